"""What the steps of a method run at once: the numbers that the memory plan is made from."""

from __future__ import annotations

from dataclasses import dataclass

from ppo_nlu.config import GRPOConfig, PPOConfig, RolloutConfig


@dataclass(frozen=True)
class Workload:
    """Counts of prompts and answers, and what is asked of the model beside log-probs."""

    prompts: int  # answered together, by the rollout; where there is none, by an evaluation
    samples: int  # answers drawn to each of them
    minibatch: int  # answers of an optimizer step
    micro_batch: int  # answers of one forward at most; 0: those of the minibatch
    per_prompt: int  # answers to one prompt that run together in an update
    critic: bool = False  # values are computed too
    rollout: bool = False  # trains on sampled answers, so an update may reuse their prompt pass

    @classmethod
    def on_rollouts(
        cls, rollout: RolloutConfig, section: PPOConfig | GRPOConfig, critic: bool
    ) -> Workload:
        """The workload of a method that samples answers and trains on minibatches of them."""
        answers = rollout.batch_size * rollout.samples_per_prompt
        minibatch = min(section.minibatch_size or answers, answers)
        return cls(
            prompts=rollout.batch_size,
            samples=rollout.samples_per_prompt,
            minibatch=minibatch,
            micro_batch=section.micro_batch_size,
            # Smaller minibatches are drawn at random: count their answers as of different prompts.
            per_prompt=rollout.samples_per_prompt if minibatch == answers else 1,
            critic=critic,
            rollout=True,
        )

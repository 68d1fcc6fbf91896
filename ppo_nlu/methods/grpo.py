"""Group relative policy optimisation (arXiv 2402.03300): answers to one prompt against each other.

There is no critic: an answer's advantage is how much better it scored than its group.

Departures from the paper, with the key that takes each back where there is one:
1. The loss is a mean over the tokens of the minibatch, not first over each answer (DAPO, arXiv
   2503.14476, section 3.3).
2. Groups whose scores are all equal teach nothing. They are left out, with their KL and their
   tokens (`grpo.drop_even=false`).
3. KL to the reference is off (`grpo.kl_coef=0.04` is the paper's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_nlu import losses
from ppo_nlu.config import Config
from ppo_nlu.methods.base import Method
from ppo_nlu.methods.minibatch import Budget, Epochs, Metrics, OptimizerStep
from ppo_nlu.methods.report import FirstRatio, Report, check_form, report_of
from ppo_nlu.methods.rollout import Rollout, metrics_of, seeded
from ppo_nlu.methods.sampler import Divergence, Sampler, score_rows
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec


@dataclass
class Batch:
    """A rollout, and what GRPO computes from it before the update."""

    rollout: Rollout
    advantages: Tensor  # (B,)
    groups: list[list[int]]  # the answers of each group that is trained
    metrics: Metrics


class GRPO(Method):
    """Group relative policy optimisation, on LoRA weights."""

    model: Policy
    budget: Budget
    title = "GRPO"
    unit = "answers"

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec], model: Policy | None = None):
        super().__init__(cfg, specs, model or load_policy(cfg))
        self.batch_size, self.samples = cfg.rollout.batch_size, cfg.rollout.samples_per_prompt
        self.section = cfg.grpo
        estimator: Divergence | None = "k3" if cfg.grpo.kl_coef else None
        self.sampler = Sampler(
            self.model, specs, cfg, critic=False, estimator=estimator, shots=self.shots
        )
        self.budget = Budget(cfg.grpo.micro_batch_size, cfg.train.micro_batch_tokens)
        self.first_ratio = FirstRatio(exact=cfg.model.dtype == "float32")

    def collect(self, rows: Sequence[Example], step: int) -> Batch:
        """Steps 1 to 5: a group of answers to each row, compared within the group."""
        grpo, size = self.section, self.samples
        # 1. Sample answers, with the log-probs of their tokens before the update.
        keep_graph = self.sampler.graph_room(grpo, self.budget)  # for the first pass of `update`
        rollout = self.sampler.sample(rows, step, keep_graph)
        # 2. Scores: each parsed answer against its label.
        scores = self.sampler.score(rollout)
        # 3. The reference's log-probs, where the loss has a KL.
        self.sampler.kl(rollout)
        # 4. Advantages: how much better an answer is than its group.
        if grpo.advantage == "rloo":
            advantages = losses.rloo_advantages(scores, size)
        else:
            advantages = losses.group_advantages(scores, size, grpo.scale)
        # 5. Keep the groups that teach something: their answers did not all earn the same.
        earned = rollout.scores.view(-1, size)
        even = (earned.amax(1) == earned.amin(1)).tolist()
        groups = [
            list(range(g * size, (g + 1) * size))
            for g in range(len(even))
            if not (even[g] and grpo.drop_even)
        ]
        metrics = metrics_of(rollout, self.specs) | {"grpo/even_groups": float(sum(even))}
        if step == 0:
            rollout.messages += check_form(metrics["answer/unparsed"])
        return Batch(rollout, advantages, groups, metrics)

    def update(self, batch: Batch, step: int) -> Report:
        """Step 6: epochs over the groups, each in a fresh order, with one optimizer step a
        minibatch."""
        rollout, epochs = batch.rollout, Epochs(self.section)
        with profiling.phase("update"):
            for index in epochs.minibatches(lambda epoch: self.order(batch, step, epoch)):
                trained = self.trained(batch, index)
                if not trained:  # a step without a gradient would follow the momentum alone
                    continue
                count = float(rollout.mask[index].sum())  # tokens of the minibatch
                run = float(rollout.mask[trained].sum())  # those with a gradient
                minibatch = OptimizerStep(self.optimizer, self.cfg.optim.max_grad_norm)
                for micro in minibatch.micro_batches(
                    rollout, trained, self.budget, self.model.tree
                ):
                    with minibatch.part(micro):
                        minibatch.backward(*self.loss(batch, micro, run, run / count))
                minibatch.metrics["grpo/trained"] = float(len(trained))
                epochs.take(minibatch, index)
        rollout.prompt_pass = None  # frees it where no forward reused it
        reuses = self.sampler.graph_room(self.section, self.budget) > 0
        messages = self.budget.taken_messages() + self.first_ratio.look(epochs, rollout, reuses)
        return report_of(batch, epochs, messages)

    def order(self, batch: Batch, step: int, epoch: int) -> list[int]:
        """The answers that are trained, in the order in which an epoch cuts them into minibatches;
        those of a group side by side, so that their prompt is run once."""
        draw = seeded("update", self.cfg.seed, step, epoch)
        shuffled = torch.randperm(len(batch.groups), generator=draw).tolist()
        return [j for g in shuffled for j in batch.groups[g]]

    def trained(self, batch: Batch, index: Sequence[int]) -> list[int]:
        """The answers with a gradient. Without KL, an answer of advantage 0 has none: it is not
        run."""
        advantages = batch.advantages.tolist()
        return [j for j in index if self.section.kl_coef or advantages[j] != 0]

    def loss(
        self, batch: Batch, micro: Sequence[int], count: float, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Surrogate and KL of some answers.

        The loss is a sum over their tokens, divided by `count`, the tokens of the minibatch that
        are run; so micro-batches change memory only. These are a `share` of the minibatch's
        tokens: those of advantage 0 are not run, but they count in the mean of the losses. All
        other metrics are means over the tokens that are run.
        """
        grpo, rollout = self.section, batch.rollout
        rows = torch.tensor(micro, device=rollout.mask.device)
        prompt_pass = rollout.take_prompt_pass(micro)
        temperature = self.cfg.rollout.temperature
        scored = score_rows(self.model, rollout, micro, temperature, prompt_pass=prompt_pass)
        width = scored.mask.shape[1]
        mask, old = rollout.mask[rows, :width], rollout.logprobs[rows, :width]
        assert torch.equal(mask, scored.mask)
        reference = rollout.ref_logprobs
        loss, metrics = losses.grpo_loss(
            logprobs=scored.logprobs,
            old_logprobs=old,
            ref_logprobs=None if reference is None else reference[rows, :width],
            advantages=batch.advantages[rows],
            mask=mask,
            clip=grpo.clip,
            clip_high=grpo.clip_high,
            kl_coef=grpo.kl_coef,
            denominator=count,
        )
        loss = loss * share
        log_ratio = (losses.counted(scored.logprobs, mask) - losses.counted(old, mask)).detach()
        metrics |= {
            "policy/loss": metrics["policy/loss"] * share,
            "policy/entropy": losses.counted(scored.entropy, mask).sum().detach() / count,
            "policy/ratio_gap": torch.expm1(log_ratio).abs().amax(),
        }
        if "kl/ref" in metrics:
            metrics["kl/loss"] = metrics.pop("kl/ref")  # in metrics, kl/ref is of a whole answer
        return loss, metrics

    def workload(self) -> Workload:
        return Workload.on_rollouts(self.cfg.rollout, self.section, critic=False)

    # --- what a run keeps -------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return self.sampler.state() | self.first_ratio.state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.sampler.set_state(state)
        self.first_ratio.set_state(state)


METHOD = GRPO

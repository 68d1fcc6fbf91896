"""Steps 1 to 3 of a rollout: answers are sampled, scored, and compared with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ppo_nlu.config import Config, GRPOConfig, PPOConfig
from ppo_nlu.data.shots import Shots
from ppo_nlu.losses import exact_kl, kl_penalty
from ppo_nlu.methods.minibatch import Budget, graph_tokens
from ppo_nlu.methods.prompts import Fitted, fit_prompt, longest_prompt
from ppo_nlu.methods.reference_cache import ReferenceCache
from ppo_nlu.methods.rollout import Rollout, normalised, seeded
from ppo_nlu.model.generate import Generation, Sampling, generate
from ppo_nlu.model.lora import lora_disabled
from ppo_nlu.model.policy import Policy, Scored, unflatten
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec, rewards
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.rewards import RunningScale
from ppo_nlu.tree.passes import PromptPass

EXACT = 1e-4  # decode and training pass may be this far apart and still count as the same
Divergence = Literal["k1", "k2", "k3", "exact"]


class Sampler:
    """Samples answers of a policy, with what it remembers from step to step.

    `critic`: values are computed too. `estimator`: how to measure the KL to the reference; None:
    not at all, and the reference is not run. `reference` keeps the reference's log-probs of earlier
    answers (`exact` does not use them). `reuse`: the log-probs of the decode pass are exact enough
    to be the old log-probs; None: the next step compares them with those of a training pass.
    `scale` puts the scores of all tasks on one scale (`reward.normalise`).
    """

    def __init__(
        self,
        policy: Policy,
        specs: Mapping[str, TaskSpec],
        cfg: Config,
        critic: bool = True,
        estimator: Divergence | None = None,
        shots: Shots | None = None,
    ):
        self.policy, self.specs, self.cfg = policy, specs, cfg
        self.critic, self.estimator = critic, estimator
        self.temperature = cfg.rollout.temperature
        self.shots = shots or Shots(cfg)
        self.reference = ReferenceCache() if cfg.rollout.reference_cache else None
        self.reuse: bool | None = {"always": True, "never": False}.get(cfg.rollout.reuse_logprobs)
        self.scale = RunningScale() if cfg.reward.normalise else None

    def sample(self, rows: Sequence[Example], step: int, keep_graph: int = 0) -> Rollout:
        """Answers to these rows, with the log-probs of their tokens before the update and, where
        asked for, the values.

        Args:
            keep_graph: keep the prompt pass with its graph, where prompts and longest answers are
                at most so many tokens.
        """
        fitted = self._fit(rows)
        drawn = self._draw([fit.ids for fit in fitted], step, keep_graph)
        rollout = self._rollout(rows, fitted, drawn)
        if not self.reuse:
            with profiling.phase("score"):
                self._rescore(rollout)
        if self.reuse is None:
            self.reuse = rollout.reused
            rollout.messages.append(tell_reuse(rollout))
        if self.estimator != "exact":
            rollout.hidden = None
        return rollout

    def score(self, rollout: Rollout) -> Tensor:
        """Parse the answers and score each against the label of its row: (B,), on one scale for all
        tasks where that is asked for. The rollout keeps the scores as they were earned."""
        specs, answered = self.specs, zip(rollout.examples, rollout.responses, strict=True)
        rollout.predictions = [
            parse(specs[row.task], response, self.cfg.prompt.form) for row, response in answered
        ]
        parsed = zip(rollout.examples, rollout.predictions, rollout.responses, strict=True)
        earned = [
            rewards.reward(specs[row.task], row, guess, response, self.cfg.reward.scale)
            for row, guess, response in parsed
        ]
        rollout.scores = torch.tensor(earned, device=self.policy.device)
        return rollout.scores if self.scale is None else normalised(self.scale, rollout)

    def kl(self, rollout: Rollout) -> Tensor:
        """The KL to the reference on each token (B, R) before the update, as `estimator` has it; 0
        where it is off. The rollout keeps it, and the reference's log-probs."""
        if self.estimator is None:
            return torch.zeros_like(rollout.logprobs)
        with profiling.phase("reference"), torch.no_grad():
            if self.estimator == "exact":
                rollout.kl = self._exact_kl(rollout)
            else:
                cache = ReferenceCache() if self.reference is None else self.reference
                rollout.ref_logprobs = cache.logprobs(
                    self.policy,
                    rollout.prompts,
                    rollout.answers,
                    rollout.prompt_of,
                    self.temperature,
                )
                rollout.kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, self.estimator)
        return rollout.kl

    def graph_room(self, section: PPOConfig | GRPOConfig, budget: Budget) -> int:
        """How many tokens a prompt pass and its answers may have to be kept for the update; 0: it
        is not kept.

        It is kept only where the decode pass gives the old log-probs: in low precision a pass that
        is cut in other places rounds differently, and the first ratio would not be 1.
        """
        policy, roll = self.policy, self.cfg.rollout
        if not (self.reuse and policy.tree) or policy.checkpointing:
            return 0
        answers = roll.batch_size * roll.samples_per_prompt
        return graph_tokens(section.minibatch_size, budget, answers, policy.device)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "reward_scale": self.scale and self.scale.seen,
            "reuse": self.reuse,
            "reference": self.reference and self.reference.state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Load it again; a checkpoint of an earlier version has only the scale."""
        self.reuse = state.get("reuse", self.reuse)
        if self.scale is not None:
            self.scale.seen = dict(state["reward_scale"])
        if self.reference is not None and state.get("reference") is not None:
            self.reference.set_state(state["reference"])

    def _fit(self, rows: Sequence[Example]) -> list[Fitted]:
        cfg, policy = self.cfg, self.policy
        longest = longest_prompt(policy, cfg, cfg.rollout.max_new_tokens)
        shots = {name: self.shots.pool(spec) for name, spec in self.specs.items()}
        return [
            fit_prompt(policy, self.specs[row.task], row, longest, cfg.prompt, shots[row.task])
            for row in rows
        ]

    def _draw(self, prompts: list[list[int]], step: int, keep_graph: int) -> Generation:
        roll = self.cfg.rollout
        return generate(
            self.policy,
            prompts,
            Sampling(roll.max_new_tokens, roll.samples_per_prompt, self.temperature),
            generator=seeded("rollout", self.cfg.seed, step),
            critic=self.critic,
            keep_graph=keep_graph,
        )

    def _rollout(
        self, rows: Sequence[Example], fitted: Sequence[Fitted], drawn: Generation
    ) -> Rollout:
        samples = self.cfg.rollout.samples_per_prompt
        prompt_of = [p for p in range(len(rows)) for _ in range(samples)]
        return Rollout(
            prompts=[fit.ids for fit in fitted],
            answers=drawn.rows,
            prompt_of=prompt_of,
            examples=[rows[p] for p in prompt_of],
            responses=[self.policy.decode(answer) for answer in drawn.rows],
            mask=drawn.mask,
            logprobs=drawn.logprobs,
            values=drawn.values,
            hidden=drawn.hidden,
            truncated=sum(fit.cut for fit in fitted),
            dropped=sum(fit.dropped for fit in fitted),
            prompt_pass=drawn.prompt_pass,
        )

    @torch.no_grad()
    def _rescore(self, rollout: Rollout) -> None:
        """Replace the old log-probs, values and hidden states of the decode pass by those of a
        training pass; where the two are compared, only if they are further apart than `EXACT`."""
        again = score_rows(
            self.policy, rollout, range(rollout.size), self.temperature, values=self.critic
        )
        rollout.gap = float((again.logprobs - rollout.logprobs)[rollout.mask].abs().max())
        rollout.reused = self.reuse is None and rollout.gap <= EXACT
        if not rollout.reused:
            rollout.logprobs, rollout.values = again.logprobs, again.values
            rollout.hidden = again.hidden

    def _exact_kl(self, rollout: Rollout) -> Tensor:
        """The KL over the whole vocabulary; the reference's log-probs come with it."""
        policy, temperature, now = self.policy, self.temperature, rollout.hidden
        assert now is not None
        with lora_disabled(policy.model):
            then = score_rows(policy, rollout, range(rollout.size), temperature)
        rollout.ref_logprobs, rollout.hidden = then.logprobs, None
        found = [
            exact_kl(policy.logits(ours) / temperature, policy.logits(theirs) / temperature)
            for ours, theirs in zip(now.split(128), then.hidden.split(128), strict=True)
        ]
        return unflatten(torch.cat(found), rollout.mask)


def score_rows(
    policy: Policy,
    rollout: Rollout,
    index: Sequence[int],
    temperature: float,
    values: bool = False,
    entropy_grad: bool = False,
    prompt_pass: PromptPass | None = None,
) -> Scored:
    """`policy.score` of some answers. An answer that a prompt has twice is run once."""
    if prompt_pass is None:
        prompts, answers, prompt_of = rollout.rows(index)
    else:
        prompts, answers = rollout.prompts, [rollout.answers[j] for j in index]
        prompt_of = [rollout.prompt_of[j] for j in index]
    place: dict[tuple[int, tuple[int, ...]], int] = {}
    keys = [(p, tuple(answer)) for p, answer in zip(prompt_of, answers, strict=True)]
    rows = [place.setdefault(key, len(place)) for key in keys]
    scored = policy.score(
        prompts,
        [list(answer) for _, answer in place],
        [p for p, _ in place],
        temperature=temperature,
        values=values,
        entropy_grad=entropy_grad,
        prompt_pass=prompt_pass,
    )
    if len(place) == len(rows):
        return scored
    taken = torch.tensor(rows, device=scored.mask.device)
    mask = scored.mask[taken]
    states = unflatten(torch.arange(len(scored.hidden), device=mask.device), scored.mask)
    return Scored(
        mask=mask,
        logprobs=scored.logprobs[taken],
        entropy=scored.entropy[taken],
        values=None if scored.values is None else scored.values[taken],
        hidden=scored.hidden[states[taken][mask]],
    )


def tell_reuse(rollout: Rollout) -> str:
    """The result of comparing the two passes, for the user."""
    done = "are taken from the decode pass" if rollout.reused else "are recomputed every step"
    return f"old log-probs {done} (largest distance from a training pass: {rollout.gap:.1e})"

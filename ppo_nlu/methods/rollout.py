"""A rollout: prompts, the answers to them, their log-probs and scores, and metrics of all this."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppo_nlu.methods.minibatch import Metrics
from ppo_nlu.tasks import Example, TaskSpec, rewards
from ppo_nlu.tree.passes import PromptPass

MOST = 0.75  # a pass with answers to this share of the prompts reuses their kept pass


@dataclass
class Rollout:
    """A batch of answers and all that was known when they were given.

    Answer j belongs to prompt `prompt_of[j]`. Tensors are (B, R), right-padded, column t for action
    a_t. The mask counts the token that ends the answer and nothing behind it. A tensor that was not
    asked for is None. `hidden` (N, H) are the states that the counted tokens were drawn from, for
    an exact KL. `reused`: `logprobs` are those of the decode pass. `gap` is their largest distance
    from those of a training pass, where both passes were run. `prompt_pass` is the kept pass over
    all prompts, with its graph. `messages` are for the user.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]
    examples: list[Example]
    responses: list[str]
    mask: Tensor
    logprobs: Tensor
    values: Tensor | None
    hidden: Tensor | None
    truncated: int
    dropped: int  # shots left out of the prompts
    predictions: list[str | None] = field(init=False)  # set by `Sampler.score`
    scores: Tensor = field(init=False)  # (B,), as earned; set by `Sampler.score`
    ref_logprobs: Tensor | None = None  # set by `Sampler.kl`
    kl: Tensor | None = None  # set by `Sampler.kl`
    reused: bool = True
    gap: float | None = None
    prompt_pass: PromptPass | None = None
    used_prompt_pass: bool = False  # the first pass of an update reused `prompt_pass`
    messages: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """B, the number of answers."""
        return len(self.answers)

    def take_prompt_pass(self, index: Sequence[int]) -> PromptPass | None:
        """`prompt_pass`, for the first pass of an update to reuse, if most prompts have an answer
        among these. It is given away once: a backward frees it, and then the weights move.

        Its backward runs all prompts, so where many have no answer here a new pass is cheaper.
        """
        prompt_pass, self.prompt_pass = self.prompt_pass, None
        used = len({self.prompt_of[j] for j in index})
        if prompt_pass is None or used < MOST * len(self.prompts):
            return None
        self.used_prompt_pass = True  # and stays so, though later passes of the update get none
        return prompt_pass

    def rows(self, index: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Prompts, answers and prompt_of of some answers, each prompt once."""
        used = list(dict.fromkeys(self.prompt_of[j] for j in index))  # in the order of the answers
        place = {prompt: new for new, prompt in enumerate(used)}
        return (
            [self.prompts[prompt] for prompt in used],
            [self.answers[j] for j in index],
            [place[self.prompt_of[j]] for j in index],
        )


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded from all the parts, such as ("rollout", seed, step, rank)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def metrics_of(rollout: Rollout, specs: Mapping[str, TaskSpec]) -> Metrics:
    """What the answers earned and what they look like."""
    right = [
        guess == specs[row.task].written(row.label or "")
        for guess, row in zip(rollout.predictions, rollout.examples, strict=True)
    ]
    metrics = {
        "reward/mean": float(rollout.scores.mean()),
        "reward/std": float(rollout.scores.std(correction=0)),
        "answer/accuracy": sum(right) / rollout.size,
        "answer/unparsed": sum(p is None for p in rollout.predictions) / rollout.size,
        "answer/tokens": float(rollout.mask.sum()) / rollout.size,
        "answer/truncated_prompts": float(rollout.truncated),
        "answer/dropped_shots": float(rollout.dropped),
    }
    if rollout.kl is not None:
        metrics["kl/ref"] = float(rollout.kl.masked_fill(~rollout.mask, 0.0).sum(1).mean())
    return metrics | (by_task(rollout) if len(specs) > 1 else {})


def by_task(rollout: Rollout) -> Metrics:
    """The mean score of each task in the batch, before any normalisation."""
    earned: dict[str, list[float]] = {}
    for row, score in zip(rollout.examples, rollout.scores.tolist(), strict=True):
        earned.setdefault(row.task, []).append(score)
    return {f"reward/{task}/mean": sum(e) / len(e) for task, e in sorted(earned.items())}


def normalised(scale: rewards.RunningScale, rollout: Rollout) -> Tensor:
    """The scores (B,) on one scale for all tasks; `scale` takes them into its statistics first."""
    pairs = list(zip(rollout.examples, rollout.scores.tolist(), strict=True))
    for row, score in pairs:
        scale.update(row.task, score)
    return rollout.scores.new_tensor([scale.apply(row.task, score) for row, score in pairs])

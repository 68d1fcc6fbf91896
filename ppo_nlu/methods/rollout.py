"""A rollout as a table: prompts that fit, the answers to them, and their log-probs and scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ppo_nlu.config import Config, PromptConfig
from ppo_nlu.data.shots import shown_to
from ppo_nlu.errors import UserError
from ppo_nlu.methods.minibatch import Metrics
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.tokens import TextError
from ppo_nlu.tasks import Example, TaskSpec, rewards
from ppo_nlu.tasks.prompts import OPENING, render, turns
from ppo_nlu.tree.passes import PromptPass

MOST = 0.75  # a pass with answers to this share of the prompts reuses their kept pass


@dataclass
class Rollout:
    """A batch of answers and all that was known when they were given.

    Answer j belongs to prompt `prompt_of[j]`. Tensors are (B, R), right-padded, column t for action
    a_t; `scores` is (B,). The mask counts the token that ends the answer and nothing behind it. A
    tensor that was not asked for is None. `reused`: `logprobs` are those of the decode pass. `gap`
    is their largest distance from those of a training pass, where both passes were run.
    `prompt_pass` is the kept pass over all prompts, with its graph. `messages` are for the user.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]
    examples: list[Example]
    responses: list[str]
    predictions: list[str | None]
    mask: Tensor
    logprobs: Tensor
    values: Tensor | None
    ref_logprobs: Tensor | None
    kl: Tensor | None
    scores: Tensor
    truncated: int
    dropped: int  # worked examples left out of the prompts
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


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits into the context."""

    text: str  # with the marks of `model.tokens`, as `Policy.encode` reads it
    ids: list[int]
    cut: bool = False  # a field was cut
    dropped: int = 0  # worked examples left out


def fit_prompt(
    policy: Policy,
    spec: TaskSpec,
    example: Example,
    longest: int,
    style: PromptConfig | None = None,
    shots: Sequence[Example] = (),
) -> Fitted:
    """The prompt of a row with at most `longest` tokens.

    Where it is too long, whole worked examples are left out, the last one first. Then the end of
    the longest text field is cut, never the form around it.
    """
    try:
        return _fitted(policy, spec, example, longest, style or PromptConfig(), shots)
    except TextError as error:
        raise UserError(f"{spec.name} {example.id or 'probe'}: {error}") from error


def _fitted(
    policy: Policy,
    spec: TaskSpec,
    example: Example,
    longest: int,
    style: PromptConfig,
    shots: Sequence[Example],
) -> Fitted:
    kept = shown_to(spec, example, shots, style.shots)
    wanted, fields = len(kept), dict(example.fields)
    text, ids = _encoded(policy, spec, fields, kept, style)
    while len(ids) > longest and kept:
        kept = kept[:-1]
        text, ids = _encoded(policy, spec, fields, kept, style)
    cut = len(ids) > longest
    while len(ids) > longest:
        name = max(spec.fields, key=lambda key: len(fields[key]))
        body = fields[name]
        if not body:
            raise UserError(
                f"data.max_prompt_tokens: the prompt of {spec.name} alone needs {len(ids)} tokens, "
                f"but {longest} are allowed; raise it or take a model with a longer context"
            )
        share = len(policy.encode(policy.seal(body))) or 1
        keep = int(len(body) * max(share - (len(ids) - longest), 0) / share)
        fields[name] = body[: min(keep, len(body) - 1)].rstrip()
        text, ids = _encoded(policy, spec, fields, kept, style)
    return Fitted(text, ids, cut, wanted - len(kept))


def _encoded(
    policy: Policy,
    spec: TaskSpec,
    fields: dict[str, str],
    shots: Sequence[Example],
    style: PromptConfig,
) -> tuple[str, list[int]]:
    fields = {name: policy.seal(text) for name, text in fields.items()}
    shots = [sealed(policy, shot) for shot in shots]
    if style.chat_template:
        messages = turns(spec, fields, shots, style.form)
        text = policy.chat(messages, style.shots > 0) + OPENING[style.form]
    else:
        text = render(spec, fields, shots, style.form)
    return text, policy.encode(text)


def sealed(policy: Policy, example: Example) -> Example:
    """The row with its texts marked as plain text: nothing in them is a control token."""
    label = None if example.label is None else policy.seal(example.label)
    extra = dict(example.extra)
    if "rationale" in extra:
        extra["rationale"] = policy.seal(extra["rationale"])
    fields = {name: policy.seal(text) for name, text in example.fields.items()}
    return replace(example, fields=fields, label=label, extra=extra)


def longest_prompt(policy: Policy, cfg: Config, room: int) -> int:
    """How many tokens a prompt may have so that `room` more fit behind it."""
    limit = policy.context - room
    if limit < 1:
        raise UserError(
            f"rollout.max_new_tokens: {room} leaves no room for a prompt in this model's context "
            f"of {policy.context} tokens; lower it"
        )
    return min(cfg.data.max_prompt_tokens or limit, limit)


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

"""Where text meets tensors: prompts to token ids, generated ids to parsed answers and rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ppo_nlu.config import Config, PromptConfig
from ppo_nlu.data import demonstrations
from ppo_nlu.errors import UserError
from ppo_nlu.losses import exact_kl, kl_penalty
from ppo_nlu.methods.reference_cache import ReferenceCache
from ppo_nlu.methods.updates import Metrics
from ppo_nlu.model.generate import Generation, Sampling, generate
from ppo_nlu.model.lora import lora_disabled
from ppo_nlu.model.policy import Policy, Scored, unflatten
from ppo_nlu.model.tokens import TextError
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec, rewards
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import OPENING, render, turns
from ppo_nlu.tree.passes import State

EXACT = 1e-4  # decode and training pass may be this far apart and still count as the same
MOST = 0.75  # of the prompts have answers in an update's first pass, or the trunk is of no use
Divergence = Literal["k1", "k2", "k3", "exact"]


@dataclass
class Rollout:
    """A batch of answers and all that was known when they were given.

    Answer j belongs to prompt `owners[j]`. Tensors are (B, R), right-padded, column t for action
    a_t; `scores` is (B,). The mask counts the token that ends the answer and nothing behind it.
    None: not asked for. `gap` is the largest distance between the log-probs of the decode pass and
    those of a training pass, where both were run; `reused` says that the former are `logprobs`.
    `trunk` is the pass over all prompts with its graph, where that was kept.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]
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
    trunk: State | None = None
    stood: bool = False  # whether an update's first pass stood on the trunk

    @property
    def size(self) -> int:
        """B, the number of answers."""
        return len(self.answers)

    def take_trunk(self, index: Sequence[int]) -> State | None:
        """The trunk, for the first pass of an update to stand on, if these answers are those of
        most prompts; it is given away once: a backward frees it, and then the weights move.

        Its backward runs all prompts: where many have no answer here, a pass of its own is cheaper.
        """
        trunk, self.trunk = self.trunk, None
        used = len({self.owners[j] for j in index})
        if trunk is None or used < MOST * len(self.prompts):
            return None
        self.stood = True  # and stays so: later passes of the update ask in vain
        return trunk

    def rows(self, index: Sequence[int]) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Prompts, answers and owners of some answers, each prompt once."""
        used = list(dict.fromkeys(self.owners[j] for j in index))  # in the order of the answers
        place = {prompt: new for new, prompt in enumerate(used)}
        return (
            [self.prompts[prompt] for prompt in used],
            [self.answers[j] for j in index],
            [place[self.owners[j]] for j in index],
        )


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits: its text (with the marks of `tokens`, for `encode`) and token ids,
    whether a field was cut for it, and how many worked examples were left out."""

    text: str
    ids: list[int]
    cut: bool = False
    dropped: int = 0


def fit_prompt(
    policy: Policy,
    spec: TaskSpec,
    example: Example,
    longest: int,
    style: PromptConfig | None = None,
    shots: Sequence[Example] = (),
) -> Fitted:
    """The prompt of a row with at most `longest` tokens.

    Where it is too long, worked examples go first, whole, from the last on; then the end of the
    longest text field is cut, never the form around it.
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
    kept = demonstrations.shown_to(spec, example, shots, style.shots)
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
    """The row with its texts marked as plain text: no control token is meant in them."""
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


def collect_answers(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    examples: Sequence[Example],
    step: int,
    critic: bool = True,
    reference: ReferenceCache | None = None,
    kl: Divergence | None = None,
    reuse: bool | None = None,
    keep_graph: int = 0,
) -> Rollout:
    """Sample answers to these rows, parse and score them by the rules of their tasks.

    Args:
        critic: ask for the values too.
        reference: where the reference's log-probs of earlier answers are kept (not read for exact).
        kl: how to measure the KL to the reference; None: not at all, and no pass of it is run.
        reuse: whether the log-probs of the decode pass are exact enough to be the old ones; None:
            as `rollout.reuse_logprobs` says, which on auto compares them with a training pass.
        keep_graph: keep the graph of a pass over prompts and answers of at most so many tokens.
    """
    roll = cfg.rollout
    longest = longest_prompt(policy, cfg, roll.max_new_tokens)
    shots = {name: demonstrations.of(spec, cfg) for name, spec in specs.items()}
    fitted = [
        fit_prompt(policy, specs[row.task], row, longest, cfg.prompt, shots[row.task])
        for row in examples
    ]
    prompts = [fit.ids for fit in fitted]
    drawn = generate(
        policy,
        prompts,
        roll.max_new_tokens,
        Sampling(roll.temperature),
        samples=roll.samples_per_prompt,
        generator=seeded("rollout", cfg.seed, step),
        critic=critic,
        keep_graph=keep_graph,
    )
    owners = [p for p in range(len(prompts)) for _ in range(roll.samples_per_prompt)]
    answers = drawn.rows
    owned = [examples[p] for p in owners]
    responses = [policy.decode(answer) for answer in answers]
    predictions = [
        parse(specs[row.task], response, cfg.prompt.form)
        for row, response in zip(owned, responses, strict=True)
    ]
    scores = [
        rewards.reward(specs[row.task], row, guess, response, cfg.reward.scale)
        for row, guess, response in zip(owned, predictions, responses, strict=True)
    ]
    rollout = Rollout(
        prompts,
        answers,
        owners,
        owned,
        responses,
        predictions,
        drawn.mask,
        drawn.logprobs,
        drawn.values,
        None,
        None,
        torch.tensor(scores, device=policy.device),
        sum(fit.cut for fit in fitted),
        sum(fit.dropped for fit in fitted),
        trunk=drawn.trunk,
    )
    if reuse is None and roll.reuse_logprobs != "auto":
        reuse = roll.reuse_logprobs == "always"
    if not reuse:
        with profiling.phase("score"):
            _rescore(policy, rollout, drawn, roll.temperature, critic, compare=reuse is None)
    if kl is not None:
        with profiling.phase("reference"):
            _diverge(policy, rollout, drawn, roll.temperature, reference, kl)
    return rollout


@torch.no_grad()
def _rescore(
    policy: Policy,
    rollout: Rollout,
    drawn: Generation,
    temperature: float,
    critic: bool,
    compare: bool,
) -> None:
    """Old log-probs (and values, and states) of a training pass in place of the decode pass's; with
    `compare` only where the two are further apart than `EXACT`."""
    index = range(rollout.size)
    again = score_rows(policy, rollout, index, temperature, values=critic)
    rollout.gap = float((again.logprobs - rollout.logprobs)[rollout.mask].abs().max())
    rollout.reused = compare and rollout.gap <= EXACT
    if not rollout.reused:
        rollout.logprobs, rollout.values = again.logprobs, again.values
        drawn.hidden = again.hidden


@torch.no_grad()
def _diverge(
    policy: Policy,
    rollout: Rollout,
    drawn: Generation,
    temperature: float,
    cache: ReferenceCache | None,
    kl: Divergence,
) -> None:
    """The reference's log-probs of the answers, and the KL per token (B, R) to it."""
    if kl != "exact":
        if cache is None:
            cache = ReferenceCache()
        rollout.ref_logprobs = cache.logprobs(
            policy, rollout.prompts, rollout.answers, rollout.owners, temperature
        )
        rollout.kl = kl_penalty(rollout.logprobs, rollout.ref_logprobs, kl)
        return
    with lora_disabled(policy.model):
        then = score_rows(policy, rollout, range(rollout.size), temperature)
    rollout.ref_logprobs = then.logprobs
    assert drawn.hidden is not None
    chunks = zip(drawn.hidden.split(128), then.hidden.split(128), strict=True)
    exact = [
        exact_kl(policy.logits(now) / temperature, policy.logits(then) / temperature)
        for now, then in chunks
    ]
    rollout.kl = unflatten(torch.cat(exact), rollout.mask)


def score_rows(
    policy: Policy,
    rollout: Rollout,
    index: Sequence[int],
    temperature: float,
    values: bool = False,
    entropy_grad: bool = False,
    trunk: State | None = None,
) -> Scored:
    """`policy.score` of some answers; where one prompt has the same answer twice it is run once."""
    if trunk is None:
        prompts, answers, owners = rollout.rows(index)
    else:
        prompts, answers = rollout.prompts, [rollout.answers[j] for j in index]
        owners = [rollout.owners[j] for j in index]
    place: dict[tuple[int, tuple[int, ...]], int] = {}
    keys = [(owner, tuple(answer)) for owner, answer in zip(owners, answers, strict=True)]
    rows = [place.setdefault(key, len(place)) for key in keys]
    scored = policy.score(
        prompts,
        [list(answer) for _, answer in place],
        [owner for owner, _ in place],
        temperature,
        values,
        entropy_grad,
        trunk,
    )
    if len(place) == len(rows):
        return scored
    taken = torch.tensor(rows, device=scored.mask.device)
    mask = scored.mask[taken]
    states = unflatten(torch.arange(len(scored.hidden), device=mask.device), scored.mask)
    return Scored(
        mask,
        scored.logprobs[taken],
        scored.entropy[taken],
        None if scored.values is None else scored.values[taken],
        scored.hidden[states[taken][mask]],
    )


def tell_reuse(rollout: Rollout) -> str | None:
    """What the comparison of the two passes found, for the user; None where there was none."""
    if rollout.gap is None:
        return None
    done = "are taken from the decode pass" if rollout.reused else "are recomputed every step"
    return f"old log-probs {done} (largest distance from a training pass: {rollout.gap:.1e})"


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
    """The mean reward of each task in the batch, as it was earned."""
    earned: dict[str, list[float]] = {}
    for row, score in zip(rollout.examples, rollout.scores.tolist(), strict=True):
        earned.setdefault(row.task, []).append(score)
    return {f"reward/{task}/mean": sum(e) / len(e) for task, e in sorted(earned.items())}


def normalised(scale: rewards.RunningScale, rollout: Rollout) -> Tensor:
    """The scores (B,), each task's put on one scale, which they are counted in first."""
    pairs = list(zip(rollout.examples, rollout.scores.tolist(), strict=True))
    for row, score in pairs:
        scale.update(row.task, score)
    return rollout.scores.new_tensor([scale.apply(row.task, score) for row, score in pairs])

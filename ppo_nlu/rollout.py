"""Where text meets tensors: prompts to token ids, generated ids to parsed answers and rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ppo_nlu import demonstrations, rewards
from ppo_nlu.answers import parse
from ppo_nlu.config import Config, PromptConfig
from ppo_nlu.errors import UserError
from ppo_nlu.generate import Generation, Sampling, generate
from ppo_nlu.lora import lora_disabled
from ppo_nlu.losses import exact_kl, kl_penalty
from ppo_nlu.model import Policy, unflatten
from ppo_nlu.prompts import OPENING, render, turns
from ppo_nlu.tasks import Example, TaskSpec


@dataclass
class Rollout:
    """A batch of answers and all that was known when they were given.

    Answer j belongs to prompt `owners[j]`. Tensors are (B, R), right-padded, column t for action
    a_t; `scores` is (B,). The mask counts the token that ends the answer and nothing behind it.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]
    examples: list[Example]
    responses: list[str]
    predictions: list[str | None]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    scores: Tensor
    truncated: int
    dropped: int  # worked examples left out of the prompts

    @property
    def size(self) -> int:
        """B, the number of answers."""
        return len(self.answers)

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
    """A prompt that fits: its text and token ids, whether a field was cut for it, and how many
    worked examples were left out."""

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
    style = style or PromptConfig()
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
        share = len(policy.encode(body)) or 1
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
    if style.chat_template:
        messages = turns(spec, fields, shots, style.form)
        text = policy.chat(messages) + OPENING[style.form]
    else:
        text = render(spec, fields, shots, style.form)
    return text, policy.encode(text)


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
) -> Rollout:
    """Sample answers to these rows, parse and score them by the rules of their tasks, and measure
    KL to the reference."""
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
        critic=True,
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
    logprobs, values = drawn.logprobs, drawn.values
    assert values is not None
    if policy.head.weight.dtype != torch.float32:
        # In low precision the cached decode and the training pass round differently; the ratio is
        # to be that of the training pass.
        with torch.no_grad():
            again = policy.score(prompts, answers, owners, roll.temperature, values=True)
        assert again.values is not None
        logprobs, values = again.logprobs, again.values
        drawn.hidden = again.hidden
    kl = _divergence(policy, cfg, drawn, logprobs, prompts, answers, owners)
    return Rollout(
        prompts,
        answers,
        owners,
        owned,
        responses,
        predictions,
        drawn.mask,
        logprobs,
        values,
        kl,
        torch.tensor(scores, device=policy.device),
        sum(fit.cut for fit in fitted),
        sum(fit.dropped for fit in fitted),
    )


@torch.no_grad()
def _divergence(
    policy: Policy,
    cfg: Config,
    drawn: Generation,
    logprobs: Tensor,
    prompts: list[list[int]],
    answers: list[list[int]],
    owners: list[int],
) -> Tensor:
    """KL to the reference per token (B, R), in the estimator of the config."""
    temperature = cfg.rollout.temperature
    with lora_disabled(policy.model):
        reference = policy.score(prompts, answers, owners, temperature)
    if cfg.ppo.kl_estimator != "exact":
        estimator = cast(Literal["k1", "k2", "k3"], cfg.ppo.kl_estimator)
        return kl_penalty(logprobs, reference.logprobs, estimator)
    assert drawn.hidden is not None
    chunks = zip(drawn.hidden.split(128), reference.hidden.split(128), strict=True)
    exact = [
        exact_kl(policy.logits(now) / temperature, policy.logits(then) / temperature)
        for now, then in chunks
    ]
    return unflatten(torch.cat(exact), drawn.mask)

"""Prompts that fit into the model's context: shots are left out, then the longest text is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ppo_nlu.config import Config, PromptConfig
from ppo_nlu.data.shots import shown_to
from ppo_nlu.errors import UserError
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.tokens import TextError
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.prompts import OPENING, render, turns


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits into the context."""

    text: str  # with the marks of `model.tokens`, as `Policy.encode` reads it
    ids: list[int]
    cut: bool = False  # a field was cut
    dropped: int = 0  # shots left out


def fit_prompt(
    policy: Policy,
    spec: TaskSpec,
    example: Example,
    longest: int,
    style: PromptConfig | None = None,
    shots: Sequence[Example] = (),
) -> Fitted:
    """The prompt of a row with at most `longest` tokens.

    Where it is too long, whole shots are left out, the last one first. Then the end of
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

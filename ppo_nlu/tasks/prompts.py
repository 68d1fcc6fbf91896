"""Prompts in the <Judgement> form (arXiv 2410.11020): the text that the model reads and writes.

Two forms: `judgement` asks for the answer alone, `analysis` for a reason before it. Training,
evaluation and submission all take their prompts and their answers from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ppo_nlu.tasks import Example, TaskSpec

Message: TypeAlias = dict[str, str]  # with a role and a content, as chat templates read them
STOP = "</Judgement>"
# What the prompt ends with, so that the model goes on inside it.
OPENING = {"judgement": "<Judgement>", "analysis": "<Analysis>"}


def render(
    spec: TaskSpec,
    fields: Mapping[str, str],
    shots: Sequence[Example] = (),
    form: str = "judgement",
) -> str:
    """The prompt for one row, behind its shots; it ends with the opening tag, so the answer begins
    with a space."""
    examples = _blocks([(query(spec, s.fields), shot_answer(spec, s, form)) for s in shots])
    return (
        f"System_prompt:\n{system(spec, fields, form)}\n{examples}"
        f"Prompt:\n{query(spec, fields)}\nAssistant:\n{OPENING[form]}"
    )


def _blocks(pairs: Sequence[tuple[str, str]]) -> str:
    """The text of the shots."""
    if not pairs:
        return ""
    blocks = "".join(f"[Prompt:\n{asked}\nAssistant:\n{said}]\n" for asked, said in pairs)
    return f"Here are {len(pairs)} examples.\n{blocks}"


def turns(
    spec: TaskSpec,
    fields: Mapping[str, str],
    shots: Sequence[Example] = (),
    form: str = "judgement",
) -> list[Message]:
    """The same as messages for a chat template; the answer then goes on behind `OPENING[form]`."""
    found = [{"role": "system", "content": system(spec, fields, form)}]
    for shot in shots:
        found.append({"role": "user", "content": query(spec, shot.fields)})
        found.append({"role": "assistant", "content": shot_answer(spec, shot, form)})
    return [*found, {"role": "user", "content": query(spec, fields)}]


def written_out(messages: Sequence[Message]) -> str:
    """The messages that `turns` gives as one text: for a template that keeps only one of them."""
    first, *shots, last = (message["content"] for message in messages)
    examples = _blocks(list(zip(shots[::2], shots[1::2], strict=True)))
    return f"{first}\n\n{examples}{last}"


def system(spec: TaskSpec, fields: Mapping[str, str], form: str = "judgement") -> str:
    """What the task is and the form of the answer."""
    reason = "<Analysis> {Insert your reasoning here} </Analysis>\n" if form == "analysis" else ""
    return (
        f"{spec.description.format(**_stripped(fields))}\n"
        "The result you give should have the following form:\n"
        f"{reason}<Judgement> {{Insert only {spec.allowed} here}} {STOP}"
    )


def query(spec: TaskSpec, fields: Mapping[str, str]) -> str:
    """What is asked of one row."""
    return spec.query.format(**_stripped(fields))


def answer(word: str, form: str = "judgement", reason: str = "") -> str:
    """The text of a right answer behind its prompt: what SFT trains on and label scoring scores."""
    if form == "judgement":
        return f" {word} {STOP}"
    return f" {reason} </Analysis>\n<Judgement> {word} {STOP}".replace("  ", " ", 1)


def gold_answer(spec: TaskSpec, example: Example, form: str = "judgement") -> str:
    """The right answer to a labelled row, with its reason where the data hold one."""
    assert example.label is not None, f"{spec.name} {example.id} has no label"
    return answer(spec.written(example.label), form, example.extra.get("rationale", ""))


def shot_answer(spec: TaskSpec, example: Example, form: str = "judgement") -> str:
    """A labelled row's answer with the opening tag, as a shot shows it."""
    return OPENING[form] + gold_answer(spec, example, form)


def _stripped(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: text.strip() for name, text in fields.items()}

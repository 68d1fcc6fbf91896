"""Prompts in the <Judgement> form (arXiv 2410.11020): the text that the model reads and writes.

Two forms: `judgement` asks for the answer alone, `analysis` for a reason before it. Training,
evaluation and submission all take their prompts and their answers from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppo_nlu.tasks import Example, TaskSpec

STOP = "</Judgement>"
# What the prompt ends with, so that the model goes on inside it.
OPENING = {"judgement": "<Judgement>", "analysis": "<Analysis>"}


def render(
    spec: TaskSpec,
    fields: Mapping[str, str],
    shots: Sequence[Example] = (),
    form: str = "judgement",
) -> str:
    """The prompt for one row behind `shots` worked examples; it ends with the opening tag, so the
    answer opens with a space."""
    blocks = "".join(
        f"[Prompt:\n{query(spec, shot.fields)}\nAssistant:\n{worked(spec, shot, form)}]\n"
        for shot in shots
    )
    examples = f"Here are {len(shots)} examples.\n{blocks}" if shots else ""
    return (
        f"System_prompt:\n{system(spec, fields, form)}\n{examples}"
        f"Prompt:\n{query(spec, fields)}\nAssistant:\n{OPENING[form]}"
    )


def turns(
    spec: TaskSpec,
    fields: Mapping[str, str],
    shots: Sequence[Example] = (),
    form: str = "judgement",
) -> list[dict[str, str]]:
    """The same as messages for a chat template; the answer then goes on behind `OPENING[form]`."""
    found = [{"role": "system", "content": system(spec, fields, form)}]
    for shot in shots:
        found.append({"role": "user", "content": query(spec, shot.fields)})
        found.append({"role": "assistant", "content": worked(spec, shot, form)})
    return [*found, {"role": "user", "content": query(spec, fields)}]


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


def worked(spec: TaskSpec, example: Example, form: str = "judgement") -> str:
    """A labelled row's answer with the opening tag, as a worked example shows it."""
    return OPENING[form] + gold_answer(spec, example, form)


def _stripped(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: text.strip() for name, text in fields.items()}

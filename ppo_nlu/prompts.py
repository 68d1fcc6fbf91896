"""Prompts in the <Judgement> form (arXiv 2410.11020): the text that the model reads and writes."""

from __future__ import annotations

from collections.abc import Mapping

from ppo_nlu.tasks import TaskSpec

STOP = "</Judgement>"


def render(spec: TaskSpec, fields: Mapping[str, str]) -> str:
    """The prompt for one row; it ends with the opening tag, so the answer opens with a space."""
    query = spec.query.format(**{name: fields[name].strip() for name in spec.fields})
    allowed = " or ".join(spec.words)
    return (
        f"System_prompt:\n{spec.description}\n"
        "The result you give should have the following form:\n"
        f"<Judgement> {{Insert only {allowed} here}} {STOP}\n"
        f"Prompt:\n{query}\n"
        "Assistant:\n<Judgement>"
    )


def answer(word: str) -> str:
    """The text of a right answer behind its prompt: what SFT trains on and label scoring scores."""
    return f" {word} {STOP}"

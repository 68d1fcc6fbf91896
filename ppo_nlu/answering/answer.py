"""What it means to answer a task's rows: the rows, a model that answers, and its answers.

Three ways to read an answer off a model: one sample at T=1, greedy decoding, and scoring each label
word whole behind the prompt (never unparsed).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from ppo_nlu import data
from ppo_nlu.config import Config
from ppo_nlu.tasks import Example, TaskSpec

DECODES = ("sample", "greedy", "score")
MINUTE = 60.0  # seconds between two lines of progress
T = TypeVar("T")


@dataclass
class Answer:
    """One row as it was answered; `probabilities` by label word where they were scored."""

    example: Example
    prediction: str | None
    response: str
    probabilities: dict[str, float] | None = None
    cut: bool = False  # the prompt was cut to fit the context
    dropped: int = 0  # shots left out of the prompt, to fit the context

    def to_json(self, named: bool = False) -> dict[str, Any]:
        """The row of a predictions.jsonl; `named`: with its task."""
        return ({"task": self.example.task} if named else {}) | {
            "id": self.example.id,
            "label": self.example.label,
            "prediction": self.prediction,
            "response": self.response,
            "probabilities": self.probabilities,
        }


def never() -> bool:
    """A `stop` that lets all rows be answered."""
    return False


class Answerer(Protocol):
    """A model that answers the rows of a task, with the config that it was made by."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    def require_fit(self, spec: TaskSpec) -> None:
        """A UserError where the model cannot answer this task; told before anything is run."""

    def answer(
        self,
        spec: TaskSpec,
        examples: Sequence[Example],
        decode: str,
        stop: Callable[[], bool] = never,
    ) -> Iterator[Answer]:
        """Answers in the order of the examples; ends early where `stop` says so."""


def decodes_of(spec: TaskSpec) -> tuple[str, ...]:
    """The ways of decoding that a task allows: free text cannot be scored."""
    return DECODES if spec.words else DECODES[:2]


def held_out(spec: TaskSpec, cfg: Config, split: str | None = None) -> data.Dataset:
    """The rows to evaluate on: at most `eval.limit`, and no group of rows cut in two."""
    found = data.load_split(spec, split or cfg.eval.split, cfg.data)
    return replace(found, examples=data.first(found.examples, cfg.eval.limit))


def ask(
    answerer: Answerer,
    spec: TaskSpec,
    examples: Sequence[Example],
    decodes: Sequence[str] | None = None,
    title: str | None = None,
    stop: Callable[[], bool] = never,
) -> dict[str, list[Answer]]:
    """All answers under each way of decoding; fewer where `stop` said so. With a title there is a
    progress bar."""
    found: dict[str, list[Answer]] = {}
    for decode in decodes or decodes_of(spec):
        rows = answerer.answer(spec, examples, decode, stop)
        found[decode] = list(shown(rows, f"{title}: {decode}", len(examples), title is not None))
    return found


def shown(rows: Iterable[T], title: str, total: int | None, progress: bool) -> Iterator[T]:
    """The rows as they come, with a bar on a terminal; in a file or a pipe a line each minute."""
    if sys.stderr.isatty() or not progress:
        yield from tqdm(rows, title, total, disable=not progress, leave=False)
        return
    told = time.monotonic()
    for number, row in enumerate(rows, 1):
        yield row
        if time.monotonic() - told >= MINUTE:
            told = time.monotonic()
            whole = f" of {total:,}" if total is not None else ""
            print(f"{title}: {number:,}{whole} rows", file=sys.stderr, flush=True)


def joined(found: Mapping[str, Sequence[Answer]]) -> list[Answer]:
    """One answer a row out of those of each decoding: the greedy one, or else the first, with the
    label probabilities of the scored one."""
    answers = found.get("greedy") or next(iter(found.values()))
    if "score" not in found:
        return list(answers)
    pairs = zip(answers, found["score"], strict=True)
    return [replace(row, probabilities=scored.probabilities) for row, scored in pairs]

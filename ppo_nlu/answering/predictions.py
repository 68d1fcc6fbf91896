"""The predictions.jsonl of an evaluation: one JSON object a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ppo_nlu.answering.answer import Answer
from ppo_nlu.storage.files import atomic_open, to_json


def write_predictions(path: Path, answers: Iterable[Answer], named: bool = False) -> None:
    """One JSON object a row; the file appears whole or not at all."""
    for _ in recorded(path, answers, named):
        pass


def recorded(path: Path, answers: Iterable[Answer], named: bool = False) -> Iterator[Answer]:
    """The answers as they come, each written down at once; with the last the file gets its name."""
    with atomic_open(path) as file:
        for row in answers:
            file.write(to_json(row.to_json(named)) + "\n")
            yield row

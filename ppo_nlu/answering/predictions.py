"""The predictions.jsonl of an evaluation: one JSON object a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ppo_nlu.answering.answer import Answer
from ppo_nlu.storage.files import atomic_open
from ppo_nlu.storage.sealed import parse_object, to_json
from ppo_nlu.tasks import Example


def write_predictions(path: Path, answers: Iterable[Answer], named: bool = False) -> None:
    """One JSON object a row; the file appears whole or not at all."""
    for _ in recorded(path, answers, named):
        pass


def recorded(path: Path, answers: Iterable[Answer], named: bool = False) -> Iterator[Answer]:
    """Pass the answers on, writing each; the file gets its name when all are written."""
    with atomic_open(path) as file:
        for row in answers:
            file.write(to_json(row.to_json(named)) + "\n")
            yield row


def read_predictions(path: Path, examples: Sequence[Example]) -> list[Answer]:
    """The answers in a file; ValueError where they are not whole, or not to these very rows."""
    rows = [parse_object(line) for line in path.read_text("utf-8").splitlines()]
    if [row.get("id") for row in rows] != [example.id for example in examples]:
        raise ValueError(f"{path}: holds answers to other rows")
    try:
        return [
            Answer(example, row["prediction"], row["response"], row["probabilities"])
            for example, row in zip(examples, rows, strict=True)
        ]
    except KeyError as error:
        raise ValueError(f"{path}: a row has no {error}") from error

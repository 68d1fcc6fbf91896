"""The answers to new rows: lines of JSON on stdout, or a .jsonl, .csv or .tsv file."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_nlu.answering.answer import Answer
from ppo_nlu.runtime import streams
from ppo_nlu.storage.files import Output, atomic_open
from ppo_nlu.storage.sealed import to_json
from ppo_nlu.tasks import TaskSpec

FORMATS = (".jsonl", ".csv", ".tsv")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

Write = Callable[[Answer], object]  # writes one answer


def _record(answer: Answer) -> dict[str, Any]:
    example = answer.example
    row: dict[str, Any] = {"id": example.id, **example.fields, "prediction": answer.prediction}
    if example.label is not None:
        row["label"] = example.label
    return row


@contextmanager
def writer(target: Path | None, spec: TaskSpec) -> Iterator[Write]:
    """A function that writes one answer; a file gets its name only when it is whole."""
    if target is None:
        utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
        yield lambda answer: streams.result(_json(answer, ascii_only=not utf8))
        return
    # Half of a character, which a .jsonl file may hold as an escape, stays an escape.
    with atomic_open(target, newline="", new=True, errors="backslashreplace") as file:
        yield _file_writer(file, target.suffix, spec)


def _json(answer: Answer, ascii_only: bool = False) -> str:
    row = _record(answer) | {"probabilities": answer.probabilities}
    return to_json(row, ascii_only=ascii_only)


def _file_writer(file: Output, suffix: str, spec: TaskSpec) -> Write:
    if suffix == ".jsonl":
        return lambda answer: file.write(_json(answer) + "\n")
    listed = spec.words if spec.kind == "choice" else ()
    columns = ["id", *spec.fields, "prediction", "label", *(f"p_{w}" for w in listed)]

    def cells(answer: Answer) -> list[str]:
        probabilities = {f"p_{w}": p for w, p in (answer.probabilities or {}).items()}
        row = _record(answer) | probabilities
        return [str(row.get(column, "")) for column in columns]

    if suffix == ".csv":
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)

        def write(answer: Answer) -> None:
            own_id, *rest = cells(answer)
            table.writerow([own_id, *map(_no_formula, rest)])

        return write
    # Without quoting, as the official .tsv files are; so a tab or line break becomes a space.
    file.write("\t".join(columns) + "\n")
    return lambda answer: file.write("\t".join(map(_flat, cells(answer))) + "\n")


def _no_formula(cell: str) -> str:
    """The cell, with `'` before a text that a spreadsheet would run as a formula.

    As OWASP advises for CSV; numbers such as -1.5 stay as they are. Ids are written as they came,
    so that answers find their rows again; .tsv and .jsonl files keep every text as it is.
    """
    return f"'{cell}" if cell.startswith(FORMULA) and not NUMBER.fullmatch(cell) else cell


def _flat(cell: str) -> str:
    return cell.replace("\t", " ").replace("\n", " ").replace("\r", " ")

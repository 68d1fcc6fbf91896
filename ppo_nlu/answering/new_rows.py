"""The answers to new rows: lines of JSON on stdout, or a .jsonl, .csv or .tsv file.

A row keeps all of its columns, with their names and values, and its answer stands behind them.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_nlu.answering.answer import Answer
from ppo_nlu.data.userfiles import GIVEN, IDS
from ppo_nlu.runtime import streams
from ppo_nlu.storage.files import Output, atomic_open
from ppo_nlu.storage.sealed import plain, to_json
from ppo_nlu.tasks import TaskSpec

FORMATS = (".jsonl", ".csv", ".tsv")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

Write = Callable[[Answer], object]  # writes one answer


@contextmanager
def writer(target: Path | None, spec: TaskSpec, columns: Sequence[str]) -> Iterator[Write]:
    """A function that writes one answer; a file gets its name only when it is whole.

    `columns` are those of the rows. Where they have no id, the number of the row comes first.
    """
    if target is None:
        utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
        line = _json_line(columns, ascii_only=not utf8)
        yield lambda answer: streams.result(line(answer))
        return
    # Half of a character, which a .jsonl file may hold as an escape, stays an escape.
    with atomic_open(target, newline="", new=True, errors="backslashreplace") as file:
        if target.suffix == ".jsonl":
            line = _json_line(columns)
            yield lambda answer: file.write(line(answer) + "\n")
        else:
            yield _table(file, target.suffix, spec, columns)


def _json_line(columns: Sequence[str], ascii_only: bool = False) -> Callable[[Answer], str]:
    more = _suffix(columns, ("prediction", "probabilities"))

    def line(answer: Answer) -> str:
        own = {f"prediction{more}": answer.prediction, f"probabilities{more}": answer.probabilities}
        return to_json(_given(answer, columns) | own, ascii_only=ascii_only)

    return line


def _table(file: Output, suffix: str, spec: TaskSpec, columns: Sequence[str]) -> Write:
    words = spec.words if spec.kind == "choice" else ()
    own = ("prediction", *(f"p_{word}" for word in words))
    more = _suffix(columns, own)
    write = _csv_writer(file, spec) if suffix == ".csv" else _tsv_writer(file)
    first = () if _has_id(columns) else ("id",)
    write({name: name for name in (*first, *columns, *(name + more for name in own))})

    def write_answer(answer: Answer) -> None:
        row = dict.fromkeys((*first, *columns)) | _given(answer, columns)
        row[f"prediction{more}"] = answer.prediction
        found = answer.probabilities or {}
        write(row | {f"p_{word}{more}": found.get(word) for word in words})

    return write_answer


def _csv_writer(file: Output, spec: TaskSpec) -> Callable[[dict[str, Any]], object]:
    table = csv.writer(file, lineterminator="\n")
    ids = {name for name in IDS if name not in spec.fields}

    def write(row: dict[str, Any]) -> None:
        cells = [(name, _cell(value)) for name, value in row.items()]
        table.writerow([cell if name in ids else _no_formula(cell) for name, cell in cells])

    return write


def _tsv_writer(file: Output) -> Callable[[dict[str, Any]], object]:
    """Without quoting, as the official .tsv files are; so a tab or line break becomes a space."""
    return lambda row: file.write("\t".join(_flat(_cell(cell)) for cell in row.values()) + "\n")


def _given(answer: Answer, columns: Sequence[str]) -> dict[str, Any]:
    """The row as it came, behind its number where it has no id."""
    row: dict[str, Any] = answer.example.extra.get(GIVEN, answer.example.fields)
    return row if _has_id(columns) else {"id": answer.example.id} | row


def _has_id(columns: Sequence[str]) -> bool:
    return any(name in columns for name in IDS)


def _suffix(columns: Sequence[str], own: Sequence[str]) -> str:
    """What our columns end in, so that they replace none of the row's: nothing, or _2, _3, ..."""
    taken, number, suffix = "", 1, ""
    while here := [name + suffix for name in own if name + suffix in columns]:
        taken, number = taken or here[0], number + 1
        suffix = f"_{number}"
    if taken:
        streams.tell(f"note: the input has a column {taken!r}; the new columns end in {suffix}")
    return suffix


def _cell(value: Any) -> str:
    """A value as the text of a cell: texts as they are, null empty, the rest as JSON."""
    value = plain(value)
    if value is None:
        return ""
    return value if isinstance(value, str) else to_json(value)


def _no_formula(cell: str) -> str:
    """The cell, with `'` before a text that a spreadsheet would run as a formula.

    As OWASP advises for CSV; numbers such as -1.5 stay as they are. Ids are written as they came,
    so that answers find their rows again; .tsv and .jsonl files keep every text as it is.
    """
    return f"'{cell}" if cell.startswith(FORMULA) and not NUMBER.fullmatch(cell) else cell


def _flat(cell: str) -> str:
    return cell.replace("\t", " ").replace("\n", " ").replace("\r", " ")

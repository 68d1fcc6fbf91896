"""Text files as numbered lines, cells and objects; errors name the line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from ppo_nlu.errors import UserError, quoted
from ppo_nlu.storage.access import irregular
from ppo_nlu.tasks.words import twice

LONGEST_CELL = 2**31 - 1  # what the csv module takes on every system; its own limit is 2**17
_TWICE = "is there twice; rename one or drop it"

Row = tuple[int, dict[str, str]]  # line number and cells by column


def unreadable(path: Path) -> str | None:
    """Why a path is not a file that can be read; None where it is.

    This is asked before opening: a pipe may block, and a device may never end.
    """
    try:
        kind = irregular(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"is not a regular file, but {kind}" if kind else None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, plain or .gz, ends kept. Only \\n ends a line: sentences
    may hold the other separators that Unicode knows."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8; save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}") from error


def without_end(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The lines without empty ones at the end of the file."""
    empty: list[tuple[int, str]] = []
    for number, line in lines:
        if line.strip(" \r\n"):
            yield from empty
            empty = []
            yield number, line
        else:
            empty.append((number, line))


def bare(line: str) -> str:
    """The line without its line end."""
    return line.removesuffix("\n").removesuffix("\r")


def check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """A UserError where a wanted column is not there, or where two have the same name."""
    same = twice(name for name in columns if name.strip() or name in wanted)
    if same is not None:
        raise UserError(f"{path}:1: the column {quoted(same)} {_TWICE}")
    if [name for name in wanted if name not in columns]:
        raise UserError(
            f"{path}:1: the header has the columns {', '.join(columns) or '(none)'}; "
            f"expected columns: {', '.join(wanted)}"
        )


def csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line number (of the last line) and the cells of every row that is not empty."""
    csv.field_size_limit(LONGEST_CELL)  # for the whole process; there is no other way
    reader = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered objects of a JSON-lines file. Empty lines may stand at its end only."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UserError(f"{where}: the key {quoted(twice(k for k, _ in pairs))} {_TWICE}")
        return found

    for number, line in without_end(numbered_lines(path)):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line; give one object a line")
        try:
            row = json.loads(line, object_pairs_hook=distinct)
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {_not_json(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; give one object a line")
        yield number, row


def _not_json(error: Exception) -> str:
    """What is wrong and how to mend it; Python's own words name settings of the interpreter."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error}; give one object a line"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply; make them flat"
    return "a number has too many digits; put it in quotes"


def text_cell(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text under that name; UserError where there is none."""
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: {name!r} must be there and be a string")
    return json_text(row[name], where)


def json_text(value: Any, where: str) -> str:
    """A JSON value as the text of a cell: null is empty, true is `true`."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: half of a surrogate pair, which is not a character")
    return text

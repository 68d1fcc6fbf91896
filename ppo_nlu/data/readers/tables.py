"""Tab-separated and comma-separated files: one row, one example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ppo_nlu.data.labels import gold
from ppo_nlu.data.lines import Row, bare, check_columns, csv_cells, numbered_lines
from ppo_nlu.data.readers.split import MALFORMED, NO_GOLD, Split, identity
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec


@dataclass(frozen=True)
class Table:
    """The rows of a tab-separated file with their line numbers, and how many were malformed."""

    columns: list[str]
    rows: list[Row]
    malformed: int


def read_tsv(path: Path, wanted: Sequence[str], header: Sequence[str] = ()) -> Table:
    """Read a tab-separated file by its header, without quoting (GLUE's fields hold quote marks).

    `header` names the columns where the first line does not. Only the wanted columns and the row's
    own number are kept. Rows whose number of columns is off are left out and counted.
    """
    lines = numbered_lines(path)
    number, first = next(lines, (1, ""))
    columns = bare(first).split("\t")
    body: Iterator[tuple[int, str]] = lines
    if header and not set(wanted) <= set(columns):
        columns, body = list(header), _again((number, first), lines)
    check_columns(path, columns, wanted)
    kept = [i for i, name in enumerate(columns) if name in (*wanted, "index", "idx", "id")]
    rows, malformed, width = [], 0, len(columns)
    named = [(columns[i], i) for i in kept]
    for number, line in body:
        cells = bare(line).split("\t")
        if len(cells) == width:
            rows.append((number, {name: cells[i] for name, i in named}))
        else:
            malformed += 1
    return Table(columns, _some(path, rows, malformed, columns), malformed)


def _again(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _some(path: Path, rows: list[Row], malformed: int, columns: Sequence[str]) -> list[Row]:
    if rows:
        return rows
    what = f"all {malformed} rows are malformed" if malformed else "there are no rows"
    raise UserError(f"{path}: {what}; every row needs the columns {', '.join(columns)}")


def _wanted(spec: TaskSpec, split: str) -> list[str]:
    columns = [spec.columns.get(name, name) for name in spec.fields]
    return columns if split == "test" else [*columns, spec.label_column]


def tsv(spec: TaskSpec, split: str, path: Path) -> Split:
    """A tab-separated file; that of the test split may have labels or not."""
    wanted = _wanted(spec, split)
    if split == "test" and spec.label_column in _first_cells(path):
        wanted.append(spec.label_column)
    table = read_tsv(path, wanted, spec.header)
    start = table.rows[0][0] if spec.header and table.rows[0][0] == 1 else 2
    return _examples(spec, split, path, table.rows, start, table.malformed)


def _first_cells(path: Path) -> list[str]:
    return bare(next(numbered_lines(path), (1, ""))[1]).split("\t")


def csv(spec: TaskSpec, split: str, path: Path) -> Split:
    """A comma-separated file with quoted cells."""
    reader = csv_cells(path)
    columns = next(reader, (1, [""]))[1]
    check_columns(path, columns, _wanted(spec, split))
    rows, malformed = [], 0
    for number, cells in reader:
        if len(cells) == len(columns):
            rows.append((number, dict(zip(columns, cells, strict=True))))
        else:
            malformed += 1
    rows = _some(path, rows, malformed, columns)
    # A quoted cell may span lines, so the place in the file is the row's number, not its line's.
    return _examples(spec, split, path, rows, None, malformed)


def _examples(
    spec: TaskSpec,
    split: str,
    path: Path,
    rows: Sequence[Row],
    start: int | None,
    malformed: int = 0,
) -> Split:
    """The examples of flat rows. A row's place is its line less `start`, or its number if None."""
    examples, without = [], 0
    columns = [(name, spec.columns.get(name, name)) for name in spec.fields]
    undecided = bool(spec.labels) and spec.word_of("-") is None
    known: dict[str | None, str | None] = {}  # what a cell stands for
    file = str(path)
    for count, (number, row) in enumerate(rows):
        value = row.get(spec.label_column)
        if undecided and value == "-":
            without += 1  # annotators did not agree (MNLI, SNLI)
            continue
        where = f"{file}:{number}"
        if value not in known:
            known[value] = gold(spec, value, where)
        fields = {name: row[column] for name, column in columns}
        place = count if start is None else number - start
        id_, extra = identity(split, place, row, where)
        examples.append(Example(id_, fields, known[value], spec.name, extra=extra))
    return Split(examples, {MALFORMED: malformed, NO_GOLD: without})


def ax(spec: TaskSpec, split: str, path: Path) -> Split:
    """AX: the file with labels names its columns otherwise than the one without."""
    if "Premise" not in _first_cells(path):
        return tsv(spec, split, path)
    columns = {"premise": "Premise", "hypothesis": "Hypothesis"}
    return tsv(replace(spec, columns=columns, label_column="Label"), split, path)

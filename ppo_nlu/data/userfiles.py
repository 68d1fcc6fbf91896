"""Rows of any task in the user's own files: .txt, .csv, .tsv, .jsonl or .parquet, by their ending.

Unlike in official files nothing is left out unasked: what cannot be read is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ppo_nlu.data.labels import gold, without_tags
from ppo_nlu.data.lines import (
    bare,
    check_columns,
    csv_cells,
    json_rows,
    json_text,
    numbered_lines,
    text_cell,
    without_end,
)
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import REWARD_KINDS, Example, TaskSpec
from ppo_nlu.tasks.custom import CustomSpec
from ppo_nlu.tasks.words import is_empty

GIVEN = "given"  # in the `extra` of an input: its row, as the file has it
# Line number, texts by the names of the task, and values by the names of the file.
Input = tuple[int, dict[str, str], dict[str, Any]]
IDS = ("id", "index", "idx")  # columns that name a row, the preferred one first


def read_inputs(path: str | Path, spec: TaskSpec) -> Iterator[Example]:
    """Stream the rows of a .txt (a sentence a line), .csv, .tsv, .jsonl (or such a .gz) or .parquet
    file; its columns are the task's fields, or the official columns of them.

    The label may be absent or empty, and may be a data value or a label word. The id is the row's
    own (`id`, `index` or `idx`) or its number from 0; `extra` holds the whole row. Unlike in
    training files, a row that cannot be read is an error: each input must have its prediction.
    """
    path = Path(path)
    return _inputs(path, spec, input_rows(path, spec))


def input_columns(path: str | Path, spec: TaskSpec) -> list[str]:
    """The columns of a file of inputs, as it names them. Lines of JSON may differ in theirs, so
    such a file is read once from end to end."""
    path = Path(path)
    rows = input_rows(path, spec)
    some = rows if input_kind(path) == ".jsonl" else islice(rows, 1)
    return list(dict.fromkeys(name for _, _, given in some for name in given))


def _inputs(path: Path, spec: TaskSpec, rows: Iterator[Input]) -> Iterator[Example]:
    count = 0
    for count, (number, row, given) in enumerate(rows, start=1):
        where = f"{path}:{number}"
        own = next((row[name] for name in IDS if row.get(name)), None)
        fields = {name: row[name] for name in spec.fields}
        value = row.get(spec.label_column, "")
        label = None if is_empty(value) else gold(spec, value, where, words=True)
        yield Example(own or str(count - 1), fields, label, spec.name, extra={GIVEN: given})
    if not count:
        raise UserError(f"{path}: there are no rows")


def custom_examples(spec: TaskSpec, split: str, path: Path) -> tuple[list[Example], dict[str, int]]:
    """The rows of a file of the user's own, and how many were left out, by what they lack.

    A row lacks what is empty (`is_empty`; a JSON null, a Parquet null or NaN): its label, or all of
    its texts. `custom.missing` says what becomes of such rows. Rows of test may lack anything.
    """
    examples, lacking, named = [], [], False
    for place, (number, row, _) in enumerate(input_rows(path, spec)):
        where = f"{path}:{number}"
        named = named or split == "test" or spec.label_column in row
        lack = "" if split == "test" else _lack(spec, row)
        if lack:
            lacking.append((where, lack))
        else:
            examples.append(_custom_example(spec, split, place, row, where))
    if lacking and not named:
        raise UserError(
            f"{lacking[0][0]}: there is no {spec.label_column!r}; name the column of the labels in "
            "custom.label_column"
        )
    left_out = Counter(lack for _, lack in lacking)
    if lacking and not (isinstance(spec, CustomSpec) and spec.missing == "drop"):
        raise UserError(_missing(spec, *lacking[0], left_out))
    if not examples:
        why = f"no row is left: {_counted(left_out)}" if left_out else "there are no rows"
        raise UserError(f"{path}: {why}")
    return examples, left_out


NO_LABEL, NO_TEXT = "no label", "no text"  # what a row may lack


def _lack(spec: TaskSpec, row: Mapping[str, str]) -> str:
    if is_empty(row.get(spec.label_column, "")):
        return NO_LABEL
    return NO_TEXT if all(is_empty(row[name]) for name in spec.fields) else ""


def _missing(spec: TaskSpec, where: str, lack: str, counts: Mapping[str, int]) -> str:
    columns = [spec.label_column] if lack == NO_LABEL else spec.fields
    empty = f"{' and '.join(map(repr, columns))} {'is' if len(columns) == 1 else 'are'} empty"
    return (
        f"{where}: {empty}; {_counted(counts)}; mend them, or leave them out: custom.missing=drop"
    )


def _counted(counts: Mapping[str, int]) -> str:
    said = (f"{count:,} row{'s have' if count > 1 else ' has'} {w}" for w, count in counts.items())
    return ", ".join(said)


def _custom_example(
    spec: TaskSpec, split: str, place: int, row: dict[str, str], where: str
) -> Example:
    value = row.get(spec.label_column)
    if split == "test" and is_empty(value or ""):
        value = None
    extra: dict[str, Any] = {"idx": place} if split == "test" else {}
    id_ = str(place) if split == "test" else f"{split}-{place}"
    if not is_empty(row.get(spec.rationale, "")):
        extra["rationale"] = without_tags(row[spec.rationale], spec.rationale, where)
    fields = {name: row[name] for name in spec.fields}
    if spec.reward not in REWARD_KINDS:
        extra["row"] = dict(row)  # the user's own function may ask for any column
    return Example(id_, fields, gold(spec, value, where), extra=extra)


# ---- the kinds of files


def input_kind(path: Path) -> str:
    """The ending that says how the file is read: .txt, .csv, .tsv, .jsonl or .parquet."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in _INPUTS or (kind == ".parquet" and path.suffix == ".gz"):
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(_INPUTS)}")
    return kind


def input_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    """Stream the rows of a file by its ending; the task's fields are there under their names,
    whether the file has them so or under the official column names. Nothing is left out."""
    kind = input_kind(path)
    if kind == ".txt" and len(spec.fields) != 1:
        raise UserError(f"{path}: {spec.title} has the fields {', '.join(spec.fields)}; give .tsv")
    return _INPUTS[kind](path, spec)


def _txt_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    for number, line in without_end(numbered_lines(path)):
        if not line.strip():
            raise UserError(f"{path}:{number}: an empty line; every line must be a sentence")
        row = {spec.fields[0]: bare(line)}
        yield number, row, row


def _tsv_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    rows = ((number, bare(line).split("\t")) for number, line in without_end(numbered_lines(path)))
    return _named_rows(path, spec, rows)


def _csv_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    return _named_rows(path, spec, csv_cells(path))


def _named_rows(
    path: Path, spec: TaskSpec, rows: Iterator[tuple[int, list[str]]]
) -> Iterator[Input]:
    names = next(rows, (1, [""]))[1]
    columns, names = _own_names(spec, names), _distinct(names)
    check_columns(path, columns, spec.fields)
    for number, cells in rows:
        if len(cells) != len(columns):
            raise UserError(f"{path}:{number}: {len(cells)} columns; the header has {len(columns)}")
        row, given = zip(columns, cells, strict=True), zip(names, cells, strict=True)
        yield number, dict(row), dict(given)


def _own_names(spec: TaskSpec, columns: Sequence[str]) -> list[str]:
    """The column names with the official ones replaced by the task's, where these are not there."""
    own = {column: name for name, column in spec.columns.items() if name not in columns}
    return [own.get(column, column) for column in columns]


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of a header; of several columns without a name each is called by its place."""
    nameless = [name for name in names if not name.strip()]
    return [
        name if name.strip() or len(nameless) == 1 else f"column_{place}"
        for place, name in enumerate(names, start=1)
    ]


def _jsonl_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    for number, found in json_rows(path):
        row = dict(zip(_own_names(spec, list(found)), found.values(), strict=True))
        where = f"{path}:{number}"
        _check_texts(spec, row, where)
        yield number, {key: json_text(value, where) for key, value in row.items()}, found


def _parquet_rows(path: Path, spec: TaskSpec) -> Iterator[Input]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow; pip install -e '.[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _own_names(spec, names)
            check_columns(path, columns, spec.fields)
            number = 0
            for batch in file.iter_batches(1024):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    where = f"{path}:{number}"
                    row = dict(zip(columns, values, strict=True))
                    _check_texts(spec, row, where)
                    texts = {key: _scalar(value, where) for key, value in row.items()}
                    yield number, texts, dict(zip(names, map(_plain, values), strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _check_texts(spec: TaskSpec, row: Mapping[str, Any], where: str) -> None:
    for name in spec.fields:
        if row.get(name, "") is not None:  # null is an empty text
            text_cell(row, name, where)


def _scalar(value: Any, where: str) -> str:
    """A cell as text. Whole numbers with gaps are often stored as floats: 1.0 is 1, NaN is none."""
    if isinstance(value, float):
        if value != value:
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    return json_text(value, where) if isinstance(value, str | int | None) else str(value)


def _plain(value: Any) -> Any:
    """A cell of .parquet in the types of JSON: dates and the like as text."""
    plain = isinstance(value, str | int | float | None)
    return value if plain else json.loads(json.dumps(value, default=str))


_INPUTS: dict[str, Callable[[Path, TaskSpec], Iterator[Input]]] = {
    ".txt": _txt_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}

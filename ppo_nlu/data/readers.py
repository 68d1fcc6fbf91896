"""The file formats: from a file of a task to its examples.

A table's reader is named by `TaskSpec.reader`. The official files have their quirks, and each is
met here, in the reader of its task. Rows that are left out or mended are counted, and the counts
come back with the rows: nothing here prints.
"""

from __future__ import annotations

import csv
import gc
import gzip
import json
import re
import unicodedata
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from ppo_nlu.errors import UserError, quoted
from ppo_nlu.storage.access import irregular
from ppo_nlu.tasks import REWARD_KINDS, Example, TaskSpec
from ppo_nlu.tasks.prompts import STOP
from ppo_nlu.tasks.words import fold, is_empty, twice, whole_words

MALFORMED = "malformed"
NO_GOLD = "without a gold label"
LONGEST_CELL = 2**31 - 1  # the most that the csv module takes on every system; it stops at 2**17

Row = tuple[int, dict[str, str]]  # line number and cells by column


@dataclass(frozen=True)
class Split:
    """The examples of a file, how many rows were left out and why, and what was mended."""

    examples: list[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    mended: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of a tab-separated file with their line numbers, and how many were malformed."""

    columns: list[str]
    rows: list[Row]
    malformed: int


def read_split(spec: TaskSpec, split: str, path: Path) -> Split:
    """All rows of a file of the task; UserError (file:line: what) where it cannot be read."""
    with _uncollected():
        found = _TABLES[spec.reader](spec, split, path)
    named = [e if e.task == spec.name else replace(e, task=spec.name) for e in found.examples]
    return replace(found, examples=named)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python looks for no cycles to free: rows have none, and it would look at all of them
    again and again, which takes a quarter of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


# ---- tables: one line, one example


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


def _tsv(spec: TaskSpec, split: str, path: Path) -> Split:
    wanted = _wanted(spec, split)
    if split == "test" and spec.label_column in _first_cells(path):
        wanted.append(spec.label_column)
    table = read_tsv(path, wanted, spec.header)
    start = table.rows[0][0] if spec.header and table.rows[0][0] == 1 else 2
    return _examples(spec, split, path, table.rows, start, table.malformed)


def _first_cells(path: Path) -> list[str]:
    return bare(next(numbered_lines(path), (1, ""))[1]).split("\t")


def _csv(spec: TaskSpec, split: str, path: Path) -> Split:
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
    """The examples of flat rows. A row's place counts from the line `start`, or None: over rows."""
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
        id_, extra = _identity(split, place, row, where)
        examples.append(Example(id_, fields, known[value], spec.name, extra=extra))
    return Split(examples, {MALFORMED: malformed, NO_GOLD: without})


def _identity(
    split: str, place: int, row: Mapping[str, Any], where: str
) -> tuple[str, dict[str, Any]]:
    """A row's id and extra: in the test split its official number, else its place in the file."""
    if split != "test":
        return f"{split}-{place}", {}
    own = next((row[name] for name in ("index", "idx", "id") if name in row), place)
    number = whole(own, where)
    return str(number), {"idx": number}


def whole(value: Any, where: str) -> int:
    """A row's official number, which some files write as a string."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {quoted(value)} is no row number; give a whole number") from None


# ---- JSON lines


def _objects(
    path: Path, build: Callable[[dict[str, Any], int, str], list[Example]]
) -> list[Example]:
    """The examples that `build(object, place, where)` makes of each line, in the file's order."""
    examples: list[Example] = []
    for number, row in json_rows(path):
        where = f"{path}:{number}"
        try:
            examples += build(row, number - 1, where)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: not in the official form: {what}") from error
    if not examples:
        raise UserError(f"{path}: there are no rows")
    return examples


def _label(spec: TaskSpec, split: str, row: Mapping[str, Any], where: str) -> str | None:
    if split == "test" and row.get(spec.label_column) is None:
        return None
    return gold(spec, json_text(row[spec.label_column], where), where)


def _flat(spec: TaskSpec, split: str, row: dict[str, Any], place: int, where: str) -> Example:
    fields = {name: text_cell(row, spec.columns.get(name, name), where) for name in spec.fields}
    id_, extra = _identity(split, place, row, where)
    return Example(id_, fields, _label(spec, split, row, where), extra=extra)


def _jsonl(spec: TaskSpec, split: str, path: Path) -> Split:
    return Split(_objects(path, lambda row, place, where: [_flat(spec, split, row, place, where)]))


def _axg(spec: TaskSpec, split: str, path: Path) -> Split:
    """AX-g: rows 2i and 2i + 1 differ in the pronoun's gender and are judged together."""
    rows = _jsonl(spec, split, path).examples
    return Split([replace(row, group=str(place // 2)) for place, row in enumerate(rows)])


def _multirc(spec: TaskSpec, split: str, path: Path) -> Split:
    """MultiRC: one row per proposed answer; those of a question are judged together."""

    def build(row: dict[str, Any], place: int, where: str) -> list[Example]:
        passage, paragraph = row["passage"], whole(row["idx"], where)
        examples = []
        for question in passage["questions"]:
            asked = whole(question["idx"], where)
            for answer in question["answers"]:
                index = (paragraph, asked, whole(answer["idx"], where))
                id_ = "-".join(map(str, index))
                fields = {
                    "passage": text_cell(passage, "text", where),
                    "question": text_cell(question, "question", where),
                    "answer": text_cell(answer, "text", where),
                }
                examples.append(
                    Example(
                        id_ if split == "test" else f"{split}-{id_}",
                        fields,
                        _label(spec, split, answer, where),
                        group=f"{paragraph}-{asked}",
                        extra={"idx": index},
                    )
                )
        return examples

    return Split(_objects(path, build))


def _record(spec: TaskSpec, split: str, path: Path) -> Split:
    """ReCoRD: one row per query and distinct entity text; those of a query are judged together."""

    def build(row: dict[str, Any], place: int, where: str) -> list[Example]:
        text = text_cell(row["passage"], "text", where)
        # The spans include their last character.
        spans = [(span["start"], span["end"] + 1) for span in row["passage"]["entities"]]
        entities = list(dict.fromkeys(text[start:end] for start, end in spans))
        passage, examples = plain_article(text), []
        for query in row["qas"]:
            index, asked = whole(query["idx"], where), text_cell(query, "query", where)
            known: dict[str, Any] = {"idx": index}
            if "answers" in query:
                known["answers"] = _gold_spans(query["answers"], where)
            elif split != "test":
                raise KeyError("answers")
            for count, entity in enumerate(entities):
                right = known.get("answers") and entity in known["answers"]
                label = spec.word_of("1" if right else "0") if "answers" in known else None
                fields = {
                    "passage": passage,
                    "statement": asked.replace("@placeholder", entity),
                }
                id_ = f"{index}-{count}" if split == "test" else f"{split}-{index}-{count}"
                extra = known | {"entity": entity}
                examples.append(Example(id_, fields, label, group=str(index), extra=extra))
        return examples

    return Split(_objects(path, build))


def _gold_spans(answers: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """The distinct right names for a query; UserError where there is none, or an empty one."""
    found = list(dict.fromkeys(text_cell(answer, "text", where) for answer in answers))
    if not found or any(map(is_empty, found)):
        raise UserError(f"{where}: a query has no answer, or an empty one; mend or drop the row")
    return found


def plain_article(text: str) -> str:
    """ReCoRD's article as running text: its `@highlight` markers become ends of sentences."""
    parts = [" ".join(part.split()) for part in text.split("@highlight")]
    parts = [part for part in parts if part]
    ended = [part if part[-1] in ".!?'\"\u2019\u201d" else f"{part}." for part in parts[:-1]]
    return " ".join([*ended, *parts[-1:]])


def _wsc(spec: TaskSpec, split: str, path: Path) -> Split:
    """WSC: the pronoun is marked in the text *so*."""
    mended: Counter[str] = Counter()

    def build(row: dict[str, Any], place: int, where: str) -> list[Example]:
        target, text = row["target"], text_cell(row, "text", where)
        pronoun = text_cell(target, "span2_text", where)
        marked, found = mark(text, pronoun, whole(target["span2_index"], where))
        mended[found] += 1
        id_, extra = _identity(split, place, row, where)
        fields = {
            "text": marked,
            "span2_text": pronoun,
            "span1_text": text_cell(target, "span1_text", where),
        }
        return [Example(id_, fields, _label(spec, split, row, where), extra=extra)]

    examples = _objects(path, build)
    told = {"moved": "pronouns not at their index, marked at the nearest match", "absent": _ABSENT}
    notes = [f"{mended[key]:,} {what}" for key, what in told.items() if mended[key]]
    return Split(examples, mended="; ".join(notes))


_ABSENT = "pronouns not in their text, left unmarked"


def mark(text: str, phrase: str, index: int) -> tuple[str, str]:
    """The text with the phrase at the whitespace token `index` marked *so*.

    Where it is not there, in whatever case, the nearest occurrence in whole words is marked, one in
    the phrase's own case before all others. The second value says which it was: "exact", "moved",
    or "absent" (nothing is marked).
    """
    starts = [token.start() for token in re.finditer(r"\S+", text)]
    words = r"\s+".join(map(re.escape, phrase.split()))
    # An apostrophe parts words: a pronoun is one in "it's".
    pattern = whole_words(words, apostrophes="")
    found = []
    for match in re.finditer(pattern, text, re.IGNORECASE) if words else ():
        token = bisect_right(starts, match.start()) - 1
        other_case = match[0].split() != phrase.split()
        found.append((token != index, other_case, abs(token - index), match.start(), match.end()))
    if not found:
        return text, "absent"
    moved, _, _, start, end = min(found)
    return f"{text[:start]}*{text[start:end]}*{text[end:]}", "moved" if moved else "exact"


def _ax(spec: TaskSpec, split: str, path: Path) -> Split:
    """AX: the file with labels names its columns otherwise than the one without."""
    if "Premise" not in _first_cells(path):
        return _tsv(spec, split, path)
    columns = {"premise": "Premise", "hypothesis": "Hypothesis"}
    return _tsv(replace(spec, columns=columns, label_column="Label"), split, path)


def _custom(spec: TaskSpec, split: str, path: Path) -> Split:
    """A file of the user's own: nothing is left out, what cannot be read is an error."""
    examples = []
    for place, (number, row) in enumerate(input_rows(path, spec)):
        where = f"{path}:{number}"
        if split != "test" and spec.label_column not in row:
            raise UserError(
                f"{where}: there is no {spec.label_column!r}; name the column of the labels in "
                "custom.label_column"
            )
        value = row.get(spec.label_column)
        if split == "test" and is_empty(value or ""):
            value = None
        extra: dict[str, Any] = {"idx": place} if split == "test" else {}
        id_ = str(place) if split == "test" else f"{split}-{place}"
        if not is_empty(row.get(spec.rationale, "")):
            extra["rationale"] = _without_tags(row[spec.rationale], spec.rationale, where)
        fields = {name: row[name] for name in spec.fields}
        if spec.reward not in REWARD_KINDS:
            extra["row"] = dict(row)  # the user's own function may ask for any column
        examples.append(Example(id_, fields, gold(spec, value, where), extra=extra))
    if not examples:
        raise UserError(f"{path}: there are no rows")
    return Split(examples)


_TABLES: dict[str, Callable[[TaskSpec, str, Path], Split]] = {
    "tsv": _tsv,
    "csv": _csv,
    "jsonl": _jsonl,
    "multirc": _multirc,
    "record": _record,
    "wsc": _wsc,
    "ax": _ax,
    "axg": _axg,
    "custom": _custom,
}


# ---- rows of any task in the user's own files


def input_kind(path: Path) -> str:
    """The ending that says how the file is read: .txt, .csv, .tsv, .jsonl or .parquet."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in _INPUTS or (kind == ".parquet" and path.suffix == ".gz"):
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(_INPUTS)}")
    return kind


def input_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    """Stream the rows of a file by its ending; the task's fields are there under their names,
    whether the file has them so or under the official column names. Nothing is left out."""
    kind = input_kind(path)
    if kind == ".txt" and len(spec.fields) != 1:
        raise UserError(f"{path}: {spec.title} has the fields {', '.join(spec.fields)}; give .tsv")
    return _INPUTS[kind](path, spec)


def _txt_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    for number, line in _without_end(numbered_lines(path)):
        if not line.strip():
            raise UserError(f"{path}:{number}: an empty line; every line must be a sentence")
        yield number, {spec.fields[0]: bare(line)}


def _tsv_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    rows = ((number, bare(line).split("\t")) for number, line in _without_end(numbered_lines(path)))
    return _named_rows(path, spec, rows)


def _csv_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    return _named_rows(path, spec, csv_cells(path))


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


def _named_rows(path: Path, spec: TaskSpec, rows: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    columns = _own_names(spec, next(rows, (1, [""]))[1])
    check_columns(path, columns, spec.fields)
    for number, cells in rows:
        if len(cells) != len(columns):
            raise UserError(f"{path}:{number}: {len(cells)} columns; the header has {len(columns)}")
        yield number, dict(zip(columns, cells, strict=True))


def _own_names(spec: TaskSpec, columns: Sequence[str]) -> list[str]:
    """The column names with the official ones replaced by the task's, where these are not there."""
    own = {column: name for name, column in spec.columns.items() if name not in columns}
    return [own.get(column, column) for column in columns]


def _jsonl_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    for number, found in json_rows(path):
        row = dict(zip(_own_names(spec, list(found)), found.values(), strict=True))
        where = f"{path}:{number}"
        for name in spec.fields:
            text_cell(row, name, where)
        yield number, {key: json_text(value, where) for key, value in row.items()}


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered objects of a JSON-lines file. Empty lines may stand at its end only."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise UserError(f"{where}: the key {quoted(twice(k for k, _ in pairs))} {_TWICE}")
        return found

    for number, line in _without_end(numbered_lines(path)):
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
        raise UserError(f"{where}: half of a surrogate pair, which is no character")
    return text


def _parquet_rows(path: Path, spec: TaskSpec) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{path}: reading .parquet needs pyarrow; pip install -e '.[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = _own_names(spec, file.schema_arrow.names)
            check_columns(path, columns, spec.fields)
            number = 0
            for batch in file.iter_batches(1024):
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    where = f"{path}:{number}"
                    row = dict(zip(columns, values, strict=True))
                    for name in spec.fields:
                        text_cell(row, name, where)
                    yield number, {key: _scalar(value, where) for key, value in row.items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error


def _scalar(value: Any, where: str) -> str:
    """A cell as text. Whole numbers with gaps are often stored as floats: 1.0 is 1, NaN is none."""
    if isinstance(value, float):
        if value != value:
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    return json_text(value, where) if isinstance(value, str | int | None) else str(value)


_INPUTS: dict[str, Callable[[Path, TaskSpec], Iterator[Row]]] = {
    ".txt": _txt_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


# ---- shared by the readers


def unreadable(path: Path) -> str | None:
    """Why a path that the user names is no file to read; None where it is one.

    Asked before it is opened: a pipe might wait, and a device never end.
    """
    try:
        kind = irregular(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"is no regular file, but {kind}" if kind else None


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


def _without_end(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
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
    """The line without its end."""
    return line.removesuffix("\n").removesuffix("\r")


def check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """A UserError where a wanted column is not there, or where two have the same name."""
    same = twice(name for name in columns if name.strip() or name in wanted)
    if same is not None:
        raise UserError(f"{path}:1: the column {quoted(same)} {_TWICE}")
    if [name for name in wanted if name not in columns]:
        raise UserError(
            f"{path}:1: the header has the columns {', '.join(columns) or '(none)'}; "
            f"wanted are {', '.join(wanted)}"
        )


_TWICE = "is there twice; rename one or drop it"


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def gold(spec: TaskSpec, value: str | None, where: str, words: bool = False) -> str | None:
    """The gold label for a cell (None: unlabelled): a label word, the number as it is written, or
    the free text. With `words` the cell of a choice may be the word itself."""
    if value is None:
        return None
    if spec.kind == "text":
        if is_empty(value):
            raise UserError(f"{where}: {spec.label_column!r} is empty; mend or drop the row")
        return _without_tags(value, spec.label_column, where).strip()
    if spec.rating:
        return _rated(spec, value, where)
    known = {label.value: label.word for label in spec.labels}
    if words:
        known = {fold(word): word for word in spec.words} | known
    plain = value.strip()
    loose = fold(plain) if words or plain.lower() in ("true", "false") else plain
    word = known.get(plain, known.get(loose))
    if word is None:  # an accent may be a letter's own or a mark behind it: they look the same
        word = {_composed(v): w for v, w in known.items()}.get(_composed(plain))
    if word is None:
        allowed = ", ".join(label.value for label in spec.labels)
        what = f"{spec.title} has no label {quoted(value)}; it has {allowed}"
        mend = "; add it to custom.labels or drop the rows" if spec.reader == "custom" else ""
        raise UserError(f"{where}: {what}{mend}")
    return word


def _rated(spec: TaskSpec, value: str, where: str) -> str:
    assert spec.rating is not None
    try:
        inside = spec.rating.holds(float(value))
    except ValueError:
        inside = False
    if not inside:
        raise UserError(f"{where}: {quoted(value)} is not {spec.allowed}; mend or drop the row")
    return value.strip()


def _without_tags(text: str, column: str, where: str) -> str:
    """The text of an answer or of its reason, which must not hold what ends it."""
    tag = next((tag for tag in (STOP, "<Judgement>", "</Analysis>") if tag in text), None)
    if tag:
        raise UserError(
            f"{where}: {column!r} holds {tag}, which parts an answer from its reason; "
            "take it out, or drop the row"
        )
    return text

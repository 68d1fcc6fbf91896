"""The official file formats: from a file of a task to its examples.

A table's reader is named by `TaskSpec.reader`. The official files have their quirks, and each is
met here, in the reader of its task. Rows that are left out or mended are counted, and the counts
come back with the rows: nothing here prints. All readers are in this one file, for each is a few
lines on the same helpers.
"""

from __future__ import annotations

import gc
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppo_nlu.data.labels import gold
from ppo_nlu.data.lines import (
    Row,
    bare,
    check_columns,
    csv_cells,
    json_rows,
    json_text,
    numbered_lines,
    text_cell,
)
from ppo_nlu.data.userfiles import custom_examples
from ppo_nlu.errors import UserError, quoted
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.words import is_empty, whole_words

MALFORMED = "malformed"
NO_GOLD = "without a gold label"


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


_TABLES: dict[str, Callable[[TaskSpec, str, Path], Split]] = {
    "tsv": _tsv,
    "csv": _csv,
    "jsonl": _jsonl,
    "multirc": _multirc,
    "record": _record,
    "wsc": _wsc,
    "ax": _ax,
    "axg": _axg,
    "custom": lambda spec, split, path: Split(custom_examples(spec, split, path)),
}

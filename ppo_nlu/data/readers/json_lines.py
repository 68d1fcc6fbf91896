"""JSON lines: one object a line, which makes one example or several."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppo_nlu.data.labels import gold
from ppo_nlu.data.lines import json_rows, json_text, text_cell
from ppo_nlu.data.readers.split import Split, identity, whole
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.words import is_empty, whole_words


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
    id_, extra = identity(split, place, row, where)
    return Example(id_, fields, _label(spec, split, row, where), extra=extra)


def jsonl(spec: TaskSpec, split: str, path: Path) -> Split:
    """Objects whose values are the fields and the label: one line, one example."""
    return Split(_objects(path, lambda row, place, where: [_flat(spec, split, row, place, where)]))


def axg(spec: TaskSpec, split: str, path: Path) -> Split:
    """AX-g: rows 2i and 2i + 1 differ in the pronoun's gender and are judged together."""
    rows = jsonl(spec, split, path).examples
    return Split([replace(row, group=str(place // 2)) for place, row in enumerate(rows)])


def multirc(spec: TaskSpec, split: str, path: Path) -> Split:
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


def record(spec: TaskSpec, split: str, path: Path) -> Split:
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


def wsc(spec: TaskSpec, split: str, path: Path) -> Split:
    """WSC: the pronoun is marked in the text with asterisks, *so*."""
    mended: Counter[str] = Counter()

    def build(row: dict[str, Any], place: int, where: str) -> list[Example]:
        target, text = row["target"], text_cell(row, "text", where)
        pronoun = text_cell(target, "span2_text", where)
        marked, found = mark(text, pronoun, whole(target["span2_index"], where))
        mended[found] += 1
        id_, extra = identity(split, place, row, where)
        fields = {
            "text": marked,
            "span2_text": pronoun,
            "span1_text": text_cell(target, "span1_text", where),
        }
        return [Example(id_, fields, _label(spec, split, row, where), extra=extra)]

    examples = _objects(path, build)
    told = {
        "moved": "pronouns not at their index, marked at the nearest match",
        "absent": "pronouns not in their text, left unmarked",
    }
    notes = [f"{mended[key]:,} {what}" for key, what in told.items() if mended[key]]
    return Split(examples, mended="; ".join(notes))


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

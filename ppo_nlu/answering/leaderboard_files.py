"""The files of a submission as a benchmark's server reads them, and the zip that holds them."""

from __future__ import annotations

import io
import json
import math
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ppo_nlu import data
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.leaderboard import Entry, index_of, queries_of
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.metrics import chosen_row

Lines = tuple[list[str], int]  # of a file, and how many of its answers are stand-ins


@dataclass(frozen=True)
class Fallback:
    """The stand-in for an unreadable answer: by `kind`, "majority" or "random"."""

    kind: str
    seed: int

    def source(self, entry: Entry) -> Callable[[], str]:
        """A function that returns the next stand-in.

        Majority: the most frequent training label, of a rating the mean. Random, as in the
        paper's code: any label alike, of a rating any number of the range.
        """
        spec, draw = entry.spec, self.draw(entry)
        if self.kind == "majority":
            return cache(lambda: usual(entry))
        if spec.rating:
            low, high = spec.rating.low, spec.rating.high
            return lambda: str(draw.uniform(low, high))
        return lambda: draw.choice(spec.words)

    def draw(self, entry: Entry) -> random.Random:
        """A generator of its own for each file."""
        return random.Random(f"{self.seed} {entry.name}")


def usual(entry: Entry) -> str:
    """The most frequent training label, the first in the task's list where two are; the mean of
    a rating. AX, AX-b and AX-g take that of the task that the run learned."""
    spec = entry.trained
    try:
        rows = data.load_split(spec, "train", entry.run.cfg.data).examples
    except UserError as error:
        raise UserError(f"{entry.name}: {error}; or use --fallback random") from error
    labels = [str(row.label) for row in rows]
    if spec.rating:
        return str(math.fsum(map(float, labels)) / len(labels))
    counts = Counter(labels)
    return max(spec.words, key=lambda word: counts[word])


def write(entry: Entry, given: Sequence[Answer], fallback: Fallback) -> tuple[bytes, int]:
    """The content of a file, and how many of its answers are stand-ins."""
    lines, filled = LAYOUTS[entry.spec.leaderboard_layout](entry, given, fallback)
    return "".join(f"{line}\n" for line in lines).encode(), filled


def _rows(entry: Entry, given: Sequence[Answer], fallback: Fallback) -> Lines:
    """A line for each test row: of a table in a .tsv file, else a JSON object."""
    values, filled = _values(entry, given, fallback)
    pairs = [(index_of(row), value) for row, value in zip(entry.examples, values, strict=True)]
    if entry.name.endswith(".tsv"):
        return ["index\tprediction", *(f"{index}\t{value}" for index, value in pairs)], filled
    return [json.dumps({"idx": index, "label": value}) for index, value in pairs], filled


def _values(entry: Entry, given: Sequence[Answer], fallback: Fallback) -> tuple[list[Any], int]:
    """The answers as the server takes them; how many are stand-ins."""
    source = fallback.source(entry)
    answers = [source() if row.prediction is None else row.prediction for row in given]
    filled = sum(row.prediction is None for row in given)
    return [_value(entry.spec, answer) for answer in answers], filled


def _value(spec: TaskSpec, answer: str) -> str | int:
    if spec.rating:
        bounded = min(max(float(answer), spec.rating.low), spec.rating.high)
        return f"{bounded + 0.0:.3f}"
    return spec.submitted_as(answer)


def _paragraphs(entry: Entry, given: Sequence[Answer], fallback: Fallback) -> Lines:
    """As in MultiRC: an object for each paragraph, with its questions and their answers inside."""
    values, filled = _values(entry, given, fallback)
    paragraphs: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row, value in zip(entry.examples, values, strict=True):
        paragraph, question, answer = row.extra["idx"]
        questions = paragraphs.setdefault(paragraph, {})
        questions.setdefault(question, []).append({"idx": answer, "label": value})
    lines = []
    for paragraph, questions in paragraphs.items():
        nested = [{"idx": number, "answers": answers} for number, answers in questions.items()]
        lines.append(json.dumps({"idx": paragraph, "passage": {"questions": nested}}))
    return lines, filled


def _queries(entry: Entry, given: Sequence[Answer], fallback: Fallback) -> Lines:
    """As in ReCoRD: an object for each query, with the entity that was chosen. For a query without
    one an entity stands in: the one that the passage names most often, or a random one."""
    draw, filled = fallback.draw(entry), 0
    lines = []
    for rows in queries_of(entry.examples).values():
        answers = [given[row] for row in rows]
        entities = [entry.examples[row].extra["entity"] for row in rows]
        place = chosen_row(
            entry.spec, [a.prediction for a in answers], [a.probabilities for a in answers]
        )
        if place is not None:
            entity = entities[place]
        else:
            filled += 1
            passage = entry.examples[rows[0]].fields["passage"]
            often = max(entities, key=passage.count)
            entity = often if fallback.kind == "majority" else draw.choice(entities)
        lines.append(json.dumps({"idx": index_of(entry.examples[rows[0]]), "label": entity}))
    return lines, filled


LAYOUTS = {"rows": _rows, "paragraphs": _paragraphs, "queries": _queries}


def packed(contents: dict[str, bytes]) -> bytes:
    """A reproducible zip: files sorted by name, no time and no machine in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, contents[name], compresslevel=6)
    return buffer.getvalue()

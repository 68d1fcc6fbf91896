"""The zip that the GLUE or the SuperGLUE server takes, from finished runs.

    python -m ppo_nlu.submit RUN_DIR ... --benchmark glue --output glue.zip

Each run answers the test rows of its own tasks; a run of MNLI also those of MNLI-mm and AX, one of
SuperGLUE's RTE also those of AX-b and AX-g. Answers are kept in the run folder, so a second call
is quick. A test file needs an answer in every row: where the model gave none, the most frequent
training label stands in (`--fallback majority`), or a random one. Label scoring always gives one
(`--decode score`); ReCoRD is always scored, since its entity is chosen by P(Yes) - P(No). A set
that is not whole is refused. The same answers give the same zip to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ppo_nlu import data, evaluate
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import cli
from ppo_nlu.storage.files import atomic_open, make_folder, parse_object
from ppo_nlu.tasks import TASKS, Example, TaskSpec
from ppo_nlu.tasks.custom import specs_of
from ppo_nlu.tasks.metrics import chosen_row


@dataclass(frozen=True)
class File:
    """A file of the zip: the task whose answers it holds, and how many rows (ReCoRD: queries)."""

    name: str
    task: str
    rows: int


FILES = {
    "glue": (
        File("AX.tsv", "ax", 1104),
        File("CoLA.tsv", "cola", 1063),
        File("MNLI-m.tsv", "mnli", 9796),
        File("MNLI-mm.tsv", "mnli-mm", 9847),
        File("MRPC.tsv", "mrpc", 1725),
        File("QNLI.tsv", "qnli", 5463),
        File("QQP.tsv", "qqp", 390965),
        File("RTE.tsv", "glue/rte", 3000),
        File("SST-2.tsv", "sst2", 1821),
        File("STS-B.tsv", "stsb", 1379),
        File("WNLI.tsv", "wnli", 146),
    ),
    "superglue": (
        File("AX-b.jsonl", "ax-b", 1104),
        File("AX-g.jsonl", "ax-g", 356),
        File("BoolQ.jsonl", "boolq", 3245),
        File("CB.jsonl", "cb", 250),
        File("COPA.jsonl", "copa", 500),
        File("MultiRC.jsonl", "multirc", 9693),  # in 166 objects
        File("RTE.jsonl", "superglue/rte", 3000),
        File("ReCoRD.jsonl", "record", 10000),
        File("WSC.jsonl", "wsc", 146),
        File("WiC.jsonl", "wic", 1400),
    ),
}
ALSO = {"mnli": ("mnli-mm", "ax"), "superglue/rte": ("ax-b", "ax-g")}  # tasks without training
# SuperGLUE labels that are not the data's value as a string.
JSON_LABELS: dict[str, Callable[[str], Any]] = {
    "copa": int,
    "multirc": int,
    "wsc": str.capitalize,  # "True" and "False"
}


def main(argv: list[str] | None = None) -> int:
    """The program."""
    args = _arguments(argv)
    output = _new_file(args.output)
    overrides = [text for text in args.targets if _is_override(text)]
    runs = [Run.read(text, overrides) for text in args.targets if not _is_override(text)]
    if not runs:
        raise UserError("RUN_DIR: name at least one finished run")
    parts, missing = collect(args.benchmark, runs)
    if missing and not (args.allow_partial and parts):
        raise UserError(
            f"{args.benchmark}: the submission is not whole: {'; '.join(missing)}; give the runs "
            "and test files that are missing, or --allow-partial"
        )
    fallback = Fallback(args.fallback, args.seed)
    contents = {}
    for part, given in answered(parts, args.decode):
        content, filled = write(part, given, fallback)
        contents[part.file.name] = content
        print(_line(part, filled, args.fallback), flush=True)
    for line in missing:
        print(f"not whole: {line}")
    with atomic_open(output, binary=True, new=True) as file:
        file.write(packed(contents))
    print(f"written: {output}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        "python -m ppo_nlu.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "targets", nargs="+", metavar="RUN_DIR|section.key=value", help="finished runs"
    )
    parser.add_argument("--benchmark", choices=tuple(FILES), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="ZIP")
    parser.add_argument(
        "--decode",
        choices=("greedy", "score", "sample"),
        default="greedy",
        help="how answers are read off the model (default: greedy)",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="write the files and rows that there are"
    )
    parser.add_argument(
        "--fallback",
        choices=("majority", "random"),
        default="majority",
        help="what stands in for an answer that could not be read (default: majority)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --fallback random")
    return parser.parse_intermixed_args(argv)


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _new_file(output: Path) -> Path:
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a new file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    return cli.require_place("--output", output)


SAME_ANSWERS = ("data.path", "data.cache", "log.", "eval.batch_size")  # overrides without a say


# ---- who answers what ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run and the tasks that it was trained on."""

    folder: Path
    cfg: Config
    specs: dict[str, TaskSpec]
    overrides: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str, overrides: Sequence[str]) -> Run:
        """The run of a folder; a UserError where it has not finished."""
        cfg = evaluate.run_config(folder, overrides)
        return cls(Path(folder), cfg, specs_of(cfg), tuple(overrides))

    def answers_folder(self, task: str) -> Path:
        """Where its answers to a task's test rows are kept: other overrides, another folder."""
        asked = sorted(text for text in self.overrides if not text.startswith(SAME_ANSWERS))
        digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
        folder = self.folder / (f"submit-{digest}" if asked else "submit")
        return folder / task.replace("/", "-")

    @property
    def trained_at(self) -> float:
        """When the newest file of what it learned was written."""
        encoder = evaluate.encoder_folder(self.folder)
        folder = encoder if self.cfg.method == "encoder" else self.folder / "adapter"
        return max(file.stat().st_mtime for file in folder.iterdir())


@dataclass(frozen=True)
class Part:
    """A file to write: the run that answers it, the task it was trained on, and the test rows."""

    file: File
    run: Run
    trained: TaskSpec
    examples: list[Example]

    @property
    def spec(self) -> TaskSpec:
        """The task that is answered."""
        return TASKS[self.file.task]


def collect(benchmark: str, runs: Sequence[Run]) -> tuple[list[Part], list[str]]:
    """What can be written, a run's files together, and what the submission lacks, a line each.

    Raises UserError where two runs answer one task, or a run none of the benchmark.
    """
    files = FILES[benchmark]
    sources = assign({file.task for file in files}, runs)
    for run in runs:
        if not any(owner is run for owner, _ in sources.values()):
            raise UserError(
                f"{run.folder}: was trained on {', '.join(run.specs)}, "
                f"and the {benchmark} submission needs none of that; leave the run away"
            )
    parts, missing = [], []
    for file in files:
        if file.task not in sources:
            missing.append(f"{file.name}: no run was trained on {_teacher(file.task)}")
            continue
        run, trained = sources[file.task]
        try:
            examples = data.load_split(TASKS[file.task], "test", run.cfg.data).examples
        except UserError as error:
            missing.append(f"{file.name}: {error}")
            continue
        parts.append(Part(file, run, trained, examples))
        missing += _lacking(parts[-1])
    return sorted(parts, key=lambda part: runs.index(part.run)), missing


def assign(tasks: set[str], runs: Sequence[Run]) -> dict[str, tuple[Run, TaskSpec]]:
    """For each task the run that answers it, and which of the run's own tasks it learned it from.

    A run answers first what it was trained on, then what goes with that and no other run learned.
    """
    found: dict[str, tuple[Run, TaskSpec]] = {}
    for run in runs:
        for name, spec in run.specs.items():
            if name in tasks and name in found:
                raise UserError(
                    f"{name}: both {found[name][0].folder} and {run.folder} were trained on it; "
                    "give one of the two"
                )
            if name in tasks:
                found[name] = (run, spec)
    for name, others in ALSO.items():
        for other in others:
            if name in found:
                found.setdefault(other, found[name])
    return found


def _teacher(task: str) -> str:
    return next((name for name, others in ALSO.items() if task in others), task)


def _lacking(part: Part) -> Iterator[str]:
    """What is wrong with the test rows, if anything."""
    file, examples = part.file, part.examples
    count = len(_queries(examples)) if file.task == "record" else len(examples)
    if count != file.rows:
        yield f"{file.name}: {count:,} test rows, the official file has {file.rows:,}"
    elif part.spec.benchmark == "glue" and [_index(e) for e in examples] != list(range(count)):
        yield f"{file.name}: the test rows are not numbered 0 to {count - 1:,} in order"
    elif len({example.id for example in examples}) < len(examples):
        yield f"{file.name}: some test rows come twice, so others are missing"


def _index(example: Example) -> int:
    return int(example.extra.get("idx", example.id))


def _queries(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each of ReCoRD's queries, in order."""
    found: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        found.setdefault(example.group, []).append(row)
    return found


# ---- answers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What the model answered to one test row."""

    prediction: str | None
    probabilities: dict[str, float] | None


def answered(parts: Sequence[Part], decode: str) -> Iterator[tuple[Part, list[Given]]]:
    """The answers to each part, those kept in the run folder or else the model's now.

    A run's parts must be neighbours: its model is loaded once, and only if it is needed.
    """
    holder: Run | None = None
    policy: Policy | Encoder | None = None
    for part in parts:
        if part.run is not holder:
            holder, policy = part.run, None
        # An entity is chosen by P(Yes) - P(No), which only scoring gives.
        how = "score" if part.spec.reader == "record" else decode
        path = part.run.answers_folder(part.spec.name) / f"predictions-{how}.jsonl"
        given = kept(path, part)
        if given is None:
            policy = policy or evaluate.load_trained(part.run.cfg, part.run.folder)
            given = ask(policy, part, path, how)
        yield part, given


def kept(path: Path, part: Part) -> list[Given] | None:
    """The answers of an earlier call; None where they are not there, are not to these very rows,
    or are older than the trained weights."""
    if not path.is_file() or path.stat().st_mtime < part.run.trained_at:
        return None
    try:
        rows = [parse_object(line) for line in path.read_text("utf-8").splitlines()]
        ids = [row["id"] for row in rows]
        given = [Given(row["prediction"], row["probabilities"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        return None
    fits = all(row.prediction is None or _allowed(part.spec, row.prediction) for row in given)
    return given if fits and ids == [example.id for example in part.examples] else None


def _allowed(spec: TaskSpec, prediction: Any) -> bool:
    if spec.rating is None:
        return prediction in spec.words
    try:
        return math.isfinite(float(prediction))
    except (TypeError, ValueError):
        return False


def ask(policy: Policy | Encoder, part: Part, path: Path, decode: str) -> list[Given]:
    """The model's answers to a part's test rows, written to `path` as they come.

    They are asked as the task that the run was trained on, whose prompt is the same and which has
    the rows for worked examples.
    """
    cfg, spec = part.run.cfg, part.trained
    evaluate.require_fit(policy, spec, cfg)
    make_folder(path.parent)
    answers = evaluate.answer_all(policy, spec, cfg, part.examples, decode)
    rows = evaluate.shown(
        evaluate.recorded(path, answers), part.file.name, len(part.examples), cfg.log.progress
    )
    return [Given(row.prediction, row.probabilities) for row in rows]


# ---- files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fallback:
    """What stands in for an answer that could not be read: "majority" or "random"."""

    kind: str
    seed: int

    def source(self, part: Part) -> Callable[[], str]:
        """A function that gives one stand-in after the other.

        Majority: the most frequent training label, of a rating the mean. Random, as in the
        paper's code: any label alike, of a rating any number of the range.
        """
        spec, draw = part.spec, self.draw(part)
        if self.kind == "majority":
            return cache(lambda: usual(part))
        if spec.rating:
            low, high = spec.rating.low, spec.rating.high
            return lambda: str(draw.uniform(low, high))
        return lambda: draw.choice(spec.words)

    def draw(self, part: Part) -> random.Random:
        """A generator of its own for each file."""
        return random.Random(f"{self.seed} {part.file.name}")


def usual(part: Part) -> str:
    """The most frequent training label, the first in the task's list where two are; the mean of
    a rating. AX, AX-b and AX-g take that of the task that the run learned."""
    spec = part.trained
    try:
        rows = data.load_split(spec, "train", part.run.cfg.data).examples
    except UserError as error:
        raise UserError(f"{part.file.name}: {error}; or use --fallback random") from error
    labels = [str(row.label) for row in rows]
    if spec.rating:
        return str(math.fsum(map(float, labels)) / len(labels))
    counts = Counter(labels)
    return max(spec.words, key=lambda word: counts[word])


def write(part: Part, given: Sequence[Given], fallback: Fallback) -> tuple[bytes, int]:
    """The content of a file, and how many of its answers are stand-ins."""
    if part.file.task == "record":
        rows, filled = _record_lines(part, given, fallback)
    else:
        source = fallback.source(part)
        answers = [source() if row.prediction is None else row.prediction for row in given]
        filled = sum(row.prediction is None for row in given)
        rows = list(_lines(part, [_value(part.spec, answer) for answer in answers]))
    return "".join(f"{line}\n" for line in rows).encode(), filled


def _value(spec: TaskSpec, answer: str) -> str:
    """An answer as the data files write it: a label's value, a rating within its range."""
    if spec.rating:
        bounded = min(max(float(answer), spec.rating.low), spec.rating.high)
        return f"{bounded + 0.0:.3f}"
    return spec.value_of(answer)


def _lines(part: Part, values: Sequence[str]) -> Iterator[str]:
    pairs = list(zip(part.examples, values, strict=True))
    label = JSON_LABELS.get(part.file.task, str)
    if part.spec.benchmark == "glue":
        yield "index\tprediction"
        yield from (f"{_index(example)}\t{value}" for example, value in pairs)
    elif part.file.task == "multirc":
        yield from _paragraphs([(example.extra["idx"], label(value)) for example, value in pairs])
    else:
        rows = ({"idx": _index(example), "label": label(value)} for example, value in pairs)
        yield from map(json.dumps, rows)


def _paragraphs(rows: Sequence[tuple[tuple[int, int, int], int]]) -> Iterator[str]:
    """MultiRC: an object for each paragraph, with its questions and their answers inside."""
    paragraphs: dict[int, dict[int, list[dict[str, int]]]] = {}
    for (paragraph, question, answer), label in rows:
        questions = paragraphs.setdefault(paragraph, {})
        questions.setdefault(question, []).append({"idx": answer, "label": label})
    for paragraph, questions in paragraphs.items():
        nested = [{"idx": number, "answers": answers} for number, answers in questions.items()]
        yield json.dumps({"idx": paragraph, "passage": {"questions": nested}})


def _record_lines(part: Part, given: Sequence[Given], fallback: Fallback) -> tuple[list[str], int]:
    """ReCoRD: an object for each query, with the entity that was chosen. For a query without one
    an entity stands in: the one that the passage names most often, or a random one."""
    draw, filled = fallback.draw(part), 0
    lines = []
    for rows in _queries(part.examples).values():
        answers = [given[row] for row in rows]
        entities = [part.examples[row].extra["entity"] for row in rows]
        place = chosen_row(
            part.spec, [a.prediction for a in answers], [a.probabilities for a in answers]
        )
        if place is not None:
            entity = entities[place]
        else:
            filled += 1
            passage = part.examples[rows[0]].fields["passage"]
            often = max(entities, key=passage.count)
            entity = often if fallback.kind == "majority" else draw.choice(entities)
        lines.append(json.dumps({"idx": _index(part.examples[rows[0]]), "label": entity}))
    return lines, filled


def _line(part: Part, filled: int, kind: str) -> str:
    record = part.file.task == "record"
    count = len(_queries(part.examples)) if record else len(part.examples)
    line = f"{part.file.name}: {count:,} rows"
    what = "unanswered queries" if record else "unparsed answers"
    return f"{line}, {filled:,} {what} filled ({kind})" if filled else line


def packed(contents: dict[str, bytes]) -> bytes:
    """A zip of the files in the order of their names, without the time and the machine in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, contents[name], compresslevel=6)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(cli.run(main))

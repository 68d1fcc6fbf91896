"""A submission to a benchmark's server: its files, and which finished run answers which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppo_nlu import data
from ppo_nlu.answering.load_run import run_config, trained_folder
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, Example, TaskSpec, benchmark_tasks
from ppo_nlu.tasks.custom import specs_of

BENCHMARKS = ("glue", "superglue")  # those with a server
SAME_ANSWERS = ("data.path", "data.cache", "log.", "eval.batch_size")  # overrides without a say


@dataclass(frozen=True)
class File:
    """A file of the zip: the task whose answers it holds, and how many rows (ReCoRD: queries)."""

    name: str
    task: str
    rows: int


def files_of(benchmark: str) -> list[File]:
    """The files that a benchmark's server takes, by their names."""
    specs = [spec for spec in benchmark_tasks(benchmark) if spec.leaderboard_file]
    files = [File(spec.leaderboard_file, spec.name, spec.leaderboard_rows) for spec in specs]
    return sorted(files, key=lambda file: file.name)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run and the tasks that it was trained on."""

    folder: Path
    cfg: Config
    specs: dict[str, TaskSpec]
    overrides: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str, overrides: Sequence[str]) -> FinishedRun:
        """The run of a folder; a UserError where it has not finished."""
        cfg = run_config(folder, overrides)
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
        folder = trained_folder(self.folder, self.cfg)
        return max(file.stat().st_mtime for file in folder.iterdir())


@dataclass(frozen=True)
class Entry:
    """A file to write: the run that answers it, the task it was trained on, and the test rows."""

    file: File
    run: FinishedRun
    trained: TaskSpec
    examples: list[Example]

    @property
    def spec(self) -> TaskSpec:
        """The task that is answered."""
        return TASKS[self.file.task]


def collect(benchmark: str, runs: Sequence[FinishedRun]) -> tuple[list[Entry], list[str]]:
    """What can be written, a run's files together, and what the submission lacks, a line each.

    Raises UserError where two runs answer one task, or a run none of the benchmark.
    """
    files = files_of(benchmark)
    sources = assign({file.task for file in files}, runs)
    for run in runs:
        if not any(owner is run for owner, _ in sources.values()):
            raise UserError(
                f"{run.folder}: was trained on {', '.join(run.specs)}, "
                f"and the {benchmark} submission needs none of that; leave the run away"
            )
    entries, missing = [], []
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
        entries.append(Entry(file, run, trained, examples))
        missing += lacking(entries[-1])
    return sorted(entries, key=lambda entry: runs.index(entry.run)), missing


def assign(tasks: set[str], runs: Sequence[FinishedRun]) -> dict[str, tuple[FinishedRun, TaskSpec]]:
    """For each task the run that answers it, and which of the run's own tasks it learned it from.

    A run answers first what it was trained on, then what goes with that and no other run learned.
    """
    found: dict[str, tuple[FinishedRun, TaskSpec]] = {}
    for run in runs:
        for name, spec in run.specs.items():
            if name in tasks and name in found:
                raise UserError(
                    f"{name}: both {found[name][0].folder} and {run.folder} were trained on it; "
                    "give one of the two"
                )
            if name in tasks:
                found[name] = (run, spec)
    for name in tasks:
        teacher = TASKS[name].trained_with
        if teacher in found:
            found.setdefault(name, found[teacher])
    return found


def _teacher(task: str) -> str:
    return TASKS[task].trained_with or task


def lacking(entry: Entry) -> Iterator[str]:
    """What is wrong with the test rows, if anything."""
    file, examples = entry.file, entry.examples
    count = len(queries_of(examples)) if file.task == "record" else len(examples)
    if count != file.rows:
        yield f"{file.name}: {count:,} test rows, the official file has {file.rows:,}"
    elif entry.spec.benchmark == "glue" and [index_of(e) for e in examples] != list(range(count)):
        yield f"{file.name}: the test rows are not numbered 0 to {count - 1:,} in order"
    elif len({example.id for example in examples}) < len(examples):
        yield f"{file.name}: some test rows come twice, so others are missing"


def index_of(example: Example) -> int:
    """The number of a row in the official test file."""
    return int(example.extra.get("idx", example.id))


def queries_of(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each of ReCoRD's queries, in order."""
    found: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        found.setdefault(example.group, []).append(row)
    return found

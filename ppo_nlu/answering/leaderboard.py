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
SAME_ANSWERS = (
    "data.path",
    "data.cache",
    "log.",
    "eval.batch_size",
)  # overrides that change no answer


def submitted(benchmark: str) -> list[TaskSpec]:
    """The tasks that a benchmark's server takes a file of, in the order of the files' names."""
    specs = [spec for spec in benchmark_tasks(benchmark) if spec.leaderboard_file]
    return sorted(specs, key=lambda spec: spec.leaderboard_file)


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
        """Where its answers to a task's test rows are kept; other overrides have another folder."""
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
    """A file to write: its task, the run that answers it, and the test rows.

    `trained` is the run's own task, which is another where the answered one has no training rows.
    """

    spec: TaskSpec
    run: FinishedRun
    trained: TaskSpec
    examples: list[Example]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.spec.leaderboard_file

    @property
    def by_query(self) -> bool:
        """Whether the rows of each query become one row of the file, as in ReCoRD."""
        return self.spec.leaderboard_layout == "queries"

    @property
    def rows(self) -> int:
        """How many rows the file will have."""
        return len(queries_of(self.examples) if self.by_query else self.examples)


def collect(benchmark: str, runs: Sequence[FinishedRun]) -> tuple[list[Entry], list[str]]:
    """The files that can be written, those of a run together; a line for each thing missing.

    Raises UserError where two runs answer one task, or a run none of the benchmark.
    """
    specs = submitted(benchmark)
    sources = assign({spec.name for spec in specs}, runs)
    for run in runs:
        if not any(owner is run for owner, _ in sources.values()):
            raise UserError(
                f"{run.folder}: was trained on {', '.join(run.specs)}, "
                f"and the {benchmark} submission needs none of that; leave this run out"
            )
    entries, missing = [], []
    for spec in specs:
        if spec.name not in sources:
            teacher = spec.trained_with or spec.name
            missing.append(f"{spec.leaderboard_file}: no run was trained on {teacher}")
            continue
        run, trained = sources[spec.name]
        try:
            examples = data.load_split(spec, "test", run.cfg.data).examples
        except UserError as error:
            missing.append(f"{spec.leaderboard_file}: {error}")
            continue
        entries.append(Entry(spec, run, trained, examples))
        missing += lacking(entries[-1])
    return sorted(entries, key=lambda entry: runs.index(entry.run)), missing


def assign(tasks: set[str], runs: Sequence[FinishedRun]) -> dict[str, tuple[FinishedRun, TaskSpec]]:
    """For each task the run that answers it, and the run's own task that serves it.

    A run answers the tasks that it was trained on, and those that are `trained_with` one of them,
    unless another run was trained on these.
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


def lacking(entry: Entry) -> Iterator[str]:
    """What is wrong with the test rows, if anything."""
    examples, count, official = entry.examples, entry.rows, entry.spec.leaderboard_rows
    numbered = entry.spec.benchmark == "glue"
    if count != official:
        yield f"{entry.name}: {count:,} test rows, the official file has {official:,}"
    elif numbered and [index_of(e) for e in examples] != list(range(count)):
        yield f"{entry.name}: the test rows are not numbered 0 to {count - 1:,} in order"
    elif len({example.id for example in examples}) < len(examples):
        yield f"{entry.name}: some test rows come twice, so others are missing"


def index_of(example: Example) -> int:
    """The number of a row in the official test file."""
    return int(example.extra.get("idx", example.id))


def queries_of(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each query, in order."""
    found: dict[str, list[int]] = {}
    for row, example in enumerate(examples):
        found.setdefault(example.group, []).append(row)
    return found

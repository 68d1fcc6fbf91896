"""What the finished cells of a grid say: scores by method, task and seed, and their spread.

Reads the folder of `ppo_nlu.reproduce` and computes; how it is shown is in `report`.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppo_nlu.errors import UserError
from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.storage import files, sealed
from ppo_nlu.tasks import TASKS, metrics

DECODES = {"sample": "sampled", "greedy": "greedy", "score": "scored"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """What one cell says of one task."""

    cell: str
    method: str
    model: str
    task: str
    seed: int
    entry: Json  # the task's part of summary.json
    summary: Json
    started: Json  # where and with what the cell ran

    def report(self, decode: str) -> Json | None:
        """The report under one way of decoding; None where there is none."""
        found = self.entry.get("reports", {}).get(decode)
        return found if isinstance(found, dict) else None

    def value(self, decode: str) -> float | None:
        """The task's one number, the mean of its metrics, in percent."""
        found = self.report(decode)
        return None if found is None else 100 * float(found["score"])

    def metric(self, decode: str, name: str) -> float | None:
        """One metric in percent."""
        value = (self.report(decode) or {}).get("metrics", {}).get(name)
        return None if value is None else 100 * float(value)

    @property
    def note(self) -> str:
        """How the data was found and what else is to be known, without folders of this machine."""
        taught = f"trained on {self.entry.get('train_note')}" if self.partly_taught else None
        parts = (self.entry.get("note"), taught, self.started.get("note"))
        return short_paths("; ".join(str(part) for part in parts if part))

    @property
    def partly_taught(self) -> bool:
        """Whether it was trained on a part of the official training set."""
        return bool(self.entry.get("train_partial"))

    @property
    def partial(self) -> bool:
        """Whether it was measured or trained on a part of an official set."""
        return bool(self.entry.get("partial")) or self.partly_taught


@dataclass(frozen=True)
class Results:
    """All of a grid's folder."""

    folder: Path
    grid: Json
    scores: list[Score]
    summaries: dict[str, tuple[Json, Json]]  # cell: (its plan, its summary)
    failures: Json
    missing: list[str]  # planned, neither finished nor failed
    started: Json

    def pick(
        self, method: str | None = None, task: str | None = None, model: str | None = None
    ) -> list[Score]:
        """The scores of a method, task and model, in the order of seeds."""
        found = [
            row
            for row in self.scores
            if method in (None, row.method)
            and task in (None, row.task)
            and model in (None, row.model)
        ]
        return sorted(found, key=lambda row: row.seed)

    def methods(self) -> list[str]:
        """The methods that have a score, in the order of the tables."""
        return [name for name in METHODS if any(row.method == name for row in self.scores)]

    def tasks(self) -> list[str]:
        """The tasks that have a score, in the order of the task table."""
        names = {row.task for row in self.scores}
        return [name for name in TASKS if name in names] + sorted(names - set(TASKS))

    def preparations(self) -> list[tuple[Json, Json]]:
        """Cell and summary of what came before all methods: the teaching of a base's form."""
        return [pair for pair in self.summaries.values() if pair[0]["method"] not in METHODS]

    def models(self) -> list[str]:
        """The language models, in their order."""
        return list(dict.fromkeys(row.model for row in self.scores if row.method != "encoder"))


def load(folder: Path) -> Results:
    """Everything in the folder of a grid; a UserError where it is none."""
    grid = read_json(folder / "grid.json")
    if not grid:
        raise UserError(f"{folder}: no grid.json; name the folder that ppo_nlu.reproduce wrote")
    started, failures = read_table(folder / "cells.json"), read_table(folder / "failures.json")
    plan = grid.get("plan", {})
    keys = {"method", "model", "tasks", "seed"}
    if not isinstance(plan, dict) or not all(
        isinstance(cell, dict) and keys <= cell.keys() for cell in plan.values()
    ):
        raise UserError(f"{folder}/grid.json: its plan is damaged; start the grid in a new folder")
    scores, summaries = [], {}
    for name, cell in plan.items():
        summary = read_summary(folder / "cells" / name / "summary.json")
        if not summary:
            continue
        summaries[name] = (cell, summary)
        if cell["method"] not in METHODS:  # what only prepares the others
            continue
        for task, entry in summary.get("tasks", {}).items():
            scores.append(
                Score(
                    name, cell["method"], cell["model"], task, cell["seed"], entry, summary,
                    started.get(name, {}),
                )
            )  # fmt: skip
    failures = {k: v for k, v in failures.items() if k not in summaries}
    missing = [name for name in plan if name not in summaries and name not in failures]
    return Results(folder, grid, scores, summaries, failures, missing, started)


def read_json(path: Path) -> Json:
    """The object in a JSON file; empty where it is missing or torn."""
    try:
        return sealed.read_object(path)
    except (OSError, ValueError):
        return {}


def read_table(path: Path) -> dict[str, Json]:
    """The objects in an object of a JSON file, by their names; what is no object is left out."""
    return {name: row for name, row in read_json(path).items() if isinstance(row, dict)}


def read_summary(path: Path) -> Json:
    """A summary.json; empty where it is missing or damaged, as if its run had not finished."""
    found = read_json(path)
    tasks = found.get("tasks", {})
    whole = isinstance(tasks, dict) and all(isinstance(entry, dict) for entry in tasks.values())
    return found if whole else {}


def short_paths(text: str) -> str:
    """Long absolute paths cut to their last two parts."""
    return re.sub(r"(?<!\S)/(?:[^\s;,()/]+/)+([^\s;,()/]+/[^\s;,()/]+)", r".../\1", text)


def is_diagnostic(task: str) -> bool:
    """Whether a task is in no average."""
    return task in TASKS and TASKS[task].diagnostic


# --- means and comparisons ------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over `count` seeds (sd None for one)."""

    mean: float
    sd: float | None
    count: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), sd, len(known))


@dataclass(frozen=True)
class Comparison:
    """Mean difference a - b over tasks, its 95 % interval over tasks and their seeds, and both
    means; points of a hundred."""

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    pairs: int
    tasks: int
    by_task: dict[str, float]  # the mean difference of each task


def compare(
    results: Results, a: str, b: str, decode: str, resamples: int = 10000
) -> Comparison | None:
    """Method a against method b on the (model, task, seed) that both have; None where none is.

    Every task counts the same, however many seeds it has; the interval is the percentile bootstrap
    of that mean over tasks drawn with replacement, and of each over its seeds: the seeds of one
    task share what is particular to the task, so they are no independent draws.
    """
    first, second = (
        {(row.model, row.task, row.seed): row.value(decode) for row in results.pick(method)}
        for method in (a, b)
    )
    keys = [
        key
        for key, value in first.items()
        if value is not None and second.get(key) is not None and not is_diagnostic(key[1])
    ]
    if not keys:
        return None
    table = np.array([[first[key], second[key]] for key in keys], dtype=float)
    tasks = [key[1] for key in keys]
    weights = np.array([1 / tasks.count(task) for task in tasks])
    means = weights @ table / weights.sum()
    gaps = table[:, 0] - table[:, 1]
    of_task = {
        task: np.array([g for g, t in zip(gaps, tasks, strict=True) if t == task])
        for task in dict.fromkeys(tasks)
    }
    by_task = {task: float(found.mean()) for task, found in of_task.items()}
    low, high = np.quantile(_resampled(list(of_task.values()), resamples), (0.025, 0.975)).tolist()
    return Comparison(
        float(means[0]), float(means[1]), float(means[0] - means[1]), (low, high), len(keys),
        len(by_task), by_task,
    )  # fmt: skip


def _resampled(of_task: Sequence[np.ndarray], resamples: int) -> np.ndarray:
    """Means over tasks drawn with replacement, each over as many draws of its own seeds."""
    draw = np.random.default_rng(0)
    means = np.stack(
        [
            found[draw.integers(0, len(found), (resamples, len(of_task), len(found)))].mean(2)
            for found in of_task
        ]
    )  # (tasks, resamples, places): a task may be drawn at several places, each with seeds anew
    picked = draw.integers(0, len(of_task), (resamples, len(of_task)))
    rows, places = np.indices(picked.shape)
    return means[picked, rows, places].mean(1)


def averages(
    results: Results, benchmark: str, method: str, decode: str, style: str
) -> Spread | None:
    """The benchmark's average over the seeds that have every task of it; None where none has."""
    values = []
    for seed in {row.seed for row in results.pick(method)}:
        found = {}
        for row in results.pick(method):
            report = row.report(decode)
            if row.seed == seed and report is not None:
                found[row.task] = report["metrics"]
        value = metrics.average(benchmark, found, style)
        values.append(None if value is None else 100 * value)
    return spread(values)


def mean_of_present(
    results: Results, method: str, decode: str, tasks: Sequence[str]
) -> tuple[Spread, int] | None:
    """The mean over those of `tasks` that the method has, diagnostic sets left out, and how many
    they are; its spread over the seeds that have them all."""
    by_task: dict[str, dict[int, float]] = {}
    for task in tasks:
        rows = {row.seed: row.value(decode) for row in results.pick(method, task)}
        known = {seed: value for seed, value in rows.items() if value is not None}
        if known and not is_diagnostic(task):
            by_task[task] = known
    if not by_task:
        return None
    seeds = set.intersection(*(set(rows) for rows in by_task.values()))
    whole = spread([statistics.fmean(rows[s] for rows in by_task.values()) for s in sorted(seeds)])
    mean = statistics.fmean(statistics.fmean(rows.values()) for rows in by_task.values())
    return Spread(mean, whole.sd if whole else None, whole.count if whole else 0), len(by_task)


# --- what it cost -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What the training runs of a method took, in means of its runs."""

    method: str
    runs: int
    labels: float
    steps: float
    seconds: float  # of training
    wall: float  # with loading and evaluation
    per_step: float
    per_label: float


def costs(results: Results) -> list[Cost]:
    """The cost of each method that trains."""
    found = []
    for method in METHODS:
        rows = [s for _, s in runs_of(results, method)]
        if rows:
            labels, steps, seconds, wall = (
                [float(row.get(key) or 0) for row in rows]
                for key in ("train_labels", "train_steps", "train_s", "wall_s")
            )
            mean = statistics.fmean
            found.append(
                Cost(
                    method, len(rows), mean(labels), mean(steps), mean(seconds), mean(wall),
                    sum(seconds) / max(sum(steps), 1), sum(seconds) / max(sum(labels), 1),
                )
            )  # fmt: skip
    return found


def runs_of(results: Results, method: str) -> Iterator[tuple[Json, Json]]:
    """(plan, summary) of the cells of a method that trained."""
    for plan, summary in results.summaries.values():
        if plan["method"] == method and summary.get("train_s"):
            yield plan, summary


def cost_ratio(results: Results, a: str, b: str) -> tuple[float, int] | None:
    """Training seconds of a over those of b, summed over the runs both have, and how many."""
    first, second = (
        {
            (plan["model"], tuple(sorted(plan["tasks"])), plan["seed"]): float(summary["train_s"])
            for plan, summary in runs_of(results, method)
        }
        for method in (a, b)
    )
    both = [key for key in first if key in second]
    if not both:
        return None
    return sum(first[k] for k in both) / sum(second[k] for k in both), len(both)


# --- rows ---------------------------------------------------------------------------------------


def rows(results: Results) -> list[dict[str, Any]]:
    """One flat row for each (cell, task): what was measured, where, and of what."""
    found = []
    for score in results.scores:
        said, summary = score.started, score.summary
        reports = {name: score.report(name) for name in DECODES}
        values = {
            name: {} if report is None else report["metrics"] for name, report in reports.items()
        }
        found.append(
            {
                "commit": said.get("commit", ""),
                "torch": said.get("torch", ""),
                "transformers": said.get("transformers", ""),
                "device": said.get("device", ""),
                "threads": said.get("threads", ""),
                "jobs": said.get("jobs", ""),
                "method": score.method,
                "model": score.model if score.method != "encoder" else summary.get("model", ""),
                "task": score.task,
                "seed": score.seed,
                "rows": score.entry.get("rows", ""),
                **{
                    name: "" if report is None else f"{report['score']:.4f}"
                    for name, report in reports.items()
                },
                "unparsed": _number(_unparsed(score)),
                "metrics": "; ".join(
                    f"{DECODES[decode]} {name} {value:.4f}"
                    for decode, table in values.items()
                    for name, value in table.items()
                ),
                "train_labels": summary.get("train_labels", 0),
                "train_steps": summary.get("train_steps", ""),
                "train_s": _number(summary.get("train_s"), 1),
                "wall_s": _number(summary.get("wall_s"), 1),
                "partial": "yes" if score.partial else "no",
                "note": score.note,
            }
        )
    return found


def _unparsed(score: Score) -> float | None:
    report = score.report("sample") or score.report("greedy") or score.report("score")
    return None if report is None else float(report.get("unparsed", 0.0))


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def write_rows(results: Results, output: Path) -> None:
    """Write rows.csv whole."""
    table = rows(results)
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    files.make_folder(output)
    files.atomic_write_text(output / "rows.csv", text.getvalue())


def unparsed_rates(results: Results) -> dict[str, dict[str, float]]:
    """{method: {task: mean rate of sampled answers that name none, in percent}}."""
    table: dict[str, dict[str, float]] = {}
    for method in results.methods():
        for task in results.tasks():
            found: Mapping[str, Any] = {
                row.cell: _unparsed(row) for row in results.pick(method, task)
            }
            mean = spread(list(found.values()))
            if mean is not None:
                table.setdefault(method, {})[task] = 100 * mean.mean
    return table

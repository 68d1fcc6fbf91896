"""Means over seeds and tasks, comparisons of two methods with their intervals, and costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.reproduce.results import Json, Results
from ppo_nlu.tasks import TASKS, metrics


def is_diagnostic(task: str) -> bool:
    """Whether a task is in no average."""
    return task in TASKS and TASKS[task].diagnostic


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over `count` seeds (sd None for one)."""

    mean: float
    sd: float | None
    count: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the known values; None if there are none."""
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
        a=float(means[0]),
        b=float(means[1]),
        difference=float(means[0] - means[1]),
        interval=(low, high),
        pairs=len(keys),
        tasks=len(by_task),
        by_task=by_task,
    )


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
                    method=method,
                    runs=len(rows),
                    labels=mean(labels),
                    steps=mean(steps),
                    seconds=mean(seconds),
                    wall=mean(wall),
                    per_step=sum(seconds) / max(sum(steps), 1),
                    per_label=sum(seconds) / max(sum(labels), 1),
                )
            )
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

"""The one number of a task, and that of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ppo_nlu.tasks import TaskSpec, benchmark_tasks


def task_score(values: Mapping[str, float]) -> float:
    """The mean of a task's metrics: its part in the benchmark's official average."""
    return float(np.mean(list(values.values())))


def average(
    benchmark: str, scores: Mapping[str, Mapping[str, float]], style: str = "official"
) -> float | None:
    """The benchmark's one number from {task: {metric: value}}; None where a task is missing.

    `benchmark` is glue or superglue. "official" is the leaderboard's, where every task counts with
    the mean of its metrics; "paper" is the plain mean of what the paper's table shows.
    """
    columns = _columns(benchmark, style)
    if not columns or any(spec.name not in scores for column in columns for spec in column):
        return None
    return float(
        np.mean([np.mean([_part(scores[s.name], s, style) for s in column]) for column in columns])
    )


def _columns(benchmark: str, style: str) -> list[list[TaskSpec]]:
    """The tasks in each column of an average; those of one column are averaged first.

    The leaderboard counts MNLI's two test sets as one task, the paper as two.
    """
    columns: dict[str, list[TaskSpec]] = {}
    for spec in benchmark_tasks(benchmark):
        if style in spec.averages:
            home = spec.trained_with if style == "official" else ""
            columns.setdefault(home or spec.name, []).append(spec)
    return list(columns.values())


def _part(values: Mapping[str, float], spec: TaskSpec, style: str) -> float:
    names = spec.shown if style == "paper" else values
    return task_score({name: values[name] for name in names})

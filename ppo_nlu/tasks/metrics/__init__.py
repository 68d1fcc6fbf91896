"""How good the predictions are: the benchmarks' metrics, counts, and their spread. numpy only.

Every rate is a fraction of 1, correlations are in [-1, 1]. A response without an answer (None) is
wrong, counts as a prediction of no class, and is reported by itself.

A metric sums up each unit (a row, or a group of rows that are judged together) in a few numbers,
and its value follows from how often each unit was drawn. So the value on all rows and the spread
over rows drawn with replacement come from the same few lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.metrics import choice, ratings, text
from ppo_nlu.tasks.metrics.averages import average, task_score
from ppo_nlu.tasks.metrics.bootstrap import interval
from ppo_nlu.tasks.metrics.choice import chosen_row, classification_report
from ppo_nlu.tasks.metrics.ratings import mean_error
from ppo_nlu.tasks.metrics.rows import Metric, Rows
from ppo_nlu.tasks.metrics.text import best_match, exact, token_f1

METRICS: dict[str, Metric] = choice.METRICS | ratings.METRICS | text.METRICS

__all__ = [
    "METRICS", "Metric", "Rows", "average", "best_match", "chosen_row", "classification_report",
    "evaluate", "exact", "mean_error", "report", "task_score", "token_f1",
]  # fmt: skip


def evaluate(
    spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> dict[str, float]:
    """The task's own metrics, by name.

    `predictions` are label words, numbers as text or free text, None where the response held no
    answer; a rating without an answer counts as the middle of the range, the guess that says
    nothing, and one outside the range as its nearer end. `probabilities` by label word let ReCoRD
    pick the best entity of a query. A constant rating has no correlation: 0 and a warning.
    """
    return _evaluate(Rows(spec, examples, predictions, probabilities))


def _evaluate(rows: Rows) -> dict[str, float]:
    table = _metrics_of(rows.spec)
    if rows.spec.kind == "rating":
        ratings.warn_constant(rows.gold_numbers, rows.numbers)
    return {name: metric.of(rows) for name, metric in table.items()}


def _metrics_of(spec: TaskSpec) -> dict[str, Metric]:
    for name in spec.metrics:
        if name not in METRICS or METRICS[name].kind != spec.kind:
            known = ", ".join(n for n, metric in METRICS.items() if metric.kind == spec.kind)
            raise UserError(f"metrics of {spec.name}: unknown metric {name!r}; use {known}")
    return {name: METRICS[name] for name in spec.metrics}


def report(
    spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about the predictions, ready for JSON; `interval` is the 95 % bootstrap interval
    of `score`, the mean of the metrics, over whole groups; None with `resamples=0`."""
    rows = Rows(spec, examples, predictions, probabilities)
    values = _evaluate(rows)
    head = {
        "count": len(rows.examples),
        "metrics": values,
        "score": task_score(values),
        "interval": interval(rows, list(_metrics_of(spec).values()), resamples, seed),
        "unparsed": float(np.mean([prediction is None for prediction in predictions])),
    }
    if spec.kind == "text":
        return head | {"predicted": {}}
    if spec.kind == "rating":
        return head | {"mean_error": mean_error(rows), "predicted": ratings.histogram(rows)}
    labels = [str(example.label) for example in examples]
    figures = classification_report(labels, predictions, spec.words)
    edges = interval(rows, [METRICS["accuracy"]], resamples, seed)
    return head | {"accuracy": figures["accuracy"], "accuracy_interval": edges} | figures

"""Metrics of ratings: correlations, the mean error, and a histogram."""

from __future__ import annotations

import itertools
import warnings

import numpy as np

from ppo_nlu.tasks.metrics.rows import UNPARSED, Metric, Rows

PARTS = 5  # of a rating's range, in its histogram


def pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation of two lists (N,); 0 and a warning where one of them is constant."""
    warn_constant(gold, predicted)
    return float(_pearson(np.ones((1, len(gold))), np.stack([gold, predicted], axis=1))[0])


def spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation of the average ranks; 0 and a warning where one is constant."""
    warn_constant(gold, predicted)
    return float(_spearman(np.ones((1, len(gold))), np.stack([gold, predicted], axis=1))[0])


def warn_constant(gold: np.ndarray, predicted: np.ndarray) -> None:
    """A warning where all numbers of a list are the same, so that there is no correlation."""
    for name, column in (("gold", gold), ("predicted", predicted)):
        if np.ptp(column) == 0:
            warnings.warn(f"all {name} ratings are {column[0]:g}: correlation 0", stacklevel=3)


def _keep_numbers(rows: Rows) -> np.ndarray:
    """(gold, predicted) of every row: ratings are drawn by the row."""
    return np.stack([rows.gold_numbers, rows.numbers], axis=1)


def _pearson(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    gold, predicted = (np.broadcast_to(column, times.shape) for column in kept.T)
    return _correlation(times, gold, predicted)


def _spearman(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    gold, predicted = (_ranks(times, column) for column in kept.T)
    return _correlation(times, gold, predicted)


def _ranks(times: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The average rank of every row among all drawn, (R, U): those below + half of the equal."""
    values, places = np.unique(column, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(values)))
    equal = np.add.reduceat(times[:, order], starts, axis=1)
    return (np.cumsum(equal, axis=1) - (equal - 1) / 2)[:, places]


def _correlation(times: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y (R, U), each pair counted `times` (R, U); 0 if constant."""
    total = times.sum(axis=1, keepdims=True)
    dx, dy = (v - (times * v).sum(axis=1, keepdims=True) / total for v in (x, y))
    xx, yy, xy = ((times * product).sum(axis=1) for product in (dx * dx, dy * dy, dx * dy))
    # Rounding leaves a constant column a spread of about (1e-16 of its size)².
    least = [1e-24 * np.maximum((times * v * v).sum(axis=1), 1e-300) for v in (x, y)]
    defined = (xx > least[0]) & (yy > least[1])
    return np.where(defined, xy / np.sqrt(np.where(defined, xx * yy, 1.0)), 0.0)


METRICS = {
    "pearson": Metric("rating", _keep_numbers, _pearson),
    "spearman": Metric("rating", _keep_numbers, _spearman),
}


def mean_error(rows: Rows) -> float:
    """The mean distance of a rating from its gold number, in the rating's own unit."""
    return float(np.mean(np.abs(rows.numbers - rows.gold_numbers)))


def histogram(rows: Rows) -> dict[str, int]:
    """How many predicted ratings are in each part of the range, and how many answers name none."""
    rating = rows.spec.rating
    assert rating is not None
    ends = np.linspace(rating.low, rating.high, PARTS + 1)
    given = rows.numbers[[prediction is not None for prediction in rows.predictions]]
    counts = np.histogram(given, ends)[0].tolist()
    names = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(ends)]
    unparsed = len(rows.numbers) - len(given)
    return dict(zip(names, counts, strict=True)) | {UNPARSED: unparsed}

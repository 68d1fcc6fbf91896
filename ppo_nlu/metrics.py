"""How good the predictions are: counts, rates and their spread. numpy only.

Every rate is a fraction of 1. A response without an answer (None) is wrong, counts as a prediction
of no class, and is reported by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

UNPARSED = "unparsed"  # the name of None in a histogram and a confusion table

Metric = Callable[[np.ndarray, np.ndarray], float]  # of gold and predicted codes, (N,) each


def encode(
    labels: Sequence[str], predictions: Sequence[str | None], words: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Gold and predicted labels as places in `words`; an unparsed prediction is len(words)."""
    if len(labels) != len(predictions) or not labels:
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions")
    codes: dict[str | None, int] = {word: place for place, word in enumerate(words)}
    unknown = (set(labels) | set(predictions)) - set(codes) - {None}
    if unknown or None in set(labels):
        raise ValueError(f"labels outside {list(words)}: {sorted(map(str, unknown)) or 'None'}")
    codes[None] = len(words)
    gold = np.array([codes[label] for label in labels])
    return gold, np.array([codes[prediction] for prediction in predictions])


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> float:
    """The share of rows that are right."""
    return float(np.mean(gold == predicted))


def confusion(gold: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes + 1): row = gold, column = predicted, the last one unparsed."""
    table = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(table, (gold, predicted), 1)
    return table


def precision_recall_f1(table: np.ndarray) -> np.ndarray:
    """One row (precision, recall, F1) for each class of a confusion table; 0 where undefined."""
    classes = len(table)
    right = np.diag(table).astype(float)
    guessed, actual = table[:, :classes].sum(axis=0), table.sum(axis=1)
    precision = right / np.maximum(guessed, 1)
    recall = right / np.maximum(actual, 1)
    f1 = 2 * right / np.maximum(guessed + actual, 1)  # = 2PR / (P + R)
    return np.stack([precision, recall, f1], axis=1)


def bootstrap_interval(
    metric: Metric,
    gold: np.ndarray,
    predicted: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of a metric over rows drawn with replacement."""
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = draw.integers(0, len(gold), len(gold))
        values.append(metric(gold[rows], predicted[rows]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def classification_report(
    labels: Sequence[str],
    predictions: Sequence[str | None],
    words: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about predicted labels, ready for JSON; `accuracy_interval` is the 95 % bootstrap
    interval, None with `resamples=0`."""
    gold, predicted = encode(labels, predictions, words)
    table = confusion(gold, predicted, len(words))
    scores = precision_recall_f1(table)
    columns = [*words, UNPARSED]
    interval = bootstrap_interval(accuracy, gold, predicted, resamples, seed) if resamples else None
    return {
        "count": len(gold),
        "accuracy": accuracy(gold, predicted),
        "accuracy_interval": list(interval) if interval else None,
        "unparsed": accuracy(predicted, np.full(len(gold), len(words))),
        "macro_f1": float(scores[:, 2].mean()),
        "per_class": {
            word: {
                "precision": float(scores[place, 0]),
                "recall": float(scores[place, 1]),
                "f1": float(scores[place, 2]),
                "support": int(table[place].sum()),
            }
            for place, word in enumerate(words)
        },
        "predicted": dict(zip(columns, table.sum(axis=0).tolist(), strict=True)),
        "confusion": {
            word: dict(zip(columns, table[place].tolist(), strict=True))
            for place, word in enumerate(words)
        },
    }

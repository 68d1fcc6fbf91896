"""The uncertainty that comes from the choice of rows: the percentile bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ppo_nlu.tasks.metrics.rows import Metric, Rows


def interval(
    rows: Rows,
    table: Sequence[Metric],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> list[float] | None:
    """The percentile interval of the mean of the metrics over units drawn with replacement.

    Units with equal kept figures form a kind; the number of draws of each kind is multinomial.
    """
    if not resamples:
        return None
    kept = [metric.keep(rows) for metric in table]
    kinds, counts = np.unique(np.hstack(kept), axis=0, return_counts=True)
    parts = np.split(kinds, np.cumsum([part.shape[1] for part in kept])[:-1], axis=1)
    means = []
    for times in _draws(counts, resamples, np.random.default_rng(seed)):
        values = [m.value(times, part) for m, part in zip(table, parts, strict=True)]
        means.append(np.mean(values, axis=0))
    edges = [(1 - level) / 2, (1 + level) / 2]
    return [float(edge) for edge in np.quantile(np.concatenate(means), edges)]


def _draws(counts: np.ndarray, resamples: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each kind is drawn, (r, kinds), in pieces that need little memory."""
    size = max(1, 1_000_000 // len(counts))
    for start in range(0, resamples, size):
        some = min(size, resamples - start)
        yield draw.multinomial(counts.sum(), counts / counts.sum(), some).astype(float)

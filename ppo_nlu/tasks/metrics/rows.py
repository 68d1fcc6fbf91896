"""What is judged, and what a metric is: it keeps a few figures of every unit, and its value follows
from them and from how often each unit was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ppo_nlu.tasks import Example, TaskSpec

UNPARSED = "unparsed"  # the name of None in a histogram and a confusion table


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


@dataclass(frozen=True)
class Rows:
    """What is judged: N rows in U units. Raises ValueError where it cannot be."""

    spec: TaskSpec
    examples: Sequence[Example]
    predictions: Sequence[str | None]
    probabilities: Sequence[Mapping[str, float] | None] | None = None

    def __post_init__(self) -> None:
        count = len(self.examples)
        others = (self.predictions, self.probabilities)
        if not count or any(other is not None and len(other) != count for other in others):
            sizes = [len(other) for other in others if other is not None]
            raise ValueError(f"{count} examples and {sizes} predictions and probabilities")
        unlabelled = next((e.id for e in self.examples if e.label is None), None)
        if unlabelled is not None:
            raise ValueError(f"row {unlabelled} has no label")

    @cached_property
    def units(self) -> np.ndarray:
        """The unit of each row, (N,): its group, or itself where it has none."""
        places: dict[Any, int] = {}
        keys = (e.group or i for i, e in enumerate(self.examples))
        return np.array([places.setdefault(key, len(places)) for key in keys])

    @cached_property
    def members(self) -> list[list[int]]:
        """The rows of each unit, in their order."""
        found: list[list[int]] = [[] for _ in range(int(self.units.max()) + 1)]
        for row, unit in enumerate(self.units.tolist()):
            found[unit].append(row)
        return found

    def summed(self, figures: np.ndarray) -> np.ndarray:
        """Figures of each row (N, D) summed over each unit, (U, D)."""
        total = np.zeros((int(self.units.max()) + 1, figures.shape[1]))
        np.add.at(total, self.units, figures)
        return total

    @cached_property
    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Gold and predicted places among the label words, (N,) each; unparsed is the last."""
        labels = [str(example.label) for example in self.examples]
        return encode(labels, self.predictions, self.spec.words)

    @property
    def right(self) -> np.ndarray:
        """Which rows are right, (N,) bool."""
        gold, predicted = self.codes
        right: np.ndarray = gold == predicted
        return right

    @property
    def positive(self) -> int:
        """The place of the positive word: the one that stands for 1 in the data, else the first."""
        return self.spec.words.index(self.spec.word_of("1") or self.spec.words[0])

    @cached_property
    def gold_numbers(self) -> np.ndarray:
        """The gold ratings, (N,)."""
        return np.array([float(str(example.label)) for example in self.examples])

    @cached_property
    def numbers(self) -> np.ndarray:
        """The predicted ratings within their range, the middle where there is none, (N,)."""
        rating = self.spec.rating
        assert rating is not None
        given = [rating.middle if p is None else float(p) for p in self.predictions]
        return np.clip(given, rating.low, rating.high)


@dataclass(frozen=True)
class Metric:
    """A metric for answers of one kind. `keep` gives the figures of every unit, (U, D). `value`
    gives the metric (R,) from `times` (R, U) and these: draw r holds unit u `times[r, u]` times."""

    kind: str
    keep: Callable[[Rows], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def of(self, rows: Rows) -> float:
        """The value on all rows."""
        kept = self.keep(rows)
        return float(self.value(np.ones((1, len(kept))), kept)[0])


def share(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """First kept sum divided by the second; 0 if that is 0."""
    sums = times @ kept
    shares: np.ndarray = sums[:, 0] / np.maximum(sums[:, 1], 1e-300)
    return shares

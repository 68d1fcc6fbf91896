"""Metrics of label words: of rows, of groups that are judged together, and counts by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.metrics.rows import UNPARSED, Metric, Rows, encode, share
from ppo_nlu.tasks.metrics.text import Match, best_match, exact, token_f1

# ---- of rows ---------------------------------------------------------------------------------


def _keep_right(rows: Rows) -> np.ndarray:
    """(right, 1) of every row."""
    return rows.summed(np.stack([rows.right, np.ones(len(rows.right))], axis=1))


def _keep_f1(rows: Rows) -> np.ndarray:
    """(2 true positives, predicted + actual positives) of every row."""
    gold, predicted = (codes == rows.positive for codes in rows.codes)
    return rows.summed(np.stack([2.0 * (gold & predicted), 1.0 * gold + predicted], axis=1))


def _keep_classes(rows: Rows) -> np.ndarray:
    """For every row K times right, K + 1 times predicted, K times gold, by class."""
    gold, predicted = rows.codes
    identity = np.eye(len(rows.spec.words) + 1)
    right = identity[gold] * rows.right[:, None]
    return rows.summed(np.hstack([right[:, :-1], identity[predicted], identity[gold][:, :-1]]))


def _class_sums(
    times: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right, predicted and gold counts (R, K) of each class, and how many are unparsed (R,)."""
    classes = kept.shape[1] // 3
    sums = times @ kept
    right, predicted = sums[:, :classes], sums[:, classes : 2 * classes]
    return right, predicted, sums[:, 2 * classes + 1 :], sums[:, 2 * classes]


def _macro_f1(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The mean of all classes' F1, 0 for one that neither occurs nor is predicted."""
    right, predicted, gold, _ = _class_sums(times, kept)
    means: np.ndarray = (2 * right / np.maximum(predicted + gold, 1)).mean(axis=1)
    return means


def _mcc(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin's R_K), 0 where undefined.

    (c·s - Σ pₖtₖ) / √((s² - Σ pₖ²)(s² - Σ tₖ²)), c right of s rows, pₖ predicted and tₖ gold
    counts. Unparsed is a class of its own that is predicted and never gold.
    """
    right, predicted, gold, unparsed = _class_sums(times, kept)
    rows = gold.sum(axis=1)
    above = right.sum(axis=1) * rows - (predicted * gold).sum(axis=1)
    spread_predicted = rows**2 - (predicted**2).sum(axis=1) - unparsed**2
    below = np.sqrt(spread_predicted * (rows**2 - (gold**2).sum(axis=1)))
    return np.where(below > 0, above / np.maximum(below, 0.5), 0.0)  # whole numbers: below >= 1


# ---- of groups -------------------------------------------------------------------------------


def _keep_all_right(rows: Rows) -> np.ndarray:
    """(every row right, 1) of every group: MultiRC's EM."""
    return np.array([[rows.right[unit].all(), 1.0] for unit in rows.members])


def _keep_question(rows: Rows) -> np.ndarray:
    """(precision, recall, 1) of every group. Nothing predicted, or nothing to find: 1, as in
    MultiRC's own scorer."""
    gold, predicted = (codes == rows.positive for codes in rows.codes)
    kept = []
    for unit in rows.members:
        both = (gold[unit] & predicted[unit]).sum()
        guessed, actual = predicted[unit].sum(), gold[unit].sum()
        kept.append([both / guessed if guessed else 1.0, both / actual if actual else 1.0, 1.0])
    return np.array(kept)


def _f1m(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The harmonic mean of the mean precision and the mean recall of all questions."""
    sums = times @ kept
    precision, recall = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    f1: np.ndarray = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return f1


def _keep_parity(rows: Rows) -> np.ndarray:
    """(the same answer, 1) of every pair; unparsed equals nothing, and half a pair is left out."""
    kept = []
    for unit in rows.members:
        answers = {rows.predictions[row] for row in unit}
        kept.append([len(answers) == 1 and None not in answers, 1.0] if len(unit) > 1 else [0, 0])
    return np.array(kept, dtype=float)


def chosen_row(
    spec: TaskSpec,
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> int | None:
    """Which of a query's rows (ReCoRD's entities) is its answer, None: unanswered.

    With probabilities the largest P(Yes) - P(No), else the first that was answered Yes.
    """
    yes = spec.word_of("1") or spec.words[0]
    given = [row for row in probabilities or () if row is not None]
    if given and len(given) == len(predictions):
        margins = [2 * row[yes] - sum(row.values()) for row in given]
        return max(range(len(margins)), key=margins.__getitem__)
    return next((i for i, prediction in enumerate(predictions) if prediction == yes), None)


def _keep_query(match: Match) -> Callable[[Rows], np.ndarray]:
    """(match of the chosen entity with the nearest gold answer, 1) of every query."""

    def keep(rows: Rows) -> np.ndarray:
        kept = []
        for unit in rows.members:
            scored = rows.probabilities and [rows.probabilities[row] for row in unit]
            place = chosen_row(rows.spec, [rows.predictions[row] for row in unit], scored)
            chosen = None if place is None else rows.examples[unit[place]].extra["entity"]
            kept.append([best_match(match, chosen, rows.examples[unit[0]]), 1.0])
        return np.array(kept)

    return keep


METRICS = {
    "accuracy": Metric("choice", _keep_right, share),
    "f1": Metric("choice", _keep_f1, share),
    "macro_f1": Metric("choice", _keep_classes, _macro_f1),
    "mcc": Metric("choice", _keep_classes, _mcc),
    "f1a": Metric("choice", _keep_f1, share),
    "em": Metric("choice", _keep_all_right, share),
    "f1m": Metric("choice", _keep_question, _f1m),
    "record_f1": Metric("choice", _keep_query(token_f1), share),
    "record_em": Metric("choice", _keep_query(exact), share),
    "gender_parity": Metric("choice", _keep_parity, share),
}

# ---- counts of label words -------------------------------------------------------------------


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


def classification_report(
    labels: Sequence[str],
    predictions: Sequence[str | None],
    words: Sequence[str],
) -> dict[str, Any]:
    """Everything about predicted labels by class, ready for JSON."""
    gold, predicted = encode(labels, predictions, words)
    table = confusion(gold, predicted, len(words))
    scores = precision_recall_f1(table)
    columns = [*words, UNPARSED]
    return {
        "count": len(gold),
        "accuracy": accuracy(gold, predicted),
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

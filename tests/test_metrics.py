"""Metrics against counts by hand, scikit-learn and scipy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ppo_nlu.metrics import (
    accuracy,
    bootstrap_interval,
    classification_report,
    encode,
)

WORDS = ("Positive", "Negative")


def test_a_report_by_hand() -> None:
    labels = ["Positive", "Positive", "Positive", "Negative", "Negative"]
    predictions = ["Positive", "Negative", None, "Negative", "Positive"]
    report = classification_report(labels, predictions, WORDS, resamples=0)
    # 2 of 5 right, 1 of 5 without an answer.
    # Positive: 1 right, 2 guessed, 3 actual: P 1/2, R 1/3, F1 2/5. Negative: 1, 2, 2: 1/2 each.
    assert report == {
        "count": 5,
        "accuracy": 0.4,
        "accuracy_interval": None,
        "unparsed": 0.2,
        "macro_f1": pytest.approx(0.45),
        "per_class": {
            "Positive": {"precision": 0.5, "recall": 1 / 3, "f1": 0.4, "support": 3},
            "Negative": {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        },
        "predicted": {"Positive": 2, "Negative": 2, "unparsed": 1},
        "confusion": {
            "Positive": {"Positive": 1, "Negative": 1, "unparsed": 1},
            "Negative": {"Positive": 1, "Negative": 1, "unparsed": 0},
        },
    }


def _random_answers(words: tuple[str, ...], count: int) -> tuple[list[str], list[str | None]]:
    draw = np.random.default_rng(3)
    labels = [words[i] for i in draw.integers(0, len(words), count)]
    options = [*words, None]
    predictions = [options[i] for i in draw.integers(0, len(options), count)]
    right = draw.random(count) < 0.6
    return labels, [labels[i] if right[i] else predictions[i] for i in range(count)]


@pytest.mark.parametrize("words", [WORDS, ("Entailment", "Neutral", "Contradiction")])
def test_a_report_agrees_with_scikit_learn(words: tuple[str, ...]) -> None:
    labels, predictions = _random_answers(words, 300)
    report = classification_report(labels, predictions, words)
    spelt = [p or "unparsed" for p in predictions]
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, spelt, labels=list(words), zero_division=0
    )
    for place, word in enumerate(words):
        mine = report["per_class"][word]
        assert mine["precision"] == pytest.approx(precision[place])
        assert mine["recall"] == pytest.approx(recall[place])
        assert mine["f1"] == pytest.approx(f1[place])
        assert mine["support"] == support[place]
    assert report["accuracy"] == pytest.approx(sk.accuracy_score(labels, spelt))
    assert report["macro_f1"] == pytest.approx(f1.mean())
    expected = sk.confusion_matrix(labels, spelt, labels=[*words, "unparsed"])[:-1]
    assert [list(row.values()) for row in report["confusion"].values()] == expected.tolist()
    assert json.loads(json.dumps(report)) == report


def test_classes_that_never_occur_count_as_zero() -> None:
    report = classification_report(["Positive"] * 3, [None] * 3, WORDS, resamples=10)
    assert report["accuracy"] == 0 and report["unparsed"] == 1 and report["macro_f1"] == 0
    assert report["accuracy_interval"] == [0, 0]
    assert report["per_class"]["Negative"] == {
        "precision": 0, "recall": 0, "f1": 0, "support": 0,
    }  # fmt: skip


def test_the_bootstrap_interval_agrees_with_scipy() -> None:
    labels, predictions = _random_answers(WORDS, 872)
    gold, predicted = encode(labels, predictions, WORDS)
    low, high = bootstrap_interval(accuracy, gold, predicted, resamples=4000)
    right = (gold == predicted).astype(float)
    other = stats.bootstrap(
        (right,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # An end of the interval is a 2.5 % quantile of 4000 draws from about a normal of deviation s,
    # so it has the standard error sqrt(.025 * .975 / 4000) / .0584 * s = 0.042 s; the difference
    # of two such is 0.06 s, and four times that is allowed (plus one step of 1/872).
    allowed = 0.24 * right.std() / np.sqrt(872) + 1 / 872
    assert abs(low - other.low) < allowed and abs(high - other.high) < allowed
    # and it is as wide as the normal approximation says
    assert high - low == pytest.approx(2 * 1.96 * right.std() / np.sqrt(872), rel=0.1)


def test_the_bootstrap_is_seeded_and_takes_any_metric() -> None:
    gold, predicted = encode(*_random_answers(WORDS, 60), WORDS)
    assert bootstrap_interval(accuracy, gold, predicted) == bootstrap_interval(
        accuracy, gold, predicted
    )
    assert bootstrap_interval(accuracy, gold, predicted) != bootstrap_interval(
        accuracy, gold, predicted, seed=1
    )
    assert bootstrap_interval(lambda g, p: float(len(g)), gold, predicted, 10) == (60, 60)
    narrow = bootstrap_interval(accuracy, gold, predicted, level=0.5)
    wide = bootstrap_interval(accuracy, gold, predicted)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        ([], []),
        (["Positive"], []),
        (["Good"], ["Positive"]),
        (["Positive"], ["Good"]),
        ([None], ["Positive"]),
    ],
)
def test_what_cannot_be_scored_is_refused(labels: list, predictions: list) -> None:
    with pytest.raises(ValueError):
        classification_report(labels, predictions, WORDS)

"""Figures of answers: the report of a task, and its headline."""

from __future__ import annotations

import pytest

from ppo_nlu.answering.aggregate import Measured, headline
from ppo_nlu.answering.aggregate import report as report_of
from ppo_nlu.answering.answer import Answer
from ppo_nlu.data import Dataset
from ppo_nlu.tasks import Example, get_task

SPEC = get_task("sst2")


def given(*pairs: tuple[str, str | None]) -> list[Answer]:
    """Answers with these (label, prediction) pairs."""
    return [
        Answer(Example(str(i), {"sentence": "a"}, label), prediction, prediction or "...")
        for i, (label, prediction) in enumerate(pairs)
    ]


def test_the_report_and_the_headline_count_unparsed_as_wrong() -> None:
    pos, neg = SPEC.words
    rows = given((pos, pos), (pos, None), (neg, neg), (neg, pos), (neg, None))
    report = report_of(SPEC, rows, resamples=100)
    assert report["accuracy"] == pytest.approx(2 / 5)
    assert report["unparsed"] == pytest.approx(2 / 5)
    low, high = report["accuracy_interval"]
    assert 0 <= low <= 0.4 <= high <= 1
    assert set(report["per_class"]) == {pos, neg}
    # Positive: 2 predicted, 1 right, 2 there; Negative: 1 predicted, 1 right, 3 there.
    assert report["per_class"][pos]["precision"] == pytest.approx(1 / 2)
    assert report["per_class"][pos]["recall"] == pytest.approx(1 / 2)
    assert report["per_class"][neg]["precision"] == pytest.approx(1)
    assert report["per_class"][neg]["recall"] == pytest.approx(1 / 3)
    assert report["per_class"][neg]["support"] == 3
    assert sum(report["predicted"].values()) == 5
    row = {"sample": 2 / 5, "greedy": None, "score": None, "unparsed": 2 / 5}
    assert headline({"sample": report}) == row
    scored = given((pos, pos), (pos, pos), (neg, neg), (neg, pos), (neg, neg))
    both = {"score": report_of(SPEC, scored), "sample": report}
    assert headline(both) == row | {"score": pytest.approx(4 / 5)}
    with pytest.raises(ValueError, match=r"eval\.split: row 0 has no label"):
        report_of(SPEC, given((None, pos)))  # type: ignore[arg-type]


def test_macro_f1_and_classes_are_those_of_the_greedy_answers() -> None:
    pos, neg = SPEC.words
    right, half = given((pos, pos), (neg, neg)), given((pos, pos), (neg, pos))
    rows = Dataset([row.example for row in right], "", "")
    after = {"sample": right, "greedy": half}
    entry = Measured(SPEC, rows, after, before={"greedy": right}).entry()
    # Positive: 2 * 1 / (2 predicted + 1 there); Negative: 0.
    assert entry["macro_f1"] == {
        "base": None,
        "before": 1.0,
        "after": pytest.approx((2 / 3 + 0) / 2),
    }
    assert entry["per_class"][pos]["precision"] == 1 / 2
    alone = Measured(SPEC, rows, {"score": right}).entry()
    assert alone["macro_f1"] == {"base": None, "before": None, "after": 1.0}

"""What a run warns of at its end, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from ppo_nlu.answering import warn
from ppo_nlu.answering.aggregate import Measured
from ppo_nlu.answering.answer import Answer
from ppo_nlu.data import Dataset
from ppo_nlu.tasks import TASKS, Example, Label, TaskSpec

A, B, C = "Ash", "Birch", "Cedar"
Counts = Mapping[tuple[str, str | None], int]  # rows of (label, prediction)


def spec(*words: str) -> TaskSpec:
    return replace(TASKS["sst2"], title="trees", labels=tuple(Label(w, w) for w in words))


def entry(greedy: Counts, scored: Counts | None = None, words: tuple[str, ...] = (A, B, C)) -> Any:
    """A task's part of the summary, without baselines."""
    after = {
        name: [
            Answer(Example("", {"sentence": ""}, label), prediction, "")
            for (label, prediction), count in counts.items()
            for _ in range(count)
        ]
        for name, counts in (("greedy", greedy), ("score", scored or greedy))
    }
    rows = Dataset([row.example for row in after["greedy"]], "", "")
    return Measured(spec(*words), rows, after).entry()


def warnings(of: Any, by_reward: bool = True, **baselines: Mapping[str, Any]) -> list[str]:
    return warn.of_task(of | {"baselines": baselines}, by_reward)


def constant(share: float) -> dict[str, Any]:
    return {"answer": A, "score": share, "macro_f1": 0.1}


def tfidf(accuracy: float, macro_f1: float) -> dict[str, Any]:
    return {"metrics": {"accuracy": accuracy}, "score": accuracy, "macro_f1": macro_f1}


GOOD = {(A, A): 40, (A, B): 10, (B, B): 40, (B, A): 10}  # 80 % right, macro-F1 of three 53.3 %


def test_a_good_model_is_not_doubted() -> None:
    found = entry(GOOD)  # nor is a class missed that has no rows
    assert warnings(found) == []
    assert warnings(found, constant=constant(0.79), tfidf=tfidf(0.8, 0.53)) == []
    assert warnings(found, tfidf={"error": "scikit-learn is missing"}) == []


def test_a_class_that_is_never_answered() -> None:
    (line,) = warnings(entry(GOOD | {(C, A): 3}))
    assert line.startswith("trees: never answered: 'Cedar' (3 of 103 rows); try more of their rows")
    assert "method=sft first" in line
    (line,) = warnings(entry(GOOD | {(C, A): 3}), by_reward=False)
    assert "method=sft" not in line
    many = tuple(f"w{i}" for i in range(8))
    pairs = {(word, word if i < 2 else None): 9 - i for i, word in enumerate(many)}
    lines = warnings(entry(pairs, words=many))
    assert "'w6' (3 of 44 rows) and 1 more;" in lines[1] and "w7" not in lines[1]
    assert "'w1'" not in lines[1] and len(lines) == 2


@pytest.mark.parametrize(
    ("gold", "given", "told"),
    [
        (90, 96, False),  # skewed, as the labels are
        (60, 79, False),
        (60, 81, True),
        (30, 49, False),  # not most of the answers
        (30, 51, True),
    ],
)
def test_most_answers_are_one_word(gold: int, given: int, told: bool) -> None:
    others = 100 - given
    found = entry({(A, A): gold, (B, A): given - gold, (B, B): others}, words=(A, B))
    lines = [line for line in warnings(found) if "of the labels" in line]
    assert bool(lines) is told
    if told:
        assert f"{given}.0 % of the greedy answers are 'Ash', and {gold}.0 %" in lines[0]


def test_a_word_that_is_not_most_answers_may_come_too_often() -> None:
    found = entry({(A, A): 20, (B, A): 25, (B, B): 28, (C, C): 27})
    assert warnings(found) == []


def test_the_tuned_model_is_not_above_the_constant() -> None:
    (line,) = warnings(entry(GOOD), constant=constant(0.8))
    assert "tuned (80.0 %) is not above the constant (80.0 %), which always answers 'Ash'" in line
    bad = {(A, A): 25, (A, B): 25, (B, B): 25, (B, A): 25}
    assert warnings(entry(bad, GOOD), constant=constant(0.6)) == []  # scored answers are above
    assert warnings(entry(GOOD, bad), constant=constant(0.6)) == []
    assert len(warnings(entry(bad), constant=constant(0.6))) == 1


def test_tfidf_is_better() -> None:
    (line,) = warnings(entry(GOOD), tfidf=tfidf(0.85, 0.6))
    assert "TF-IDF is better than tuned: accuracy 85.0 % beside 80.0 %, macro-F1 60.0 %" in line
    (line,) = warnings(entry(GOOD), tfidf=tfidf(0.7, 0.6))
    assert "better than tuned: macro-F1 60.0 % beside 53.3 %;" in line


def test_most_answers_name_no_label() -> None:
    parsed = {(A, A): 24, (B, B): 24, (A, None): 26, (B, None): 26}
    (line,) = warnings(entry(parsed))
    assert "52.0 % of the greedy answers name no label" in line and "teach_form" in line
    assert warnings(entry({(A, A): 25, (B, B): 25, (A, None): 25, (B, None): 25})) == []

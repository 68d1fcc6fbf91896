"""The baselines beside a run: against figures by hand, and against parts of scikit-learn."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from ppo_nlu.answering import baselines
from ppo_nlu.tasks import TASKS, Example, Label, TaskSpec
from tests import tickets

WORDS = tuple(tickets.SHARES)
SPEC = replace(
    TASKS["sst2"], name="tickets", fields=("text",), labels=tuple(Label(w, w) for w in WORDS)
)


def example(text: str, label: str) -> Example:
    return Example("", {"text": text}, label, "tickets")


def made(count: int, seed: int = 0) -> list[Example]:
    rows = tickets.rows(count, seed)
    return [example(row["text"], row["category"]) for row in rows if row["category"]]


def by_sklearn(train: list[Example], held: list[Example], most: int | None) -> tuple[float, float]:
    """Accuracy and macro-F1 of the same model, put together from other parts."""
    texts, asked = ([row.fields["text"] for row in rows] for rows in (train, held))
    counts = CountVectorizer(ngram_range=(1, 2), max_features=most).fit(texts)
    scaled = TfidfTransformer().fit(counts.transform(texts))
    labels = [row.label for row in train]
    model = LogisticRegression(max_iter=1000)
    model.fit(scaled.transform(counts.transform(texts)), labels)
    predicted = model.predict(scaled.transform(counts.transform(asked)))
    gold = [row.label for row in held]
    macro = f1_score(gold, predicted, labels=list(WORDS), average="macro", zero_division=0)
    return accuracy_score(gold, predicted), macro


def test_the_constant_is_the_largest_class_of_training() -> None:
    first, second, third, *_ = WORDS
    train = [example("a", label) for label in (second, first, second)]
    held = [example("a", label) for label in (first, second, third, third)]
    found = baselines.measure(SPEC, train, held)["constant"]
    assert found["answer"] == second
    assert found["accuracy"] == found["score"] == found["metrics"]["accuracy"] == 1 / 4
    assert found["macro_f1"] == pytest.approx(2 / (4 + 1) / 5)  # 2 right / (predicted + gold)


def test_tfidf_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = made(300), made(200, seed=1)
    for weights in (baselines.WEIGHTS, 5 * 30):  # 30 features for each of five classes
        monkeypatch.setattr(baselines, "WEIGHTS", weights)
        found = baselines.measure(SPEC, train, held)["tfidf"]
        accuracy, macro = by_sklearn(baselines.drawn(SPEC, train), held, weights // 5)
        assert found["accuracy"] == pytest.approx(accuracy)
        assert found["macro_f1"] == pytest.approx(macro)
        assert found["train_rows"] == len(train) and 0 < found["seconds"] < 60


def test_of_many_rows_a_seeded_part_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [example(f"{i:04}", WORDS[0]) for i in range(1000)]
    assert sorted(baselines.drawn(SPEC, rows), key=lambda row: row.fields["text"]) == rows
    monkeypatch.setattr(baselines, "ROWS", 100)
    part = [int(row.fields["text"]) for row in baselines.drawn(SPEC, rows)]
    assert len(set(part)) == 100 and 400 < np.mean(part) < 600
    monkeypatch.setattr(baselines, "CHARACTERS", 43)  # of which each row has four
    assert [int(row.fields["text"]) for row in baselines.drawn(SPEC, rows)] == part[:10]
    monkeypatch.setattr(baselines, "CHARACTERS", 1)
    assert len(baselines.drawn(SPEC, rows)) == 1


def test_what_scikit_learn_raises_becomes_a_line() -> None:
    one_class = [example("some words", WORDS[0]), example("other words", WORDS[0])]
    no_words = [example("", WORDS[0]), example("", WORDS[1])]
    for rows, reason in ((one_class, "1 class|one class"), (no_words, "empty vocabulary")):
        found = baselines.measure(SPEC, rows, made(20))
        assert found["constant"]["answer"] == WORDS[0]
        (error,) = found["tfidf"].values()
        assert list(found["tfidf"]) == ["error"] and "\n" not in error
        assert any(text in error for text in reason.split("|"))


def test_without_scikit_learn_a_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    found = baselines.measure(SPEC, made(20), made(20))
    assert found["constant"]["accuracy"] > 0
    assert "pip install -e '.[baselines]'" in found["tfidf"]["error"]


def test_ratings_have_the_mean_and_free_text_nothing() -> None:
    def rated(*labels: str) -> list[Example]:
        texts = {"sentence1": "a", "sentence2": "b"}
        return [Example("", texts, label, "stsb") for label in labels]

    found = baselines.measure(TASKS["stsb"], rated("1", "2", "3"), rated("0", "4", "5"))
    assert found == {"constant": {"answer": "2.000", "mean_error": pytest.approx(7 / 3)}}
    text = TaskSpec("qa", "QA", "custom", "", "", "{q}", ("q",), metrics=("exact",))
    assert baselines.measure(text, [Example("", {"q": "a"}, "b")], []) == {}

"""Metrics of chosen labels against counts by hand and scikit-learn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from ppo_nlu.tasks import TASKS, Example, Label
from ppo_nlu.tasks.metrics import classification_report, evaluate
from ppo_nlu.tasks.metrics.bootstrap import interval
from tests.tasks.metrics.judged import (
    ACCURACY,
    WORDS,
    judged,
    measured,
    random_answers,
    rows,
    spelt,
)


def test_a_report_by_hand() -> None:
    labels = ["Positive", "Positive", "Positive", "Negative", "Negative"]
    predictions = ["Positive", "Negative", None, "Negative", "Positive"]
    report = classification_report(labels, predictions, WORDS)
    # 2 of 5 right, 1 of 5 without an answer.
    # Positive: 1 right, 2 guessed, 3 actual: P 1/2, R 1/3, F1 2/5. Negative: 1, 2, 2: 1/2 each.
    assert report == {
        "count": 5,
        "accuracy": 0.4,
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


@pytest.mark.parametrize("words", [WORDS, ("Entailment", "Neutral", "Contradiction")])
def test_a_report_agrees_with_scikit_learn(words: tuple[str, ...]) -> None:
    labels, predictions = random_answers(words, 300)
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
    report = classification_report(["Positive"] * 3, [None] * 3, WORDS)
    assert report["accuracy"] == 0 and report["unparsed"] == 1 and report["macro_f1"] == 0
    assert interval(judged(["Positive"] * 3, [None] * 3), ACCURACY, resamples=10) == [0, 0]
    assert report["per_class"]["Negative"] == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "support": 0,
    }


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


def answered(words: Sequence[str]) -> st.SearchStrategy[list[tuple[str, str | None]]]:
    pair = st.tuples(st.sampled_from(list(words)), st.sampled_from([*words, None]))
    return st.lists(pair, min_size=1, max_size=40)


ONE_LABEL = pytest.mark.filterwarnings("ignore:A single label was found")


@ONE_LABEL
@given(answered(("Yes", "No")))
def test_binary_metrics_agree_with_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    gold, given = [g for g, _ in pairs], [p for _, p in pairs]
    yes, said = [g == "Yes" for g in gold], [p == "Yes" for p in given]
    f1 = sk.f1_score(yes, said, zero_division=0)
    assert measured("f1", "mrpc", gold, given) == pytest.approx(f1)
    accuracy = sk.accuracy_score(gold, spelt(given))
    assert measured("accuracy", "mrpc", gold, given) == pytest.approx(accuracy)
    mcc = sk.matthews_corrcoef(gold, spelt(given))
    assert measured("mcc", "cola", gold, given) == pytest.approx(mcc, abs=1e-12)


@ONE_LABEL
@given(answered(TASKS["cb"].words))
def test_three_way_metrics_agree_with_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    gold, given = [g for g, _ in pairs], [p for _, p in pairs]
    words = list(TASKS["cb"].words)
    macro = sk.f1_score(gold, spelt(given), labels=words, average="macro", zero_division=0)
    assert evaluate(TASKS["cb"], rows(gold), given) == {
        "macro_f1": pytest.approx(macro),
        "accuracy": pytest.approx(sk.accuracy_score(gold, spelt(given))),
    }
    mcc = sk.matthews_corrcoef(gold, spelt(given))
    assert evaluate(TASKS["ax"], rows(gold), given)["mcc"] == pytest.approx(mcc, abs=1e-12)


def test_mcc_by_hand() -> None:
    # TP 2, FN 1, FP 1, TN 3: (6 - 1) / sqrt(3 * 3 * 4 * 4) = 5/12
    gold, given = ["Yes"] * 3 + ["No"] * 4, ["Yes", "Yes", "No", "Yes", "No", "No", "No"]
    assert measured("mcc", "cola", gold, given) == pytest.approx(5 / 12)
    # The last answer lost: c 4, s 7, p (3, 3, and 1 unparsed), t (3, 4):
    # (28 - 9 - 12) / sqrt((49 - 9 - 9 - 1) (49 - 9 - 16)) = 7 / sqrt(30 * 24)
    lost = [*given[:-1], None]
    assert measured("mcc", "cola", gold, lost) == pytest.approx(7 / math.sqrt(720))
    assert measured("mcc", "cola", gold, ["No"] * 7) == 0


def test_the_positive_class_is_the_one_that_stands_for_1() -> None:
    assert measured("f1", "mrpc", ["Yes", "No"], ["Yes", "Yes"]) == pytest.approx(2 / 3)
    turned = (Label("No", "0"), Label("Yes", "1"))
    spec = replace(TASKS["mrpc"], labels=turned, metrics=("f1",))
    assert evaluate(spec, rows(["Yes", "No"]), ["Yes", "Yes"])["f1"] == pytest.approx(2 / 3)
    assert measured("f1", "qnli", ["Yes", "No"], ["Yes", "Yes"]) == pytest.approx(2 / 3)


def test_a_class_that_never_occurs_halves_a_macro_f1_of_three() -> None:
    given = ["Entailment", "Contradiction"]
    assert measured("macro_f1", "cb", given, given) == pytest.approx(2 / 3)


# Two questions. The first: answers 1 1 0, given 1 0 0. The second: 1 0, given 1 0; then with
# nothing right and nothing said: 0 0, given 0 0.
MULTIRC_GROUPS = ["7-0", "7-0", "7-0", "7-1", "7-1"]
MULTIRC_GOLD = ["True", "True", "False", "True", "False"]
MULTIRC_GIVEN = ["True", "False", "False", "True", "False"]


def test_multirc_by_hand() -> None:
    spec = TASKS["multirc"]
    figures = evaluate(spec, rows(MULTIRC_GOLD, MULTIRC_GROUPS), MULTIRC_GIVEN)
    # Over all pairs TP 2, guessed 2, actual 3; one question of two is wholly right.
    assert figures == {"f1a": pytest.approx(4 / 5), "em": 0.5}
    # P 1 and 1, R 1/2 and 1: means 1 and 3/4, harmonic mean 2 * 3/4 / (7/4) = 6/7
    f1m = measured("f1m", "multirc", MULTIRC_GOLD, MULTIRC_GIVEN, groups=MULTIRC_GROUPS)
    assert f1m == pytest.approx(6 / 7)
    lost = [*MULTIRC_GIVEN[:4], None]  # the second question's last row has no answer
    figures = evaluate(spec, rows(MULTIRC_GOLD, MULTIRC_GROUPS), lost)
    assert figures == {"f1a": pytest.approx(4 / 5), "em": 0}


def test_a_question_with_no_right_answer_and_none_given_is_found_whole() -> None:
    groups = ["1-0", "1-0", "1-1"]
    gold, given = ["True", "False", "False"], ["False", "True", "False"]
    # P 0 and 1, R 0 and 1: means 1/2 each
    assert measured("f1m", "multirc", gold, given, groups=groups) == pytest.approx(1 / 2)
    assert measured("em", "multirc", gold, given, groups=groups) == 0.5
    assert measured("f1m", "multirc", ["True"], ["False"], groups=["1-0"]) == 0


def test_rows_of_one_group_need_not_be_neighbours() -> None:
    order = [3, 0, 4, 2, 1]
    gold = [MULTIRC_GOLD[i] for i in order]
    given = [MULTIRC_GIVEN[i] for i in order]
    groups = [MULTIRC_GROUPS[i] for i in order]
    assert evaluate(TASKS["multirc"], rows(gold, groups), given)["em"] == 0.5


def record(*queries: tuple[list[str], list[str]]) -> list[Example]:
    """A row for each (entities, gold answers) and entity."""
    return [
        Example(
            f"{number}-{place}",
            {},
            "Yes" if entity in answers else "No",
            group=str(number),
            extra={"idx": number, "entity": entity, "answers": answers},
        )
        for number, (entities, answers) in enumerate(queries)
        for place, entity in enumerate(entities)
    ]


def test_record_by_hand() -> None:
    spec = TASKS["record"]
    examples = record(
        (["Ada Lovelace", "Charles Babbage"], ["Charles Babbage"]),
        (["The U.S.", "New York City", "Boston"], ["Boston", "York city"]),
        (["Paris", "Rome"], ["Paris"]),
    )
    # First query: both Yes, the first counts and is wrong. Second: New York City against York
    # city: P 2/3, R 1, F1 4/5. Third: unanswered.
    given = ["Yes", "Yes", "No", "Yes", "Yes", None, "No"]
    assert evaluate(spec, examples, given) == {
        "record_f1": pytest.approx(0.8 / 3),
        "record_em": 0,
    }
    # P(Yes) - P(No) picks Babbage (0.2 over 0.1), Boston and Paris (though each is below one half)
    sure = [0.55, 0.6, 0.3, 0.1, 0.4, 0.25, 0.2]
    probabilities = [{"Yes": p, "No": 1 - p} for p in sure]
    assert evaluate(spec, examples, given, probabilities) == {"record_f1": 1, "record_em": 1}
    # a query with an unscored row falls back on what was said: here New York City
    some = [*probabilities[:4], None, *probabilities[5:]]
    assert evaluate(spec, examples, given, some)["record_f1"] == pytest.approx(2.8 / 3)


def test_gender_parity_by_hand() -> None:
    # Four pairs: same, different, both unparsed, one unparsed; then half a pair.
    given = ["Yes", "Yes", "Yes", "No", None, None, "No", None, "Yes"]
    gold = ["Yes", "No", "Yes", "Yes", "Yes", "Yes", "No", "No", "Yes"]
    groups = [str(i // 2) for i in range(9)]
    assert evaluate(TASKS["ax-g"], rows(gold, groups), given) == {
        "gender_parity": 0.25,
        "accuracy": pytest.approx(4 / 9),
    }
    assert measured("gender_parity", "ax-g", ["Yes"], ["Yes"], groups=["0"]) == 0

"""Metrics against counts by hand, scikit-learn and scipy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, Example, Label, Rating, TaskSpec
from ppo_nlu.tasks.metrics import (
    METRICS,
    accuracy,
    average,
    bootstrap_interval,
    classification_report,
    encode,
    evaluate,
    exact,
    normalise,
    pearson,
    report,
    spearman,
    task_score,
    token_f1,
)

WORDS = ("Positive", "Negative")
TEXT = TaskSpec("qa", "QA", "custom", "", "", "{q}", ("q",), metrics=("exact", "token_f1"))


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


# ---- the benchmarks' metrics -----------------------------------------------------------------


def rows(labels: Sequence[str], groups: Sequence[str] = ()) -> list[Example]:
    names = groups or [""] * len(labels)
    pairs = enumerate(zip(labels, names, strict=True))
    return [Example(str(i), {}, label, group=group) for i, (label, group) in pairs]


def measured(
    name: str, task: str, labels: Sequence[str], given: Sequence[str | None], **more: Sequence[str]
) -> float:
    """One metric, whether or not the task's own list has it."""
    return evaluate(replace(TASKS[task], metrics=(name,)), rows(labels, **more), given)[name]


def answered(words: Sequence[str]) -> st.SearchStrategy[list[tuple[str, str | None]]]:
    pair = st.tuples(st.sampled_from(list(words)), st.sampled_from([*words, None]))
    return st.lists(pair, min_size=1, max_size=40)


def spelt(predictions: Sequence[str | None]) -> list[str]:
    return [p or "unparsed" for p in predictions]


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


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), min_size=2, max_size=40).filter(
        lambda pairs: all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
    )
)
def test_correlations_agree_with_scipy(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, dtype=float).T
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    given = [f"{value / 10:.1f}" for value in y]
    assert evaluate(TASKS["stsb"], rows([f"{v:.3f}" for v in x]), given) == {
        "pearson": pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9),
        "spearman": pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12),
    }


def test_a_constant_rating_is_0_and_a_warning() -> None:
    gold = rows(["0.1", "2.5", "4.0"])
    with pytest.warns(UserWarning, match="all predicted ratings are 3.3"):
        assert evaluate(TASKS["stsb"], gold, ["3.3"] * 3) == {"pearson": 0, "spearman": 0}
    with pytest.warns(UserWarning, match="all predicted ratings are 2.5"):
        figures = report(TASKS["stsb"], gold, [None] * 3, resamples=50)
    assert figures["interval"] == [0, 0] and figures["unparsed"] == 1
    with pytest.warns(UserWarning, match="all gold"):
        assert pearson(np.full(7, 0.1), np.arange(7.0)) == 0
    with pytest.warns(UserWarning, match="all predicted"):
        assert spearman(np.arange(7.0), np.full(7, 0.1)) == 0


def test_an_unparsed_rating_is_the_middle_and_one_outside_is_the_end() -> None:
    gold = rows(["1.0", "2.0", "4.0", "5.0"])
    spec = TASKS["stsb"]
    assert evaluate(spec, gold, ["1.0", None, "3.0", "9"]) == evaluate(
        spec, gold, ["1.0", "2.5", "3.0", "5.0"]
    )
    figures = report(spec, gold, ["1.0", None, "3.0", "9"], resamples=0)
    # |1 - 1|, |2.5 - 2|, |3 - 4|, |5 - 5|
    assert figures["mean_error"] == pytest.approx(1.5 / 4)
    assert figures["unparsed"] == 0.25
    assert figures["predicted"] == {
        "0-1": 0, "1-2": 1, "2-3": 0, "3-4": 1, "4-5": 1, "unparsed": 1,
    }  # fmt: skip
    stars = replace(spec, rating=Rating(0.0, 10.0, 1.0))
    assert list(report(stars, gold, ["1"] * 2 + ["7", "10"], resamples=0)["predicted"]) == [
        "0-2", "2-4", "4-6", "6-8", "8-10", "unparsed",
    ]  # fmt: skip


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
        "record_f1": pytest.approx(0.8 / 3), "record_em": 0,
    }  # fmt: skip
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
        "gender_parity": 0.25, "accuracy": pytest.approx(4 / 9),
    }  # fmt: skip
    assert measured("gender_parity", "ax-g", ["Yes"], ["Yes"], groups=["0"]) == 0


def test_squad_normalisation_and_matches() -> None:
    assert normalise("  The Cat's  (an) A-frame, theatre ") == "cats aframe theatre"
    assert exact("the U.S.", "US") == 1 and exact("US dollar", "US") == 0
    # common: new, york (once): P 2/3, R 2/2
    assert token_f1("new york york", "York, the new") == pytest.approx(0.8)
    assert token_f1("x", "y") == 0
    assert token_f1("The", "a") == 1 and token_f1("The", "cat") == 0


def test_free_text_by_hand() -> None:
    examples = rows(["Paris", "new york", "Rome"])
    examples[2] = replace(examples[2], extra={"answers": ["Roma", "the city of Rome"]})
    given = ["paris.", None, "city of Rome"]
    assert evaluate(TEXT, examples, given) == {
        "exact": pytest.approx(2 / 3), "token_f1": pytest.approx(2 / 3),
    }  # fmt: skip
    figures = report(TEXT, examples, given, resamples=20)
    assert figures["predicted"] == {} and figures["unparsed"] == pytest.approx(1 / 3)
    assert json.loads(json.dumps(figures)) == figures and "confusion" not in figures


@pytest.mark.parametrize(("task", "name"), [("sst2", "pearson"), ("stsb", "accuracy")])
def test_a_metric_of_another_kind_is_refused(task: str, name: str) -> None:
    spec = replace(TASKS[task], metrics=(name,))
    with pytest.raises(UserError, match=f"metrics of {task}: unknown metric '{name}'; use "):
        evaluate(spec, rows([spec.words[0]]), [spec.words[0]])


@pytest.mark.parametrize(
    ("labels", "given"), [([], []), (["Yes"], []), ([None], ["Yes"]), (["Yes"], ["Maybe"])]
)
def test_rows_that_cannot_be_judged_are_refused(labels: list, given: list) -> None:
    with pytest.raises(ValueError):
        evaluate(TASKS["cola"], rows(labels), given)
    if None in labels:
        with pytest.raises(ValueError, match="row 0 has no label"):
            evaluate(TEXT, rows(labels), given)
    if labels == ["Yes"]:
        with pytest.raises(ValueError, match="probabilities"):
            evaluate(TASKS["cola"], rows(labels), ["Yes"], [None, None])


def test_every_metric_of_every_task_is_known() -> None:
    for spec in TASKS.values():
        assert all(METRICS[name].kind == spec.kind for name in spec.metrics), spec.name


# ---- reports ---------------------------------------------------------------------------------


def test_a_report_holds_the_metrics_and_the_counts() -> None:
    gold, given = _random_answers(("Yes", "No"), 400)
    figures = report(TASKS["mrpc"], rows(gold), given)
    said = [p == "Yes" for p in given]
    f1 = sk.f1_score([g == "Yes" for g in gold], said)
    right = sk.accuracy_score(gold, spelt(given))
    assert figures["metrics"] == {"f1": pytest.approx(f1), "accuracy": pytest.approx(right)}
    assert figures["score"] == pytest.approx((f1 + right) / 2) == task_score(figures["metrics"])
    plain = classification_report(gold, given, ("Yes", "No"), resamples=0)
    assert {key: figures[key] for key in plain if key != "accuracy_interval"} == {
        key: value for key, value in plain.items() if key != "accuracy_interval"
    }
    assert figures["interval"][0] < figures["score"] < figures["interval"][1]
    assert json.loads(json.dumps(figures)) == figures
    assert report(TASKS["mrpc"], rows(gold), given) == figures
    assert report(TASKS["mrpc"], rows(gold), given, seed=1)["interval"] != figures["interval"]
    bare = report(TASKS["mrpc"], rows(gold), given, resamples=0)
    assert bare["interval"] is None and bare["accuracy_interval"] is None


def _two_normal_widths(values: np.ndarray) -> float:
    return float(2 * 1.96 * values.std() / np.sqrt(len(values)))


# Below, the ends of an interval from 4000 draws have a standard error of 0.042 deviations each
# (see above), its width one of 0.06 of 3.92: 1.5 %; four times that is 6 %.


def test_the_interval_of_accuracy_is_the_bootstrap_over_rows() -> None:
    gold, given = _random_answers(WORDS, 872)
    figures = report(TASKS["sst2"], rows(gold), given, resamples=4000)
    right = np.array([g == p for g, p in zip(gold, given, strict=True)], dtype=float)
    assert np.ptp(figures["interval"]) == pytest.approx(_two_normal_widths(right), rel=0.06)
    assert figures["interval"] == figures["accuracy_interval"]


def test_groups_are_drawn_whole() -> None:
    draw = np.random.default_rng(5)
    right = draw.random(200) < 0.7  # of each of 200 groups of 5
    gold = ["Yes"] * 1000
    given = ["Yes" if right[i // 5] else "No" for i in range(1000)]
    spec = replace(TASKS["qnli"], metrics=("accuracy",))
    grouped = report(spec, rows(gold, [f"g{i // 5}" for i in range(1000)]), given, resamples=4000)
    by_row = report(spec, rows(gold), given, resamples=4000)
    width = _two_normal_widths(right.astype(float))
    assert np.ptp(grouped["interval"]) == pytest.approx(width, rel=0.06)
    assert np.ptp(grouped["accuracy_interval"]) == pytest.approx(width, rel=0.06)
    assert np.ptp(by_row["interval"]) == pytest.approx(width / np.sqrt(5), rel=0.06)


def _mcc(gold: np.ndarray, predicted: np.ndarray) -> float:
    return float(sk.matthews_corrcoef(gold, predicted))


def test_the_interval_of_mcc_agrees_with_drawing_rows_one_by_one() -> None:
    gold, given = _random_answers(("Yes", "No"), 300)
    figures = report(TASKS["cola"], rows(gold), given, resamples=4000)
    slow = bootstrap_interval(_mcc, *encode(gold, given, ("Yes", "No")), resamples=1000)
    # 1000 draws: 8.4 % of a deviation an end, and 4.2 %: four times their sum in squares, 38 %
    allowed = 0.38 * (slow[1] - slow[0]) / 3.92
    assert figures["interval"] == pytest.approx(list(slow), abs=allowed)


def test_the_interval_of_correlations_agrees_with_scipy() -> None:
    draw = np.random.default_rng(2)
    x = np.round(draw.uniform(0, 5, 200), 1)  # with ties
    y = np.round(np.clip(x + draw.normal(0, 1.2, 200), 0, 5), 1)
    figures = report(
        replace(TASKS["stsb"], metrics=("spearman",)),
        rows([str(v) for v in x]),
        [str(v) for v in y],
        resamples=4000,
    )
    other = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b)[0],
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    allowed = 0.38 * (other.high - other.low) / 3.92
    assert figures["interval"] == pytest.approx([other.low, other.high], abs=allowed)


# ---- the averages ----------------------------------------------------------------------------

# arXiv 2410.11020, tables 1 and 2, with their averages. Left out: the two rows whose printed
# average does not follow from them (PPO-MT of GLUE, few-shot of SuperGLUE). Each printed number is
# rounded by at most 0.05, so a mean of them may differ from the printed mean by 0.1.
GLUE_ORDER = ("mnli", "mnli-mm", "qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "glue/rte")
GLUE_ROWS = {
    "BERT-base": ((84.6, 83.4, 71.2, 90.5, 93.5, 52.1, 85.8, 88.9, 66.4), 79.6),
    "BERT-large": ((86.7, 85.9, 72.1, 92.7, 94.9, 60.5, 86.5, 89.3, 70.1), 82.1),
    "zero-shot": ((38.3, 39.7, 31.3, 58.5, 75.7, 18.6, 27.5, 66.3, 59.3), 46.1),
    "few-shot": ((62.4, 61.7, 30.9, 60.7, 84.2, 29.0, 45.5, 80.8, 72.9), 58.7),
    "PPO-ST": ((88.8, 88.2, 70.5, 93.2, 96.4, 59.9, 92.6, 89.4, 84.3), 84.8),
    "SFT-ST": ((87.0, 86.5, 63.8, 93.6, 73.8, 50.7, 84.7, 85.8, 80.4), 78.5),
    "SFT-MT": ((84.9, 84.5, 62.9, 86.0, 72.0, 41.4, 85.5, 82.6, 86.2), 76.2),
}
SUPERGLUE_ORDER = ("boolq", "cb", "copa", "multirc", "record", "superglue/rte", "wic", "wsc")
SUPERGLUE_ROWS = {
    "BERT-large": (
        ((77.4,), (75.7, 83.6), (70.6,), (70.0, 24.0), (72.0, 71.3), (71.6,), (69.5,), (64.3,)),
        69.0,
    ),
    "BERT-large++": (
        ((79.0,), (84.7, 90.4), (73.8,), (70.0, 24.1), (72.0, 71.3), (79.0,), (69.5,), (64.3,)),
        71.5,
    ),
    "zero-shot": (
        ((75.8,), (26.4, 43.6), (57.0,), (51.9, 20.3), (27.0, 26.2), (59.2,), (54.4,), (52.1,)),
        49.5,
    ),
    "PPO-ST": (
        ((85.9,), (74.7, 88.0), (88.6,), (82.5, 50.0), (70.6, 69.9), (84.3,), (72.1,), (78.1,)),
        78.3,
    ),
}


@pytest.mark.parametrize("model", GLUE_ROWS)
def test_the_papers_glue_average_follows_from_its_rows(model: str) -> None:
    values, published = GLUE_ROWS[model]
    # The metrics that the paper does not show are there too, and must not count.
    scores = {
        task: {TASKS[task].shown[0]: value} | {"other": -1e9}
        for task, value in zip(GLUE_ORDER, values, strict=True)
    }
    scores |= {"wnli": {"accuracy": -1e9}, "ax": {"mcc": -1e9}}
    assert average("glue", scores, "paper") == pytest.approx(published, abs=0.1)


@pytest.mark.parametrize("model", SUPERGLUE_ROWS)
def test_the_papers_superglue_average_follows_from_its_rows(model: str) -> None:
    rows, published = SUPERGLUE_ROWS[model]
    scores = {
        task: dict(zip(TASKS[task].metrics, values, strict=True))
        for task, values in zip(SUPERGLUE_ORDER, rows, strict=True)
    }
    scores |= {"ax-b": {"mcc": -1e9}, "ax-g": {"gender_parity": -1e9, "accuracy": -1e9}}
    for style in ("paper", "official"):
        assert average("superglue", scores, style) == pytest.approx(published, abs=0.1)


def test_the_official_glue_average_by_hand() -> None:
    scores = {
        "cola": {"mcc": 0.5},
        "sst2": {"accuracy": 1.0},
        "mrpc": {"f1": 0.8, "accuracy": 0.6},  # 0.7
        "qqp": {"f1": 0.7, "accuracy": 0.9},  # 0.8
        "stsb": {"pearson": 0.9, "spearman": 0.7},  # 0.8
        "mnli": {"accuracy": 0.8},  # with -mm 0.7
        "mnli-mm": {"accuracy": 0.6},
        "qnli": {"accuracy": 0.9},
        "glue/rte": {"accuracy": 0.6},
        "wnli": {"accuracy": 0.4},
        "ax": {"mcc": -1.0},
    }
    # .5 1 .7 .8 .8 .7 .9 .6 .4
    assert average("glue", scores) == pytest.approx(6.4 / 9)
    # the paper's: .8 .6 .7 .9 1 .5 .7 .8 .6
    assert average("glue", scores, "paper") == pytest.approx(6.6 / 9)
    for task, styles in {"wnli": {"official"}, "mnli-mm": {"official", "paper"}}.items():
        short = {name: values for name, values in scores.items() if name != task}
        missing = {s for s in ("official", "paper") if average("glue", short, s) is None}
        assert missing == styles


def test_the_paper_shows_only_metrics_that_the_tasks_have() -> None:
    for spec in TASKS.values():
        assert set(spec.shown) <= set(spec.metrics)
    assert [name for name, spec in TASKS.items() if spec.shown != spec.metrics] == [
        "qqp", "stsb", "mrpc",
    ]  # fmt: skip

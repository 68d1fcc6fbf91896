"""Bootstrap intervals against scipy, the normal approximation and drawing one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ppo_nlu.tasks import TASKS
from ppo_nlu.tasks.metrics import Metric, report
from ppo_nlu.tasks.metrics.bootstrap import interval
from ppo_nlu.tasks.metrics.rows import encode
from tests.tasks.metrics.judged import ACCURACY, WORDS, judged, random_answers, rows


def test_the_bootstrap_interval_agrees_with_scipy() -> None:
    labels, predictions = random_answers(WORDS, 872)
    gold, predicted = encode(labels, predictions, WORDS)
    low, high = interval(judged(labels, predictions), ACCURACY, resamples=4000) or (0, 0)
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
    found = judged(*random_answers(WORDS, 600))
    wide = interval(found, ACCURACY)
    assert wide == interval(found, ACCURACY) != interval(found, ACCURACY, seed=1)
    count = Metric("choice", lambda r: np.ones((len(r.examples), 1)), lambda times, _: times.sum(1))
    assert interval(found, [count], 10) == [600, 600]
    narrow = interval(found, ACCURACY, level=0.5)
    assert wide and narrow and wide[0] < narrow[0] < narrow[1] < wide[1]


# Below, the ends of an interval from 4000 draws have a standard error of 0.042 deviations each
# (see above), its width one of 0.06 of 3.92: 1.5 %; four times that is 6 %.


def _two_normal_widths(values: np.ndarray) -> float:
    return float(2 * 1.96 * values.std() / np.sqrt(len(values)))


def test_the_interval_of_accuracy_is_the_bootstrap_over_rows() -> None:
    gold, given = random_answers(WORDS, 872)
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


def test_the_interval_of_mcc_agrees_with_drawing_rows_one_by_one() -> None:
    gold, given = random_answers(("Yes", "No"), 300)
    figures = report(TASKS["cola"], rows(gold), given, resamples=4000)
    codes, draw = np.stack(encode(gold, given, ("Yes", "No"))), np.random.default_rng(0)
    drawn = [codes[:, draw.integers(0, 300, 300)] for _ in range(1000)]
    slow = np.quantile([sk.matthews_corrcoef(*sample) for sample in drawn], [0.025, 0.975])
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

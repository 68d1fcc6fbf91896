"""Metrics of ratings against scipy and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ppo_nlu.tasks import TASKS, Rating
from ppo_nlu.tasks.metrics import evaluate, report
from ppo_nlu.tasks.metrics.ratings import pearson, spearman
from tests.tasks.metrics.judged import rows


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

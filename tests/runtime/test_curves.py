"""The curves of a run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu.runtime import runlog
from ppo_nlu.runtime.curves import draw_curves, moving_average


def fill(run_dir: Path, count: int = 60) -> None:
    with runlog.MetricsLog(run_dir) as log:
        for step in range(1, count + 1):
            share = step / count
            record = {"reward/mean": 0.5 + 0.4 * share + 0.05 * math.sin(9 * step)}
            record["kl/ref"] = 0.3 * share if step != 7 else math.nan
            if step % 10 == 0:
                record["eval/sst2/accuracy"] = 0.6 + 0.25 * share
            log.log(step, record)


def test_moving_average_by_hand() -> None:
    assert moving_average([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert moving_average([1, 2], 1) == [1, 2]
    assert moving_average([], 3) == []


def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The figure that was written."""
    plt = pytest.importorskip("matplotlib.pyplot")
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    path = draw_curves(tmp_path, "PPO on SST-2", **options)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert not list(tmp_path.glob(".tmp*"))
    return kept[0]


def test_curves_show_rewards_kl_evaluation_and_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    before = {"reward": 0.42, "accuracy": 0.55, "unparsed": None}
    figure = drawn(tmp_path, monkeypatch, subtitle="bundled data", before=before)
    assert figure._suptitle.get_text() == "PPO on SST-2\nbundled data"
    reward, kl, evals = figure.axes
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "mean reward per answer",
        "KL to reference",
        "evaluation (%)",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"training step"}
    raw, mean, start = reward.lines
    assert len(raw.get_ydata()) == 60 and start.get_linestyle() == "--"
    values = [record["reward/mean"] for record in runlog.read_metrics(tmp_path)]
    assert mean.get_ydata()[-1] == pytest.approx(sum(values[-12:]) / 12)  # window 60 / 5
    assert list(start.get_ydata()) == [0.42, 0.42]
    assert len(kl.lines[0].get_xdata()) == 59  # the NaN is left out
    assert list(evals.lines[0].get_ydata())[-1] == pytest.approx(85.0)
    assert list(evals.lines[1].get_ydata()) == pytest.approx([55.0, 55.0])
    labels = [text.get_text() for text in reward.get_legend().get_texts()]
    assert labels == ["each step", "mean of 12 steps", "before training"]


def test_curves_without_evaluation_or_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runlog.MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward/mean": 0.5})
    figure = drawn(tmp_path, monkeypatch, before={"reward": None})
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 1
    assert figure._suptitle.get_text() == "PPO on SST-2"


def test_no_curves_without_matplotlib_or_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw_curves(tmp_path, "empty") is None
    fill(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(tmp_path, "no library") is None
    assert not (tmp_path / "curves.png").exists()

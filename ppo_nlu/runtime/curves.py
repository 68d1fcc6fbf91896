"""The curves of a run, drawn from metrics.jsonl; matplotlib is imported only when asked for."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_nlu.runtime.runlog import is_number, read_metrics
from ppo_nlu.storage.files import atomic_write_bytes

_BLUE, _ORANGE, _GREEN, _GREY = "#2a6fbb", "#d9822b", "#3a8f5c", "#6b7280"
_EVAL_COLOURS = (_BLUE, _ORANGE, _GREEN, "#8a5bb5")


def draw_curves(
    run_dir: str | Path,
    title: str,
    subtitle: str | None = None,
    before: Mapping[str, float | None] | None = None,
) -> Path | None:
    """Draw metrics.jsonl as curves.png; None where matplotlib or the metrics are missing.

    `before` holds the base model's numbers, drawn as dashed lines: `reward` in the reward panel,
    any other under the last part of its `eval/<task>/<metric>` name.
    """
    records = read_metrics(run_dir)
    rewards = _series(records, "reward/mean")
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return None
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    evals = {name: _series(records, name) for name in _eval_names(records)}
    panels = [name for name, data in (("kl", _series(records, "kl/ref")), ("eval", evals)) if data]
    losses = _series(records, "loss") if not rewards else []
    if not rewards and not losses and not panels:
        return None
    before = before or {}
    figure = plt.figure(figsize=(9.6, 4.6), layout="constrained")
    grid = figure.add_gridspec(max(len(panels), 1), 2 if panels else 1)
    first = figure.add_subplot(grid[:, 0])
    if losses:
        _draw_main(first, losses, None, "loss per token (nats)")
    else:
        _draw_main(first, rewards, before.get("reward"), "mean reward per answer")
        _draw_tasks(first, records)
    for row, name in enumerate(panels):
        axes = figure.add_subplot(grid[row, 1])
        if name == "kl":
            _draw_kl(axes, _series(records, "kl/ref"))
        else:
            _draw_evals(axes, evals, before)
    last = max(record["step"] for record in records)
    for axes in figure.axes:
        axes.set_xlim(0, last * 1.02)
    figure.suptitle(title + (f"\n{subtitle}" if subtitle else ""), fontsize=12)
    path = Path(run_dir) / "curves.png"
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    atomic_write_bytes(path, image.getvalue())
    return path


Series = list[tuple[int, float]]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(r["step"], r[name]) for r in records if is_number(r.get(name))]


def _eval_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of evaluation metrics, in the order of their appearance."""
    names = {name: None for r in records for name in r if name.startswith("eval/")}
    return [name for name in names if _series(records, name)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values (of fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _style(axes: Any, ylabel: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    """Above the panel, where it hides no line."""
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    room = {"columnspacing": 1.2, "handlelength": 1.6}
    axes.legend(frameon=False, fontsize=9, ncols=3, **place, **room)


def _draw_main(axes: Any, series: Series, baseline: float | None, ylabel: str) -> None:
    steps, values = [s for s, _ in series], [v for _, v in series]
    window = max(1, min(20, len(values) // 5))
    if window > 1:
        axes.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=0.9, label="each step")
        label = f"mean of {window} steps"
        axes.plot(steps, moving_average(values, window), color=_BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=_BLUE, linewidth=1.5, marker="o", ms=3, label="each step")
    if baseline is not None:
        axes.axhline(baseline, color=_GREY, linestyle="--", linewidth=1.2, label="before training")
    _style(axes, ylabel)
    _legend(axes)


def _draw_tasks(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """With several tasks, the reward of each as a smoothed line."""
    names = sorted({n for r in records for n in r if re.fullmatch(r"reward/.+/mean", n)})
    for index, name in enumerate(names):
        series = _series(records, name)
        means = moving_average([v for _, v in series], max(1, min(20, len(series) // 5)))
        colour, task = f"C{(index + 1) % 10}", name.removeprefix("reward/").removesuffix("/mean")
        axes.plot([s for s, _ in series], means, color=colour, linewidth=1.1, label=task)
    if names:
        _legend(axes)


def _draw_kl(axes: Any, kl: Series) -> None:
    axes.plot([s for s, _ in kl], [v for _, v in kl], color=_ORANGE, linewidth=1.2)
    _style(axes, "KL to reference\n(nats per answer)")


def _draw_evals(axes: Any, evals: Mapping[str, Series], before: Mapping[str, float | None]) -> None:
    for index, (name, series) in enumerate(evals.items()):
        colour, short = _EVAL_COLOURS[index % len(_EVAL_COLOURS)], name.rsplit("/", 1)[-1]
        steps, values = [s for s, _ in series], [100 * v for _, v in series]
        axes.plot(steps, values, color=colour, linewidth=1.5, marker="o", ms=3, label=short)
        baseline = before.get(short)
        if baseline is not None:
            dash = colour if len(evals) > 1 else _GREY
            axes.axhline(100 * baseline, color=dash, linestyle="--", linewidth=1.2)
    if any(before.get(name.rsplit("/", 1)[-1]) is not None for name in evals):
        axes.plot([], [], color=_GREY, linestyle="--", linewidth=1.2, label="before training")
    _style(axes, "evaluation (%)")
    _legend(axes)

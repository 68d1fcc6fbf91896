"""The reward while a method trains, as figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_nlu.reproduce.axes import BLUE, INK, panels, png, style
from ppo_nlu.reproduce.document import Figure
from ppo_nlu.reproduce.results import Results
from ppo_nlu.reproduce.tables import title_of
from ppo_nlu.runtime.curves import moving_average
from ppo_nlu.runtime.runlog import read_metrics

LINES = ("#2563eb", "#d97706", "#0d9488", "#db2777", "#7c3aed", "#65a30d", "#0891b2", "#b45309",
         "#475569", "#dc2626", "#4f46e5")  # fmt: skip
Curve = tuple[np.ndarray, np.ndarray]  # steps (S,), smoothed values of each seed (runs, S)


def _curves(results: Results, method: str) -> dict[str, dict[str, Curve]]:
    """{cells that differ in the seed alone: {metric: curve}}."""
    logs: dict[str, list[Mapping[float, Mapping[str, Any]]]] = {}
    for name, (plan, _) in results.summaries.items():
        if plan["method"] == method:
            run = read_metrics(results.folder / "cells" / name)
            key = "+".join(plan["tasks"])
            logs.setdefault(key, []).append({r["step"]: r for r in run if "step" in r})
    found: dict[str, dict[str, Curve]] = {}
    for key, runs in logs.items():
        names = {n: None for run in runs for row in run.values() for n in row if _is_reward(n)}
        curves = {n: _curve([run for run in runs if run], n) for n in names}
        found[key] = {n: curve for n, curve in curves.items() if curve is not None}
    return {key: curves for key, curves in found.items() if "reward/mean" in curves}


def _is_reward(name: str) -> bool:
    return name.startswith("reward/") and name.endswith("mean")


def _curve(runs: Sequence[Mapping[float, Mapping[str, Any]]], name: str) -> Curve | None:
    """Smoothed over a twelfth of the run; the steps that all seeds have a value at."""
    series = [{s: row[name] for s, row in run.items() if row.get(name) is not None} for run in runs]
    series = [values for values in series if values]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(values) for values in series)))
    if len(steps) < 2:
        return None
    window = max(1, len(steps) // 12)
    smooth = [moving_average([values[s] for s in steps], window) for values in series]
    return np.array(steps), np.array(smooth)


def _band(axis: Any, curve: Curve, colour: str, width: float = 1.8, shade: float = 0.16) -> None:
    """The mean over seeds, and a standard deviation to either side."""
    steps, values = curve
    mean = values.mean(0)
    axis.plot(steps, mean, color=colour, linewidth=width)
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        axis.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=shade, linewidth=0)


def reward_mixed(results: Results) -> Figure | None:
    """The reward of PPO-MT over its steps, of all tasks together and of each."""
    found = _curves(results, "ppo-mt")
    if not found:
        return None
    figure, axes = panels(len(found), 1, 8.6, 4.2)
    for axis, curves in zip(axes, found.values(), strict=True):
        single = {name: c for name, c in curves.items() if name != "reward/mean"}
        ends = []
        for place, (name, curve) in enumerate(single.items()):
            colour = LINES[place % len(LINES)]
            _band(axis, curve, colour, 1.2, 0.07)
            task = name.removeprefix("reward/").removesuffix("/mean")
            ends.append((curve[1].mean(0)[-1], title_of(task), colour))
        _band(axis, curves["reward/mean"], INK, 2.4)
        ends.append((curves["reward/mean"][1].mean(0)[-1], "all tasks", INK))
        last = curves["reward/mean"][0][-1]
        axis.set_xlim(0, last)
        _label_ends(axis, ends, last)
        axis.set_xlabel("training step", fontsize=9)
        axis.set_ylabel("mean reward per answer", fontsize=9)
        style(axis)
    caption = (
        "Mean over seeds with one standard deviation to either side, smoothed over a twelfth of "
        "the run. A right label earns 1, a wrong one 0, no label -1; ratings earn 2.5 minus their "
        "error."
    )
    return Figure("reward_ppo_mt", "Reward of PPO-MT while it trains", caption, png(figure))


def _label_ends(axis: Any, ends: Sequence[tuple[float, str, str]], last: float) -> None:
    """A name at the right end of each line, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = 0.058 * (high - low)
    placed: list[float] = []
    for value, text, colour in sorted(ends):
        y = max(value, placed[-1] + gap) if placed else value
        placed.append(y)
        axis.annotate(
            text, (last, value), (last * 1.02, y), color=colour, fontsize=8.5, va="center",
            weight="bold" if text == "all tasks" else "normal", annotation_clip=False,
        )  # fmt: skip
    axis.set_ylim(low, max(high, placed[-1] + gap / 2))


def reward_single(results: Results) -> Figure | None:
    """The reward of every PPO-ST, a panel a task."""
    found = _curves(results, "ppo-st")
    order = [task for task in results.tasks() if task in found]
    if not order:
        return None
    figure, axes = panels(len(order), 4, 2.65, 2.1)
    for axis, task in zip(axes, order, strict=True):
        _band(axis, found[task]["reward/mean"], BLUE)
        axis.set_title(title_of(task), fontsize=9.5, loc="left", color=INK)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        axis.yaxis.get_major_locator().set_params(nbins=4)
        style(axis)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("mean reward per answer", fontsize=9)
    caption = (
        "Mean over seeds with one standard deviation to either side, smoothed. Every panel has its "
        "own scale; ratings (STS-B) earn 2.5 minus their error, labels 1, 0 or -1."
    )
    return Figure("reward_ppo_st", "Reward of PPO-ST while it trains", caption, png(figure))

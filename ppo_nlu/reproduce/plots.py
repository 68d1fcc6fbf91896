"""The figures of the report, as PNG bytes. Needs matplotlib, as `axes` and `curves` do."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_nlu.reproduce.axes import BLUE, GREY, INK, ORANGE, TEAL, new, panels, png, style
from ppo_nlu.reproduce.curves import reward_mixed, reward_single
from ppo_nlu.reproduce.document import Figure
from ppo_nlu.reproduce.methods import method_title
from ppo_nlu.reproduce.results import Results
from ppo_nlu.reproduce.tables import title_of

COLOURS = {"sft-st": ORANGE, "sft-seconds": TEAL, "ppo-st": BLUE, "sft-mt": ORANGE, "ppo-mt": BLUE}


def available() -> bool:
    """Whether matplotlib is there."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True


def draw_all(results: Results) -> dict[str, Figure]:
    """Every figure for which there is data, by name."""
    drawn = (
        sampled_and_greedy(results, ("sft-st", "sft-seconds", "ppo-st"), "sampled_greedy"),
        reward_mixed(results),
        reward_single(results),
        confusions(results),
        histograms(results),
    )
    return {figure.name: figure for figure in drawn if figure is not None}


# --- sampled and greedy -------------------------------------------------------------------------


def sampled_and_greedy(results: Results, methods: Sequence[str], name: str) -> Figure | None:
    """Each method's score under one sample (ring) and greedily (dot), task by task."""
    table = {
        task: {
            method: (_mean(results, method, task, "sample"), _mean(results, method, task, "greedy"))
            for method in methods
        }
        for task in results.tasks()
    }
    table = {
        task: {m: (a, b) for m, (a, b) in row.items() if a is not None and b is not None}
        for task, row in table.items()
    }
    table = {task: row for task, row in table.items() if row}
    if not table:
        return None
    figure, axes = new(8.6, 1.3 + 0.52 * len(table))
    axis, present = axes[0, 0], [m for m in methods if any(m in row for row in table.values())]
    step = 0.72 / max(len(present), 1)
    for place, row in enumerate(table.values()):
        for rank, method in enumerate(present):
            if method in row:
                y = place + (rank - (len(present) - 1) / 2) * step
                _dumbbell(axis, row[method], y, COLOURS[method])
    for edge in range(1, len(table)):
        axis.axhline(edge - 0.5, color=GREY, alpha=0.2, linewidth=0.6)
    axis.set_yticks(range(len(table)), [title_of(task) for task in table])
    axis.set_ylim(len(table) - 0.45, -0.55)
    axis.set_xlabel("score on the evaluation rows (percent; mean of seeds)", fontsize=9)
    style(axis, "x")
    for method in present:
        axis.plot([], [], color=COLOURS[method], linewidth=3, label=method_title(method))
    axis.plot([], [], "o", mfc="white", mec=INK, ms=6, label="one sample at T=1")
    axis.plot([], [], "o", color=INK, ms=6, label="greedy")
    figure.legend(loc="outside upper center", ncols=len(present) + 2, frameon=False, fontsize=8.5)
    caption = (
        "Each bar goes from the score of one sample at T=1 (ring) to that of greedy decoding "
        "(dot). A short bar means a sharp answer distribution: sampling costs little."
    )
    return Figure(name, "Sampled versus greedy", caption, png(figure))


def _dumbbell(axis: Any, ends: tuple[Any, Any], y: float, colour: str) -> None:
    axis.plot(ends, (y, y), color=colour, linewidth=2.6, alpha=0.55, solid_capstyle="round")
    axis.plot(ends[1], y, "o", color=colour, ms=6)
    axis.plot(ends[0], y, "o", mfc="white", mec=colour, mew=1.5, ms=6)


def _mean(results: Results, method: str, task: str, decode: str) -> float | None:
    values = [row.value(decode) for row in results.pick(method, task)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- what is answered ---------------------------------------------------------------------------

SHOWN = ("sft-st", "ppo-st")


def _methods_for(results: Results) -> list[str]:
    """The two methods that are set side by side, or what there is."""
    present = [m for m in SHOWN if results.pick(m)]
    return present or [m for m in results.methods() if m != "encoder"][-2:]


def _summed(results: Results, method: str, task: str, key: str) -> dict[str, Any]:
    """Counts of the greedy reports summed over seeds: of `predicted`, or of `confusion`."""
    total: dict[str, Any] = {}
    for row in results.pick(method, task):
        for name, value in ((row.report("greedy") or {}).get(key) or {}).items():
            if isinstance(value, dict):
                inner = total.setdefault(name, {})
                for word, count in value.items():
                    inner[word] = inner.get(word, 0) + count
            else:
                total[name] = total.get(name, 0) + value
    return total


def confusions(results: Results) -> Figure | None:
    """Shares of each gold label's greedy answers, SFT and PPO side by side."""
    methods = _methods_for(results)
    found = [
        (task, method, table)
        for task in results.tasks()
        for method in methods
        if (table := _summed(results, method, task, "confusion"))
    ]
    if not found:
        return None
    columns = 4 if len(methods) == 2 else 3
    most = max(len(table) for _, _, table in found)
    figure, axes = panels(len(found), columns, 2.75, 1.75 + 0.22 * max(0, most - 2))
    for axis, (task, method, table) in zip(axes, found, strict=True):
        _confusion(axis, table)
        axis.set_title(f"{title_of(task)}: {method_title(method)}", fontsize=9, color=INK)
    figure.supxlabel("answered", fontsize=9)
    figure.supylabel("gold label", fontsize=9)
    caption = (
        "Greedy answers, percent of each gold label (rows add up to 100), all seeds together. "
        "A column that is dark from top to bottom is a model that always says the same. "
        "`none`: the answer names no label."
    )
    return Figure("confusion", "Confusion matrices", caption, png(figure))


def _confusion(axis: Any, table: Mapping[str, Mapping[str, int]]) -> None:
    words = list(table)
    columns = [*words, *(name for name in next(iter(table.values())) if name not in words)]
    counts = np.array([[table[gold].get(name, 0) for name in columns] for gold in words], float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=115, aspect="auto")
    for (i, j), value in np.ndenumerate(shares):
        axis.text(
            j, i, f"{value:.0f}", ha="center", va="center", fontsize=8.5,
            color="white" if value > 62 else INK,
        )  # fmt: skip
    named = [_short(name) for name in columns]
    axis.set_xticks(range(len(columns)), named, fontsize=7.5)
    axis.set_yticks(range(len(words)), named[: len(words)], fontsize=7.5)
    axis.tick_params(length=0, colors=INK)
    axis.spines[:].set_visible(False)


def _short(word: str) -> str:
    word = "none" if word == "unparsed" else word
    return word if len(word) <= 9 else f"{word[:7]}."


def histograms(results: Results) -> Figure | None:
    """How often each label is answered, beside how often it is right."""
    methods = _methods_for(results)
    shown = []
    for task in results.tasks():
        bars = {method_title(m): _summed(results, m, task, "predicted") for m in methods}
        bars = {title: counts for title, counts in bars.items() if sum(counts.values())}
        tables = [_summed(results, method, task, "confusion") for method in methods]
        table = next((found for found in tables if found), {})
        gold = {word: sum(row.values()) for word, row in table.items()}
        if bars:
            shown.append((task, ({"gold": gold} if gold else {}) | bars))
    if not shown:
        return None
    figure, axes = panels(len(shown), 4, 2.65, 2.1)
    colours = {"gold": GREY} | {method_title(m): COLOURS.get(m, BLUE) for m in methods}
    for axis, (task, bars) in zip(axes, shown, strict=True):
        _bars(axis, bars, colours)
        axis.set_title(title_of(task), fontsize=9.5, loc="left", color=INK)
    figure.supylabel("percent of the rows", fontsize=9)
    handles = [axes[0].bar([0], [0], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8.5)
    caption = (
        "Greedy answers of all seeds beside the gold labels. For ratings the bars are ranges of "
        "the answered number. `none`: the answer names no label."
    )
    return Figure("labels", "What is answered, and what is right", caption, png(figure))


def _bars(axis: Any, bars: Mapping[str, Mapping[str, int]], colours: Mapping[str, str]) -> None:
    names = list(dict.fromkeys(name for counts in bars.values() for name in counts))
    width = 0.8 / len(bars)
    for rank, (title, counts) in enumerate(bars.items()):
        total = max(sum(counts.values()), 1)
        heights = [100 * counts.get(name, 0) / total for name in names]
        places = [i + (rank - (len(bars) - 1) / 2) * width for i in range(len(names))]
        axis.bar(places, heights, width * 0.94, color=colours[title])
    crowded = len(names) > 4
    skip = 2 if len(names) > 8 else 1
    shown = [_short(name) if i % skip == 0 else "" for i, name in enumerate(names)]
    axis.set_xticks(
        range(len(names)),
        shown,
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else "default",
    )
    style(axis)
    axis.tick_params(axis="x", length=0, labelsize=7 if crowded else 7.5)

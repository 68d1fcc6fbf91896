"""Bar charts of measured rows: each provider's time over the limit's, one panel a case."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]
OURS, OTHERS = "#1f6feb", "#b8c0cc"


def draw(groups: Sequence[Sequence[Row]], path: Path) -> None:
    """One panel for each case that has a limit; 1 is the limit, shorter bars are better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [g for g in groups if any(r["provider"] == "limit" for r in g) and len(g) > 1]
    if not panels:
        raise ValueError("nothing to draw: no case has rows beside its limit")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(len(g) for g in panels)
    size = (5.2 * columns, (0.75 + 0.3 * tallest) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, rows in zip(axes.flat, panels, strict=False):
        _panel(axis, rows)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    first = panels[0][0]
    figure.suptitle(f"{first['device']}, torch {first['torch']}, {first['commit']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    """Horizontal bars, fastest on top, whiskers from the 20th to the 80th percentile."""
    limit = next(float(r["p50_ms"]) for r in rows if r["provider"] == "limit")
    bars = sorted((r for r in rows if r["provider"] != "limit"), key=lambda r: float(r["p50_ms"]))
    low, middle, high = ([float(r[f"{p}_ms"]) / limit for r in bars] for p in ("p20", "p50", "p80"))
    names = [r["provider"] for r in bars]
    spread = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    colors = [OURS if name.startswith("ours") else OTHERS for name in names]
    axis.barh(names, middle, color=colors, height=0.7, xerr=spread,
              error_kw={"elinewidth": 0.8, "ecolor": "#444"})  # fmt: skip
    axis.axvline(1.0, color="#d1242f", linewidth=1)
    wide = max(middle) > 15
    if wide:
        axis.set_xscale("log")
    for place, row, ratio, end in zip(range(len(bars)), bars, middle, high, strict=True):
        text = f" {_short(ratio)}×  {_short(row['p50_ms'])} ms  {_short(row['peak_mib'])} MiB"
        axis.text(max(end, ratio), place, text, va="center", fontsize=7)
    axis.set_xlim(right=max(high) * (60 if wide else 1.75))
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    shape = " ".join(f"{k}={v}" for k, v in json.loads(first["shape"]).items())
    axis.set_title(f"{first['kernel']}, {first['mode']}, {first['dtype']}\n{shape}", fontsize=8)
    axis.set_xlabel("time over the limit's", fontsize=7)


def _short(number: str | float) -> str:
    """Three digits, or all of a large number."""
    value = float(number)
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

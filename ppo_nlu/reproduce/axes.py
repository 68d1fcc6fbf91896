"""What all figures share: colours, panels, the look of axes, and PNG bytes. Needs matplotlib."""

from __future__ import annotations

import importlib
import io
import math
from typing import Any

BLUE, ORANGE, GREY, INK, TEAL = "#2563eb", "#d97706", "#9ca3af", "#1f2937", "#0d9488"
DPI = 160


def new(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), without pyplot and its global state."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained", facecolor="white"
    )
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, hspace=0.04, wspace=0.04)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def style(axes: Any, grid: str = "y") -> None:
    """Two thin axes and faint lines along one of them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, the places left over empty."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure, axes = new(width * columns, height * lines, lines, columns)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return figure, flat[:count]

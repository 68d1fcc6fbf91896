"""What a run prints at its end: the table of results and the peak of memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import torch

_COLUMNS = (("sample", "sample T=1"), ("greedy", "greedy"), ("score", "score"))


def results_table(
    before: Mapping[str, float | None] | None,
    after: Mapping[str, float | None] | None,
    start: str = "base",
    base: Mapping[str, float | None] | None = None,
) -> str:
    """Base and tuned model side by side, in percent; what was not measured is a dash. `start` is
    the name of the model before training; where it is not the base, `base` may have a row too."""
    columns = (*_COLUMNS, ("unparsed", "unparsed"))
    lines = ["(%)    " + "".join(f"{title:>12}" for _, title in columns)]
    for name, row in (("base", base), (start, before), ("tuned", after)):
        if row is not None:
            lines.append(f"{name:<7}" + "".join(f"{_percent(row.get(k)):>12}" for k, _ in columns))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def peak_memory_mb(device: torch.device | str) -> float:
    """The most memory held so far, in MiB: of the GPU's tensors, or of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

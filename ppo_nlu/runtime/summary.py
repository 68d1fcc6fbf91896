"""What a run prints at its end: the tables of results and the peak of memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch

from ppo_nlu.errors import one_line

_COLUMNS = (("sample", "sample T=1"), ("greedy", "greedy"), ("score", "score"))
MOST_CLASSES, WORST = 20, 10  # above so many classes, the table shows the worst
LONGEST_WORD = 40  # characters of a class in a table


def results_table(
    rows: Mapping[str, Mapping[str, float | None] | None],
    macro_f1: bool = False,
) -> str:
    """The figures of models and baselines by name, in percent; what was not measured is a dash, and
    a row that is None is left out. `macro_f1`: with a column for it."""
    columns = [*_COLUMNS, ("unparsed", "unparsed")]
    columns += [("macro_f1", "macro-F1")] if macro_f1 else []
    lines = [_line("(%)", [title for _, title in columns])]
    for name, row in rows.items():
        if row is not None:
            lines.append(_line(name, [_percent(row.get(key)) for key, _ in columns]))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name}{cells[0]:>{19 - len(name)}}" + "".join(f"{cell:>12}" for cell in cells[1:])


def class_table(per_class: Mapping[str, Mapping[str, float]]) -> str:
    """Precision, recall and F1 in percent, and the rows, of each class; of more than 20 classes
    only of the 10 with the lowest F1 among those that have rows."""
    shown, title = list(per_class.items()), "greedy answers"
    if len(shown) > MOST_CLASSES:
        present = [(word, row) for word, row in shown if row["support"]]
        shown = sorted(present, key=lambda item: item[1]["f1"])[:WORST]
        title = f"the worst {len(shown)} of {len(per_class)}"
    names = [one_line(word, LONGEST_WORD) for word, _ in shown]
    width = max(map(len, [title, *names]))
    lines = [f"{title:<{width}}{'precision':>11}{'recall':>9}{'F1':>8}{'rows':>8}"]
    for name, (_, row) in zip(names, shown, strict=True):
        precision, recall, f1 = (_percent(row[key]) for key in ("precision", "recall", "f1"))
        lines.append(f"{name:<{width}}{precision:>11}{recall:>9}{f1:>8}{row['support']:>8,}")
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

"""What the texts of rows say about the rows: which are the same, and what looks like a mistake."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence

from ppo_nlu.errors import printable, quoted
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.words import is_empty

FEW = 10  # rows of a label


def normalise(text: str) -> str:
    """The form in which two sentences count as the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def joined(spec: TaskSpec, example: Example) -> str:
    """All texts of a row as one."""
    return " ".join(example.fields[name] for name in spec.fields)


def oddities(rows: Sequence[Example]) -> list[str]:
    """Notes on rows that are valid but look empty."""
    empty = sum(any(map(is_empty, row.fields.values())) for row in rows)
    return [f"{empty:,} rows have an empty text"] if empty else []


def one_label(rows: Sequence[Example]) -> str:
    """A note where all rows have one label; empty elsewhere."""
    labels = {row.label for row in rows}
    if len(rows) < 2 or len(labels) > 1:
        return ""
    return f"every row has the label {quoted(rows[0].label)}, so there is nothing to tell apart"


def few_rows(spec: TaskSpec, rows: Sequence[Example]) -> str:
    """A word on labels that too few rows have to be learned or measured well."""
    counts = Counter(row.label for row in rows)
    least = max(FEW, len(rows) / 100)
    few = [f"{quoted(w)} {counts[w]:,}" for w in spec.words if counts[w] < least]
    return f"labels with few rows (under {FEW}, or under 1 %): {', '.join(few)}" if few else ""


def about_too_long(rows: Sequence[Example], too_long: Callable[[Example], bool]) -> int:
    """About how many rows are too long. By their letters rows are put in order, and the edge is
    looked for by halving, so only a few rows are asked about."""
    ordered = sorted(rows, key=lambda row: sum(map(len, row.fields.values())))
    return len(ordered) - bisect_left(ordered, True, key=too_long)


def left_out(count: int, why: str) -> str:
    """A note on rows that are not used; empty where there are none."""
    return f"{count:,} rows left out: {why}" if count else ""


def join(*parts: str) -> str:
    """The parts of a note that are not empty, joined and printable."""
    return printable("; ".join(part for part in parts if part))

"""What the texts of rows say about the rows: which are the same, and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_nlu.errors import printable, quoted
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.words import is_empty


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


def left_out(count: int, why: str) -> str:
    """A note on rows that are not used; empty where there are none."""
    return f"{count:,} rows left out: {why}" if count else ""


def join(*parts: str) -> str:
    """The parts of a note that are not empty, joined and printable."""
    return printable("; ".join(part for part in parts if part))

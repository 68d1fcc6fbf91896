"""What every reader gives: the examples of a file, their ids, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ppo_nlu.errors import UserError, quoted
from ppo_nlu.tasks import Example

MALFORMED = "malformed"
NO_GOLD = "without a gold label"


@dataclass(frozen=True)
class Split:
    """The examples of a file, how many rows were left out and why, and what was mended."""

    examples: list[Example]
    left_out: Mapping[str, int] = field(default_factory=dict)
    mended: str = ""


def identity(
    split: str, place: int, row: Mapping[str, Any], where: str
) -> tuple[str, dict[str, Any]]:
    """A row's id and extra: in the test split its official number, else its place in the file."""
    if split != "test":
        return f"{split}-{place}", {}
    own = next((row[name] for name in ("index", "idx", "id") if name in row), place)
    number = whole(own, where)
    return str(number), {"idx": number}


def whole(value: Any, where: str) -> int:
    """A row's official number, which some files write as a string."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: the row number {quoted(value)} is not a whole number") from None

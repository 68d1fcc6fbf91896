"""Fields of a config's dataclasses with limits on their values, and the keys of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, cast, get_type_hints


def number(
    default: Any,
    min: float | None = None,
    max: float | None = None,
    exclusive_min: bool = False,
    exclusive_max: bool = False,
) -> Any:
    """A field with a range, whose bounds are allowed unless they are exclusive."""
    ends = {"min": min, "max": max, "exclusive_min": exclusive_min, "exclusive_max": exclusive_max}
    return field(default=default, metadata=ends)


def positive(default: Any, max: float | None = None) -> Any:
    """A field above 0."""
    return number(default, min=0, max=max, exclusive_min=True)


def count(default: int, min: int = 0) -> Any:
    """A field that counts things, of which no machine has more than 10^9."""
    return number(default, min=min, max=10**9)


def share(default: Any) -> Any:
    """A field from 0 to 1, both allowed."""
    return number(default, min=0, max=1)


def below_one(default: Any) -> Any:
    """A field from 0 (allowed) to 1 (not allowed)."""
    return number(default, min=0, max=1, exclusive_max=True)


def long_text(default: Any) -> Any:
    """A field that takes pages of text."""
    return field(default=default, metadata={"longest": 100_000})


def one_of(default: str, *choices: str) -> Any:
    """A field that takes one of a few words."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True)
class Leaf:
    """One key that takes a value: its type and its metadata."""

    kind: Any
    limits: Mapping[str, Any]


@cache
def schema(cls: Any, prefix: str = "") -> dict[str, Leaf]:
    """Every dotted key of a tree of dataclasses, in order."""
    kinds = get_type_hints(cls)
    found: dict[str, Leaf] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        leaf = {key: Leaf(kind, item.metadata)}
        found |= schema(cast(type, kind), f"{key}.") if is_dataclass(kind) else leaf
    return found

"""The methods of a grid, one row each: what a cell of it does, and what the report calls it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables.

    `family` says which of a preset's files it takes: "_sft", "_encoder", or "" for that of PPO,
    which evaluation shares. `after` names the methods whose finished cells of the same task it
    needs.
    """

    title: str
    family: str = ""
    trains: bool = True
    several: bool = False  # one run for all tasks
    shots: int = 0
    after: tuple[str, ...] = ()


# In the order of the report's tables.
METHODS = {
    "encoder": Method("encoder", "_encoder"),
    "zero-shot": Method("zero-shot", trains=False),
    "few-shot": Method("few-shot (5)", trains=False, shots=5),
    "sft-st": Method("SFT-ST", "_sft"),
    "sft-seconds": Method("SFT-ST, equal seconds", "_sft", after=("sft-st", "ppo-st")),
    "ppo-st": Method("PPO-ST"),
    "sft-mt": Method("SFT-MT", "_sft", several=True),
    "ppo-mt": Method("PPO-MT", several=True),
}


def in_running_order(names: Collection[str]) -> list[str]:
    """The methods of those names, cheap ones and those that others need first."""
    rows = [(row.trains, row.several, bool(row.after), name) for name, row in METHODS.items()]
    return [name for *_, name in sorted(rows, key=lambda row: row[:3]) if name in names]


def method_title(name: str) -> str:
    """What the report calls a method; the name itself of one that only the paper has."""
    return METHODS[name].title if name in METHODS else name

"""Which rows of which tasks each training step sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ppo_nlu import data
from ppo_nlu.tasks import Example

if TYPE_CHECKING:
    from ppo_nlu.config import MixtureConfig


def shares(sizes: Mapping[str, int], cfg: MixtureConfig) -> dict[str, int]:
    """Rows of each task in one pass over the mixture.

    `proportional`: all of them; `capped`: at most `cap`; `equal`: as many of each as the largest
    has (at most `cap`), so the rows of smaller tasks come round again.
    """
    if cfg.mixing == "proportional":
        return dict(sizes)
    if cfg.mixing == "capped":
        return {task: min(size, cfg.cap) for task, size in sizes.items()}
    most = min(max(sizes.values()), cfg.cap)
    return dict.fromkeys(sizes, most)


def batch(
    rows: Mapping[str, list[Example]], cfg: MixtureConfig, size: int, step: int, seed: int
) -> list[Example]:
    """The rows of a step (from 0), a function of the step alone: a resumed run needs no state.

    A pass over the mixture is a seeded shuffle of (task, place). Pass after pass, a task's places
    slide over its rows, in a new order each time through, as with one task.
    """
    if len(rows) == 1:
        (only,) = rows.values()
        return [only[place] for place in data.batch_indices(len(only), size, step, seed)]
    each = shares({task: len(found) for task, found in rows.items()}, cfg)
    total = sum(each.values())
    chosen = []
    for place in range(step * size, (step + 1) * size):
        epoch, offset = divmod(place, total)
        entry = data.batch_indices(total, 1, epoch * total + offset, seed)[0]
        for task, share in each.items():
            if entry < share:
                turn = epoch * share + entry
                found = rows[task]
                chosen.append(found[data.batch_indices(len(found), 1, turn, seed)[0]])
                break
            entry -= share
    return chosen

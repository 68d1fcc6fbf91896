"""Shots, labelled rows in a prompt: seeded, balanced where asked, never the row itself."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ppo_nlu import data
from ppo_nlu.tasks import Example, TaskSpec, get_task

if TYPE_CHECKING:
    from ppo_nlu.config import Config

SPARE = 2  # rows beyond the count, to stand in where one is the row that is asked about


def choose(rows: Sequence[Example], count: int, balanced: bool, seed: int) -> list[Example]:
    """`count` distinct training rows in a seeded order; `balanced`: the labels take turns.

    Numbers count as labels by their whole part. The draw uses `random()` alone, whose sequence
    Python promises to keep.
    """
    order = data.epoch_order(len(rows), seed, epoch=-1)
    if not balanced:
        return [rows[place] for place in order[:count]]
    queues: dict[str, list[Example]] = {}
    for place in order:
        queues.setdefault(_class(rows[place].label or ""), []).append(rows[place])
    uniform = random.Random(f"ppo_nlu shots {seed}").random
    chosen: list[Example] = []
    while len(chosen) < count and queues:
        labels = sorted(queues)
        while labels and len(chosen) < count:
            label = labels.pop(int(uniform() * len(labels)))
            chosen.append(queues[label].pop(0))
        queues = {label: queue for label, queue in queues.items() if queue}
    return chosen


def _class(label: str) -> str:
    try:
        return str(math.floor(float(label)))
    except ValueError:
        return label


class Shots:
    """The shots of a run; those of a task are drawn when they are first asked for."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self._pools: dict[str, tuple[Example, ...]] = {}

    def pool(self, spec: TaskSpec) -> tuple[Example, ...]:
        """The shots of a task and some spare ones, from its training rows; a diagnostic set has
        those of the task it belongs to."""
        if spec.name not in self._pools:
            self._pools[spec.name] = _drawn(spec, self.cfg)
        return self._pools[spec.name]


def _drawn(spec: TaskSpec, cfg: Config) -> tuple[Example, ...]:
    if not cfg.prompt.shots:
        return ()
    seen = data.saw_labels(cfg.model.name_or_path)
    own = not spec.trained_with or "train" in spec.files
    source = spec if own else get_task(spec.trained_with)
    rows = data.train_examples(source, cfg.data, seen).examples
    count = cfg.prompt.shots + SPARE
    return tuple(choose(rows, count, cfg.prompt.balanced, cfg.seed))


def shown_to(
    spec: TaskSpec, example: Example, pool: Sequence[Example], count: int
) -> list[Example]:
    """The first `count` of the pool that are not the row itself."""
    own = data.normalise(data.joined(spec, example))
    return [shot for shot in pool if data.normalise(data.joined(spec, shot)) != own][:count]

"""The worked examples of few-shot prompts: seeded, balanced where asked, never the row itself."""

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


def of(spec: TaskSpec, cfg: Config) -> tuple[Example, ...]:
    """The worked examples of a run's prompts and some spare ones, from the training rows; for a
    diagnostic set those of the task it belongs to."""
    if not cfg.prompt.shots:
        return ()
    key = repr((spec, cfg.prompt, cfg.data, cfg.custom, cfg.seed, cfg.model.name_or_path))
    if key not in _chosen:
        seen = data.saw_labels(cfg.model.name_or_path)
        own = not spec.trained_with or "train" in spec.files
        source = spec if own else get_task(spec.trained_with)
        rows = data.train_examples(source, cfg.data, seen).examples
        count = cfg.prompt.shots + SPARE
        _chosen[key] = tuple(choose(rows, count, cfg.prompt.balanced, cfg.seed))
    return _chosen[key]


_chosen: dict[str, tuple[Example, ...]] = {}  # a run asks many times


def shown_to(
    spec: TaskSpec, example: Example, pool: Sequence[Example], count: int
) -> list[Example]:
    """The first `count` of the pool that are not the row itself."""
    own = data.normalise(data.joined(spec, example))
    return [shot for shot in pool if data.normalise(data.joined(spec, shot)) != own][:count]

"""Which rows train, and in which order training sees them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from ppo_nlu.data.seen_labels import exclusions
from ppo_nlu.data.splits import Dataset, load_split
from ppo_nlu.data.texts import join, joined, left_out, normalise, oddities, one_label
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec

if TYPE_CHECKING:
    from ppo_nlu.config import DataConfig


def train_examples(spec: TaskSpec, data_cfg: DataConfig, bundled_model: bool) -> Dataset:
    """The training rows, after four filters:

    1. Drop rows whose labels the bundled model has seen, if that model trains.
    2. Drop short rows (`data.min_words`).
    3. In ReCoRD, keep as many wrong names as right ones.
    4. Keep the first `data.limit` rows of the file; so a limit means the same rows for every seed.
    """
    whole = load_split(spec, "train", data_cfg)
    seen = exclusions() if bundled_model and data_cfg.exclude_pretraining_labels else set()
    rows = whole.examples
    fresh = [row for row in rows if normalise(joined(spec, row)) not in seen] if seen else rows
    least = data_cfg.min_words
    kept = [row for row in fresh if len(joined(spec, row).split()) >= least] if least else fresh
    if not kept:
        raise UserError(
            f"data.min_words: no training row is left of {len(rows)} ({len(fresh)} after "
            f"the exclusion of pretraining labels); lower data.min_words ({least}) "
            "or set data.exclude_pretraining_labels=false"
        )
    note = join(
        whole.note,
        left_out(len(rows) - len(fresh), "seen with their labels in pretraining"),
        left_out(len(fresh) - len(kept), f"under {least} words"),
    )
    if spec.reader == "record":
        even = _balanced(spec, kept)
        note = join(note, left_out(len(kept) - len(even), "as many No as Yes for each query"))
        kept = even
    if data_cfg.limit:
        kept = kept[: data_cfg.limit]
        note = join(note, f"the first {len(kept):,} rows")
    return replace(whole, examples=kept, note=join(note, *oddities(kept), one_label(kept)))


def _balanced(spec: TaskSpec, rows: Sequence[Example]) -> list[Example]:
    """For each group all rows that are right and as many that are wrong, drawn by the group's name,
    in the order of the file. A group without a right row leaves none."""
    yes, kept = spec.words[0], []
    for group, members in groupby(rows, key=lambda row: row.group):
        found = list(members)
        wrong = [place for place, row in enumerate(found) if row.label != yes]
        uniform = random.Random(f"ppo_nlu balance {group}").random
        drawn = sorted(wrong, key=lambda _: uniform())[: len(found) - len(wrong)]
        chosen = set(drawn) | (set(range(len(found))) - set(wrong))
        kept += [row for place, row in enumerate(found) if place in chosen]
    return kept


def first(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first rows up to a limit (0 = all) that leave no group in two; a single group that is
    longer than the limit is cut."""
    kept = list(examples[:limit] if limit else examples)
    if len(kept) == len(examples):
        return kept
    cut = examples[len(kept)].group
    whole = [row for row in kept if not cut or row.group != cut]
    return whole or kept


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), the same on every machine and Python version.

    Fisher-Yates on `random()` alone, the one method whose sequence Python promises to keep.
    """
    uniform = random.Random(f"ppo_nlu order {seed} {epoch}").random
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(uniform() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


_cached_order = lru_cache(maxsize=64)(epoch_order)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of a step (from 0): a window that slides over epoch after epoch, each in its own
    order. A function of the step alone, so a resumed run needs no state to go on where it was."""
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"batch_indices: n {n}, batch_size {batch_size}, step {step}")
    places = (divmod(place, n) for place in range(step * batch_size, (step + 1) * batch_size))
    return [_cached_order(n, seed, epoch)[offset] for epoch, offset in places]

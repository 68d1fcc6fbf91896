"""Which rows of a file of the user's own are dev, where there is no dev file (custom.dev_share)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ppo_nlu.data.texts import joined, normalise
from ppo_nlu.errors import UserError, quoted
from ppo_nlu.tasks import Example
from ppo_nlu.tasks.custom import CustomSpec

Sides = dict[str, list[Example]]  # the rows of "train" and "dev"


def divide(spec: CustomSpec, rows: Sequence[Example], path: Path) -> Sides:
    """The rows in two, by a hash of their text.

    All rows of the same text (`normalise`) fall on the same side, in every run and wherever they
    stand in the file. A larger share keeps the dev rows of a smaller one.

    A text is dev if its hash is below the share. Where the task has labels, and that would take
    over a fifth more or less than the share of a label's distinct texts, the edge of this label is
    moved: that happens to rare ones. Only of these may rows that are added to the file move others.
    """
    labels: dict[str, set[str]] = {}
    texts = [normalise(joined(spec, row)) for row in rows]
    for text, row in zip(texts, rows, strict=True):
        labels.setdefault(text, set()).add(row.label or "")
    if len(labels) < 2:
        raise UserError(
            f"{path}: all rows have the same text, so none can be kept apart for dev; "
            "give custom.dev"
        )
    dev = _stratified(labels, spec.dev_share) if spec.labels else set()
    dev = dev or _below(labels, spec.dev_share)
    sides: Sides = {"train": [], "dev": []}
    for text, row in zip(texts, rows, strict=True):
        side = "dev" if text in dev else "train"
        sides[side].append(replace(row, id=f"{side}-{row.id.partition('-')[2]}"))
    return sides


def one_sided(spec: CustomSpec, sides: Sides) -> list[str]:
    """A line for each side that has no row of a label, though the other side has."""
    there = {side: {row.label for row in rows} for side, rows in sides.items()}
    lines = []
    for side, other in (("train", "dev"), ("dev", "train")):
        missing = [w for w in spec.words if w in there[other] and w not in there[side]]
        if missing:
            names = ", ".join(map(quoted, missing))
            lines.append(
                f"{side} has no row of {names}: too few distinct texts; add rows or give custom.dev"
            )
    return lines


def _stratified(labels: Mapping[str, set[str]], share: float) -> set[str]:
    """The texts of dev. Each label with two distinct texts or more has one on each side, unless
    its texts have other labels too; the rarest labels choose first."""
    texts_of: dict[str, set[str]] = {}
    for text, given in labels.items():
        for label in given:
            texts_of.setdefault(label, set()).add(text)
    dev: set[str] = set()
    done: set[str] = set()
    for _, texts in sorted(texts_of.items(), key=lambda item: (len(item[1]), item[0])):
        wanted = _wanted(texts, share) - len(texts & dev)
        dev |= set(sorted(texts - done, key=_place)[: max(wanted, 0)])
        done |= texts
    return dev


def _wanted(texts: Collection[str], share: float) -> int:
    """How many texts of a label are to be dev: not all, and none only where there is but one."""
    fair, below = share * len(texts), sum(_place(text) <= share for text in texts)
    close = min(max(below, round(0.8 * fair)), round(1.2 * fair))
    return min(max(close, 1), len(texts) - 1)


def _below(texts: Iterable[str], share: float) -> set[str]:
    """The texts whose hash is below the share; at least one, and not all."""
    places = {text: _place(text) for text in texts}
    lowest, *middle, highest = sorted(places.values())
    edge = min(max(share, lowest), max([p for p in middle if p < highest], default=lowest))
    return {text for text, place in places.items() if place <= edge}


def _place(text: str) -> float:
    """A number in [0, 1), evenly spread over texts and always the same for a text."""
    digest = hashlib.sha256(f"ppo_nlu dev\n{text}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48

"""Prefixes that prompts share: how they are found, and one that is kept for many passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

Tokens = Sequence[int]
PREFIX_COST = 16  # tokens that one more prefix must save to be worth its own product


@dataclass
class PrefixCache:
    """A prefix that many passes with the same weights share: its tokens, and each layer's keys and
    values (n, heads, d)."""

    tokens: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def fits(self, prompts: Iterable[Tokens]) -> bool:
        """Whether all of the prompts begin with it and are longer."""
        size = len(self.tokens)
        return all(len(p) > size and list(p[:size]) == self.tokens for p in prompts)


def common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def common_prefix(prompts: Sequence[Tokens], most: int | None = None) -> list[int]:
    """What all of the prompts begin with: less than a whole prompt and at most `most` tokens. Empty
    where that is too few to be run by itself."""
    size = min((common(prompts[0], p) for p in prompts), default=0)
    size = min([size, *(len(p) - 1 for p in prompts)])
    size = size if most is None else min(size, most)
    return [] if size < PREFIX_COST else list(prompts[0][:size])


def shared_prefixes(prompts: Sequence[Tokens]) -> tuple[list[int], list[int]]:
    """How many leading tokens of each prompt are shared, and by which prefix (-1: none).

    Prompts in sorted order are cut into clusters where neighbours share fewer than t tokens. The
    prefix of a cluster is what all its members share, less than a whole prompt. The t that saves
    the most tokens wins.
    """
    count = len(prompts)
    order = sorted(range(count), key=lambda i: list(prompts[i]))
    near = [common(prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    best_saved, best = 0, ([0] * count, [-1] * count)
    steps = sorted(set(near) - {0})
    for threshold in sorted({*steps[:1], *steps[-16:]}, reverse=True):
        cuts, prefix_of = [0] * count, [-1] * count
        prefixes = saved = 0
        for start, stop in _clusters(near, threshold):
            members = order[start:stop]
            shared = min([*near[start : stop - 1], *(len(prompts[i]) - 1 for i in members)])
            gain = shared * (len(members) - 1) - PREFIX_COST
            if gain > 0:
                for i in members:
                    cuts[i], prefix_of[i] = shared, prefixes
                prefixes, saved = prefixes + 1, saved + gain
        if saved > best_saved:
            best_saved, best = saved, (cuts, prefix_of)
    return best


def _clusters(near: Sequence[int], threshold: int) -> list[tuple[int, int]]:
    """(start, stop) of the clusters: neighbours in them share at least `threshold` tokens."""
    cuts = [i + 1 for i, shared in enumerate(near) if shared < threshold]
    return list(zip([0, *cuts], [*cuts, len(near) + 1], strict=True))

"""Which queries of a packed row meet which keys: the products that its attention is made of.

Every run of tokens meets itself (causal), and the runs that it continues (all of them). Runs of
like length are taken together, as rows of one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

LOOSE = 0.85  # rows shorter than this share of the longest go to a batch of their own

Index: TypeAlias = "Tensor | slice"
Run: TypeAlias = tuple[int, int]  # start, length
Link: TypeAlias = tuple[int, int, int, int]  # start, length of queries; start, length of keys


@dataclass
class Part:
    """Queries and keys of one product, as indices of packed tokens: (rows, length), or a slice.

    `bias` (rows, 1, 1, keys) is -inf on padded keys; None: no key is padding. `real` are the places
    of the flattened queries that are no padding (None: all), `tokens` the tokens at these places;
    `padded` (rows, 1, queries) marks the padding. `earlier`: the keys are those of an earlier pass.
    """

    queries: Index
    keys: Index
    causal: bool
    tokens: Index
    bias: Tensor | None = None
    real: Tensor | None = None
    padded: Tensor | None = None
    earlier: bool = False

    @classmethod
    def of(cls, queries: Sequence[Run], keys: Sequence[Run] | None = None) -> Part:
        """The part of these runs of queries and keys; without keys, of each run with itself."""
        if len(queries) == 1:
            (start, length), (first, count) = queries[0], (keys or queries)[0]
            run = slice(start, start + length)
            return cls(
                queries=run, keys=slice(first, first + count), causal=keys is None, tokens=run
            )
        index, real = table(queries)
        part = cls(queries=index, keys=index, causal=keys is None, tokens=_as_slice(index[real]))
        if keys is not None:
            part.keys, seen = table(keys)
            if not bool(seen.all()):
                part.bias = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None, None]
        if not bool(real.all()):
            part.real, part.padded = real.flatten().nonzero().squeeze(1), ~real[:, None]
        return part

    def to(self, device: torch.device) -> Part:
        """The same part with its tensors on `device`."""
        tensors = ((name, x) for name, x in vars(self).items() if isinstance(x, Tensor))
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors}
        return replace(self, **moved)


@dataclass(frozen=True)
class Plan:
    """The parts of one pass over `size` tokens, in sequences of at most `longest`: in `own` every
    run meets itself, in `ancestors` the runs that it continues.

    `predicting` are the tokens that another one is predicted from; the last block's states are
    needed at these alone (None: at all tokens).
    """

    own: list[Part]
    ancestors: list[Part]
    predicting: Tensor | None
    size: int
    longest: int

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        own, ancestors = [p.to(device) for p in self.own], [p.to(device) for p in self.ancestors]
        predicting = None if self.predicting is None else self.predicting.to(device)
        return replace(self, own=own, ancestors=ancestors, predicting=predicting)


def plan_of(
    runs: Sequence[Run],
    to_prefixes: Sequence[Link],
    to_suffixes: Sequence[Link],
    predicting: Tensor | None,
    longest: int,
    earlier: tuple[bool, bool] = (False, False),
) -> Plan:
    """The plan of a packed row; `predicting` and `longest` as in `Plan`.

    A product costs a launch, and padding costs time. So a link with many queries is a product of
    its own; short runs and links are batched, where each is at least `LOOSE` times the longest.

    Args:
        runs: start and length of each; together they cover the row.
        to_prefixes: links from queries to their prefix: few links, each with many queries.
        to_suffixes: links from a prompt's answers to its suffix: many links, each with few queries.
        earlier: whether `to_prefixes`, and `to_suffixes`, lead to tokens of an earlier pass.
    """
    ordered = sorted((run for run in runs if run[1]), key=lambda run: -run[1])
    covered = [Part.of(batch) for batch in _batches(ordered, [length for _, length in ordered])]
    links = sorted((link for link in to_suffixes if link[1] and link[3]), key=lambda link: -link[3])
    batches = [([link], earlier[0]) for link in to_prefixes if link[1] and link[3]]
    batches += [(batch, earlier[1]) for batch in _batches(links, [link[3] for link in links])]
    ancestors = [
        replace(Part.of([x[:2] for x in batch], [x[2:] for x in batch]), earlier=before)
        for batch, before in batches
    ]
    return Plan(
        own=covered,
        ancestors=ancestors,
        predicting=predicting,
        size=sum(length for _, length in runs),
        longest=longest,
    )


def _batches(items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Consecutive items in batches of like length (`LOOSE`); `lengths` never rises."""
    batch: list[Any] = []
    longest = 0
    for item, length in zip(items, lengths, strict=True):
        if batch and length < LOOSE * longest:
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(item)
    if batch:
        yield batch


def table(runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
    """Indices (rows, longest) of the tokens of these runs, and which of them are real. Padding
    repeats the last token of its run."""
    starts, lengths = torch.tensor(runs, dtype=torch.long).unbind(1)
    column = torch.arange(int(lengths.max()))
    real = column < lengths[:, None]
    return starts[:, None] + torch.minimum(column, lengths[:, None] - 1), real


def _as_slice(tokens: Tensor) -> Index:
    """The same tokens as a slice where they are consecutive: a slice is faster to copy."""
    first, count = int(tokens[0]), len(tokens)
    if torch.equal(tokens, torch.arange(first, first + count)):
        return slice(first, first + count)
    return tokens

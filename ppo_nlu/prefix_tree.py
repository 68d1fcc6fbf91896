"""The prefix tree: every distinct token of a batch is run once, with gradients.

A batch of prompts, each with one or more answers, becomes a short list of levels. Level 0 holds the
distinct shared prefixes (often one row), the next level the rest of each prompt, the last the
answers. Each level is one forward of the decoder whose `past_key_values` are its parents' keys and
values; autograd sums the gradient over the children by itself. Rows are right-padded, positions are
explicit, so padding inside a level changes nothing.

    level 0   System_prompt: ... Prompt: ... the sentence "          1 row
    level 1   it 's charming ". Assistant: <Judgement>               one row a prompt
    level 2   Positive </Judgement>                                  one row an answer

Where every prompt has just one answer, level 2 is joined to level 1. A model whose positions cannot
be given explicitly takes the plain path: one level, one row an answer, left-padded. The code that
calls `run` does not know the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

Tokens = Sequence[int]


@dataclass
class Level:
    """One forward: `ids`, `mask` (rows, length), and each row's parent row one level up."""

    ids: Tensor
    mask: Tensor
    parent: Tensor | None = None


@dataclass
class Tree:
    """Levels, where each prompt ends, and where each answer token is predicted from.

    `ends (P,)` and `positions (B, R)` are indices into the hidden states of all levels, flattened
    and laid end to end; `mask (B, R)` tells which answer tokens count.
    """

    levels: list[Level]
    ends: Tensor
    positions: Tensor
    mask: Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that are run, padding not counted."""
        return sum(int(level.mask.sum()) for level in self.levels)

    def to(self, device: torch.device) -> Tree:
        """The same tree with its tensors on `device`."""
        levels = [
            Level(
                level.ids.to(device),
                level.mask.to(device),
                None if level.parent is None else level.parent.to(device),
            )
            for level in self.levels
        ]
        ends, positions = self.ends.to(device), self.positions.to(device)
        return Tree(levels, ends, positions, self.mask.to(device), self.lengths)


@dataclass
class State:
    """Keys and values after a pass, one row a prompt, and what decoding needs to go on."""

    cache: DynamicCache
    mask: Tensor
    lengths: Tensor


def build(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens] = (),
    owners: Sequence[int] | None = None,
    shared: bool = True,
) -> Tree:
    """The tree of these prompts and answers; answer j belongs to prompt `owners[j]` (default: j).

    Every prompt holds at least one token. With `shared=False` the plain path's single level.
    """
    owners = list(range(len(answers))) if owners is None else list(owners)
    assert len(owners) == len(answers) and all(len(prompt) for prompt in prompts)
    if not shared:
        return _plain(prompts, answers, owners)
    joined = len(answers) > 0 and owners == list(range(len(prompts)))
    cuts, parents = _shared_prefixes(prompts)
    tails = [list(prompt[cut:]) for prompt, cut in zip(prompts, cuts, strict=True)]
    ends_at = [len(tail) - 1 for tail in tails]
    if joined:
        tails = [tail + list(answer[:-1]) for tail, answer in zip(tails, answers, strict=True)]

    levels: list[Level] = []
    if parents is not None:
        first = {parent: index for index, parent in reversed(list(enumerate(parents)))}
        heads = [prompts[first[row]][: cuts[first[row]]] for row in range(len(first))]
        levels.append(_level(heads))
    levels.append(_level(tails, parents))
    offset = sum(level.ids.numel() for level in levels[:-1])
    width = levels[-1].ids.shape[1]
    ends = [offset + row * width + column for row, column in enumerate(ends_at)]

    if joined:
        positions = [[ends[j] + t for t in range(len(a))] for j, a in enumerate(answers)]
    else:
        offset += levels[-1].ids.numel()
        bodies = [list(answer[:-1]) for answer in answers]
        if any(bodies):
            levels.append(_level(bodies, owners))
        width = levels[-1].ids.shape[1]
        positions = [
            [ends[owners[j]], *(offset + j * width + t for t in range(len(a) - 1))][: len(a)]
            for j, a in enumerate(answers)
        ]
    return _tree(levels, ends, positions, prompts)


def _plain(prompts: Sequence[Tokens], answers: Sequence[Tokens], owners: list[int]) -> Tree:
    """One left-padded level: a row for each answer, or for each prompt where there are none."""
    owners = owners or list(range(len(prompts)))
    bodies = [list(a[:-1]) for a in answers] or [[] for _ in prompts]
    rows = [list(prompts[o]) + body for o, body in zip(owners, bodies, strict=True)]
    level = _level(rows, left=True)
    width = level.ids.shape[1]
    starts = [
        j * width + width - len(body) - 1 for j, body in enumerate(bodies)
    ]  # the prompt's last token
    positions = [[starts[j] + t for t in range(len(a))] for j, a in enumerate(answers)]
    row_of = {owner: j for j, owner in reversed(list(enumerate(owners)))}
    ends = [starts[row_of[p]] if p in row_of else 0 for p in range(len(prompts))]
    return _tree([level], ends, positions, prompts)


def _tree(
    levels: list[Level], ends: list[int], positions: list[list[int]], prompts: Sequence[Tokens]
) -> Tree:
    table, mask = pad(positions)
    lengths = [len(prompt) for prompt in prompts]
    return Tree(levels, torch.tensor(ends, dtype=torch.long), table, mask, lengths)


def pad(rows: Sequence[Tokens], left: bool = False, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor (rows, longest) and the mask of what is real."""
    width = max((len(row) for row in rows), default=0)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    gaps = [[fill] * (width - len(row)) for row in rows]
    padded = [
        gap + list(row) if left else list(row) + gap for row, gap in zip(rows, gaps, strict=True)
    ]
    ids = torch.tensor(padded, dtype=torch.long).view(len(rows), width)
    column = torch.arange(width)
    mask = column >= width - lengths[:, None] if left else column < lengths[:, None]
    return ids, mask


def _level(
    rows: Sequence[Tokens], parents: Sequence[int] | None = None, left: bool = False
) -> Level:
    ids, mask = pad(rows, left)
    return Level(ids, mask, None if parents is None else torch.tensor(parents, dtype=torch.long))


def _shared_prefixes(prompts: Sequence[Tokens]) -> tuple[list[int], list[int] | None]:
    """How many leading tokens of each prompt go to level 0, and the row there.

    Prompts in sorted order are cut into clusters where neighbours share fewer than t tokens; a
    cluster's prefix is what all its members share. The t that runs the fewest padded tokens wins;
    where no sharing beats one plain level, the parents are None.
    """
    count = len(prompts)
    order = sorted(range(count), key=lambda i: list(prompts[i]))
    near = [common(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False)]
    best_cost = count * max(map(len, prompts))
    best: tuple[list[int], list[int] | None] = ([0] * count, None)
    steps = sorted(set(near) - {0})
    for threshold in sorted({*steps[:1], *steps[-16:]}, reverse=True):
        cuts, parents = [0] * count, [0] * count
        rows = 0
        start = 0
        heads: list[int] = []
        for stop in range(1, count + 1):
            if stop < count and near[stop - 1] >= threshold:
                continue
            members = order[start:stop]
            shared = min(near[start : stop - 1], default=threshold)
            shared = min([shared, *(len(prompts[i]) - 1 for i in members)])
            for i in members:
                cuts[i], parents[i] = shared, rows
            heads.append(shared)
            rows, start = rows + 1, stop
        tail = max(len(p) - cut for p, cut in zip(prompts, cuts, strict=True))
        cost = rows * max(heads) + count * tail
        if min(heads) > 0 and cost < best_cost:
            best_cost, best = cost, (cuts, parents)
    return best


def common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def run(decoder: nn.Module, tree: Tree, positions: bool = True) -> tuple[Tensor, State]:
    """Forward every level; returns the flattened hidden states (tokens, H) and the last state.

    `decoder` is a Hugging Face decoder without its head; `positions=False` for one that takes no
    `position_ids`. The state is that of the last level.
    """
    hidden: list[Tensor] = []
    cache: DynamicCache | None = None
    seen: Tensor | None = None
    for level in tree.levels:
        mask = level.mask
        if cache is not None and level.parent is not None:
            assert seen is not None
            cache = gather(cache, level.parent)
            seen = seen.index_select(0, level.parent)
            mask = torch.cat([seen, level.mask], dim=1)
        place = mask.long().cumsum(1).sub_(1).clamp_(min=0)[:, -level.ids.shape[1] :]
        out = forward(decoder, level.ids, mask, place if positions else None, cache)
        cache, seen = out.past_key_values, mask
        hidden.append(out.last_hidden_state.flatten(0, 1))
    assert cache is not None and seen is not None
    lengths = seen.sum(1)
    return torch.cat(hidden), State(cache, seen, lengths)


def forward(
    decoder: nn.Module, ids: Tensor, mask: Tensor, place: Tensor | None, cache: DynamicCache | None
):
    """One call of the decoder: `ids` (rows, length), `mask` (rows, past + length), positions."""
    extra = {} if place is None else {"position_ids": place}
    return decoder(
        input_ids=ids,
        attention_mask=mask.long(),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **extra,
    )


def gather(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache whose row i is row `rows[i]` of the given one, which is left as it is."""

    def taken(x: Tensor) -> Tensor:
        return x.expand(len(rows), -1, -1, -1) if len(x) == 1 else x.index_select(0, rows)

    return _cache([(taken(keys), taken(values)) for keys, values in _pairs(cache)])


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _cache(pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache around these tensors, not copied (its `update` concatenates, never writes)."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache

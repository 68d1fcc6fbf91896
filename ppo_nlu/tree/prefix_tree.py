"""The prefix tree: every distinct token of a batch is run once, with gradients.

A batch of prompts, each with one or more answers, becomes a tree of runs of tokens: the prefixes
that prompts share (often one), the rest of each prompt, the answers. All runs lie end to end in one
row without padding, with explicit positions; the decoder runs that row in one forward, and
`tree_attention` lets each token see its ancestors alone. Autograd sums the gradient over the
children by itself.

    shared    System_prompt: ... Prompt: ... the sentence "          once
    own       it 's charming ". Assistant: <Judgement>               one run a prompt
    answer    Positive </Judgement>                                  one run an answer

Where every prompt has just one answer, the answer is joined to its prompt's own run. A model whose
positions cannot be given, or whose attention is its own, takes the plain path: one row an answer,
left-padded. The code that calls `run` does not know the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ppo_nlu.tree import tree_attention
from ppo_nlu.tree.tree_attention import Plan, TreeCache

Tokens = Sequence[int]
HEAD_COST = 16  # tokens that one more shared prefix must save to be worth its own product


@dataclass(frozen=True)
class Cost:
    """Tokens of a pass, padding not counted: as run, and as one row an answer would need; `pairs`
    counts each token that is run with each one it attends to, `wanted` those whose states are
    asked for, where the last block runs no others."""

    tokens_run: int
    tokens_full: int
    pairs: int
    wanted: int | None = None


@dataclass
class Opening:
    """What many passes with the same weights share: its tokens, and each layer's keys and values
    (n, heads, d)."""

    tokens: list[int]
    layers: list[tuple[Tensor, Tensor]]

    def fits(self, prompts: Iterable[Tokens]) -> bool:
        """Whether all of the prompts begin with it, and go on."""
        size = len(self.tokens)
        return all(len(p) > size and list(p[:size]) == self.tokens for p in prompts)


@dataclass
class Tree:
    """What to run, where each prompt ends, and where each answer token is predicted from.

    `ids` are the packed tokens (N,), or left-padded rows (rows, length) on the plain path, which
    has no `plan`; `places`, of the same shape, are positions, and `seen` is the mask of the rows.
    `ends (P,)` and `positions (B, R)` are indices into the flattened hidden states; `mask (B, R)`
    tells which answer tokens count. `heads` and `tails` are the (start, length) of the shared runs
    and of each prompt's own run, `parents` the shared run of each prompt, -1 for none. Behind an
    opening the one shared run lies in that.
    """

    ids: Tensor
    places: Tensor
    ends: Tensor
    positions: Tensor
    mask: Tensor
    lengths: list[int]
    cost: Cost
    plan: Plan | None = None
    seen: Tensor | None = None
    heads: list[tuple[int, int]] | None = None
    tails: list[tuple[int, int]] | None = None
    parents: list[int] | None = None

    def to(self, device: torch.device) -> Tree:
        """The same tree with its tensors on `device`."""
        return Tree(
            self.ids.to(device),
            self.places.to(device),
            self.ends.to(device),
            self.positions.to(device),
            self.mask.to(device),
            self.lengths,
            self.cost,
            None if self.plan is None else self.plan.to(device),
            None if self.seen is None else self.seen.to(device),
            self.heads,
            self.tails,
            self.parents,
        )


def build(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens] = (),
    owners: Sequence[int] | None = None,
    shared: bool = True,
    opening: Opening | None = None,
) -> Tree:
    """The tree of these prompts and answers; answer j belongs to prompt `owners[j]` (default: j).

    Every prompt holds at least one token. With `shared=False` the plain path's padded rows. An
    `opening` that fits the prompts is not run again; it gets no gradient.
    """
    owners = list(range(len(answers))) if owners is None else list(owners)
    assert len(owners) == len(answers) and all(len(prompt) for prompt in prompts)
    if not shared:
        return _plain(prompts, answers, owners)
    if opening is not None and not opening.fits(prompts):
        opening = None
    return _packed(prompts, answers, owners, opening)


def _packed(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    owners: list[int],
    opening: Opening | None,
) -> Tree:
    """All runs end to end: the shared ones, then below each its prompts, then their answers."""
    joined = len(answers) > 0 and owners == list(range(len(prompts)))
    row = _Row()
    heads: list[tuple[int, int]] = []
    if opening is not None:
        heads.append((0, len(opening.tokens)))
        cuts, parents = [len(opening.tokens)] * len(prompts), [0] * len(prompts)
    else:
        cuts, parents = _shared_prefixes(prompts)
        for head in range(max(parents) + 1):
            first = parents.index(head)
            heads.append(row.add(prompts[first][: cuts[first]], 0))
    replies = _replies(owners)
    tails = [(0, 0)] * len(prompts)
    starts = [0] * len(answers)  # of the answers' own runs
    shared_links, own_links = [], []
    for head in range(-1, len(heads)):
        began = len(row.ids)
        members = [p for p, parent in enumerate(parents) if parent == head]
        # Runs of like length, which attention takes together, lie together.
        members.sort(key=lambda p: cuts[p] - len(prompts[p]) - (len(answers[p]) if joined else 0))
        for p in members:
            body = answers[p][:-1] if joined else ()
            tails[p] = row.add([*prompts[p][cuts[p] :], *body], cuts[p])
        for p in members if not joined else ():
            mine = replies.get(p, ())
            own_links.append(_add_answers(row, answers, mine, len(prompts[p]), tails[p], starts))
        if head >= 0:
            shared_links.append((began, len(row.ids) - began, *heads[head]))

    ends = [tails[p][0] + len(prompt) - cuts[p] - 1 for p, prompt in enumerate(prompts)]
    positions = [
        [ends[o] + t for t in range(len(a))]
        if joined
        else [ends[o], *(starts[j] + t for t in range(len(a) - 1))][: len(a)]
        for j, (a, o) in enumerate(zip(answers, owners, strict=True))
    ]
    table, mask = pad(positions)
    wanted = torch.tensor(sorted({*ends, *(place for line in positions for place in line)}))
    plan = tree_attention.plan(
        row.runs, shared_links, own_links, wanted, max(row.places) + 1, (opening is not None, False)
    )
    plan.past = None if opening is None else opening.layers
    return Tree(
        torch.tensor(row.ids),
        torch.tensor(row.places),
        torch.tensor(ends),
        table,
        mask,
        [len(prompt) for prompt in prompts],
        Cost(
            len(row.ids),
            _full(prompts, answers, owners),
            row.pairs([*shared_links, *own_links]),
            len(wanted),
        ),
        plan,
        None,
        heads,
        tails,
        parents,
    )


class _Row:
    """The packed row while it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.places: list[int] = []
        self.runs: list[tuple[int, int]] = []

    def add(self, tokens: Tokens, place: int) -> tuple[int, int]:
        """Append a run whose first token has this position; its (start, length)."""
        run = (len(self.ids), len(tokens))
        self.ids += tokens
        self.places += range(place, place + len(tokens))
        self.runs.append(run)
        return run

    def pairs(self, links: Iterable[tuple[int, int, int, int]]) -> int:
        """How many pairs of tokens attend: inside each run, and along these links to other runs."""
        inside = _triangles(length for _, length in self.runs)
        return inside + sum(asked * length for _, asked, _, length in links)


def _replies(owners: Sequence[int]) -> dict[int, list[int]]:
    """The answers of each prompt that has any."""
    found: dict[int, list[int]] = {}
    for j, owner in enumerate(owners):
        found.setdefault(owner, []).append(j)
    return found


def _add_answers(
    row: _Row,
    answers: Sequence[Tokens],
    mine: Sequence[int],
    place: int,
    tail: tuple[int, int],
    starts: list[int],
) -> tuple[int, int, int, int]:
    """Append a prompt's answers, each from `place` on, short of its last token; `starts` learns
    where. Returns the link from all of them to the prompt's own run."""
    first = len(row.ids)
    for j in mine:
        starts[j] = row.add(answers[j][:-1], place)[0]
    return first, len(row.ids) - first, *tail


def _full(prompts: Sequence[Tokens], answers: Sequence[Tokens], owners: list[int]) -> int:
    """Tokens of one row an answer, or of one a prompt where there are no answers."""
    if not answers:
        return sum(len(prompt) for prompt in prompts)
    return sum(len(prompts[o]) + len(a) - 1 for a, o in zip(answers, owners, strict=True))


def _plain(prompts: Sequence[Tokens], answers: Sequence[Tokens], owners: list[int]) -> Tree:
    """Left-padded rows: one for each answer, or for each prompt where there are none."""
    full = _full(prompts, answers, owners)
    owners = owners or list(range(len(prompts)))
    bodies = [list(a[:-1]) for a in answers] or [[] for _ in prompts]
    rows = [list(prompts[o]) + body for o, body in zip(owners, bodies, strict=True)]
    ids, seen = pad(rows, left=True)
    width = ids.shape[1]
    starts = [
        j * width + width - len(body) - 1 for j, body in enumerate(bodies)
    ]  # the prompt's last token
    positions = [[starts[j] + t for t in range(len(a))] for j, a in enumerate(answers)]
    row_of = {owner: j for j, owner in reversed(list(enumerate(owners)))}
    ends = [starts[row_of[p]] if p in row_of else 0 for p in range(len(prompts))]
    table, mask = pad(positions)
    lengths = [len(prompt) for prompt in prompts]
    places = seen.long().cumsum(1).sub_(1).clamp_(min=0)
    cost = Cost(full, full, _triangles(len(row) for row in rows))
    return Tree(ids, places, torch.tensor(ends), table, mask, lengths, cost, seen=seen)


def _triangles(lengths: Iterable[int]) -> int:
    """Pairs of causal attention inside runs of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


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


def _shared_prefixes(prompts: Sequence[Tokens]) -> tuple[list[int], list[int]]:
    """How many leading tokens of each prompt are shared, and by which shared run (-1: none).

    Prompts in sorted order are cut into clusters where neighbours share fewer than t tokens; a
    cluster's prefix is what all its members share, short of a whole prompt. The t that runs the
    fewest tokens wins.
    """
    count = len(prompts)
    order = sorted(range(count), key=lambda i: list(prompts[i]))
    near = [common(prompts[a], prompts[b]) for a, b in zip(order, order[1:], strict=False)]
    best_saved, best = 0, ([0] * count, [-1] * count)
    steps = sorted(set(near) - {0})
    for threshold in sorted({*steps[:1], *steps[-16:]}, reverse=True):
        cuts, parents = [0] * count, [-1] * count
        heads = saved = start = 0
        for stop in range(1, count + 1):
            if stop < count and near[stop - 1] >= threshold:
                continue
            members = order[start:stop]
            shared = min([*near[start : stop - 1], *(len(prompts[i]) - 1 for i in members)])
            gain = shared * (len(members) - 1) - HEAD_COST
            if gain > 0:
                for i in members:
                    cuts[i], parents[i] = shared, heads
                heads, saved = heads + 1, saved + gain
            start = stop
        if saved > best_saved:
            best_saved, best = saved, (cuts, parents)
    return best


def common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


@dataclass
class State:
    """What a pass over prompts left behind: its tree, the states (P, H) behind the prompts, and
    keys and values. Where the pass ran under autograd, its graph hangs on the tensors."""

    tree: Tree
    ends: Tensor
    layers: list[tuple[Tensor, Tensor]] | None = None  # packed: (N, heads, d) of each layer
    cache: DynamicCache | None = None  # plain

    def start(self, rows: Sequence[int], room: int, static: bool = False) -> TreeCache | PlainCache:
        """A cache with a row for each of these prompts (one may come often), `room` to grow;
        `static`: as in `TreeCache`, where it is one."""
        tree = self.tree
        if self.layers is None:
            assert self.cache is not None and tree.seen is not None
            index = torch.tensor(rows, device=tree.seen.device)
            return PlainCache(select(self.cache, index), tree.seen[index])
        assert tree.tails is not None and tree.heads is not None and tree.parents is not None
        tails, parents = [tree.tails[r] for r in rows], [tree.parents[r] for r in rows]
        reach = max(tree.lengths) + room
        above = None if tree.plan is None else tree.plan.past
        return TreeCache(self.layers, tree.heads, tails, parents, room, reach, static, above)


def run(
    decoder: nn.Module, tree: Tree, positions: bool = True, keep: bool = False
) -> tuple[Tensor, State]:
    """Forward a tree; the flattened hidden states (tokens, H), and with `keep` what decoding needs.

    `decoder` is a Hugging Face decoder without its head; `positions=False` for one that takes no
    `position_ids`.
    """
    if tree.plan is not None:
        tree.plan.keep = [] if keep else None
        flat = tree_attention.forward(decoder, tree.ids, tree.places, tree.plan)
        # The graph's nodes hold the plan: keys and values left in it would never be freed.
        layers, tree.plan.keep = tree.plan.keep, None
        return flat, State(tree, flat.index_select(0, tree.ends), layers)
    assert tree.seen is not None
    places = tree.places if positions else None
    out = forward(decoder, tree.ids, tree.seen, places, None, keep)
    flat = out.last_hidden_state.flatten(0, 1)
    return flat, State(tree, flat.index_select(0, tree.ends), cache=kept_cache(out))


@torch.no_grad()
def opening_of(
    decoder: nn.Module, prompts: Sequence[Tokens], most: int | None = None
) -> Opening | None:
    """What all of these prompts begin with, up to `most` tokens, run once; None where that is too
    little."""
    size = min((common(prompts[0], p) for p in prompts), default=0)
    size = min([size, *(len(p) - 1 for p in prompts)])
    size = size if most is None else min(size, most)
    if size < HEAD_COST:
        return None
    tokens = list(prompts[0][:size])
    tree = build([tokens]).to(next(decoder.parameters()).device)
    layers = run(decoder, tree, keep=True)[1].layers
    assert layers is not None
    return Opening(tokens, layers)


def grow(
    decoder: nn.Module, state: State, answers: Sequence[Tokens], owners: Sequence[int]
) -> tuple[Tensor, Tensor, Cost]:
    """Run answers behind prompts that a packed pass has run; its graph is the trunk of theirs.

    Returns the states (N, H) that predict the answers' tokens, row by row, the mask (B, R), and
    the cost, the prompts' own left out.
    """
    tree = state.tree
    assert state.layers is not None and tree.heads is not None
    assert tree.plan is not None and tree.plan.past is None
    assert tree.tails is not None and tree.parents is not None
    replies, row = _replies(owners), _Row()
    starts = [0] * len(answers)
    shared_links, own_links = [], []
    for head in range(-1, len(tree.heads)):
        began = len(row.ids)
        for p in (p for p, parent in enumerate(tree.parents) if parent == head and p in replies):
            place, tail = tree.lengths[p], tree.tails[p]
            own_links.append(_add_answers(row, answers, replies[p], place, tail, starts))
        if head >= 0:
            shared_links.append((began, len(row.ids) - began, *tree.heads[head]))
    count = len(tree.lengths)
    table, mask = pad(
        [
            [owner, *(count + starts[j] + t for t in range(len(answer) - 1))][: len(answer)]
            for j, (answer, owner) in enumerate(zip(answers, owners, strict=True))
        ]
    )
    device = state.ends.device
    hidden = state.ends
    if row.ids:
        reach = max(row.places) + 1
        plan = tree_attention.plan(row.runs, shared_links, own_links, None, reach, (True, True))
        plan = plan.to(device)
        plan.past = state.layers
        ids, places = (torch.tensor(x, device=device) for x in (row.ids, row.places))
        hidden = torch.cat([hidden, tree_attention.forward(decoder, ids, places, plan)])
    full = sum(tree.lengths[o] + len(a) - 1 for a, o in zip(answers, owners, strict=True))
    cost = Cost(len(row.ids), full, row.pairs([*shared_links, *own_links]))
    table, mask = table.to(device), mask.to(device)
    return hidden.index_select(0, table[mask]), mask, cost


def forward(
    decoder: nn.Module,
    ids: Tensor,
    mask: Tensor,
    place: Tensor | None,
    cache: DynamicCache | None,
    keep: bool = True,
):
    """One call of the decoder: `ids` (rows, length), `mask` (rows, past + length), positions."""
    extra: dict[str, Any] = {} if place is None else {"position_ids": place}
    extra[cache_argument(decoder)] = cache
    return decoder(
        input_ids=ids,
        attention_mask=mask.long(),
        use_cache=keep,
        return_dict=True,
        **extra,
    )


def cache_argument(decoder: nn.Module) -> str:
    """What this version of transformers calls the keys and values of earlier tokens."""
    known = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def kept_cache(out: Any) -> Any:
    """The keys and values in a decoder's output, by either name."""
    return out.cache if hasattr(out, "cache") else out.past_key_values


class PlainCache:
    """Keys and values while decoding on the plain path, as transformers keeps them."""

    def __init__(self, cache: DynamicCache, mask: Tensor):
        self.cache, self.mask = cache, mask

    def step(self, decoder: nn.Module, token: Tensor, place: Tensor | None) -> Tensor:
        """Run one token a row (at its position, where the model takes it); the last hidden states
        (rows, H)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        places = None if place is None else place[:, None]
        out = forward(decoder, token[:, None], self.mask, places, self.cache)
        self.cache = kept_cache(out)
        return out.last_hidden_state[:, -1]

    def keep(self, going: Sequence[int]) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(going, device=self.mask.device)
        self.cache, self.mask = select(self.cache, rows), self.mask[rows]


def select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows; plain layers are left as they are, for other callers."""
    layers: list[Any] = cache.layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        cache.reorder_cache(rows)  # type: ignore[arg-type]  # layers with a window or a recurrent state keep more
        return cache
    taken = DynamicCache()
    for old in layers:
        layer: Any = DynamicLayer()
        layer.keys, layer.values = old.keys.index_select(0, rows), old.values.index_select(0, rows)
        layer.dtype, layer.device, layer.is_initialized = old.keys.dtype, old.keys.device, True
        taken.layers.append(layer)
    return taken

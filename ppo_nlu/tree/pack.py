"""The prefix tree as integers: every distinct token of a batch once, in one row.

A batch of prompts, each with one or more answers, becomes a tree of runs of tokens: the prefixes
that prompts share (often one), the rest of each prompt, the answers. All runs lie end to end in one
row without padding, each token with its position id. A plan says which runs attend to which.

    prefix    System_prompt: ... Prompt: ... the sentence "          once
    suffix    it 's charming ". Assistant: <Judgement>               one run a prompt
    answer    Positive </Judgement>                                  one run an answer

The last token of an answer is not run: nothing is predicted from it. Where every prompt has just
one answer, suffix and answer are one run. A model that takes no position ids, or whose attention is
its own, takes the plain path: one left-padded row for each answer. The code that uses a tree does
not know the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppo_nlu.tree.packed_row import Cost, PackedRow, triangles
from ppo_nlu.tree.plan import Plan, Run
from ppo_nlu.tree.prefixes import PrefixCache, Tokens, shared_prefixes


@dataclass(frozen=True)
class Branches:
    """Where the runs of a packed tree lie: (start, length) of the prefixes and of each prompt's
    suffix. `prefix_of` gives each prompt's prefix, -1 for none. With a `cache` there is one prefix,
    which lies in the cache and not in the row."""

    prefixes: list[Run]
    suffixes: list[Run]
    prefix_of: list[int]
    cache: PrefixCache | None = None


@dataclass(frozen=True)
class Tree:
    """What to run, where each prompt ends, and where each answer token is predicted from.

    `ids` are the packed tokens (N,), with `position_ids` of the same shape. On the plain path they
    are left-padded rows (rows, length) with their `attention_mask`, and there is neither `plan` nor
    `branches`. `ends` (P,), the last token of each prompt, and `predicted_from` (B, R) are indices
    into the flattened hidden states; `mask` (B, R) tells which answer tokens are real. `lengths`
    are those of the prompts.
    """

    ids: Tensor
    position_ids: Tensor
    ends: Tensor
    predicted_from: Tensor
    mask: Tensor
    lengths: list[int]
    cost: Cost
    plan: Plan | None = None
    branches: Branches | None = None
    attention_mask: Tensor | None = None

    def to(self, device: torch.device) -> Tree:
        """The same tree with its tensors on `device`."""
        return replace(
            self,
            ids=self.ids.to(device),
            position_ids=self.position_ids.to(device),
            ends=self.ends.to(device),
            predicted_from=self.predicted_from.to(device),
            mask=self.mask.to(device),
            plan=None if self.plan is None else self.plan.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
        )


def build(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens] = (),
    prompt_of: Sequence[int] | None = None,
    packed: bool = True,
    prefix_cache: PrefixCache | None = None,
) -> Tree:
    """The tree of these prompts and answers; answer j belongs to prompt `prompt_of[j]` (default:
    j).

    Every prompt holds at least one token. `packed=False` gives the plain path's padded rows. The
    tokens of a `prefix_cache` that fits the prompts are not run again; they get no gradient.
    """
    prompt_of = list(range(len(answers))) if prompt_of is None else list(prompt_of)
    assert len(prompt_of) == len(answers) and all(len(prompt) for prompt in prompts)
    if not packed:
        return _plain(prompts, answers, prompt_of)
    if prefix_cache is not None and not prefix_cache.fits(prompts):
        prefix_cache = None
    return _packed(prompts, answers, prompt_of, prefix_cache)


def _packed(
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    prompt_of: list[int],
    cache: PrefixCache | None,
) -> Tree:
    """All runs end to end: the prefixes; then for each prefix its suffixes and their answers."""
    row = PackedRow()
    cuts, branches = _prefixes(row, prompts, cache)
    if len(answers) > 0 and prompt_of == list(range(len(prompts))):
        _add_joined(row, prompts, answers, cuts, branches)
        starts = None
    else:
        starts = _add_apart(row, prompts, answers, prompt_of, cuts, branches)
    ends = [branches.suffixes[p][0] + len(prompt) - cuts[p] - 1 for p, prompt in enumerate(prompts)]
    if starts is None:
        starts = [end + 1 for end in ends]
    found = _predicted_from(answers, prompt_of, ends, starts)
    predicted_from, mask = pad(found)
    predicting = torch.tensor(sorted({*ends, *(index for line in found for index in line)}))
    lengths = [len(prompt) for prompt in prompts]
    return Tree(
        ids=torch.tensor(row.ids),
        position_ids=torch.tensor(row.position_ids),
        ends=torch.tensor(ends),
        predicted_from=predicted_from,
        mask=mask,
        lengths=lengths,
        cost=row.cost(_full(lengths, answers, prompt_of), len(predicting)),
        plan=row.plan((cache is not None, False), predicting),
        branches=branches,
    )


def _prefixes(
    row: PackedRow, prompts: Sequence[Tokens], cache: PrefixCache | None
) -> tuple[list[int], Branches]:
    """Append the prefixes that are not in the cache. Returns how many tokens of each prompt its
    prefix holds, and the branches, whose suffixes are still to be filled in."""
    suffixes = [(0, 0)] * len(prompts)
    if cache is not None:
        size = len(cache.tokens)
        cuts = [size] * len(prompts)
        return cuts, Branches([(0, size)], suffixes, [0] * len(prompts), cache)
    cuts, prefix_of = shared_prefixes(prompts)
    firsts = [prefix_of.index(prefix) for prefix in range(max(prefix_of) + 1)]
    prefixes = [row.add(prompts[p][: cuts[p]], 0) for p in firsts]
    return cuts, Branches(prefixes, suffixes, prefix_of)


def _add_joined(
    row: PackedRow,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    cuts: list[int],
    branches: Branches,
) -> None:
    """Append each prompt's suffix and its one answer as one run."""
    for prefix, members in _by_prefix(branches):
        began = len(row.ids)
        # Runs of like length, which attention takes together, lie together.
        for p in sorted(members, key=lambda p: cuts[p] - len(prompts[p]) - len(answers[p])):
            tokens = [*prompts[p][cuts[p] :], *answers[p][:-1]]
            branches.suffixes[p] = row.add(tokens, cuts[p])
        row.link_to_prefix(began, prefix)


def _add_apart(
    row: PackedRow,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    prompt_of: list[int],
    cuts: list[int],
    branches: Branches,
) -> list[int]:
    """Append for each prefix the suffixes, then the answers. Returns where each answer starts."""
    starts = [0] * len(answers)
    answers_of = _answers_of(prompt_of)
    for prefix, members in _by_prefix(branches):
        began = len(row.ids)
        ordered = sorted(members, key=lambda p: cuts[p] - len(prompts[p]))
        for p in ordered:
            branches.suffixes[p] = row.add(prompts[p][cuts[p] :], cuts[p])
        for p in ordered:
            mine = answers_of.get(p, ())
            row.add_answers(answers, mine, len(prompts[p]), branches.suffixes[p], starts)
        row.link_to_prefix(began, prefix)
    return starts


def _by_prefix(branches: Branches) -> Iterable[tuple[Run | None, list[int]]]:
    """Each prefix with its prompts; first None, with the prompts that have no prefix."""
    for index, prefix in enumerate([None, *branches.prefixes], start=-1):
        yield prefix, [p for p, found in enumerate(branches.prefix_of) if found == index]


def _answers_of(prompt_of: Sequence[int]) -> dict[int, list[int]]:
    """The answers of each prompt that has any."""
    found: dict[int, list[int]] = {}
    for j, prompt in enumerate(prompt_of):
        found.setdefault(prompt, []).append(j)
    return found


@dataclass(frozen=True)
class AnswerRuns:
    """Answers behind prompts that were run before: their tokens (N,), without a plan where there
    are none. `predicted_from` (B, R) are indices into the states at the prompts' ends followed by
    the states of these tokens."""

    ids: Tensor
    position_ids: Tensor
    plan: Plan | None
    predicted_from: Tensor
    mask: Tensor
    cost: Cost


def pack_answers(tree: Tree, answers: Sequence[Tokens], prompt_of: Sequence[int]) -> AnswerRuns:
    """Answers behind the prompts of a packed tree."""
    branches, row, answers_of = tree.branches, PackedRow(), _answers_of(prompt_of)
    assert branches is not None and branches.cache is None
    starts = [0] * len(answers)
    for prefix, members in _by_prefix(branches):
        began = len(row.ids)
        for p in (p for p in members if p in answers_of):
            row.add_answers(answers, answers_of[p], tree.lengths[p], branches.suffixes[p], starts)
        row.link_to_prefix(began, prefix)
    count = len(tree.lengths)
    starts = [count + start for start in starts]
    predicted_from, mask = pad(_predicted_from(answers, prompt_of, range(count), starts))
    plan = row.plan((True, True)) if row.ids else None
    full = sum(tree.lengths[p] + len(a) - 1 for a, p in zip(answers, prompt_of, strict=True))
    return AnswerRuns(
        ids=torch.tensor(row.ids),
        position_ids=torch.tensor(row.position_ids),
        plan=plan,
        predicted_from=predicted_from,
        mask=mask,
        cost=row.cost(full),
    )


def _predicted_from(
    answers: Sequence[Tokens], prompt_of: Sequence[int], ends: Sequence[int], starts: Sequence[int]
) -> list[list[int]]:
    """Where each token of each answer is predicted from: the end of its prompt, then the tokens of
    the answer before it, which lie from `starts[j]` on."""
    return [
        [ends[p], *range(start, start + len(answer) - 1)][: len(answer)]
        for answer, p, start in zip(answers, prompt_of, starts, strict=True)
    ]


def _full(lengths: Sequence[int], answers: Sequence[Tokens], prompt_of: Sequence[int]) -> int:
    """Tokens of one row for each answer, or for each prompt where there are no answers."""
    if not answers:
        return sum(lengths)
    return sum(lengths[p] + len(a) - 1 for a, p in zip(answers, prompt_of, strict=True))


def _plain(prompts: Sequence[Tokens], answers: Sequence[Tokens], prompt_of: list[int]) -> Tree:
    """Left-padded rows: one for each answer, or for each prompt where there are none."""
    lengths = [len(prompt) for prompt in prompts]
    full = _full(lengths, answers, prompt_of)
    prompt_of = prompt_of or list(range(len(prompts)))
    bodies = [list(a[:-1]) for a in answers] or [[] for _ in prompts]
    rows = [list(prompts[p]) + body for p, body in zip(prompt_of, bodies, strict=True)]
    ids, attention_mask = pad(rows, left=True)
    width = ids.shape[1]
    # The last token of each row's prompt.
    last = [j * width + width - len(body) - 1 for j, body in enumerate(bodies)]
    row_of = {prompt: j for j, prompt in reversed(list(enumerate(prompt_of)))}
    ends = [last[row_of[p]] if p in row_of else 0 for p in range(len(prompts))]
    predicted_from, mask = pad(
        [range(end, end + len(answer)) for end, answer in zip(last, answers, strict=False)]
    )
    position_ids = attention_mask.long().cumsum(1).sub_(1).clamp_(min=0)
    cost = Cost(full, full, triangles(len(row) for row in rows))
    return Tree(
        ids=ids,
        position_ids=position_ids,
        ends=torch.tensor(ends),
        predicted_from=predicted_from,
        mask=mask,
        lengths=lengths,
        cost=cost,
        attention_mask=attention_mask,
    )


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

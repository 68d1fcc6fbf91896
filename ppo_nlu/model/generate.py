"""Batched generation: one pass of the prefix tree over the prompts, then token by token.

Finished rows leave the batch, some at a time; where steps are recorded (`decode_graph`, on a GPU)
they stay in it and count no more. Log-probabilities, values and hidden states come out of the
decode pass itself; nothing is run twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_nlu.model.policy import Policy, unflatten
from ppo_nlu.runtime import profiling
from ppo_nlu.tree import pack, passes
from ppo_nlu.tree.cache import TreeCache
from ppo_nlu.tree.passes import State
from ppo_nlu.tree.plain import PlainCache
from ppo_nlu.tree.prefixes import PrefixCache, Tokens

BLOCK = 128  # tokens
COMPACT = 0.75  # once no more than this share of the rows goes on, the others leave the batch


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: at most `max_new_tokens` each, `samples` for each prompt. Top-k and
    top-p are for evaluation only."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 1.0
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class Generation:
    """Responses with the token that ends each; (B, R), right-padded, zero behind the mask.

    `logprobs` are those of the sampling distribution before top-k and top-p; `hidden` (N, H) are
    the states that the counted tokens were drawn from, row by row. `prompt_pass` is the pass over
    the prompts with its graph, where it was to be kept.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor | None
    hidden: Tensor | None
    prompt_pass: State | None = None

    @property
    def rows(self) -> list[list[int]]:
        """The responses as lists of token ids, their ending token included."""
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    generator: torch.Generator | None = None,
    critic: bool = False,
    keep_graph: int = 0,
    prefix_cache: PrefixCache | None = None,
) -> Generation:
    """`sampling.samples` answers for each prompt, those of one prompt side by side.

    An answer ends with the token that completes `</Judgement>` in its text, with a token that ends
    the sequence, or at `sampling.max_new_tokens`. Random numbers are drawn for all rows and steps
    beforehand, so a row's answer does not depend on which other rows have finished.

    Args:
        generator: where the random numbers come from; None: torch's own.
        critic: whether values are asked for.
        keep_graph: where the prompts and the longest possible answers have together at most so many
            tokens, run the prompts under autograd and return their pass for an update to use.
        prefix_cache: what the prompts begin with, run with these weights; it is not run again. Not
            together with `keep_graph`.
    """
    assert prefix_cache is None or not keep_graph
    longest, device = sampling.max_new_tokens, policy.device
    prompt_of = [p for p in range(len(prompts)) for _ in range(sampling.samples)]
    rows = len(prompt_of)
    draws = torch.rand(rows, longest, generator=generator, dtype=torch.float64).to(device)

    def run(graph: int) -> Generation:
        with profiling.phase("prefill"):
            shared = policy.packs(max(map(len, prompts)) + longest)
            state, kept = _prefill(policy, prompts, prompt_of, shared, graph, prefix_cache)
            repeat = torch.tensor(prompt_of, device=device)
            hidden = state.ends.detach()[repeat]
            place = torch.tensor(state.tree.lengths, device=device)[repeat]
            cache = state.start(prompt_of, longest - 1, policy.recorder is not None)
        with profiling.phase("decode"):
            drawn = _decode(policy, hidden, place, cache, draws, sampling, critic)
        drawn.prompt_pass = state if kept else None
        return drawn

    graph = keep_graph - rows * (longest - 1)
    if graph > 0:
        try:
            return run(graph)
        except torch.cuda.OutOfMemoryError:
            pass  # and once more without; outside of the handler, whose traceback keeps it all
    return run(0)


def _prefill(
    policy: Policy,
    prompts: Sequence[Tokens],
    prompt_of: list[int],
    shared: bool,
    keep_graph: int,
    prefix_cache: PrefixCache | None,
) -> tuple[State, bool]:
    """Run the prompts; what decoding needs of them, and whether their graph was kept, which is done
    where they are at most `keep_graph` tokens. `shared`: as in `pack.build`."""
    tree = pack.build(prompts, shared=shared, prefix_cache=prefix_cache).to(policy.device)
    cost = tree.cost
    saved = sum(tree.lengths[p] for p in prompt_of) - cost.tokens_run
    profiling.count(
        cost.tokens_run, saved, positions=len(prompt_of), pairs=cost.pairs, wanted=cost.wanted
    )
    kept = tree.plan is not None and cost.tokens_run <= keep_graph
    with torch.set_grad_enabled(kept):
        return passes.run(policy.decoder, tree, policy.takes_positions, keep=True)[1], kept


def _decode(
    policy: Policy,
    hidden: Tensor,
    place: Tensor,
    cache: TreeCache | PlainCache,
    draws: Tensor,
    sampling: Sampling,
    critic: bool,
) -> Generation:
    """Token by token, from the states (rows, H) behind the prompts and draws (rows, steps)."""
    (rows, longest), device = draws.shape, policy.device
    run, alive = list(range(rows)), torch.arange(rows, device=device)  # the rows in the batch
    over = [False] * rows
    replies: list[list[int]] = [[] for _ in range(rows)]
    found = _Found()
    recorded = None
    if policy.recorder is not None and isinstance(cache, TreeCache):
        recorded = policy.recorder.steps(cache)
    for step in range(longest):
        token, logprob = _choose(policy.logits(hidden), draws[alive, step], sampling)
        drawn = token.tolist()  # the one wait for the device in a step
        going = [i for i, row in enumerate(run) if not over[row]]
        for i in going:
            replies[run[i]].append(drawn[i])
        found.add([(run[i], step, i) for i in going], logprob, hidden)
        ended = policy.stop.ended([replies[run[i]] for i in going])
        for i, end in zip(going, ended, strict=True):
            over[run[i]] = end
        going = [i for i in going if not over[run[i]]]
        if step + 1 == longest or not going:
            break
        if recorded is None and len(going) <= COMPACT * len(run):
            index = torch.tensor(going, device=device)
            cache.keep(going)
            run, alive, token = [run[i] for i in going], alive[index], token[index]
            place = place[index]
        if profiling.active():
            pairs = int((place + 1).sum())
            profiling.count(len(run), positions=len(run), pairs=pairs)
        if recorded is not None:
            hidden = recorded(token, place)
        else:
            hidden = cache.step(policy.decoder, token, place if policy.takes_positions else None)
        place = place + 1
    tokens, mask = pack.pad(replies)
    tokens, mask = tokens.to(device), mask.to(device)
    logprobs, states = found.in_order(device)
    return Generation(
        tokens=tokens,
        mask=mask,
        logprobs=unflatten(logprobs, mask),
        values=unflatten(policy.value(states), mask) if critic else None,
        hidden=states,
    )


class _Found:
    """What the decode steps leave: all rows of each step, and which of them count."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.counted: list[tuple[int, int, int]] = []  # row, step, place in the rows of all steps
        self.size = 0

    def add(self, counted: list[tuple[int, int, int]], logprob: Tensor, hidden: Tensor) -> None:
        """A step's log-probabilities (rows,) and states (rows, H); of the counted the row, the step
        and their place among these."""
        self.counted += [(row, step, self.size + i) for row, step, i in counted]
        self.steps.append((logprob, hidden))
        self.size += len(logprob)

    def in_order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N,) and states (N, H) of the counted, row by row."""
        index = torch.tensor([place for _, _, place in sorted(self.counted)], device=device)
        logprobs = torch.cat([logprob for logprob, _ in self.steps])
        states = torch.cat([hidden for _, hidden in self.steps])
        return logprobs.index_select(0, index), states.index_select(0, index)


def _choose(logits: Tensor, draw: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row (B,) and its log-probability at the sampling temperature."""
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    highest = logits.amax(-1, keepdim=True)
    weights = (logits - highest).exp_()
    greedy = sampling.greedy
    token = logits.argmax(-1) if greedy else invert(_truncate(weights, sampling), draw)
    chosen = (logits.gather(1, token[:, None]) - highest).squeeze(1)
    return token, chosen - weights.sum(-1).log()


def invert(weights: Tensor, draw: Tensor) -> Tensor:
    """Sampling by inverting the distribution function: (B, V) weights, (B,) draws in [0, 1).

    In two steps, so that a vocabulary's running sum is not formed: the block of 128 tokens, then
    the token in it.
    """
    rows, vocab = weights.shape
    blocks = -(-vocab // BLOCK)
    if blocks * BLOCK > vocab:
        weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocab))
    table = weights.view(rows, blocks, BLOCK)
    sums = table.sum(-1).double().cumsum(-1)
    aim = (draw * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, aim, right=True).clamp_(max=blocks - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = table.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    # The sum inside the block is in double precision and the table's is not: the rest of the aim is
    # put on its scale.
    scale = inner[:, -1:] / (sums.gather(1, block) - before).clamp_(min=1e-300)
    token = torch.searchsorted(inner, (aim - before).clamp_(min=0.0) * scale, right=True)
    # Rounding may lead past the last token of the block that has any weight.
    last = (inner < inner[:, -1:]).sum(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(token, last)).squeeze(1)


def _truncate(weights: Tensor, sampling: Sampling) -> Tensor:
    """Weights with all but the top k, and all but the smallest set of mass top_p, at zero."""
    if sampling.top_k:
        kth = weights.topk(min(sampling.top_k, weights.shape[-1]), dim=-1).values[:, -1:]
        weights = weights.masked_fill(weights < kth, 0.0)
    if sampling.top_p < 1.0:
        ordered, index = weights.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(-1, keepdim=True), 0)
        weights = torch.zeros_like(weights).scatter(1, index, ordered)
    return weights

"""Batched generation: one pass of the prefix tree over the prompts, then token by token.

Finished rows leave the batch, several at a time. Where steps are recorded (`decode_graph`, on a
GPU) they stay in it, but count no more. Log-probabilities, values and hidden states come out of the
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
from ppo_nlu.tree.passes import PromptPass
from ppo_nlu.tree.plain import PlainCache
from ppo_nlu.tree.prefixes import PrefixCache, Tokens

BLOCK = 128  # tokens
COMPACT = 0.75  # finished rows leave the batch once at most this share of it goes on


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
    """Answers, each with the token that ends it; (B, R), right-padded, zero outside the mask.

    `logprobs` are those of the sampling distribution before top-k and top-p. `hidden` (N, H) are
    the states that the tokens were drawn from, row by row. `prompt_pass` is the pass over the
    prompts with its graph, where that was kept.
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor | None
    hidden: Tensor | None
    prompt_pass: PromptPass | None = None

    @property
    def rows(self) -> list[list[int]]:
        """The answers as lists of token ids, with the token that ends each."""
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
            packed = policy.packs(max(map(len, prompts)) + longest)
            prompt_pass, kept = _prefill(policy, prompts, prompt_of, packed, graph, prefix_cache)
            repeat = torch.tensor(prompt_of, device=device)
            hidden = prompt_pass.ends.detach()[repeat]
            position = torch.tensor(prompt_pass.tree.lengths, device=device)[repeat]
            static = policy.recorder is not None
            cache = prompt_pass.decode_cache(prompt_of, longest - 1, static)
        with profiling.phase("decode"):
            drawn = _decode(policy, hidden, position, cache, draws, sampling, critic)
        drawn.prompt_pass = prompt_pass if kept else None
        return drawn

    graph = keep_graph - rows * (longest - 1)
    if graph > 0:
        try:
            return run(graph)
        except torch.cuda.OutOfMemoryError:
            pass  # tried again without the graph, below: in here the traceback would keep it
    return run(0)


def _prefill(
    policy: Policy,
    prompts: Sequence[Tokens],
    prompt_of: list[int],
    packed: bool,
    keep_graph: int,
    prefix_cache: PrefixCache | None,
) -> tuple[PromptPass, bool]:
    """Run the prompts, with autograd if they have at most `keep_graph` tokens. Returns the pass and
    whether its graph was kept. `packed`: as in `pack.build`."""
    tree = pack.build(prompts, packed=packed, prefix_cache=prefix_cache).to(policy.device)
    cost = tree.cost
    saved = sum(tree.lengths[p] for p in prompt_of) - cost.tokens_run
    profiling.count(
        cost.tokens_run,
        saved,
        positions=len(prompt_of),
        pairs=cost.pairs,
        predicting=cost.predicting,
    )
    kept = tree.plan is not None and cost.tokens_run <= keep_graph
    with torch.set_grad_enabled(kept):
        return passes.run(policy.decoder, tree, policy.takes_positions, keep=True)[1], kept


def _decode(
    policy: Policy,
    hidden: Tensor,
    position: Tensor,
    cache: TreeCache | PlainCache,
    draws: Tensor,
    sampling: Sampling,
    critic: bool,
) -> Generation:
    """Token by token, from the states (rows, H) at the prompts' ends, the position (rows,) of each
    row's next token, and random numbers (rows, steps)."""
    (rows, longest), device = draws.shape, policy.device
    batch, alive = list(range(rows)), torch.arange(rows, device=device)  # the rows in the batch
    over = [False] * rows
    answers: list[list[int]] = [[] for _ in range(rows)]
    found = _StepOutputs()
    recorded = None
    if policy.recorder is not None and isinstance(cache, TreeCache):
        recorded = policy.recorder.steps(cache)
    for step in range(longest):
        token, logprob = _choose(policy.logits(hidden), draws[alive, step], sampling)
        drawn = token.tolist()  # the one wait for the device in a step
        going = [i for i, row in enumerate(batch) if not over[row]]
        for i in going:
            answers[batch[i]].append(drawn[i])
        found.add([(batch[i], step, i) for i in going], logprob, hidden)
        ended = policy.stop.ended([answers[batch[i]] for i in going])
        for i, end in zip(going, ended, strict=True):
            over[batch[i]] = end
        going = [i for i in going if not over[batch[i]]]
        if step + 1 == longest or not going:
            break
        if recorded is None and len(going) <= COMPACT * len(batch):
            index = torch.tensor(going, device=device)
            cache.keep(going)
            batch, alive, token = [batch[i] for i in going], alive[index], token[index]
            position = position[index]
        if profiling.active():
            pairs = int((position + 1).sum())
            profiling.count(len(batch), positions=len(batch), pairs=pairs)
        if recorded is not None:
            hidden = recorded(token, position)
        else:
            position_ids = position if policy.takes_positions else None
            hidden = cache.step(policy.decoder, token, position_ids)
        position = position + 1
    tokens, mask = pack.pad(answers)
    tokens, mask = tokens.to(device), mask.to(device)
    logprobs, states = found.in_order(device)
    return Generation(
        tokens=tokens,
        mask=mask,
        logprobs=unflatten(logprobs, mask),
        values=unflatten(policy.value(states), mask) if critic else None,
        hidden=states,
    )


class _StepOutputs:
    """Log-probabilities and states of all decode steps, and which of their rows count."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.counted: list[tuple[int, int, int]] = []  # row, step, place in the rows of all steps
        self.size = 0

    def add(self, counted: list[tuple[int, int, int]], logprob: Tensor, hidden: Tensor) -> None:
        """Add a step's log-probabilities (rows,) and states (rows, H). `counted` holds the row, the
        step and the place in this step's batch of each token that counts."""
        self.counted += [(row, step, self.size + i) for row, step, i in counted]
        self.steps.append((logprob, hidden))
        self.size += len(logprob)

    def in_order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N,) and states (N, H) of the tokens that count, row by row."""
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

    In two steps, so that no running sum over the vocabulary is formed: first the block of 128
    tokens, then the token in it.
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
    # The sum inside the block is in double precision, the table's is not: the rest of the aim is
    # brought to its scale.
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

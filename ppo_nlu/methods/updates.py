"""What the algorithms' updates share: epochs of minibatches, and a minibatch's gradient in parts.

A minibatch is one optimizer step. Its gradient is a sum over micro-batches, cut by rows and by
tokens; every loss is divided by a count of the whole minibatch, so the cuts change memory alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ppo_nlu.config import Config, GRPOConfig, PPOConfig
from ppo_nlu.errors import UserError
from ppo_nlu.runtime.optim import clip_gradients
from ppo_nlu.tree import prefixes

Metrics = dict[str, float]
LARGEST = ("policy/ratio_max", "policy/ratio_gap")  # the largest counts, not the sum


class BadStep(Exception):
    """A loss or gradient that is not finite; the minibatch's rows and metrics go with it."""

    def __init__(self, index: Sequence[int], metrics: Metrics):
        super().__init__("loss or gradient is not finite")
        self.index, self.metrics = list(index), metrics


class Rows(Protocol):
    """Token ids to run; answer j belongs to prompt `owners[j]`."""

    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]


@dataclass
class Budget:
    """What one forward of an update may hold; 0 = no limit. It decides memory, not the result.

    `remarks` are for the user, and whoever tells them clears them.
    """

    rows: int = 0
    tokens: int = 0
    remarks: list[str] = field(default_factory=list)

    def halve(self, rows: int) -> None:
        """From now on at most half of the `rows` that did not fit; said the first time."""
        if rows < 2:
            raise UserError(
                "train.micro_batch_tokens: the GPU's memory does not hold the update of a single "
                "answer; set model.checkpointing=true, or lower data.max_prompt_tokens"
            ) from None
        self.rows = rows // 2
        remark = "out of GPU memory: a smaller micro-batch from here on, with the same result"
        if remark not in self.remarks:
            self.remarks.append(remark)


def graph_tokens(
    section: PPOConfig | GRPOConfig, budget: Budget, rows: int, device: torch.device
) -> int:
    """How many tokens the first forward of an update may hold where it is one of all `rows`
    answers, and so can stand on the rollout's pass over their prompts; 0 where it is not.

    On a GPU half of the budget: the rollout has to fit beside it.
    """
    if min(section.minibatch_size or rows, budget.rows or rows) < rows:
        return 0
    if not budget.tokens:
        return sys.maxsize
    return budget.tokens // (1 if device.type == "cpu" else 2)


# --- one step of a method -------------------------------------------------------------------------


def run(
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    cfg: Config,
    section: PPOConfig | GRPOConfig,
    order: Callable[[int], Sequence[int]],
    backward: Callable[[list[int]], Metrics | None],
) -> Metrics:
    """Epochs over a batch, one optimizer step a minibatch; the means of the minibatches' metrics.

    Args:
        parameters: all that trains; gradients are clipped over them together.
        order: the rows of an epoch, in the order in which they are cut into minibatches.
        backward: leaves the gradient of a minibatch and returns its metrics; None where there is
            nothing to learn from it, which takes no optimizer step.
    Raises: BadStep, with no gradient left, where a loss or gradient is not finite.
    """
    totals: Metrics = {}
    taken = skipped = 0
    first_gap: float | None = None
    for epoch in range(section.epochs):
        rows = order(epoch)
        stop = False
        for index in chunks(rows, section.minibatch_size or len(rows)):
            metrics = backward(index)
            if metrics is None:
                continue
            if first_gap is None:
                first_gap = metrics["policy/ratio_gap"]
            norm = float(clip_gradients(parameters, cfg.optim.max_grad_norm))
            metrics["optim/grad_norm"] = norm
            if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
                optimizer.zero_grad(set_to_none=True)
                raise BadStep(index, metrics)
            if section.max_ratio and metrics["policy/ratio_mean"] > section.max_ratio:
                skipped += 1
            else:
                optimizer.step()
                taken += 1
            optimizer.zero_grad(set_to_none=True)
            add(totals, metrics)
            limit = section.target_kl
            if limit is not None and metrics["policy/approx_kl"] > 1.5 * limit:
                stop = True
                break
        if stop:
            break
    count = taken + skipped
    means = {n: x if n in LARGEST else x / count for n, x in totals.items()}
    means |= {"optim/steps": float(taken), "optim/skipped": float(skipped)}
    return means if first_gap is None else means | {"policy/first_ratio_gap": first_gap}


def accumulate(
    parameters: Sequence[nn.Parameter],
    rows: Rows,
    index: Sequence[int],
    budget: Budget,
    backward: Callable[[list[int]], Metrics],
    shared: bool = True,
) -> Metrics:
    """The gradient of the rows `index`, summed over micro-batches; their metrics, summed too.

    Where a GPU's memory does not hold a micro-batch, the gradient is started afresh with half of
    its rows. The parameters have no gradient before. `shared`: as in `cut`.
    """
    while True:
        totals: Metrics = {}
        short = 0  # rows that did not fit
        for micro in cut(rows, index, budget, shared):
            try:
                add(totals, backward(micro))
            except torch.cuda.OutOfMemoryError:
                short = len(micro)
                break
        if not short:
            return totals
        # Outside of the handler: its traceback would keep the activations.
        for parameter in parameters:
            parameter.grad = None
        budget.halve(short)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cut(
    rows: Rows, index: Sequence[int], budget: Budget, shared: bool = True
) -> Iterator[list[int]]:
    """The rows of a minibatch in micro-batches of at most `budget.rows` rows and `budget.tokens`
    tokens; a row that is longer than that goes alone.

    Tokens are counted as the prefix tree runs them, a prompt once for all its answers and what all
    prompts share once; with `shared=False` row by row. Under a limit of tokens the longest rows
    come first, and those of one prompt side by side.
    """
    most = budget.rows or len(index)
    if not budget.tokens:
        yield from chunks(index, most)
        return
    first = rows.prompts[rows.owners[index[0]]]
    head = min(prefixes.common(first, rows.prompts[rows.owners[j]]) for j in index)
    head = head if shared else 0

    def size(j: int) -> int:
        return len(rows.prompts[rows.owners[j]])

    micro: list[int] = []
    held, used = set[int](), head
    for j in sorted(index, key=lambda j: (-size(j), rows.owners[j], -len(rows.answers[j]))):
        own = 0 if shared and rows.owners[j] in held else size(j) - head
        need = own + len(rows.answers[j]) - 1
        if micro and (len(micro) == most or used + need > budget.tokens):
            yield micro
            micro, held, used = [], set(), head
            need = size(j) - head + len(rows.answers[j]) - 1
        micro.append(j)
        held.add(rows.owners[j])
        used += need
    yield micro


def add(totals: Metrics, metrics: Metrics) -> None:
    """Sum metrics up, in place; of those in `LARGEST` the largest is kept."""
    for name, value in metrics.items():
        old = totals.get(name, 0.0)
        totals[name] = max(old, value) if name in LARGEST else old + value


def chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), max(size, 1)):
        yield list(items[start : start + size])


def check_first_ratio(gap: float, exact: bool) -> str | None:
    """What to say of the ratio's distance from 1 at the first minibatch; fp32 ends over 1e-3.

    The policy has not moved yet, so any distance means dropout, padding, temperature or a mismatch
    between the decode and the training pass.
    """
    if not exact and gap == 0:  # a pass compared with itself
        return None
    if not exact:
        return f"largest distance of the first ratio from 1 in low precision: {gap:.1e}"
    if gap > 1e-3:
        raise UserError(
            f"model.name_or_path: the first ratio is {gap:.1e} away from 1 before any update; "
            "decode and training pass disagree for this model. Try model.path=plain, "
            "model.attention=eager or model.dtype=float32"
        )
    if gap > 1e-4:
        return f"warning: the first ratio is {gap:.1e} away from 1 (expected below 1e-4)"
    return None

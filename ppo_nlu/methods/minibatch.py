"""One optimizer step, and epochs of steps: what the updates of all methods share.

A minibatch is one optimizer step. Its gradient is a sum over micro-batches, which are cut by rows
and by tokens. Every loss is divided by a count of the whole minibatch, so the cuts change memory
only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppo_nlu.config import GRPOConfig, PPOConfig
from ppo_nlu.errors import UserError
from ppo_nlu.runtime.optim import clip_gradients
from ppo_nlu.tree import prefixes

Metrics = dict[str, float]
LARGEST = ("policy/ratio_max", "policy/ratio_gap")  # metrics that are a maximum, not a sum


class Rows(Protocol):
    """Token ids to run; answer j belongs to prompt `prompt_of[j]`."""

    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]


@dataclass
class Budget:
    """What one forward of an update may hold; 0 = no limit. It decides memory, not the result.

    `messages` are for the user.
    """

    rows: int = 0
    tokens: int = 0
    messages: list[str] = field(default_factory=list)

    def halve(self, rows: int) -> None:
        """Allow at most half of the `rows` that did not fit; the first time is reported."""
        if rows < 2:
            raise UserError(
                "train.micro_batch_tokens: the GPU's memory does not hold the update of a single "
                "answer; set model.checkpointing=true, or lower data.max_prompt_tokens"
            ) from None
        self.rows = rows // 2
        message = "out of GPU memory: a smaller micro-batch from here on, with the same result"
        if message not in self.messages:
            self.messages.append(message)

    def taken_messages(self) -> list[str]:
        """The messages so far; they are cleared."""
        told, self.messages = self.messages, []
        return told


def graph_tokens(minibatch: int, budget: Budget, rows: int, device: torch.device) -> int:
    """How many tokens the first forward of an update may hold if it can reuse the prompt pass of
    the rollout; 0 where it cannot, because it is not a forward of all `rows` answers.

    `minibatch`: answers of an optimizer step, 0: all. On a GPU the result is half of the budget,
    so that the rollout fits beside the pass.
    """
    if min(minibatch or rows, budget.rows or rows) < rows:
        return 0
    if not budget.tokens:
        return sys.maxsize
    return budget.tokens // (1 if device.type == "cpu" else 2)


# --- one optimizer step ---------------------------------------------------------------------------


class OptimizerStep:
    """The gradient of one minibatch, and the step along it; every method takes its steps here.

        step = OptimizerStep(optimizer, max_grad_norm)
        for micro in step.micro_batches(rows, index, budget):
            with step.part(micro):
                step.backward(*loss_of(micro))
        if not step.take():
            ...  # loss or gradient is not finite: no step was taken

    Where a minibatch is one forward, `backward` and `take` are enough. `metrics` are sums over the
    micro-batches; `take` adds `optim/grad_norm`.
    """

    def __init__(self, optimizer: Optimizer, max_grad_norm: float) -> None:
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.metrics: Metrics = {}
        self.short = 0  # rows of the micro-batch that did not fit

    def micro_batches(
        self, rows: Rows, index: Sequence[int], budget: Budget, shared: bool = True
    ) -> Iterator[list[int]]:
        """The rows `index` in micro-batches; `shared` as in `cut`.

        Where one of them does not fit into a GPU's memory, the gradient is started afresh with
        micro-batches of half as many rows.
        """
        while True:
            self.metrics, self.short = {}, 0
            for micro in cut(rows, index, budget, shared):
                yield micro
                if self.short:
                    break
            if not self.short:
                return
            self.optimizer.zero_grad(set_to_none=True)
            budget.halve(self.short)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextmanager
    def part(self, micro: Sequence[int]) -> Iterator[None]:
        """A context for forward and backward of a micro-batch, which may exceed a GPU's memory."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            # `micro_batches` frees the memory later: here the traceback still holds activations.
            self.short = len(micro)

    def backward(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add the gradient of a micro-batch, and its metrics."""
        loss.backward()
        named = {**metrics, "loss": loss.detach()}
        numbers = torch.stack(list(named.values())).tolist()  # one copy from the device
        add(self.metrics, dict(zip(named, numbers, strict=True)))

    def take(self, skip: bool = False) -> bool:
        """Clip the gradient and take the step, unless `skip`; the gradient is cleared.

        False where loss or gradient is not finite: then no step is taken.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(clip_gradients(trained, self.max_grad_norm))
        self.metrics["optim/grad_norm"] = norm
        finite = math.isfinite(norm) and math.isfinite(self.metrics["loss"])
        if finite and not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite


# --- epochs of them -------------------------------------------------------------------------------


class Epochs:
    """Epochs over a batch in minibatches, and the metrics of their steps.

    They end early above `target_kl`, and where a loss or gradient is not finite; `bad` is then that
    minibatch's rows and metrics.
    """

    def __init__(self, section: PPOConfig | GRPOConfig) -> None:
        self.section = section
        self.totals: Metrics = {}
        self.taken = self.skipped = 0
        self.first_gap: float | None = None
        self.over = False
        self.bad: tuple[list[int], Metrics] | None = None

    def minibatches(self, order: Callable[[int], Sequence[int]]) -> Iterator[list[int]]:
        """The rows of each minibatch; `order(epoch)` is the row order."""
        for epoch in range(self.section.epochs):
            rows = order(epoch)
            for index in chunks(rows, self.section.minibatch_size or len(rows)):
                yield index
                if self.over:
                    return

    def take(self, step: OptimizerStep, index: Sequence[int]) -> None:
        """Take the step of the minibatch `index`, unless its mean ratio is above `max_ratio`."""
        metrics, limits = step.metrics, self.section
        if self.first_gap is None:
            self.first_gap = metrics["policy/ratio_gap"]
        skip = bool(limits.max_ratio and metrics["policy/ratio_mean"] > limits.max_ratio)
        if not step.take(skip):
            self.over, self.bad = True, (list(index), metrics)
            return
        self.taken, self.skipped = self.taken + (not skip), self.skipped + skip
        add(self.totals, metrics)
        limit = limits.target_kl
        self.over = limit is not None and metrics["policy/approx_kl"] > 1.5 * limit

    def metrics(self) -> Metrics:
        """The means over the minibatches, and the number of steps."""
        count = self.taken + self.skipped
        means = {n: x if n in LARGEST else x / count for n, x in self.totals.items()}
        means |= {"optim/steps": float(self.taken), "optim/skipped": float(self.skipped)}
        if self.first_gap is None:
            return means
        return means | {"policy/first_ratio_gap": self.first_gap}


# --- cutting --------------------------------------------------------------------------------------


def cut(
    rows: Rows, index: Sequence[int], budget: Budget, shared: bool = True
) -> Iterator[list[int]]:
    """The rows of a minibatch in micro-batches of at most `budget.rows` rows and `budget.tokens`
    tokens; a row that is longer than the limit runs alone.

    Tokens are counted as the prefix tree runs them: the tokens that all prompts share once, and a
    prompt once for all its answers; with `shared=False` row by row. Under a limit of tokens the
    longest prompts come first, with the answers to one prompt side by side.
    """
    most = budget.rows or len(index)
    if not budget.tokens:
        yield from chunks(index, most)
        return
    first = rows.prompts[rows.prompt_of[index[0]]]
    prefix = min(prefixes.common(first, rows.prompts[rows.prompt_of[j]]) for j in index)
    prefix = prefix if shared else 0

    def size(j: int) -> int:
        return len(rows.prompts[rows.prompt_of[j]])

    micro: list[int] = []
    held, used = set[int](), prefix
    for j in sorted(index, key=lambda j: (-size(j), rows.prompt_of[j], -len(rows.answers[j]))):
        own = 0 if shared and rows.prompt_of[j] in held else size(j) - prefix
        need = own + len(rows.answers[j]) - 1
        if micro and (len(micro) == most or used + need > budget.tokens):
            yield micro
            micro, held, used = [], set(), prefix
            need = size(j) - prefix + len(rows.answers[j]) - 1
        micro.append(j)
        held.add(rows.prompt_of[j])
        used += need
    yield micro


def add(totals: Metrics, metrics: Metrics) -> None:
    """Add metrics to `totals`, in place; of those in `LARGEST` keep the maximum."""
    for name, value in metrics.items():
        old = totals.get(name, 0.0)
        totals[name] = max(old, value) if name in LARGEST else old + value


def chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), max(size, 1)):
        yield list(items[start : start + size])

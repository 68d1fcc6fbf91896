"""The softmax of rows whose logits come one block at a time, and its gradient, in plain torch.

Of each row only the running statistics are kept. `torch_logprobs` forms the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FLOOR = -1e5  # exp(-1e5) is exactly 0 and 0 · -1e5 is 0, where 0 · -inf would be NaN


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RunningSoftmax:
    """For a chunk of rows the running maximum m, Σ exp and Σ z exp over v ≠ y, and the target's z.

    Online softmax: after each block m' = max(m, max z), and the sums relative to m are scaled by
    exp(m − m'). With z measured from m, entropy = log Σ exp(z) − Σ z exp(z) / Σ exp(z). The target
    is left out of the sums: near p_y = 1, log p_y = −log1p(Σ exp(z_v − z_y)) then loses no digit.
    """

    def __init__(self, targets: Tensor, dtype: torch.dtype) -> None:
        self.targets = targets
        self.top = torch.full(targets.shape, -torch.inf, dtype=dtype, device=targets.device)
        self.others = torch.zeros_like(self.top)
        self.weighted = torch.zeros_like(self.top)
        self.at_target = torch.zeros_like(self.top)

    def update(self, z: Tensor, exp: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in the logits of entries start, start + 1, …

        `exp` is filled with exp(z − m') and z becomes (z − m') exp(z − m'), the target's entry
        cleared in both. Returns: m − m' and its exponential, for earlier sums.
        """
        top = torch.maximum(self.top, z.amax(1))
        finite = top.masked_fill(top == -torch.inf, 0.0)
        column, inside = columns(self.targets, start, z.shape[1])
        self.at_target = torch.where(inside, z.gather(1, column)[:, 0], self.at_target)
        shift = (self.top - finite).clamp_(min=FLOOR)
        scale = shift.exp()
        z.sub_(finite[:, None]).clamp_(min=FLOOR)
        torch.exp(z, out=exp)
        exp.scatter_(1, column, exp.gather(1, column).masked_fill_(inside[:, None], 0.0))
        z.mul_(exp)
        self.weighted = (self.weighted + shift * self.others) * scale + z.sum(1)
        self.others = self.others * scale + exp.sum(1)
        self.top = top
        return shift, scale

    def result(self) -> tuple[Tensor, Tensor]:
        """log π(target), entropy, m and log Σ exp(z − m), stacked (4, C); and Σ exp(z − m) (C,).

        m and the logarithm stay apart: their sum would lose digits where m is large.
        """
        below = self.at_target - self.top
        own = below.exp()
        total = self.others + own
        log_total = total.log()
        logprobs = torch.where(own > 0.5, -(self.others / own).log1p(), below - log_total)
        self.weighted = self.weighted + below.clamp(min=FLOOR) * own
        entropy = log_total - self.weighted / total
        return torch.stack((logprobs, entropy, self.top, log_total)), total


def columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a block (C, 1), clamped to it, and whether it lies in it (C,)."""
    column = targets - start
    inside = (column >= 0) & (column < width)
    return column.clamp_(0, width - 1)[:, None], inside


def logits_gradient(
    z: Tensor,
    start: int,
    targets: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    p: Tensor,
) -> Tensor:
    """g (1[v=y] − p_v) − g_ent p_v (log p_v + entropy) for a block of logits z.

    z and p (of the same shape) are overwritten; the result is in one of them.

    The target's 1 − p is formed as −expm1(log p): the difference would cancel where p is near 1.
    """
    logprobs, entropy, top, log_total = stats
    z.sub_(top[:, None]).sub_(log_total[:, None]).clamp_(min=FLOOR)
    torch.exp(z, out=p)
    if grad_entropy is not None:
        z.add_(entropy[:, None]).mul_(p).mul_(-grad_entropy[:, None])
    if grad_logprobs is None:
        return z
    column, inside = columns(targets, start, z.shape[1])
    entry = torch.where(inside, torch.expm1(logprobs), p.gather(1, column)[:, 0])
    p.scatter_(1, column, entry[:, None]).mul_(-grad_logprobs[:, None])
    return p if grad_entropy is None else p.add_(z)


def used(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """None for a gradient that is absent; on the CPU also for one that is zero everywhere."""
    if grad is None or (grad.device.type == "cpu" and not grad.any()):
        return None
    return grad.to(dtype)


def part_of(grad: Tensor | None, part: slice) -> Tensor | None:
    """The gradient of some rows, where there is one."""
    return None if grad is None else grad[part]


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, max(step, 1)))

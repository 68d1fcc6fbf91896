"""Log-probabilities in plain torch: the reference form of `ppo_nlu.ops`, and the one for the CPU.

Logits are formed one block (rows by vocabulary entries) at a time, in buffers that every block uses
again; of each row only the statistics of `torch_softmax` are kept. With a frozen head U = ∂log π/∂h
and, on request, E = ∂entropy/∂h are formed in the same pass. `torch_capped` has logits with a soft
cap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_nlu.ops.torch_softmax import (
    FLOOR,
    RunningSoftmax,
    accumulator,
    logits_gradient,
    part_of,
    slices,
    used,
    wants_grad,
)

WIDENED = 1 << 20  # weights turned to fp32 at a time: the processor's cache holds them


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of softmax((hidden Wᵀ + s hidden Aᵀ Bᵀ + bias)/τ).

    Args: hidden (N, H), weight (V, H), targets (N,), bias (V,) or None, lora_a (r, H) and
        lora_b (V, r) or None. entropy_grad: form ∂entropy/∂hidden in the forward; without it the
        entropy's gradient comes from recomputed blocks.
    """
    head = (weight, bias, lora_a, lora_b, float(scaling), float(temperature))
    if not wants_grad(hidden, weight, bias, lora_a, lora_b):
        stats, _ = _linear_logprobs_forward(hidden, Head(*head), targets)
        return stats[0], stats[1]
    if lora_a is None and not wants_grad(weight, bias):
        return _LinearLogprobsFrozen.apply(hidden, targets, entropy_grad, *head)
    return _LinearLogprobsTrainable.apply(hidden, targets, *head)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden Wᵀ + bias (N, V) in fp32, not rounded on the way.

    A product of bf16 matrices would round each logit to 8 bits. Where no gradient is needed, a
    block of W is widened at a time.
    """
    dtype = accumulator(hidden.dtype)
    if hidden.dtype == weight.dtype == dtype or wants_grad(hidden, weight, bias):
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
    head, chunk = Head(weight, bias, None, None, 1.0, 1.0), hidden.to(dtype)
    out = torch.empty(len(hidden), weight.shape[0], dtype=dtype, device=hidden.device)
    for entries in slices(weight.shape[0], WIDENED // max(weight.shape[1], 1)):
        head.logits(chunk, None, entries, out[:, entries])
    return out


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of logits (N, V) over the temperature."""
    if wants_grad(logits):
        return _TokenLogprobs.apply(logits, targets, temperature)
    stats = _token_logprobs_forward(logits, targets, temperature)
    return stats[0], stats[1]


# ---- linear_logprobs


class Head(NamedTuple):
    """What turns hidden states into logits: (h Wᵀ + s (h Aᵀ) Bᵀ + bias)/τ."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    temperature: float

    def low(self, chunk: Tensor) -> Tensor | None:
        """S = s h Aᵀ (C, r) of a chunk of rows."""
        if self.lora_a is None:
            return None
        return (chunk @ self.lora_a.to(chunk.dtype).t()).mul_(self.scaling)

    def logits(self, chunk: Tensor, low: Tensor | None, entries: slice, z: Tensor) -> Tensor:
        """Fill z with the block's logits over τ; returns its part of W in the dtype of z."""
        part = self.weight[entries].to(z.dtype)
        torch.mm(chunk, part.t(), out=z)
        if low is not None and self.lora_b is not None:
            z.addmm_(low, self.lora_b[entries].to(z.dtype).t())
        if self.bias is not None:
            z.add_(self.bias[entries].to(z.dtype))
        if self.temperature != 1.0:
            z.div_(self.temperature)
        return part


class _Blocks:
    """The blocks that rows and vocabulary are cut into, and two buffers of the size of a block.

    A block never has all rows and the whole vocabulary. Up to 512 rows stay together: reading the
    head twice would cost more. On the CPU a block is small enough to stay in the cache.
    """

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        most_rows, most_columns = _block_shape(rows, vocab, device)
        self.rows = list(slices(rows, most_rows))
        self.entries = list(slices(vocab, most_columns))
        size = min(rows, most_rows) * min(vocab, most_columns)
        self.z, self.exp = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))

    def buffers(self, rows: int, entries: slice) -> tuple[Tensor, Tensor]:
        shape = rows, entries.stop - entries.start
        z, exp = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.z, self.exp))
        return z, exp


def _block_shape(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of a block: at most a quarter of all logits, or half if few."""
    most_rows, most = (512, 1 << 23) if device.type == "cuda" else (512, 1 << 20)
    rows, parts = min(rows, most_rows), (4 if rows * vocab > 1 << 16 else 2)
    return rows, max(1, min(-(-vocab // parts), most // max(rows, 1)))


def _linear_logprobs_forward(
    hidden: Tensor, head: Head, targets: Tensor, directions: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The statistics of each row (4, N), and the directions asked for (0, 1 or 2; N; H):
    U = ∂logprobs/∂hidden and E = ∂entropy/∂hidden."""
    dtype = accumulator(hidden.dtype)
    stats = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
    out = hidden.new_empty(directions, *hidden.shape) if directions else None
    blocks = _Blocks(hidden.shape[0], head.weight.shape[0], dtype, hidden.device)
    for rows in blocks.rows:
        chunk, state = hidden[rows].to(dtype), RunningSoftmax(targets[rows], dtype)
        low = head.low(chunk)
        pulled = chunk.new_zeros(directions, *chunk.shape)  # Σ exp(z) W over v ≠ y; Σ z exp(z) W
        for entries in blocks.entries:
            z, exp = blocks.buffers(len(chunk), entries)
            part = head.logits(chunk, low, entries, z)
            shift, scale = state.update(z, exp, entries.start)
            _pull(pulled, (exp, z), part, shift, scale)
        stats[:, rows], total = state.result()
        if out is not None:
            own = head.weight[targets[rows]].to(dtype)
            _finish(pulled, own, state, stats[:, rows], total)
            out[:, rows] = pulled.mul_(1.0 / head.temperature)
    return stats, out


def _pull(
    pulled: Tensor, block: Sequence[Tensor], part: Tensor, shift: Tensor, scale: Tensor
) -> None:
    """Rescale the sums so far to the new maximum and add the block's exp(z) W (and z exp(z) W)."""
    if len(pulled) == 2:
        pulled[1].addcmul_(pulled[0], shift[:, None])
    for total, terms in zip(pulled, block, strict=False):
        total.mul_(scale[:, None]).addmm_(terms, part)


def _finish(
    pulled: Tensor, own: Tensor, state: RunningSoftmax, stats: Tensor, total: Tensor
) -> None:
    """Turn the sums over v ≠ y into U and E, given W_y (C, H); all relative to the logits.

    U = (1 − p_y) W_y − Σ p_v W_v over v ≠ y: nothing cancels where p_y is near 1. With z̄ = Σ p z,
    E = −Σ p_v (z_v − z̄) W_v, the target's term added here.
    """
    logprobs, _, top, log_total = stats
    pulled.div_(total[:, None])
    if len(pulled) == 2:
        mean = state.weighted / total
        p = (state.at_target - top - log_total).exp()
        spread = (state.at_target - top).clamp(min=FLOOR) - mean
        pulled[1].addcmul_(pulled[0], mean[:, None], value=-1.0)
        pulled[1].addcmul_(own, (p * spread)[:, None]).neg_()
    pulled[0].addcmul_(own, torch.expm1(logprobs)[:, None]).neg_()


def _recompute(
    inputs: Sequence[Tensor],
    head: Head,
    stats: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    grads: Sequence[Tensor | None],
) -> None:
    """Recompute each block; add into the buffers for hidden, weight, bias, lora_a and lora_b."""
    hidden, targets = inputs
    grad_hidden, grad_weight, grad_bias, grad_a, grad_b = grads
    blocks = _Blocks(hidden.shape[0], head.weight.shape[0], stats.dtype, hidden.device)
    for rows in blocks.rows:
        chunk = hidden[rows].to(stats.dtype)
        low = head.low(chunk)
        grad_low = None if low is None else torch.zeros_like(low)
        own = targets[rows], stats[:, rows], part_of(upstream[0], rows), part_of(upstream[1], rows)
        for entries in blocks.entries:
            z, p = blocks.buffers(len(chunk), entries)
            part = head.logits(chunk, low, entries, z)
            dz = logits_gradient(z, entries.start, *own, p).mul_(1.0 / head.temperature)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(dz, part)
            if grad_weight is not None:
                grad_weight[entries].addmm_(dz.t(), chunk)
            if grad_bias is not None:
                grad_bias[entries] += dz.sum(0)
            if grad_low is not None and head.lora_b is not None:
                grad_low.addmm_(dz, head.lora_b[entries].to(dz.dtype))
            if grad_b is not None and low is not None:
                grad_b[entries].addmm_(dz.t(), low)
        if grad_low is not None and head.lora_a is not None:
            grad_low.mul_(head.scaling)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(grad_low, head.lora_a.to(grad_low.dtype))
            if grad_a is not None:
                grad_a.addmm_(grad_low.t(), chunk)


class _LinearLogprobsFrozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, entropy_grad, *head):  # type: ignore[override]
        count = 2 if entropy_grad else 1
        stats, directions = _linear_logprobs_forward(hidden, Head(*head), targets, count)
        again = () if entropy_grad else (hidden, targets, *head[:2], stats)
        ctx.save_for_backward(directions, *again)
        ctx.temperature = head[-1]
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        directions, *again = ctx.saved_tensors
        dtype = accumulator(directions.dtype)
        grad = torch.zeros(directions.shape[1:], dtype=dtype, device=directions.device)
        upstream = used(grad_logprobs, dtype), used(grad_entropy, dtype)
        for direction, g in zip(directions, upstream, strict=False):
            if g is not None:
                grad.addcmul_(direction.to(dtype), g[:, None])
        if again and upstream[1] is not None:
            hidden, targets, weight, bias, stats = again
            head = Head(weight, bias, None, None, 1.0, ctx.temperature)
            grads = (grad, None, None, None, None)
            with torch.autocast(hidden.device.type, enabled=False):
                _recompute((hidden, targets), head, stats, (None, upstream[1]), grads)
        return grad.to(directions.dtype), *(None,) * 8


class _LinearLogprobsTrainable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, *head):  # type: ignore[override]
        stats, _ = _linear_logprobs_forward(hidden, Head(*head), targets)
        ctx.save_for_backward(hidden, targets, *head[:4], stats)
        ctx.factors = head[4:]
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        hidden, targets, *tensors, stats = ctx.saved_tensors
        upstream = used(grad_logprobs, stats.dtype), used(grad_entropy, stats.dtype)
        sources = (hidden, *tensors)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        grads = [
            torch.zeros(t.shape, dtype=stats.dtype, device=t.device) if wanted else None
            for t, wanted in zip(sources, needed, strict=True)
        ]
        if any(g is not None for g in upstream):
            head = Head(*tensors, *ctx.factors)
            with torch.autocast(hidden.device.type, enabled=False):
                _recompute((hidden, targets), head, stats, upstream, grads)
        cast = [None if g is None else g.to(t.dtype) for g, t in zip(grads, sources, strict=True)]
        return cast[0], None, *cast[1:], None, None


# ---- token_logprobs


def _token_logprobs_forward(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The statistics of each row (4, N), through fp32 copies of a few rows at a time."""
    dtype = accumulator(logits.dtype)
    stats = torch.empty(4, logits.shape[0], dtype=dtype, device=logits.device)
    for rows in slices(*_token_rows(logits)):
        state = RunningSoftmax(targets[rows], dtype)
        z = logits[rows].to(dtype, copy=True).div_(temperature)
        state.update(z, torch.empty_like(z), 0)
        stats[:, rows], _ = state.result()
    return stats


def _token_rows(logits: Tensor) -> tuple[int, int]:
    """The number of rows, and how many to take at a time: their copy should fit in the cache."""
    entries = 1 << (24 if logits.is_cuda else 19)
    return logits.shape[0], max(1, entries // max(logits.shape[1], 1))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature):  # type: ignore[override]
        stats = _token_logprobs_forward(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        logits, targets, stats = ctx.saved_tensors
        dtype = stats.dtype
        upstream = used(grad_logprobs, dtype), used(grad_entropy, dtype)
        if all(g is None for g in upstream):
            return torch.zeros_like(logits), None, None
        grad = logits.new_empty(logits.shape)
        for rows in slices(*_token_rows(logits)):
            z = logits[rows].to(dtype, copy=True).div_(ctx.temperature)
            own = (
                targets[rows],
                stats[:, rows],
                part_of(upstream[0], rows),
                part_of(upstream[1], rows),
            )
            dz = logits_gradient(z, 0, *own, torch.empty_like(z))
            grad[rows] = dz.mul_(1.0 / ctx.temperature)
        return grad, None, None

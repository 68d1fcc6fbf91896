"""Log-probability and entropy from hidden states, a chunk of rows at a time.

Per chunk: Z = h Wᵀ in fp32 by torch's GEMM; one Triton pass over Z gives log π and the entropy. If
a gradient is wanted and the head is frozen, a second pass writes D = (1[v=y] − p)/τ, and U = D W is
kept: ∂log π/∂h does not depend on the upstream gradient, so the backward is one multiplication.
D W is not W_y − Σ p W: with a low-precision p that difference cancels where p_y is near 1. The
entropy's gradient, and all gradients of a trainable head, come from recomputed chunks.

Imports torch and triton only. Deterministic: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .token_logprobs import accumulator, launch_backward, launch_forward

MAX_ROWS = 256  # 148 MiB of fp32 logits at V = 152064: the GEMM is compute-bound from here on
MIN_ROWS = 64  # below this a second pass over the head costs more than its logits weigh
_WIDEN = 1 << 22  # entries of a low-precision head widened at a time where the GEMM cannot do it


def _chunks(rows: int) -> Iterator[slice]:
    step = min(MAX_ROWS, max(MIN_ROWS, (rows + 1) // 2))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(C, V) in the accumulator dtype, never rounded to the inputs' precision on the way."""
    dtype = accumulator(hidden.dtype)[0]
    if hidden.dtype == weight.dtype == dtype:
        z = hidden @ weight.t()
    elif hidden.is_cuda and hidden.dtype == weight.dtype and _mm_takes_out_dtype():
        z = torch.mm(hidden, weight.t(), out_dtype=dtype)
    else:
        z = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
        step = max(1, _WIDEN // max(weight.shape[1], 1))
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            z[:, part] = hidden.to(dtype) @ weight[part].to(dtype).t()
    return z if bias is None else z.add_(bias.to(dtype))


def _mm_takes_out_dtype() -> bool:
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    with_direction: bool,
) -> tuple[Tensor, Tensor | None]:
    """The statistics of `launch_forward` (4, N) and, on request, U = ∂logprobs/∂hidden (N, H)."""
    dtype = accumulator(hidden.dtype)[0]
    stats = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
    direction = hidden.new_empty(hidden.shape) if with_direction else None
    for rows in _chunks(hidden.shape[0]):
        z = _logits(hidden[rows], weight, bias)
        chunk = launch_forward(z, targets[rows], temperature)
        for row, value in zip(stats, chunk, strict=True):
            row[rows] = value
        if direction is not None:
            out = z.new_empty(z.shape, dtype=weight.dtype)
            ones = torch.ones_like(chunk[0])
            d = launch_backward(z, targets[rows], temperature, chunk, ones, None, out)
            direction[rows] = d @ weight
    return stats, direction


def _recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    stats: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Add into the fp32 buffers given for hidden, weight and bias, chunk by chunk."""
    grad_hidden, grad_weight, grad_bias = grads
    for rows in _chunks(hidden.shape[0]):
        z = _logits(hidden[rows], weight, bias)
        chunk = stats[:, rows].unbind()
        g, g_entropy = (None if u is None else u[rows] for u in upstream)
        out = z.new_empty(z.shape, dtype=weight.dtype)
        dz = launch_backward(z, targets[rows], temperature, chunk, g, g_entropy, out)
        if grad_hidden is not None:
            grad_hidden[rows] += dz @ weight
        if grad_weight is not None:
            grad_weight += dz.t() @ hidden[rows].to(dz.dtype)
        if grad_bias is not None:
            grad_bias += dz.sum(0, dtype=grad_bias.dtype)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):  # type: ignore[override]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        frozen = needs_hidden and not (needs_weight or needs_bias)
        stats, direction = _forward(hidden, weight, bias, targets, temperature, frozen)
        ctx.save_for_backward(hidden, weight, bias, targets, stats, direction)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        *inputs, stats, direction = ctx.saved_tensors
        grads = [
            torch.zeros(t.shape, dtype=stats.dtype, device=t.device) if needed else None
            for t, needed in zip(inputs[:3], ctx.needs_input_grad, strict=False)
        ]
        if direction is not None and grad_logprobs is not None:
            grads[0] = direction * grad_logprobs[:, None]
            grad_logprobs = None
        if grad_logprobs is not None or grad_entropy is not None:
            upstream = grad_logprobs, grad_entropy
            _recompute(*inputs, ctx.temperature, stats, upstream, tuple(grads))
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=False))
        return *cast, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of softmax((hidden Wᵀ + bias)/τ).

    Args: hidden (N, H), weight (V, H), targets (N,), bias (V,) or None.
    """
    if not torch.is_grad_enabled():
        stats, _ = _forward(hidden, weight, bias, targets, temperature, with_direction=False)
        return stats[0], stats[1]
    return _LinearLogprobs.apply(hidden, weight, bias, targets, temperature)

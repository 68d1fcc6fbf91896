"""Log-probability and entropy of given logits: one Triton program a row, one read of the logits.

Forward: online softmax in base 2, m' = max(m, max x), l' = l·2^(m−m') + Σ 2^(x−m'), and the same
for Σ 2^(x−m') (x−m'), where x = z log₂e / τ. Backward reads the logits once more:
dz = (g (1[v=y] − p) − g_ent p (log p + entropy)) / τ, the target's 1 − p as −expm1(log p).

Imports torch and triton only. Loads are widened to fp32 (float64 for float64) before arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2E = 1.4426950408889634
MAX_BLOCK = 4096
_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_FLOOR: tl.constexpr = tl.constexpr(-1e5)  # 2^(-1e5) is 0, and 0 · -1e5 is 0 where 0 · -inf is not


@triton.jit
def _minus_expm1(log_p):
    """1 − p from log p <= 0: a series where p is near 1 and the difference would cancel."""
    near = -log_p * (
        1.0
        + log_p
        * (
            1.0 / 2
            + log_p
            * (
                1.0 / 6
                + log_p
                * (
                    1.0 / 24
                    + log_p
                    * (1.0 / 120 + log_p * (1.0 / 720 + log_p * (1.0 / 5040 + log_p / 40320)))
                )
            )
        )
    )
    return tl.where(log_p > -0.35, near, 1.0 - tl.exp2(log_p * _LOG2E))


@triton.jit
def _forward(
    logits,
    targets,
    logprobs,
    entropy,
    tops,
    log_totals,
    row_stride,
    column_stride,
    vocab,
    scale,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    scale = scale * _LOG2E
    top = tl.full((), float("-inf"), DTYPE)
    total = tl.full((), 0.0, DTYPE)
    others = tl.full((), 0.0, DTYPE)
    weighted = tl.full((), 0.0, DTYPE)
    target = tl.load(targets + row)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        x = tl.load(base + column.to(tl.int64) * column_stride, mask=inside, other=float("-inf"))
        x = x.to(DTYPE) * scale
        new_top = tl.maximum(top, tl.max(x, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shift = tl.maximum(top - finite, _FLOOR)
        factor = tl.exp2(shift)
        x = tl.maximum(x - finite, _FLOOR)
        e = tl.exp2(x)
        weighted = (weighted + shift * total) * factor + tl.sum(x * e, 0)
        total = total * factor + tl.sum(e, 0)
        others = others * factor + tl.sum(tl.where(column == target, 0.0, e), 0)
        top = new_top
    valid = (target >= 0) & (target < vocab)
    at_target = tl.load(base + target * column_stride, mask=valid, other=float("nan"))
    log_total = tl.log2(total)
    below = at_target.to(DTYPE) * scale - top
    # Near p = 1: −log1p(Σ 2^(x_v − x_y) over v ≠ y), as log(u) ratio / (u − 1), u = 1 + ratio.
    own = tl.exp2(below)
    ratio = others / tl.maximum(own, 0.5)
    u = 1.0 + ratio
    log1p = tl.where(u == 1.0, ratio, tl.log2(u) * _LN2 * ratio / tl.maximum(u - 1.0, 1e-30))
    tl.store(logprobs + row, tl.where(own > 0.5, -log1p, (below - log_total) * _LN2))
    tl.store(entropy + row, (log_total - weighted / total) * _LN2)
    # Kept apart: their sum would lose the digits of log_total where the logits are large.
    tl.store(tops + row, top)
    tl.store(log_totals + row, log_total)


@triton.jit
def _backward(
    logits,
    targets,
    logprobs,
    entropy,
    tops,
    log_totals,
    grad_logprobs,
    grad_entropy,
    grad,
    row_stride,
    column_stride,
    grad_stride,
    vocab,
    scale,
    WITH_LOGPROBS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    top = tl.load(tops + row)
    log_total = tl.load(log_totals + row)
    entropy_row = tl.load(entropy + row)
    one_minus_p = _minus_expm1(tl.load(logprobs + row))
    g = tl.load(grad_logprobs + row).to(DTYPE) if WITH_LOGPROBS else 0.0
    g_entropy = tl.load(grad_entropy + row).to(DTYPE) if WITH_ENTROPY else 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        x = tl.load(base + column.to(tl.int64) * column_stride, mask=inside, other=float("-inf"))
        x = tl.maximum((x.to(DTYPE) * (scale * _LOG2E) - top) - log_total, _FLOOR)
        p = tl.exp2(x)
        dz = tl.zeros((BLOCK,), DTYPE)
        if WITH_LOGPROBS:
            dz += g * tl.where(column == target, one_minus_p, -p)
        if WITH_ENTROPY:
            dz -= g_entropy * p * (x * _LN2 + entropy_row)
        dz = (dz * scale).to(grad.dtype.element_ty)
        tl.store(grad + row * grad_stride + column, dz, mask=inside)


def block_and_warps(vocab: int) -> tuple[int, int]:
    """One block for a small vocabulary, else 4096 entries on 8 warps."""
    block = min(triton.next_power_of_2(max(vocab, 16)), MAX_BLOCK)
    return block, 8 if block >= 2048 else 4


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """The dtype of all arithmetic, for torch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def launch_forward(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, max x and log₂ Σ 2^(x − max x) of every row, each (N,)."""
    rows, vocab = logits.shape
    dtype, triton_dtype = accumulator(logits.dtype)
    stats = [torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(4)]
    if rows:
        block, warps = block_and_warps(vocab)
        _forward[(rows,)](
            logits,
            targets.contiguous(),
            *stats,
            logits.stride(0),
            logits.stride(1),
            vocab,
            1.0 / temperature,
            BLOCK=block,
            DTYPE=triton_dtype,
            num_warps=warps,
        )
    return stats[0], stats[1], stats[2], stats[3]


def launch_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    stats: Sequence[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill `out` (N, V), rows contiguous, with the gradient of the logits."""
    rows, vocab = logits.shape
    if rows:
        block, warps = block_and_warps(vocab)
        spare = stats[0]  # stands in for an absent gradient, never read
        _backward[(rows,)](
            logits,
            targets.contiguous(),
            *stats,
            spare if grad_logprobs is None else grad_logprobs.contiguous(),
            spare if grad_entropy is None else grad_entropy.contiguous(),
            out,
            logits.stride(0),
            logits.stride(1),
            out.stride(0),
            vocab,
            1.0 / temperature,
            WITH_LOGPROBS=grad_logprobs is not None,
            WITH_ENTROPY=grad_entropy is not None,
            BLOCK=block,
            DTYPE=accumulator(logits.dtype)[1],
            num_warps=warps,
        )
    return out


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature):  # type: ignore[override]
        stats = launch_forward(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, *stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0], stats[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        logits, targets, *stats = ctx.saved_tensors
        out = logits.new_empty(logits.shape)
        grad = launch_backward(
            logits, targets, ctx.temperature, stats, grad_logprobs, grad_entropy, out
        )
        return grad, None, None


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of logits (N, V) over the temperature.

    A target outside the vocabulary answers NaN; the caller is to refuse it beforehand.
    """
    return _TokenLogprobs.apply(logits, targets, temperature)

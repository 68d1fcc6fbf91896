"""Log-probability and entropy of given logits: one Triton program a row, one read of the logits.

Forward: online softmax in base 2 over v ≠ y. With x = (z − m) log₂e / τ and m' = max(m, max z),
Σ 2^x and Σ x 2^x are rescaled by 2^((m − m') log₂e / τ) as the maximum rises; the target's logit is
read by itself, so log π = −log1p(Σ 2^x / 2^x_y) loses no digit near p_y = 1. The maximum is taken
off before the scaling: logits of 1e4 that differ by 1 keep all the digits of the difference.
Backward reads the logits once more: dz = (g (1[v=y] − p) − g_ent p (log p + entropy)) / τ, the
target's 1 − p as −expm1(log p).

A NaN among the logits gives NaN. Imports torch and triton only. Loads are widened to fp32
(float64 for float64) before arithmetic. Row offsets are int64 and rows lie on grid axis 0, the one
without the limit of 65535. Deterministic: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK = 4096
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_FLOOR: tl.constexpr = tl.constexpr(-1e5)  # 2^(-1e5) is 0, and 0 · -1e5 is 0 where 0 · -inf is not


@triton.jit
def minus_expm1(log_p):
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
def nan_or_larger(a, b):
    """max(a, b), NaN where either is NaN, which the hardware's maximum would lose."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def floored(x):
    """x with -inf replaced by a number whose power of 2 is 0 too; NaN stays."""
    return nan_or_larger(x, _FLOOR)


@triton.jit
def finite_or_zero(top):
    """A row's largest logit; 0 where all of them are -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def finish(top, others, weighted, at_target, scale):
    """log π, entropy and log₂ Σ 2^x from the sums over v ≠ y and the target's logit."""
    below = (at_target - top) * scale
    own = tl.exp2(below)
    total = others + own
    log_total = tl.log2(total)
    # Near p = 1: −log1p(Σ 2^(x_v − x_y) over v ≠ y), as log(u) ratio / (u − 1), u = 1 + ratio.
    ratio = others / tl.maximum(own, 0.5)
    u = 1.0 + ratio
    log1p = tl.where(u == 1.0, ratio, tl.log2(u) * _LN2 * ratio / tl.maximum(u - 1.0, 1e-30))
    log_p = tl.where(own > 0.5, -log1p, (below - log_total) * _LN2)
    entropy = (log_total - (weighted + floored(below) * own) / total) * _LN2
    return log_p, entropy, log_total


@triton.jit
def row_statistics(base, column_stride, target, vocab, scale, BLOCK: tl.constexpr, DTYPE):
    """log π, entropy, m and log₂ Σ 2^x of one row; `scale` is log₂e / τ."""
    valid = (target >= 0) & (target < vocab)
    at_target = tl.load(base + target * column_stride, mask=valid, other=float("nan")).to(DTYPE)
    top = tl.full((), float("-inf"), DTYPE)
    others = tl.full((), 0.0, DTYPE)
    weighted = tl.full((), 0.0, DTYPE)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(base + column.to(tl.int64) * column_stride, mask=inside, other=float("-inf"))
        z = z.to(DTYPE)
        new_top = tl.maximum(top, tl.max(z, 0))
        finite = finite_or_zero(new_top)
        shift = floored((top - finite) * scale)
        factor = tl.exp2(shift)
        x = floored((z - finite) * scale)
        e = tl.where(column == target, 0.0, tl.exp2(x))
        weighted = (weighted + shift * others) * factor + tl.sum(x * e, 0)
        others = others * factor + tl.sum(e, 0)
        top = new_top
    log_p, entropy, log_total = finish(top, others, weighted, at_target, scale)
    return log_p, entropy, top, log_total


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
    target = tl.load(targets + row)
    log_p, ent, top, log_total = row_statistics(
        logits + row * row_stride, column_stride, target, vocab, scale * _LOG2E, BLOCK, DTYPE
    )
    tl.store(logprobs + row, log_p)
    tl.store(entropy + row, ent)
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
    one_minus_p = minus_expm1(tl.load(logprobs + row))
    g = tl.load(grad_logprobs + row).to(DTYPE) if WITH_LOGPROBS else 0.0
    g_entropy = tl.load(grad_entropy + row).to(DTYPE) if WITH_ENTROPY else 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(base + column.to(tl.int64) * column_stride, mask=inside, other=float("-inf"))
        x = floored((z.to(DTYPE) - top) * (scale * _LOG2E) - log_total)
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


def may_overwrite(vocab: int) -> bool:
    """Whether a gradient may take the place of its logits: each entry is one thread's alone.

    With fewer entries than threads several hold the same one, and one may write before another
    has read.
    """
    block, warps = block_and_warps(vocab)
    return block >= 32 * warps


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """The dtype of all arithmetic, for torch and for Triton."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def empty_stats(rows: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Room for logprobs, entropy, m and log₂ Σ 2^x of every row."""
    return [torch.empty(rows, dtype=dtype, device=device) for _ in range(4)]


def launch_forward(
    logits: Tensor, targets: Tensor, temperature: float, stats: Sequence[Tensor]
) -> None:
    """Fill the four `stats` (N,) of `empty_stats`."""
    rows, vocab = logits.shape
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
            DTYPE=accumulator(logits.dtype)[1],
            num_warps=warps,
        )


def launch_backward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    stats: Sequence[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Fill `out` (N, V), rows contiguous, with the gradient of the logits.

    It may be `logits` where `may_overwrite` says so.
    """
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
        stats = empty_stats(logits.shape[0], accumulator(logits.dtype)[0], logits.device)
        launch_forward(logits, targets, temperature, stats)
        ctx.save_for_backward(logits, targets, *stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0], stats[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        logits, targets, *stats = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        grad = launch_backward(
            logits, targets, ctx.temperature, stats, grad_logprobs, grad_entropy, out
        )
        return grad, None, None


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of logits (N, V) over the temperature.

    A target outside the vocabulary gives NaN; the caller must refuse it beforehand.
    """
    return _TokenLogprobs.apply(logits, targets, temperature)


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """One launch of each configuration, on tensors without contents."""
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in (151936, 1000):
            name = f"{str(dtype)[6:]}-{vocab}"
            yield f"logits-forward-{name}", lambda d=dtype, v=vocab: _example(d, v, None)
            for flags in ((True, False), (True, True)):
                label = f"logits-backward-{name}{'-entropy' if flags[1] else ''}"
                yield label, lambda d=dtype, v=vocab, f=flags: _example(d, v, f)


def _example(dtype: torch.dtype, vocab: int, wanted: tuple[bool, bool] | None) -> None:
    logits = torch.empty(8192, vocab, dtype=dtype)
    targets = torch.empty(8192, dtype=torch.long)
    stats = empty_stats(8192, torch.float32, logits.device)
    if wanted is None:
        launch_forward(logits, targets, 1.0, stats)
        return
    upstream = [torch.empty(8192) if want else None for want in wanted]
    launch_backward(logits, targets, 1.0, stats, *upstream, torch.empty_like(logits))

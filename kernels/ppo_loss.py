"""The clipped PPO loss, its gradients and its statistics in one launch; one more in the backward.

With ρ = exp(clamp(log π − log π_old, ±20)) and sums over the counted tokens, divided by their count

L = Σ max(−Âρ, −Â clip(ρ, 1−ε, 1+ε_high)) + c_v ½ Σ max((V−G)², (clip(V, V_old±ε_v)−G)²) − c_e Σ H

(arXiv 1707.06347, equations 7 and 9; for Â < 0 at most −c·Â with dual clipping, 1912.09729). The
inputs are small and each torch operation on them is a launch, so the forward keeps ∂L/∂log π,
∂L/∂V and ∂L/∂H, and the backward is one multiplication by the upstream scalar. Ties follow the
subgradients of torch.maximum (half to each side) and torch.clamp (passes at its bounds).

Imports torch and triton only. Deterministic: one program sums up to 65,536 tokens in a fixed order;
beyond that programs write partial sums, which a second launch adds up, again in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2048
ONE_PROGRAM = 1 << 16  # tokens that one program sums alone
SPAN = 1 << 14  # tokens a program where there are more
SUMS = (
    "policy/loss", "policy/clip_fraction", "policy/approx_kl", "policy/approx_kl_k1",
    "policy/ratio_mean", "value/loss", "value/clip_fraction", "policy/entropy",
)  # fmt: skip
MAXIMA = ("policy/ratio_max", "policy/ratio_gap")
_SUMS: tl.constexpr = tl.constexpr(len(SUMS))
_STATS: tl.constexpr = tl.constexpr(len(SUMS) + len(MAXIMA) + 1)  # and the loss itself
_MAX_LOG_RATIO: tl.constexpr = tl.constexpr(20.0)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _clamp(x, low, high):
    """Into [low, high]; NaN stays NaN, which the hardware's minimum and maximum would lose."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _larger(a, b):
    """max(a, b), NaN where b is NaN, and how much of the gradient each side gets."""
    to_a = tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))
    return tl.where(a > b, a, b), to_a, 1.0 - to_a


@triton.jit
def _surrogate(log_ratio, advantage, low, high, dual_clip, DUAL: tl.constexpr):
    """The policy's loss of each token, its gradient, whether it was clipped, and ρ."""
    bounded = _clamp(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = tl.exp2(bounded * _LOG2E)
    free, clipped = -advantage * ratio, -advantage * _clamp(ratio, low, high)
    loss, to_free, to_clipped = _larger(free, clipped)
    inside = (ratio >= low) & (ratio <= high)
    slope = to_free + tl.where(inside, to_clipped, 0.0)
    if DUAL:
        cap = -dual_clip * advantage
        _, _to_cap, to_loss = _larger(loss, cap)  # the minimum is the other side
        capped = tl.where(loss > cap, cap, loss)
        loss = tl.where(advantage < 0.0, capped, loss)
        slope = tl.where(advantage < 0.0, slope * to_loss, slope)
    slope = tl.where(bounded == log_ratio, slope, 0.0)
    return loss, -advantage * ratio * slope, clipped > free, ratio


@triton.jit
def _critic(value, old, target, clip, CLIP: tl.constexpr):
    """Half the squared error of each token, its gradient, and whether it was clipped."""
    error = value - target
    free = error * error
    if not CLIP:
        return 0.5 * free, error, free != free
    bounded = _clamp(value, old - clip, old + clip) - target
    clipped = bounded * bounded
    loss, to_free, to_clipped = _larger(free, clipped)
    inside = (value >= old - clip) & (value <= old + clip)
    slope = to_free * error + tl.where(inside, to_clipped * bounded, 0.0)
    return 0.5 * loss, slope, clipped > free


@triton.jit
def _forward(
    logprobs,
    old_logprobs,
    advantages,
    values,
    old_values,
    returns,
    entropy,
    mask,
    grads,
    stats,
    divisor,
    tokens,
    span,
    low,
    high,
    dual_clip,
    value_clip,
    value_coef,
    entropy_coef,
    denominator,
    DENOMINATOR: tl.constexpr,
    DUAL: tl.constexpr,
    CRITIC: tl.constexpr,
    VALUE_CLIP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, tokens)
    column = tl.arange(0, BLOCK)
    if DENOMINATOR == "count":
        number = tl.zeros((BLOCK,), tl.int32)
        for start in range(first, last, BLOCK):
            i = start + column
            number += (tl.load(mask + i, mask=i < last, other=0) != 0).to(tl.int32)
        count = tl.sum(number, 0).to(DTYPE)
    elif DENOMINATOR == "tensor":
        count = tl.load(divisor).to(DTYPE)
    else:
        count = tl.zeros((), DTYPE) + denominator
    count = tl.where(count == 0.0, 1.0, count)
    surrogate = tl.zeros((BLOCK,), DTYPE)
    clipped = tl.zeros((BLOCK,), DTYPE)
    squared = tl.zeros((BLOCK,), DTYPE)
    log_ratios = tl.zeros((BLOCK,), DTYPE)
    ratios = tl.zeros((BLOCK,), DTYPE)
    largest = tl.zeros((BLOCK,), DTYPE)
    gap = tl.zeros((BLOCK,), DTYPE)
    critic = tl.zeros((BLOCK,), DTYPE)
    critic_clipped = tl.zeros((BLOCK,), DTYPE)
    entropies = tl.zeros((BLOCK,), DTYPE)
    for start in range(first, last, BLOCK):
        i = start + column
        here = i < last
        counts = tl.load(mask + i, mask=here, other=0) != 0
        # Masked loads: what lies outside the mask, NaN included, is never read.
        log_ratio = tl.load(logprobs + i, mask=counts, other=0.0).to(DTYPE)
        log_ratio -= tl.load(old_logprobs + i, mask=counts, other=0.0).to(DTYPE)
        advantage = tl.load(advantages + i, mask=counts, other=0.0).to(DTYPE)
        loss, slope, cut, ratio = _surrogate(log_ratio, advantage, low, high, dual_clip, DUAL)
        tl.store(grads + i, tl.where(counts, slope / count, 0.0), mask=here)
        surrogate += loss
        clipped += cut.to(DTYPE)
        squared += log_ratio * log_ratio
        log_ratios += log_ratio
        ratios += tl.where(counts, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(counts, ratio, 0.0))
        gap = tl.maximum(gap, tl.abs(tl.where(counts, tl.exp2(log_ratio * _LOG2E) - 1.0, 0.0)))
        if CRITIC:
            value = tl.load(values + i, mask=counts, other=0.0).to(DTYPE)
            old = tl.load(old_values + i, mask=counts & VALUE_CLIP, other=0.0).to(DTYPE)
            target = tl.load(returns + i, mask=counts, other=0.0).to(DTYPE)
            loss, slope, cut = _critic(value, old, target, value_clip, VALUE_CLIP)
            slope = tl.where(counts, slope * value_coef / count, 0.0)
            tl.store(grads + tokens + i, slope, mask=here)
            critic += loss
            critic_clipped += cut.to(DTYPE)
        if ENTROPY:
            entropies += tl.load(entropy + i, mask=counts, other=0.0).to(DTYPE)
            slope = tl.where(counts, -entropy_coef / count, 0.0).to(DTYPE)
            tl.store(grads + 2 * tokens + i, slope, mask=here)
    stats += tl.program_id(0) * _STATS
    sum_surrogate = tl.sum(surrogate, 0) / count
    sum_critic = tl.sum(critic, 0) / count
    sum_entropy = tl.sum(entropies, 0) / count
    tl.store(stats, sum_surrogate)
    tl.store(stats + 1, tl.sum(clipped, 0) / count)
    tl.store(stats + 2, 0.5 * tl.sum(squared, 0) / count)
    tl.store(stats + 3, -tl.sum(log_ratios, 0) / count)
    tl.store(stats + 4, tl.sum(ratios, 0) / count)
    tl.store(stats + 5, sum_critic)
    tl.store(stats + 6, tl.sum(critic_clipped, 0) / count)
    tl.store(stats + 7, sum_entropy)
    tl.store(stats + 8, tl.max(largest, 0))
    tl.store(stats + 9, tl.max(gap, 0))
    loss = sum_surrogate + value_coef * sum_critic - entropy_coef * sum_entropy
    tl.store(stats + 10, loss)


@triton.jit
def _combine(partials, stats, programs, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """One program a statistic: the partial sums (or maxima) of all programs, in order."""
    which = tl.program_id(0)
    total = tl.full((), 0.0, DTYPE)
    top = tl.full((), 0.0, DTYPE)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        x = tl.load(partials + program * _STATS + which, mask=program < programs, other=0.0)
        total += tl.sum(x, 0)
        top = tl.maximum(top, tl.max(x, 0))
    is_maximum = (which >= _SUMS) & (which < _STATS - 1)
    tl.store(stats + which, tl.where(is_maximum, top, total))


def launch(
    tensors: dict[str, Tensor],
    mask: Tensor,
    clip: tuple[float, float],
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    denominator: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """∂L/∂(log π, V, H) stacked (3, N) and the statistics (SUMS, MAXIMA and the loss)."""
    logprobs = tensors["logprobs"]
    wide = logprobs.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    tokens, device = mask.numel(), mask.device
    programs = 1 if tokens <= ONE_PROGRAM else triton.cdiv(tokens, SPAN)
    if programs > 1 and denominator is None:
        denominator = mask.sum()
    grads = torch.empty(3, tokens, dtype=dtype, device=device)
    partials = torch.empty(programs, len(SUMS) + len(MAXIMA) + 1, dtype=dtype, device=device)
    kind = "count" if denominator is None else "tensor"
    number = 1.0
    if isinstance(denominator, (int, float)):
        kind, number = "number", float(denominator)
    counts = mask.contiguous().view(torch.uint8)
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy")
    _forward[(programs,)](
        *(contiguous.get(name, logprobs) for name in names),
        counts,
        grads,
        partials,
        denominator.to(device) if isinstance(denominator, Tensor) else counts,
        tokens,
        max(tokens, 1) if programs == 1 else SPAN,
        1.0 - clip[0],
        1.0 + clip[1],
        float(dual_clip or 0.0),
        float(value_clip or 0.0),
        float(value_coef),
        float(entropy_coef),
        number,
        DENOMINATOR=kind,
        DUAL=dual_clip is not None,
        CRITIC="values" in tensors,
        VALUE_CLIP=value_clip is not None,
        ENTROPY="entropy" in tensors,
        DTYPE=tl.float64 if wide else tl.float32,
        BLOCK=BLOCK,
        num_warps=8,
    )
    if programs == 1:
        return grads, partials[0]
    stats = torch.empty_like(partials[0])
    _combine[(len(stats),)](
        partials, stats, programs, BLOCK=256, DTYPE=tl.float64 if wide else tl.float32, num_warps=4
    )
    return grads, stats


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, values, entropy, rest, mask, settings):  # type: ignore[override]
        given = {"logprobs": logprobs, "values": values, "entropy": entropy, **rest}
        tensors = {name: t for name, t in given.items() if t is not None}
        grads, stats = launch(tensors, mask, *settings)
        ctx.save_for_backward(grads)
        ctx.shape = mask.shape
        ctx.dtypes = [None if t is None else t.dtype for t in (logprobs, values, entropy)]
        ctx.mark_non_differentiable(stats)
        return stats[-1], stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[override]
        scaled = ctx.saved_tensors[0] * grad_loss
        return *(
            g.view(ctx.shape).to(dtype) if needed else None
            for g, dtype, needed in zip(scaled, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ), None, None, None  # fmt: skip


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.5,
    denominator: float | Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss and its metrics, as `ppo_nlu.losses.ppo_loss`; all tensors (B, R).

    Gradients go to logprobs, values and entropy. `values=None` leaves the critic out.
    """
    rest = {"old_logprobs": old_logprobs, "advantages": advantages}
    if values is not None:
        rest |= {"returns": returns} | ({} if value_clip is None else {"old_values": old_values})
    high = clip if clip_high is None else clip_high
    settings = (
        (clip, high), dual_clip, value_clip, value_coef, entropy_coef if entropy is not None else 0,
        denominator,
    )  # fmt: skip
    loss, stats = _PPOLoss.apply(logprobs, values, entropy, rest, mask, settings)
    metrics = dict(zip((*SUMS, *MAXIMA), stats[:-1].unbind(), strict=True))
    if values is None:
        metrics = {n: x for n, x in metrics.items() if not n.startswith("value/")}
    if entropy is None:
        metrics.pop("policy/entropy")
    return loss, metrics


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches at real shapes, for `compile_report`."""
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy")
    for rows in (512, 8192):
        tensors = {name: torch.empty(rows, 16) for name in names}
        mask = torch.empty(rows, 16, dtype=torch.bool)
        settings = ((0.2, 0.2), 3.0, 0.2, 0.5, 0.01)
        for kind, denominator in (("number", 100.0), ("count", None)):
            if rows * 16 <= ONE_PROGRAM or kind == "number":
                yield f"{rows} x 16, {kind}", partial(launch, tensors, mask, *settings, denominator)

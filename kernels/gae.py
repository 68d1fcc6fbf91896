"""Generalised advantage estimation: one Triton program a row, a reversed associative scan.

Âₜ = δₜ + γλ Âₜ₊₁ with δₜ = rₜ + γ Vₜ₊₁ − Vₜ (arXiv 1506.02438, equation 16): pairs (a, b) of the
affine maps Â ↦ a Â + b compose to (a₂ a₁, b₂ + a₂ b₁). Outside the mask everything is 0.

Imports torch and triton only. The result carries no gradient: advantages are constants in PPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


@triton.jit
def _compose(a_later, b_later, a, b):
    return a_later * a, b + a * b_later


@triton.jit
def _gae(
    rewards,
    values,
    mask,
    advantages,
    returns,
    reward_row,
    reward_column,
    value_row,
    value_column,
    mask_row,
    mask_column,
    length,
    gamma,
    decay,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rewards += row * reward_row
    values += row * value_row
    mask += row * mask_row
    advantages += row * length
    returns += row * length
    offset = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, DTYPE)
    for block in range(tl.cdiv(length, BLOCK) - 1, -1, -1):
        t = block * BLOCK + offset
        here = t < length
        after = t + 1 < length
        counts = tl.load(mask + t * mask_column, mask=here, other=0) != 0
        counts_after = tl.load(mask + (t + 1) * mask_column, mask=after, other=0) != 0
        # Masked loads: what lies outside the mask, NaN included, is never read.
        value = tl.load(values + t * value_column, mask=counts, other=0.0).to(DTYPE)
        value_after = tl.load(values + (t + 1) * value_column, mask=counts_after, other=0.0)
        reward = tl.load(rewards + t * reward_column, mask=counts, other=0.0).to(DTYPE)
        delta = reward + gamma * value_after.to(DTYPE) - value
        a, b = tl.associative_scan(
            (tl.zeros((BLOCK,), DTYPE) + decay, delta), 0, _compose, reverse=True
        )
        advantage = b + a * carry
        carry = tl.sum(tl.where(offset == 0, advantage, 0.0), 0)
        tl.store(advantages + t, advantage, mask=here)
        tl.store(returns + t, advantage + value, mask=here)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, R) in fp32, 0 outside the mask (right-padded).

    Args: rewards, values (B, R) and mask (B, R) bool, True = counts.
    """
    wide = values.dtype == torch.float64
    advantages = torch.empty(
        mask.shape, dtype=torch.float64 if wide else torch.float32, device=values.device
    )
    returns = torch.empty_like(advantages)
    if mask.numel():
        block = min(triton.next_power_of_2(max(mask.shape[1], 16)), MAX_BLOCK)
        counts = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        _gae[(mask.shape[0],)](
            rewards,
            values,
            counts,
            advantages,
            returns,
            *rewards.stride(),
            *values.stride(),
            *counts.stride(),
            mask.shape[1],
            gamma,
            gamma * lam,
            BLOCK=block,
            DTYPE=tl.float64 if wide else tl.float32,
            num_warps=4,
        )
    return advantages, returns


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches at real shapes, for `compile_report`."""
    for length in (16, 1024):
        tensors = torch.empty(2, 512, length).unbind()
        mask = torch.empty(512, length, dtype=torch.bool)
        yield f"512 x {length}", partial(gae, *tensors, mask, 0.99, 0.95)

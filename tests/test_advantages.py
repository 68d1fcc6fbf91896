"""Masked statistics, shaped rewards, GAE and group advantages against pencil and plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_nlu.losses import (
    exact_kl,
    gae,
    group_advantages,
    kl_penalty,
    masked_mean,
    masked_whiten,
    shaped_rewards,
)

NAN = float("nan")


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def near(actual: Tensor, expected: Any) -> None:
    """Equal to 1e-6 in float32 and to 1e-12 in float64."""
    atol = 1e-12 if actual.dtype == torch.float64 else 1e-6
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def random_rows(seed: int = 0, rows: int = 5, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return rewards, values, mask_of([6, 1, 0, 3, 5], width)


# ---- masked statistics


def test_masked_mean_counts_only_the_mask() -> None:
    near(masked_mean(torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]]), mask_of([2, 1], 3)), 3.0)
    near(masked_mean(torch.full((2, 3), NAN), mask_of([0, 0], 3)), 0.0)


def test_masked_mean_is_taken_in_float32() -> None:
    # In bfloat16 (8 bits) a sum of ones stops growing at 256.
    ones = torch.ones(1, 1000, dtype=torch.bfloat16)
    result = masked_mean(ones * 3, mask_of([1000], 1000))
    assert result.dtype == torch.float32
    near(result, 3.0)


def test_masked_whiten_by_hand() -> None:
    # Counted 1, 2, 3: mean 2, unbiased variance (1 + 0 + 1) / 2 = 1 (the biased one would be 2/3).
    x, mask = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]]), mask_of([2, 1], 3)
    near(masked_whiten(x, mask), [[-1, 0, 0], [1, 0, 0]])
    near(masked_whiten(x, mask, shift_mean=False), [[1, 2, 0], [3, 0, 0]])


def test_masked_whiten_epsilon_is_1e_8_inside_the_root() -> None:
    # Counted ±1e-4: variance 2e-8, so the result is ±1e-4 / √(2e-8 + 1e-8) = ±1/√3.
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)
    near(masked_whiten(x, mask_of([2], 2)), [[1 / math.sqrt(3), -1 / math.sqrt(3)]])


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, 0.0), (False, 5.0)])
def test_masked_whiten_of_one_element(shift_mean: bool, expected: float) -> None:
    x, mask = torch.tensor([[5.0, NAN]]), mask_of([1], 2)
    near(masked_whiten(x, mask, shift_mean), [[expected, 0.0]])


def test_masked_whiten_does_not_blow_up_rounding() -> None:
    # Every element equal: nothing to scale, however the float32 mean of 1000.1 was rounded.
    x = torch.full((7, 11), 1000.1)
    near(masked_whiten(x, torch.ones(7, 11, dtype=torch.bool)), torch.zeros(7, 11))


def test_masked_whiten_is_blind_to_shift_and_scale() -> None:
    x, _, mask = random_rows()
    white = masked_whiten(x, mask)
    near(masked_mean(white, mask), 0.0)
    torch.testing.assert_close(white, masked_whiten(3 * x + 7, mask), rtol=0, atol=1e-7)
    assert abs(white[mask].var().item() - 1) < 1e-7


# ---- shaped rewards


def test_shaped_rewards_by_hand() -> None:
    # κ = 0.1. Row 0 has two tokens: −0.1·(−1 + 1.5) = −0.05, then −0.1·(−2 + 1) + 3 = 3.1.
    # Row 1 has one: −0.1·(−0.5 + 0.5) − 1 = −1. Row 2 has none: nothing, its score is dropped.
    logprobs = torch.tensor([[-1.0, -2.0, NAN], [-0.5, NAN, NAN], [NAN, NAN, NAN]])
    reference = torch.tensor([[-1.5, -1.0, NAN], [-0.5, NAN, NAN], [NAN, NAN, NAN]])
    scores = torch.tensor([3.0, -1.0, 9.0])
    rewards = shaped_rewards(scores, logprobs, reference, mask_of([2, 1, 0], 3), 0.1)
    near(rewards, [[-0.05, 3.1, 0], [-1, 0, 0], [0, 0, 0]])


def test_shaped_rewards_with_a_kl_of_the_callers_own() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ref_logits = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    scores, mask = torch.tensor([1.0, 0.0]), mask_of([3, 2], 3)
    kl = exact_kl(logits, ref_logits)
    expected = -0.2 * kl
    expected[0, 2] += 1.0
    expected[1, 2] = 0.0
    near(shaped_rewards(scores, None, None, mask, 0.2, kl=kl), expected)
    ignored = torch.full((2, 3), NAN)
    near(shaped_rewards(scores, ignored, ignored, mask, 0.2, kl=kl), expected)


def test_shaped_rewards_default_is_k1() -> None:
    logprobs, reference, mask = random_rows()
    scores = torch.arange(5.0)
    k1 = kl_penalty(logprobs, reference, "k1")
    near(
        shaped_rewards(scores, logprobs, reference, mask, 0.3),
        shaped_rewards(scores, None, None, mask, 0.3, kl=k1),
    )


def test_the_return_of_a_row_is_its_score_less_its_kl() -> None:
    logprobs, reference, mask = random_rows()
    scores = torch.tensor([1.0, -1.0, 5.0, 0.0, 2.0], dtype=torch.float64)
    rewards = shaped_rewards(scores, logprobs, reference, mask, 0.2)
    kl = ((logprobs - reference) * mask).sum(1)
    near(rewards.sum(1), (scores - 0.2 * kl) * mask.any(1))


# ---- GAE


def gae_in_loops(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Âₜ = Σₖ (γλ)ᵏ δₜ₊ₖ as a double sum over one row, without the recursion."""
    length = len(rewards)
    padded = [*values, 0.0]
    deltas = [rewards[t] + gamma * padded[t + 1] - padded[t] for t in range(length)]
    advantages = [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_gae_by_hand() -> None:
    # γ = 0.9, λ = 0.8, γλ = 0.72; rewards 0, 0, 1; values 0.5, 0.4, 0.3.
    # δ₂ = 1 − 0.3 = 0.7         Â₂ = 0.7                            G₂ = 1.0
    # δ₁ = 0.9·0.3 − 0.4 = −0.13  Â₁ = −0.13 + 0.72·0.7   = 0.374      G₁ = 0.774
    # δ₀ = 0.9·0.4 − 0.5 = −0.14  Â₀ = −0.14 + 0.72·0.374 = 0.12928    G₀ = 0.62928
    rewards = torch.tensor([[0.0, 0.0, 1.0, NAN]])
    values = torch.tensor([[0.5, 0.4, 0.3, NAN]])
    advantages, returns = gae(rewards, values, mask_of([3], 4), gamma=0.9, lam=0.8)
    near(advantages, [[0.12928, 0.374, 0.7, 0]])
    near(returns, [[0.62928, 0.774, 1.0, 0]])


def test_gae_defaults_are_gamma_1_lambda_095() -> None:
    # Rewards 0, 1 and values 0.5, 0.25: δ₁ = 0.75, δ₀ = −0.25, Â₀ = −0.25 + 0.95·0.75 = 0.4625.
    advantages, _ = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), mask_of([2], 2))
    near(advantages, [[0.4625, 0.75]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_gae_against_loops_row_by_row(gamma: float, lam: float) -> None:
    rewards, values, mask = random_rows()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = gae_in_loops(
            rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam
        )
        near(advantages[row, :length], expected[0])
        near(returns[row, :length], expected[1])
        assert advantages[row, length:].eq(0).all() and returns[row, length:].eq(0).all()


def test_gae_with_lambda_1_gives_monte_carlo_returns() -> None:
    rewards, values, mask = random_rows()
    _, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(mask.sum(1).tolist()):
        r = rewards[row, :length].tolist()
        near(
            returns[row, :length],
            [sum(0.9 ** (s - t) * r[s] for s in range(t, length)) for t in range(length)],
        )


def test_gae_with_lambda_0_is_the_td_error() -> None:
    rewards, values, mask = random_rows()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    kept = values.masked_fill(~mask, 0.0)
    following = torch.cat([kept[:, 1:], torch.zeros(5, 1, dtype=torch.float64)], dim=1)
    near(advantages, (rewards + 0.9 * following - values).masked_fill(~mask, 0.0))


def test_gae_of_a_perfect_critic_is_0() -> None:
    # V(sₜ) = Σ of the rewards to come: every TD error is 0, the returns are the values.
    rewards, _, mask = random_rows()
    rewards = rewards * mask
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    near(advantages, torch.zeros_like(values))
    near(returns, values)


def test_gae_gradient() -> None:
    rewards, values, mask = random_rows(rows=5)
    inputs = (rewards.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask, 0.9, 0.8), inputs)


def test_inputs_are_not_edited() -> None:
    rewards, values, mask = random_rows()
    before = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask)
    masked_whiten(rewards, mask)
    shaped_rewards(torch.ones(5), rewards, values, mask, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask), strict=True))


# ---- groups


def test_group_advantages_by_hand() -> None:
    # 1, 0, 0, 1: mean ½, unbiased variance 4·¼/3 = ⅓, so ±0.5 / (√⅓ + 1e-4).
    # 2, 2, 2, 2: no spread, 0.
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    near(group_advantages(scores, 4), [a, -a, -a, a, 0, 0, 0, 0])
    near(group_advantages(scores, 4, scale=False), [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0])


def test_group_advantages_groups_are_contiguous() -> None:
    # (0, 1) and (5, 5): in the first the mean is ½, unbiased std √½.
    scores = torch.tensor([0.0, 1.0, 5.0, 5.0], dtype=torch.float64)
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    near(group_advantages(scores, 2), [-a, a, 0, 0])


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_without_spread_are_exactly_0(scale: bool) -> None:
    # The float32 mean of twelve times 0.1 is not 0.1; the rounding would be a (tiny) signal.
    assert group_advantages(torch.full((24,), 0.1), 12, scale).eq(0).all()
    assert group_advantages(torch.tensor([3.0, -1.0]), 1, scale).eq(0).all()


def test_group_advantages_do_not_see_the_reward_scale_of_the_code() -> None:
    # The released code's rewards are 2·paper − 1: the same advantages, up to the 1e-4.
    paper = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    near_enough = torch.testing.assert_close
    near_enough(group_advantages(paper, 4), group_advantages(2 * paper - 1, 4), rtol=2e-4, atol=0)


def test_integer_scores_are_fine() -> None:
    near(group_advantages(torch.tensor([1, 0]), 2, scale=False), [0.5, -0.5])


# ---- mistakes of the caller


@pytest.mark.parametrize(
    "call",
    [
        lambda: masked_mean(torch.ones(2, 3), torch.ones(2, 3)),
        lambda: masked_mean(torch.ones(2, 3), mask_of([1, 1], 4)),
        lambda: shaped_rewards(torch.ones(2, 1), None, None, mask_of([1, 1], 3), 0.1),
        lambda: shaped_rewards(torch.ones(2), None, None, mask_of([1, 1], 3), 0.1),
        lambda: group_advantages(torch.ones(5), 2),
        lambda: gae(torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.bool)),
    ],
)
def test_wrong_shapes_and_masks_are_refused(call) -> None:
    with pytest.raises(AssertionError):
        call()

"""Bugs that were published in other PPO engines, as tests that an engine with the bug fails.

Each test re-types the mistake in a few lines, shows that it gives another number on the same data,
and that `ppo_nlu.losses` gives the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_nlu.losses import (
    exact_kl,
    gae,
    group_advantages,
    grpo_loss,
    kl_penalty,
    masked_mean,
    masked_whiten,
    policy_loss,
    sft_loss,
    shaped_rewards,
    td_error_loss,
    value_loss,
)

NAN, INF = float("nan"), float("inf")
F64 = torch.float64


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def near(actual: Tensor, expected: Any) -> None:
    """Equal to 1e-6 in float32 and to 1e-12 in float64."""
    atol = 1e-12 if actual.dtype == F64 else 1e-6
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def far(one: Tensor, other: Tensor | float) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# ---- whitening


def test_whitening_takes_the_mean_away() -> None:
    """torchtune: `whiten(shift_mean=True)` adds the mean back, so its advantages are uncentred."""
    # 3, 4, 5, 6: mean 4.5, unbiased variance 5/3.
    x = torch.tensor([[3.0, 4.0, 5.0, 6.0]], dtype=F64)
    mask = mask_of([4], 4)
    scale = 1 / math.sqrt(5 / 3 + 1e-8)
    white = masked_whiten(x, mask, shift_mean=True)
    near(white, [[-1.5 * scale, -0.5 * scale, 0.5 * scale, 1.5 * scale]])
    near(white.mean(), 0.0)
    near(masked_whiten(x, mask, shift_mean=False).mean(), 4.5)


def test_whitening_does_not_count_pads() -> None:
    """trlx: advantages are whitened over the whole rectangle, zeros in the padding included."""
    x = torch.tensor([[4.0, 6.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]], dtype=F64)
    mask = mask_of([2, 1], 4)
    with_pads = (x - x.mean()) / x.std()
    white = masked_whiten(x, mask)
    assert far(with_pads[mask], white[mask])
    # 4, 6, 5: mean 5, unbiased variance 2/2 = 1.
    one = 1 / math.sqrt(1 + 1e-8)
    near(white, [[-one, one, 0, 0], [0, 0, 0, 0]])


def test_a_group_without_spread_is_no_signal() -> None:
    """Dividing the rounding of a mean by a tiny spread makes an advantage out of nothing."""
    # In float32 the mean of twelve times 0.1 is not 0.1; (x − mean) / (std + 1e-8) is then −0.58.
    scores = torch.full((12,), 0.1)
    assert far((scores - scores.mean()) / (scores.std() + 1e-8), 0.0)
    assert group_advantages(scores, 12).eq(0).all()
    assert group_advantages(scores, 12, scale=False).eq(0).all()


# ---- the stop token and the padding


def test_the_stop_token_is_trained_where_pad_is_eos() -> None:
    """TRL PPO and tiny-grpo: a mask from `token != pad` loses the EOS when pad and EOS share an id.

    Positions [0, 1, 2] are trained, not [0, 1], and the score sits on position 2.
    """
    eos = 2
    tokens = torch.tensor([[7, 9, eos, eos, eos]])
    from_ids, from_lengths = tokens != eos, mask_of([3], 5)
    assert from_ids.sum() == 2 and from_lengths.sum() == 3
    logprobs = torch.full((1, 5), -1.0, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sft_loss(logprobs, from_lengths), logprobs)
    near(gradient, [[-1 / 3, -1 / 3, -1 / 3, 0, 0]])
    near(shaped_rewards(torch.ones(1), logprobs, logprobs, from_lengths, 0.0), [[0, 0, 1, 0, 0]])


def test_the_score_is_on_the_last_token_not_one_slot_later() -> None:
    """TRL PPO: the reward lands one slot after the EOS, where the policy has no action."""
    scores, mask = torch.tensor([1.0, -1.0, 2.0], dtype=F64), mask_of([2, 4, 1], 4)
    zero = torch.zeros(3, 4, dtype=F64)
    rewards = shaped_rewards(scores, zero, zero, mask, 0.2)
    near(rewards, [[0, 1, 0, 0], [0, 0, 0, -1], [2, 0, 0, 0]])
    # With γ = λ = 1 and V = 0 each counted token must be credited with the whole score.
    advantages, returns = gae(rewards, zero, mask, 1.0, 1.0)
    near(advantages, scores[:, None] * mask)
    near(returns, scores[:, None] * mask)


def test_no_value_is_bootstrapped_after_the_end() -> None:
    """A critic evaluates pads too; V of the slot after the end must not enter the last δ."""
    # δ = 1 − 0.5 for a one-token answer, whatever stands at index 1; the mistake gives 1 + 8 − 0.5.
    rewards, mask = torch.tensor([[1.0, 0.0]], dtype=F64), mask_of([1], 2)
    values = torch.tensor([[0.5, 8.0]], dtype=F64)
    advantages, returns = gae(rewards, values, mask)
    near(advantages, [[0.5, 0.0]])
    near(returns, [[1.0, 0.0]])
    near(td_error_loss(values, rewards, mask, 1.0), 0.25)


def test_an_answer_as_long_as_the_limit_is_terminal_too() -> None:
    rewards = torch.tensor([[0.0, 1.0]], dtype=F64)
    values = torch.tensor([[0.5, 0.25]], dtype=F64)
    advantages, _ = gae(rewards, values, mask_of([2], 2), 1.0, 1.0)
    near(advantages, [[0.5, 0.75]])


FUNCTIONS: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "masked_mean": lambda x, m: masked_mean(x[0], m),
    "masked_whiten": lambda x, m: masked_whiten(x[0], m),
    "masked_whiten, mean kept": lambda x, m: masked_whiten(x[0], m, shift_mean=False),
    "shaped_rewards": lambda x, m: shaped_rewards(x[3][:, 0], x[0], x[1], m, 0.1),
    "shaped_rewards, kl": lambda x, m: shaped_rewards(x[3][:, 0], x[0], x[1], m, 0.1, kl=x[2]),
    "gae": lambda x, m: torch.cat(gae(x[0], x[1], m, 0.9, 0.8)),
    "policy_loss": lambda x, m: policy_loss(x[0], x[1], x[2], m)[0],
    "policy_loss, all clips": lambda x, m: policy_loss(x[0], x[1], x[2], m, 0.1, 0.3, 2.0)[0],
    "policy metrics": lambda x, m: torch.stack(list(policy_loss(x[0], x[1], x[2], m)[1].values())),
    "value_loss": lambda x, m: value_loss(x[0], x[1], x[2], m)[0],
    "value_loss, no clip": lambda x, m: value_loss(x[0], None, x[2], m, clip=None)[0],
    "value metrics": lambda x, m: torch.stack(list(value_loss(x[0], x[1], x[2], m)[1].values())),
    "td_error_loss": lambda x, m: td_error_loss(x[0], x[1], m, 0.9),
    "grpo_loss": lambda x, m: grpo_loss(x[0], x[1], x[2], x[3][:, 0], m, kl_coef=0.5)[0],
    "grpo metrics": lambda x, m: torch.stack(
        list(grpo_loss(x[0], x[1], x[2], x[3][:, 0], m, kl_coef=0.5)[1].values())
    ),
    "sft_loss": lambda x, m: sft_loss(x[0], m),
}


@pytest.mark.parametrize("filling", [NAN, INF, -INF, 1.0, 1e30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_padding_reaches_neither_value_nor_gradient(name: str, filling: float) -> None:
    """Sentinels in the padding (CleanRL's 1.0) leak; masking only the output leaves 0·NaN = NaN."""
    generator = torch.Generator().manual_seed(4)
    mask = mask_of([4, 2, 0, 1, 3], 4)
    clean = [torch.randn(5, 4, generator=generator, dtype=F64) * mask for _ in range(3)]
    scores = torch.randn(5, 1, generator=generator, dtype=F64)
    results = []
    for fill in (0.0, filling):
        inputs = [x.masked_fill(~mask, fill).requires_grad_() for x in clean]
        value = FUNCTIONS[name]([*inputs, scores], mask)
        gradients: tuple[Tensor, ...] = ()
        if value.requires_grad:
            weights = torch.arange(1.0, value.numel() + 1, dtype=F64).reshape(value.shape)
            gradients = torch.autograd.grad(
                (value * weights).sum(), inputs, allow_unused=True, materialize_grads=True
            )
        results.append((value.detach(), *gradients))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after) and after.isfinite().all()


def test_more_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    old, logprobs, advantages = torch.randn(3, 2, 3, generator=generator, dtype=F64)
    mask = mask_of([3, 1], 3)
    loss, metrics = policy_loss(logprobs, old, advantages, mask)
    new, before, gain = (F.pad(x, (0, 5), value=NAN) for x in (logprobs, old, advantages))
    wide_loss, wide_metrics = policy_loss(new, before, gain, F.pad(mask, (0, 5)))
    near(wide_loss, loss)
    for name, metric in metrics.items():
        near(wide_metrics[name], metric)


# ---- means and metrics


def test_metrics_are_not_averaged_over_pads() -> None:
    """TRL PPO: `approxkl` averages the pads; the fill value 1.0 once leaked into the entropy."""
    # One counted token of four, log ρ = 0.1: ½·0.01, not a quarter of it.
    old = torch.zeros(1, 4, dtype=F64)
    logprobs = torch.tensor([[0.1, 0.0, 0.0, 0.0]], dtype=F64)
    _, metrics = policy_loss(logprobs, old, torch.ones(1, 4, dtype=F64), mask_of([1], 4), clip=0.05)
    near(metrics["policy/approx_kl"], 0.005)
    near(metrics["policy/approx_kl_k1"], -0.1)
    near(metrics["policy/ratio_mean"], math.exp(0.1))
    near(metrics["policy/clip_fraction"], 1.0)
    # All ratios below 1: the 1s of the padding must not be the maximum.
    _, metrics = policy_loss(-logprobs, old, old, mask_of([1], 4))
    near(metrics["policy/ratio_max"], math.exp(-0.1))


def test_the_mean_of_micro_batch_means_is_not_the_mean() -> None:
    """A short answer alone in its micro-batch would weigh as much as the long ones together."""
    logprobs = torch.tensor([[-1.0, -1.0, -1.0], [-5.0, NAN, NAN]], dtype=F64)
    mask = mask_of([3, 1], 3)
    whole = sft_loss(logprobs, mask)
    near(whole, 2.0)  # (1 + 1 + 1 + 5) / 4
    parts = list(zip(logprobs.split(1), mask.split(1), strict=True))
    near(torch.stack([sft_loss(x, m) for x, m in parts]).mean(), 3.0)
    near(torch.stack([sft_loss(x, m, denominator=4) for x, m in parts]).sum(), whole)


def test_metrics_do_not_shrink_with_the_number_of_minibatches() -> None:
    """TRL PPO: with 4 mini-batches the logged ratio is 0.25, the entropy a quarter."""
    old, mask = torch.zeros(4, 3, dtype=F64), mask_of([3, 1, 2, 2], 3)
    for denominator in (None, 8):
        parts = [
            policy_loss(x, x, x, m, denominator=denominator)[1]["policy/ratio_mean"]
            for x, m in zip(old.split(1), mask.split(1), strict=True)
        ]
        total = torch.stack(parts)
        near(total.mean() if denominator is None else total.sum(), 1.0)


# ---- formulas


def test_the_low_ratio_case_that_passed_with_a_tolerance_of_a_million() -> None:
    """torchtune's own test expects 0.8 here and gets −0.368; `rtol=1e6` let it pass."""
    # A = 1, ρ = e^−1 = 0.368 below the clip: max(−0.368, −0.8) = −0.368, not clipped.
    zero = torch.zeros(1, 1, dtype=F64)
    loss, metrics = policy_loss(zero - 1, zero, zero + 1, mask_of([1], 1))
    near(loss, -math.exp(-1))
    near(metrics["policy/clip_fraction"], 0.0)


@pytest.mark.parametrize("gap", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_wild_log_ratio_overflows_nothing(gap: float, advantage: float) -> None:
    """OpenRLHF and verl trackers: ratios up to 5e8, then a NaN loss; hence the clamp to ±20."""
    old = torch.zeros(1, 2)
    logprobs = torch.tensor([[gap, 0.0]], requires_grad=True)
    mask = mask_of([2], 2)
    advantages = torch.full((1, 2), advantage)
    for loss, metrics in (
        policy_loss(logprobs, old, advantages, mask),
        grpo_loss(logprobs, old, old, advantages[:, 0], mask, kl_coef=0.1),
    ):
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()
        assert all(metric.isfinite() for metric in metrics.values())
    _, metrics = policy_loss(logprobs, old, advantages, mask)
    expected = math.exp(20) if gap > 0 else 1.0
    assert metrics["policy/ratio_max"].item() == pytest.approx(expected, rel=1e-6)


def test_which_kl_estimator_may_be_a_loss() -> None:
    """OpenRLHF #1309: as a loss k1 has gradient 0 in expectation, k2 the gradient of the true KL,
    k3 that of the reverse one; k1 belongs in the reward. Expectations are exact sums over v."""
    generator = torch.Generator().manual_seed(6)
    logits, ref_logits = torch.randn(2, 7, generator=generator, dtype=F64)
    logits.requires_grad_()
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logp.detach().exp()
    true = torch.autograd.grad(exact_kl(logits, ref_logits), logits, retain_graph=True)[0]

    def expected_gradient(per_word: Tensor) -> Tensor:
        return torch.autograd.grad((p * per_word).sum(), logits, retain_graph=True)[0]

    near(expected_gradient(kl_penalty(logp, logq, "k1")), torch.zeros(7))
    near(expected_gradient(kl_penalty(logp, logq, "k2")), true)
    # ∇ of KL(π_ref‖π) = π − π_ref.
    near(expected_gradient(kl_penalty(logp, logq, "k3")), p - logq.exp())
    # In the reward: −κ·k1·∇log π, in expectation −κ times the true gradient.
    advantage = -0.2 * kl_penalty(logp, logq, "k1").detach()
    near(expected_gradient(advantage * logp), -0.2 * true)


def test_the_critic_target_is_taken_before_whitening() -> None:
    """Returns built from whitened advantages have lost the scale of the reward."""
    rewards = torch.tensor([[0.0, 10.0], [0.0, -2.0]], dtype=F64)
    mask, values = mask_of([2, 2], 2), torch.zeros(2, 2, dtype=F64)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    near(returns, [[10, 10], [-2, -2]])
    assert far(masked_whiten(advantages, mask) + values, returns)


def test_the_td_target_gets_no_gradient() -> None:
    """Through an attached target the critic would pull V of the next state to meet the error."""
    values = torch.tensor([[0.0, 3.0]], dtype=F64, requires_grad=True)
    rewards = torch.tensor([[0.0, 3.0]], dtype=F64)
    # δ = (3, 0): only V₀ moves, by −2·3/2; attached, V₁ would have +3 as well.
    (gradient,) = torch.autograd.grad(td_error_loss(values, rewards, mask_of([2], 2), 1.0), values)
    near(gradient, [[-3.0, 0.0]])

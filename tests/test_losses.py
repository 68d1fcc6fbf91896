"""The losses against pencil, plain Python loops, the rivals' formulas and numerical gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_nlu.losses import (
    AdaptiveKL,
    entropy,
    exact_kl,
    explained_variance,
    grpo_loss,
    kl_penalty,
    policy_loss,
    preference_loss,
    sft_loss,
    td_error_loss,
    value_loss,
)

NAN = float("nan")
F64 = torch.float64


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def near(actual: Tensor, expected: Any) -> None:
    """Equal to 1e-6 in float32 and to 1e-12 in float64."""
    atol = 1e-12 if actual.dtype == F64 else 1e-6
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def row(*numbers: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor([numbers], dtype=dtype)


def rows(count: int, seed: int = 0, lengths: tuple[int, ...] = (6, 1, 0, 3, 5)) -> list[Tensor]:
    """`count` random float64 tensors (B, 6), then their ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 6)
    tensors = [torch.randn(shape, generator=generator, dtype=F64) for _ in range(count)]
    return [*tensors, mask_of(list(lengths), 6)]


def everything_counts(x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=torch.bool)


# ---- the policy loss


def test_policy_loss_by_hand() -> None:
    # ε = 0.2. For each token the larger of −Aρ and −A·clip(ρ, 0.8, 1.2):
    #   A = +1, ρ = 1.5:  max(−1.5, −1.2) = −1.2   clipped, no gradient
    #   A = +1, ρ = 0.5:  max(−0.5, −0.8) = −0.5   gradient −Aρ/4 = −0.125
    #   A = −1, ρ = 1.5:  max( 1.5,  1.2) =  1.5   gradient        = +0.375
    #   A = −1, ρ = 0.5:  max( 0.5,  0.8) =  0.8   clipped, no gradient
    # Mean (−1.2 − 0.5 + 1.5 + 0.8) / 4 = 0.15. The fifth column is padding.
    old = row(-1.0, -2.0, -3.0, -0.7, NAN)
    logprobs = (old + row(1.5, 0.5, 1.5, 0.5, 1.0).log()).requires_grad_()
    advantages = row(1.0, 1.0, -1.0, -1.0, NAN)
    loss, metrics = policy_loss(logprobs, old, advantages, mask_of([4], 5))
    near(loss, 0.15)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    near(gradient, [[0.0, -0.125, 0.375, 0.0, 0.0]])
    log15, log05 = math.log(1.5), math.log(0.5)
    expected = {
        "policy/loss": 0.15,
        "policy/clip_fraction": 2 / 4,
        "policy/approx_kl": 0.5 * (log15**2 + log05**2) / 2,
        "policy/approx_kl_k1": -(log15 + log05) / 2,
        "policy/ratio_mean": 1.0,
        "policy/ratio_max": 1.5,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        near(metrics[name], value)
        assert not metrics[name].requires_grad


def test_clip_high_moves_only_the_upper_bound() -> None:
    # ε = 0.2, ε_high = 0.28. A = +1, ρ = 1.5: −1.28. A = −1, ρ = 0.5: 0.8. A = +1, ρ = 1.25: −1.25.
    old = torch.zeros(1, 3, dtype=F64)
    loss, metrics = policy_loss(
        row(1.5, 0.5, 1.25).log(), old, row(1.0, -1.0, 1.0), everything_counts(old), clip_high=0.28
    )
    near(loss, (-1.28 + 0.8 - 1.25) / 3)
    near(metrics["policy/clip_fraction"], 2 / 3)


def test_dual_clip_bounds_the_loss_of_negative_advantages() -> None:
    # c = 3. A = −2, ρ = 5: min(max(10, 2.4), 6) = 6 and no gradient. A = −2, ρ = 2: 4, untouched.
    # A = +2, ρ = 5: max(−10, −2.4) = −2.4, untouched, although −cA = −6 is smaller.
    old = torch.zeros(1, 3, dtype=F64)
    logprobs = row(5.0, 2.0, 5.0).log().requires_grad_()
    advantages = row(-2.0, -2.0, 2.0)
    loss, _ = policy_loss(logprobs, old, advantages, everything_counts(old), dual_clip=3.0)
    near(loss, (6 + 4 - 2.4) / 3)
    near(torch.autograd.grad(loss, logprobs)[0], [[0.0, 4 / 3, 0.0]])


def test_at_ratio_1_the_gradient_is_the_policy_gradient() -> None:
    # ρ = 1: ∂L/∂log π = −A/N, and the loss itself is −mean A.
    old, advantages, mask = rows(2)
    logprobs = old.clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, old, advantages, mask)
    near(loss, -advantages[mask].mean())
    expected = -advantages.masked_fill(~mask, 0.0) / mask.sum()
    near(torch.autograd.grad(loss, logprobs)[0], expected)
    near(metrics["policy/ratio_mean"], 1.0)
    near(metrics["policy/ratio_max"], 1.0)
    for name in ("policy/clip_fraction", "policy/approx_kl", "policy/approx_kl_k1"):
        near(metrics[name], 0.0)


@pytest.mark.parametrize(
    ("clip", "high", "dual"), [(0.2, None, None), (0.1, 0.3, None), (0.2, 0.28, 3)]
)
def test_policy_loss_against_loops(clip: float, high: float | None, dual: float | None) -> None:
    """The clipped objective of TRL (`dual` None) and of verl (dual-clip), token by token."""
    logprobs, old, advantages, mask = rows(3, seed=3, lengths=(6, 1, 0, 3, 5, 6, 6, 6, 6, 6))
    terms, sides = [], set()
    for b, t in mask.nonzero().tolist():
        a = advantages[b, t].item()
        ratio = math.exp(logprobs[b, t].item() - old[b, t].item())
        sides.add((a < 0, ratio < 0.8, ratio > 3.0))
        bounded = min(max(ratio, 1 - clip), 1 + (clip if high is None else high))
        objective = min(a * ratio, a * bounded)  # maximised
        if dual is not None and a < 0:
            objective = max(objective, dual * a)
        terms.append(-objective)
    assert len(sides) == 6  # low, middling and high ratios under advantages of either sign
    loss, _ = policy_loss(logprobs, old, advantages, mask, clip, high, dual)
    near(loss, sum(terms) / len(terms))


def test_policy_loss_gradient() -> None:
    logprobs, old, advantages, mask = rows(3, seed=4)
    logprobs.requires_grad_()
    for dual in (None, 2.0):
        assert torch.autograd.gradcheck(
            lambda x, dual=dual: policy_loss(x, old, advantages, mask, dual_clip=dual)[0], logprobs
        )


def test_only_the_first_argument_gets_a_gradient() -> None:
    x, old, target, mask = rows(3)
    for tensor in (x, old, target):
        tensor.requires_grad_()
    policy_loss(x, old, target, mask)[0].backward()
    value_loss(x, old, target, mask)[0].backward()
    td_error_loss(x, target, mask, 0.9).backward()
    grpo_loss(x, old, old, target[:, 0], mask, kl_coef=0.1)[0].backward()
    assert x.grad is not None
    assert old.grad is None and target.grad is None


# ---- the value loss


def test_value_loss_by_hand() -> None:
    # ε = 0.2, V_old ± 0.2:
    #   V = 1, V_old = 0.5 → clipped 0.7; G = 2: max(1, 1.69) = 1.69  (clipped, no gradient)
    #   V = 1, V_old = 0.5 → clipped 0.7; G = 0: max(1, 0.49) = 1     gradient (V − G)/3 = ⅓
    #   V = 2, V_old = 2   → not clipped; G = 1: 1                    gradient ⅓
    # ½·(1.69 + 1 + 1)/3 = 0.615; without clipping ½·3/3 = 0.5.
    values = row(1.0, 1.0, 2.0, NAN).requires_grad_()
    old, returns, mask = row(0.5, 0.5, 2.0, NAN), row(2.0, 0.0, 1.0, NAN), mask_of([3], 4)
    loss, metrics = value_loss(values, old, returns, mask)
    near(loss, 0.615)
    near(torch.autograd.grad(loss, values)[0], [[0.0, 1 / 3, 1 / 3, 0.0]])
    near(metrics["value/loss"], 0.615)
    near(metrics["value/clip_fraction"], 1 / 3)
    # Returns 2, 0, 1: variance ⅔. Errors 1, −1, −1: mean −⅓, variance 1 − 1/9 = 8/9. 1 − 4/3 = −⅓.
    near(metrics["value/explained_variance"], -1 / 3)
    assert set(metrics) == {"value/loss", "value/clip_fraction", "value/explained_variance"}
    assert not any(metric.requires_grad for metric in metrics.values())
    plain, metrics = value_loss(values, None, returns, mask, clip=None)
    near(plain, 0.5)
    near(metrics["value/clip_fraction"], 0.0)


@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_value_loss_against_loops(clip: float) -> None:
    """The clipped value loss of TRL (ε = 0.2) and of verl (ε = 0.5), token by token."""
    values, old, returns, mask = rows(3, seed=5)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        v, v_old, g = (x[b, t].item() for x in (values, old, returns))
        bounded = v_old + max(-clip, min(clip, v - v_old))
        total += max((v - g) ** 2, (bounded - g) ** 2) / 2
    near(value_loss(values, old, returns, mask, clip)[0], total / int(mask.sum()))


def test_value_loss_gradient() -> None:
    values, old, returns, mask = rows(3, seed=6)
    values.requires_grad_()
    for clip in (0.2, None):
        assert torch.autograd.gradcheck(
            lambda x, clip=clip: value_loss(x, old, returns, mask, clip)[0], values
        )


def test_value_loss_inside_the_clip_is_the_squared_error() -> None:
    values, returns, mask = rows(2, seed=7)
    values.requires_grad_()
    clipped = value_loss(values, values.detach() + 0.1, returns, mask, clip=0.2)[0]
    plain = value_loss(values, None, returns, mask, clip=None)[0]
    near(clipped, plain)
    near(torch.autograd.grad(clipped, values)[0], torch.autograd.grad(plain, values)[0])


def test_explained_variance() -> None:
    values, returns, mask = rows(2)
    near(explained_variance(returns, returns, mask), 1.0)
    near(explained_variance(returns + 3.0, returns, mask), 1.0)
    near(explained_variance(torch.full_like(returns, 4.0), returns, mask), 0.0)
    near(explained_variance(values, torch.full_like(returns, 4.0), mask), 0.0)
    v, g = values[mask], returns[mask]
    near(explained_variance(values, returns, mask), 1 - (g - v).var() / g.var())


def test_td_error_loss_by_hand() -> None:
    # γ = 0.9; rewards 0, 0, 1; values 0.5, 0.4, 0.3. δ = 0.36 − 0.5, 0.27 − 0.4, 1 − 0.3.
    # (0.14² + 0.13² + 0.7²)/3 = 0.5265/3 = 0.1755, no ½. Target detached: ∂L/∂Vₜ = −2δₜ/3.
    values = row(0.5, 0.4, 0.3, NAN).requires_grad_()
    loss = td_error_loss(values, row(0.0, 0.0, 1.0, NAN), mask_of([3], 4), 0.9)
    near(loss, 0.1755)
    near(torch.autograd.grad(loss, values)[0], [[0.28 / 3, 0.26 / 3, -1.4 / 3, 0.0]])


def test_td_error_loss_on_ragged_rows_is_the_mean_square_of_the_loops() -> None:
    values, rewards, mask = rows(2, seed=8)
    squares = []
    for b, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            following = values[b, t + 1].item() if t + 1 < length else 0.0
            squares.append((rewards[b, t].item() + 0.9 * following - values[b, t].item()) ** 2)
    near(td_error_loss(values, rewards, mask, 0.9), sum(squares) / len(squares))


# ---- KL and entropy


def test_kl_penalty_by_hand() -> None:
    # log π = −1, log π_ref = −1.5: d = −0.5; k1 = 0.5, k2 = 0.125, k3 = e^−0.5 − 1 + 0.5.
    # log π = −2, log π_ref = −1:   d = 1;    k1 = −1,  k2 = 0.5,   k3 = e − 2.
    logprobs, reference = row(-1.0, -2.0), row(-1.5, -1.0)
    near(kl_penalty(logprobs, reference), [[0.5, -1.0]])
    near(kl_penalty(logprobs, reference, "k1"), [[0.5, -1.0]])
    near(kl_penalty(logprobs, reference, "k2"), [[0.125, 0.5]])
    near(kl_penalty(logprobs, reference, "k3"), [[math.exp(-0.5) - 0.5, math.e - 2]])
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_penalty(logprobs, reference, "exact")  # type: ignore[arg-type]


def test_kl_penalty_in_extremes() -> None:
    # π_ref / π = e^−50: k3 = 50 − 1 + e^−50, not cut short. e^+200: finite, where eᵈ is not.
    near(kl_penalty(row(0.0), row(-50.0), "k3"), [[49.0]])
    assert kl_penalty(torch.tensor([-200.0]), torch.tensor([0.0]), "k3").isfinite().all()


def test_k1_and_k3_expect_the_exact_kl() -> None:
    # E over the policy's own distribution, summed exactly over the vocabulary.
    generator = torch.Generator().manual_seed(2)
    logits, ref_logits = torch.randn(2, 4, 9, generator=generator, dtype=F64)
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = exact_kl(logits, ref_logits)
    for estimator in ("k1", "k3"):
        near((logp.exp() * kl_penalty(logp, logq, estimator)).sum(-1), exact)
    assert (exact > 0).all() and (kl_penalty(logp, logq, "k3") >= 0).all()
    assert not torch.allclose((logp.exp() * kl_penalty(logp, logq, "k2")).sum(-1), exact)


def test_exact_kl_and_entropy_by_hand() -> None:
    # p = (½, ½), q = (¼, ¾): KL(p‖q) = ½·log 2 + ½·log ⅔ = ½·log(4/3);
    # KL(q‖p) = ¼·log ½ + ¾·log(3/2); H(p) = log 2; H(q) = ¼·log 4 + ¾·log(4/3).
    p, q = row(0.5, 0.5).log() + 3.0, row(0.25, 0.75).log() - 7.0  # a constant changes nothing
    near(exact_kl(p, q), [0.5 * math.log(4 / 3)])
    near(exact_kl(q, p), [0.25 * math.log(0.5) + 0.75 * math.log(1.5)])
    near(exact_kl(p, p), [0.0])
    near(entropy(p), [math.log(2)])
    near(entropy(q), [0.25 * math.log(4) + 0.75 * math.log(4 / 3)])


def test_a_word_ruled_out_adds_nothing_and_has_no_gradient() -> None:
    # The third word has probability 0 on both sides: −inf must not turn into NaN.
    p = torch.tensor([[0.0, 0.0, -math.inf]], dtype=F64, requires_grad=True)
    q = row(math.log(0.25), math.log(0.75), -math.inf)
    total = entropy(p).sum() + exact_kl(p, q).sum()
    near(total, math.log(2) + 0.5 * math.log(4 / 3))
    (gradient,) = torch.autograd.grad(total, p)
    assert gradient.isfinite().all() and gradient[0, 2] == 0


def test_a_word_that_only_the_reference_rules_out_is_an_infinite_kl() -> None:
    assert exact_kl(row(0.0, 0.0), row(0.0, -math.inf)).isposinf().all()


def test_kl_and_entropy_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, 3, 5, generator=generator, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(entropy, (logits,))
    assert torch.autograd.gradcheck(exact_kl, (logits, ref_logits))
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda a, b, name=estimator: kl_penalty(a, b, name), (logits, ref_logits)
        )


# ---- GRPO, SFT, preferences, the controller


def test_grpo_loss_by_hand() -> None:
    # Two responses, A = (1, −1), two tokens and one, ρ = 1, β = 0.5; N = 3.
    # Surrogate −(1 + 1 − 1)/3 = −⅓. d = −0.5, 1, 0: k3 = e^−0.5 − 0.5, e − 2, 0.
    # Gradient: −A/3 + β·(1 − eᵈ)/3.
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, NAN]], dtype=F64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0], [-3.0, NAN]], dtype=F64)
    advantages, mask = torch.tensor([1.0, -1.0], dtype=F64), mask_of([2, 1], 2)
    old = logprobs.detach()
    loss, metrics = grpo_loss(logprobs, old, reference, advantages, mask, kl_coef=0.5)
    kl = (math.exp(-0.5) - 0.5 + math.e - 2) / 3
    near(loss, -1 / 3 + 0.5 * kl)
    near(metrics["kl/ref"], kl)
    near(metrics["policy/loss"], -1 / 3)
    near(
        torch.autograd.grad(loss, logprobs)[0],
        [
            [-1 / 3 + 0.5 * (1 - math.exp(-0.5)) / 3, -1 / 3 + 0.5 * (1 - math.e) / 3],
            [1 / 3, 0.0],
        ],
    )
    without, metrics = grpo_loss(logprobs, old, None, advantages, mask)
    near(without, -1 / 3)
    assert "kl/ref" not in metrics
    with_reference, metrics = grpo_loss(logprobs, old, reference, advantages, mask)
    near(with_reference, -1 / 3)
    near(metrics["kl/ref"], kl)


def test_grpo_loss_clips_as_policy_loss_does() -> None:
    # ε = 0.1, ε_high = 0.3. A = 1: ρ = 2 → −1.3, ρ = 0.5 → −0.5. A = −1: ρ = 2 → 2, ρ = 0.5 → 0.9.
    old = torch.zeros(2, 2, dtype=F64)
    logprobs = torch.tensor([[2.0, 0.5], [2.0, 0.5]], dtype=F64).log()
    advantages = torch.tensor([1.0, -1.0], dtype=F64)
    loss, _ = grpo_loss(
        logprobs, old, None, advantages, everything_counts(old), clip=0.1, clip_high=0.3
    )
    near(loss, (-1.3 - 0.5 + 2 + 0.9) / 4)


def test_grpo_loss_gradient() -> None:
    logprobs, old, reference, mask = rows(3, seed=10)
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.0], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, old, reference, advantages, mask, kl_coef=0.3)[0],
        logprobs.requires_grad_(),
    )


def test_sft_loss_by_hand() -> None:
    # −(−1 − 2 − 4)/3 = 7/3, each counted token with gradient −1/3.
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, NAN]], dtype=F64, requires_grad=True)
    loss = sft_loss(logprobs, mask_of([2, 1], 2))
    near(loss, 7 / 3)
    near(torch.autograd.grad(loss, logprobs)[0], [[-1 / 3, -1 / 3], [-1 / 3, 0.0]])


def test_preference_loss_by_hand() -> None:
    # −log σ(log 3) = −log ¾; −log σ(0) = log 2. With τ = 2 the first margin 2·log 3 is log 3 again.
    chosen = torch.tensor([math.log(3) + 1, 5.0], dtype=F64)
    rejected = torch.tensor([1.0, 5.0], dtype=F64)
    near(preference_loss(chosen, rejected), (math.log(4 / 3) + math.log(2)) / 2)
    wide = torch.tensor([2 * math.log(3)], dtype=F64)
    near(preference_loss(wide, torch.zeros(1, dtype=F64), temperature=2.0), math.log(4 / 3))
    # A margin of −200 costs 200, not inf.
    near(preference_loss(torch.tensor([-200.0]), torch.tensor([0.0])), 200.0)


def test_preference_loss_gradient() -> None:
    chosen, rejected = torch.randn(2, 5, dtype=F64).requires_grad_()
    loss = lambda a, b: preference_loss(a, b, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


def test_adaptive_kl_by_hand() -> None:
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 500)  # error 0.1: × (1 + 0.1·500/10000) = 1.005
    assert controller.coef == pytest.approx(0.2 * 1.005, abs=1e-12)
    controller.update(torch.tensor(60.0), 500)  # error 9, clipped to 0.2: × 1.01
    assert controller.coef == pytest.approx(0.2 * 1.005 * 1.01, abs=1e-12)
    controller.update(-3.0, 500)  # error −1.5, clipped to −0.2: × 0.99
    assert controller.coef == pytest.approx(0.2 * 1.005 * 1.01 * 0.99, abs=1e-12)
    before = controller.coef
    controller.update(6.0, 500)  # on target
    controller.update(NAN, 500)  # a broken measurement
    assert controller.coef == before


# ---- micro-batches, precision, edges

LENGTHS = (6, 1, 0, 3, 5, 2, 2, 6, 4, 1, 1, 1, 0, 0, 0, 0)  # the last four rows count nothing


def losses_of(part: slice, x: Tensor, denominator: int | Tensor | None) -> dict[str, Tensor]:
    """Every loss (and its additive metrics) on some rows of one batch; `x` gets the gradient."""
    old, target, reference, mask = rows(3, seed=11, lengths=LENGTHS)
    old, target, reference, mask, x = (y[part] for y in (old, target, reference, mask, x))
    policy, policy_metrics = policy_loss(x, old, target, mask, denominator=denominator)
    value, value_metrics = value_loss(x, old, target, mask, denominator=denominator)
    grpo, grpo_metrics = grpo_loss(
        x, old, reference, target[:, 0], mask, kl_coef=0.3, denominator=denominator
    )
    metrics = policy_metrics | value_metrics | {"kl/ref": grpo_metrics["kl/ref"]}
    not_additive = {"policy/ratio_max", "value/explained_variance"}
    return {
        "policy": policy,
        "value": value,
        "grpo": grpo,
        "sft": sft_loss(x, mask, denominator),
        "td": td_error_loss(x, target, mask, 0.9, denominator),
        **{name: metric for name, metric in metrics.items() if name not in not_additive},
    }


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_micro_batches_add_up_to_the_minibatch(size: int, kind) -> None:
    tokens = sum(LENGTHS)
    x, mask = rows(1, seed=12, lengths=LENGTHS)
    assert int(mask.sum()) == tokens
    whole = losses_of(slice(None), x.requires_grad_(), None)
    parts = [losses_of(slice(i, i + size), x, kind(tokens)) for i in range(0, 16, size)]
    for name, loss in whole.items():
        total = torch.stack([part[name] for part in parts]).sum()
        near(total, loss.detach())
        if loss.requires_grad:
            gradient, expected = (torch.autograd.grad(y, x)[0] for y in (total, loss))
            assert expected.abs().sum() > 0
            near(gradient, expected)


def test_without_any_counted_token_everything_is_0() -> None:
    x, mask = torch.full((2, 3), NAN, requires_grad=True), mask_of([0, 0], 3)
    for denominator in (None, 0, torch.tensor(0)):
        policy = policy_loss(x, x, x, mask, denominator=denominator)
        value = value_loss(x, x, x, mask, denominator=denominator)
        scores = torch.ones(2)
        grpo = grpo_loss(x, x, x, scores, mask, kl_coef=0.1, denominator=denominator)
        losses = [sft_loss(x, mask, denominator), td_error_loss(x, x, mask, 1.0, denominator)]
        for loss in (policy[0], value[0], grpo[0], *losses):
            near(loss, 0.0)
            assert torch.autograd.grad(loss, x)[0].eq(0).all()
        for metric in (policy[1] | value[1] | grpo[1]).values():
            near(metric, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    *tensors, mask = rows(3)
    x, old, target = (tensor.to(dtype) for tensor in tensors)
    for function in (policy_loss, value_loss):
        loss, metrics = function(x, old, target, mask)
        assert loss.dtype == torch.float32
        assert all(metric.dtype == torch.float32 for metric in metrics.values())
        near(loss, function(x.float(), old.float(), target.float(), mask)[0])
    near(entropy(x), entropy(x.float()))
    near(exact_kl(x, old), exact_kl(x.float(), old.float()))


def test_wrong_shapes_are_refused() -> None:
    x, mask = torch.zeros(2, 3), mask_of([3, 3], 3)
    for call in (
        lambda: policy_loss(x, x, torch.zeros(2), mask),
        lambda: policy_loss(x, x, x, mask, dual_clip=0.5),
        lambda: policy_loss(x, x, x, mask.float()),
        lambda: value_loss(x, None, x, mask),
        lambda: grpo_loss(x, x, x, x, mask),
        lambda: grpo_loss(x, x, None, torch.zeros(2), mask, kl_coef=0.1),
        lambda: kl_penalty(x, x[:1]),
        lambda: preference_loss(x, x[0]),
    ):
        with pytest.raises(AssertionError):
            call()


# ---- what the module is for


def python(code: str) -> set[str]:
    """The words that `code` prints in a fresh interpreter."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return set(run.stdout.split())


def test_importing_the_losses_loads_torch_and_nothing_else() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import ppo_nlu.losses;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    gained = python(code) - set(sys.stdlib_module_names)
    assert gained == {"ppo_nlu"}


def test_the_losses_import_neither_more_of_the_package_nor_anything_heavy() -> None:
    code = "import sys, ppo_nlu.losses; print(*sorted(sys.modules))"
    loaded = python(code)
    ours = {name for name in loaded if name.startswith("ppo_nlu")}
    assert ours == {"ppo_nlu", "ppo_nlu.advantages", "ppo_nlu.losses"}
    assert not loaded & {"transformers", "triton", "yaml", "peft", "accelerate", "safetensors"}

"""The losses of PPO, GRPO, SFT and reward models as functions on tensors; imports torch alone.

    from ppo_nlu.losses import gae, masked_whiten, policy_loss, shaped_rewards, value_loss

All losses are in one file on purpose: with `ppo_nlu.advantages` it can be copied into another
project. The shapes, the mask and the padding are described there, and its functions can be imported
from here. Only the model that is trained gets a gradient: old log-probs, advantages, returns and
the reference are detached. Metrics are detached tensors in a dict.

`denominator` is the token count of the whole minibatch. With it every loss is a sum divided by that
number, so micro-batches (and ranks) add up to the loss and the gradient of the minibatch. So do the
metrics, except `policy/ratio_max` (take the maximum) and `value/explained_variance` (call
`explained_variance` on the whole batch). Without it a loss is the mean over its own counted tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_nlu.advantages import (
    counted,
    full_precision,
    gae,
    group_advantages,
    masked_mean,
    masked_whiten,
    rloo_advantages,
    shaped_rewards,
    token_count,
)

__all__ = [
    "AdaptiveKL",
    "counted",
    "entropy",
    "exact_kl",
    "explained_variance",
    "gae",
    "group_advantages",
    "grpo_loss",
    "kl_penalty",
    "masked_mean",
    "masked_whiten",
    "policy_loss",
    "ppo_loss",
    "preference_loss",
    "rloo_advantages",
    "sft_loss",
    "shaped_rewards",
    "td_error_loss",
    "value_loss",
]

MAX_LOG_RATIO = 20.0  # e²⁰ ≈ 5e8: beyond it one token would swamp the sum over all tokens

Metrics = dict[str, Tensor]


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1"
) -> Tensor:
    """KL(π‖π_ref) per token, estimated from the sampled token alone, d = log π_ref − log π.

    k1 = −d,  k2 = d²/2,  k3 = eᵈ − 1 − d

    Source: Schulman, "Approximating KL divergence" (2020). k1 and k3 are unbiased under π.
    Departure: k3 takes min(d, 20) for d, so that one token cannot overflow the sum.

    Args: logprobs, ref_logprobs: any one shape. There is no mask here: mask before or after.
    Returns: that shape.
    """
    assert logprobs.shape == ref_logprobs.shape
    d = full_precision(ref_logprobs) - full_precision(logprobs)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        d = d.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(d) - d
    raise ValueError(f"no KL estimator {estimator!r}: use k1, k2 or k3 (exact_kl needs logits)")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π‖π_ref) over the whole vocabulary: no sampling noise, and never below 0.

    KL = Σᵥ π(v)·(log π(v) − log π_ref(v)); a word that π rules out (p = 0) adds 0.

    Args: logits, ref_logits: (..., V), both at the sampling temperature.  Returns: (...).
    """
    assert logits.shape == ref_logits.shape
    logp = F.log_softmax(full_precision(logits), dim=-1)
    logq = F.log_softmax(full_precision(ref_logits), dim=-1)
    p = logp.exp()
    return (p * (logp - logq).masked_fill(p == 0, 0.0)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """The entropy of the policy in nats: H = −Σᵥ π(v)·log π(v).

    Args: logits: (..., V), at the sampling temperature; −inf rules a word out.  Returns: (...).
    """
    logp = F.log_softmax(full_precision(logits), dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of PPO, to be minimised.

    ρₜ = exp(log π(aₜ|sₜ) − log π_old(aₜ|sₜ))
    L = mean max(−Âₜρₜ, −Âₜ·clip(ρₜ, 1 − ε, 1 + ε_high)), and for Âₜ < 0 at most −c·Âₜ

    Source: arXiv 1707.06347, equation 7; ε_high: arXiv 2503.14476 (DAPO); c (`dual_clip`, above 1):
    arXiv 1912.09729 (dual-clip). Departure: the log-ratio is clamped to ±20 before exp.

    Args:
        logprobs: (B, R) of the current policy, the only input with a gradient.
        old_logprobs, advantages: (B, R) from the rollout.
        mask: (B, R) bool.
        clip, clip_high: ε and ε_high; None: ε on both sides.
        denominator: the token count of the whole minibatch; None: of this mask.
    Returns: the scalar loss, and the metrics `policy/loss`, `policy/clip_fraction` (share of tokens
    where the clipped term is the larger one), `policy/approx_kl` = ½ mean (log ρ)²,
    `policy/approx_kl_k1` = −mean log ρ, `policy/ratio_mean`, `policy/ratio_max`.
    """
    assert dual_clip is None or dual_clip > 1, f"dual_clip {dual_clip} must be above 1"
    advantages = counted(advantages, mask).detach()
    log_ratio = counted(logprobs, mask) - counted(old_logprobs, mask).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    losses = torch.maximum(free, clipped)  # 0 in the padding, where the advantage is 0
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    count = token_count(mask, denominator)
    loss = losses.sum() / count
    log_ratio, ratio = log_ratio.detach(), counted(ratio.detach(), mask)
    return loss, {
        "policy/loss": loss.detach(),
        "policy/clip_fraction": (clipped > free).to(ratio.dtype).sum() / count,
        "policy/approx_kl": 0.5 * log_ratio.square().sum() / count,
        "policy/approx_kl_k1": -log_ratio.sum() / count,
        "policy/ratio_mean": ratio.sum() / count,
        "policy/ratio_max": ratio.amax(),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the spread of the returns the critic accounts for: 1 − Var(G − V) / Var(G).

    Args: values, returns, mask: (B, R).  Returns: a detached scalar, at most 1; 0 where the returns
    have no spread.
    """
    returns = counted(returns, mask).detach()
    error = returns - counted(values, mask).detach()
    total = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    unexplained = masked_mean((error - masked_mean(error, mask)).square(), mask)
    return torch.where(total > 0, 1 - unexplained / total, torch.zeros_like(total))


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The critic's squared error, clipped around the values of the rollout.

    L = ½ mean max((Vₜ − Gₜ)², (clip(Vₜ, Vₜ_old ± ε) − Gₜ)²)

    Source: OpenAI baselines' PPO, kept by lm-human-preferences and TRL.
    Departure from arXiv 2410.11020, whose critic loss is `td_error_loss`.

    Args:
        values: (B, R), the only input with a gradient.
        old_values, returns: (B, R) from the rollout; `old_values` is not read when `clip` is None.
        mask: (B, R) bool.
        clip: ε; None: the plain squared error.
        denominator: the token count of the whole minibatch; None: of this mask.
    Returns: the scalar loss, and the metrics `value/loss`, `value/clip_fraction`,
    `value/explained_variance` (of the rows given).
    """
    values, returns = counted(values, mask), counted(returns, mask).detach()
    free = losses = (values - returns).square()
    if clip is not None:
        assert old_values is not None, "value clipping needs the values of the rollout"
        old = counted(old_values, mask).detach()
        clipped = torch.clamp(values, old - clip, old + clip)
        losses = torch.maximum(free, (clipped - returns).square())
    count = token_count(mask, denominator)
    loss = 0.5 * losses.sum() / count
    return loss, {
        "value/loss": loss.detach(),
        "value/clip_fraction": (losses > free).to(values.dtype).sum() / count,
        "value/explained_variance": explained_variance(values, returns, mask),
    }


def ppo_loss(
    *,
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
) -> tuple[Tensor, Metrics]:
    """The whole loss of PPO: surrogate + c_v · critic − c_e · entropy bonus.

    L = `policy_loss` + c_v · `value_loss` − c_e · mean Hₜ

    Source: arXiv 1707.06347, equation 9. Arguments go by keyword, so that no two of the seven
    tensors of one shape can be swapped.

    Args:
        logprobs, values, entropy: (B, R) of the current policy and critic; these get gradients.
        old_logprobs, old_values, advantages, returns: (B, R) from the rollout.
        values: None leaves the critic out; entropy: None leaves the bonus out.
        value_coef, entropy_coef: c_v, c_e; the others as in `policy_loss` and `value_loss`.
    Returns: the scalar loss, and the metrics of its parts (without `value/explained_variance`,
    which is of the whole batch), `policy/entropy` and `policy/ratio_gap` = max |ρ − 1|.
    """
    loss, metrics = policy_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
        denominator=denominator,
    )
    log_ratio = (counted(logprobs, mask) - counted(old_logprobs, mask)).detach()
    metrics["policy/ratio_gap"] = torch.expm1(log_ratio).abs().amax()
    if values is not None:
        assert returns is not None, "a critic needs the returns of the rollout"
        critic, more = value_loss(
            values=values,
            old_values=old_values,
            returns=returns,
            mask=mask,
            clip=value_clip,
            denominator=denominator,
        )
        more.pop("value/explained_variance")
        loss, metrics = loss + value_coef * critic, metrics | more
    if entropy is not None:
        mean = counted(entropy, mask).sum() / token_count(mask, denominator)
        loss = loss - entropy_coef * mean
        metrics["policy/entropy"] = mean.detach()
    return loss, metrics


def td_error_loss(
    values: Tensor,
    rewards: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The critic's loss as the paper states it: the squared one-step TD error.

    L = mean (rₜ + γVₜ₊₁ − Vₜ)²,  V after the last counted token is 0

    Source: arXiv 2410.11020, equation 1, which has no ½. The target rₜ + γVₜ₊₁ is detached; the
    paper does not say so.

    Args: values, rewards, mask: (B, R); denominator: as in `value_loss`.  Returns: a scalar.
    """
    values = counted(values, mask)
    next_values = F.pad(values.detach()[:, 1:], (0, 1))
    errors = counted(rewards, mask).detach() + gamma * next_values - values
    return errors.square().sum() / token_count(mask, denominator)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl_coef: float = 0.0,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate with one advantage a response, plus the KL to the reference.

    L = L_policy + β·mean (eᵈ − 1 − d),  d = log π_ref(aₜ|sₜ) − log π(aₜ|sₜ)  (k3)

    Source: arXiv 2402.03300 (GRPO), equations 3 and 4. Departure: the mean is over the tokens of
    the minibatch, not first over each response (arXiv 2503.14476, DAPO). A response of advantage 0
    still has its KL: to drop it, mask out the groups without spread.

    Args:
        logprobs: (B, R), the only input with a gradient.
        old_logprobs, ref_logprobs: (B, R); the reference may be None when `kl_coef` is 0.
        advantages: (B,) of `group_advantages`.
        mask: (B, R) bool.
        clip, clip_high, denominator: as in `policy_loss`; kl_coef: β.
    Returns: the scalar loss, and the metrics of `policy_loss` (`policy/loss` is without the KL)
    and, given a reference, `kl/ref`, the mean of k3.
    """
    assert advantages.shape == mask.shape[:1], "advantages are one per response"
    advantages = advantages[:, None].expand(mask.shape)
    loss, metrics = policy_loss(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        clip=clip,
        clip_high=clip_high,
        denominator=denominator,
    )
    if ref_logprobs is None:
        assert kl_coef == 0, "a KL penalty needs the reference's log-probs"
        return loss, metrics
    reference = counted(ref_logprobs, mask).detach()
    kl = kl_penalty(counted(logprobs, mask), reference, "k3").sum() / token_count(mask, denominator)
    metrics["kl/ref"] = kl.detach()
    return (loss + kl_coef * kl if kl_coef else loss), metrics


def sft_loss(logprobs: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """The negative log-likelihood of the counted tokens: L = −mean log π(aₜ|sₜ).

    Args: logprobs, mask: (B, R); denominator: the token count of the whole minibatch.
    Returns: a scalar.
    """
    return -counted(logprobs, mask).sum() / token_count(mask, denominator)


def preference_loss(chosen: Tensor, rejected: Tensor, temperature: float = 1.0) -> Tensor:
    """The Bradley–Terry loss of a reward model: L = −mean log σ((r⁺ − r⁻) / τ).

    Source: arXiv 2203.02155 (InstructGPT), equation 1, with a temperature τ.

    Args: chosen, rejected: (B,) scores of the preferred and of the other response.
    Returns: a scalar.
    """
    assert chosen.shape == rejected.shape
    return -F.logsigmoid((full_precision(chosen) - full_precision(rejected)) / temperature).mean()


class AdaptiveKL:
    """The KL coefficient κ, adapted so that the measured KL goes to a target.

    κ ← κ·(1 + clip(KL/target − 1, −0.2, 0.2)·n/horizon)

    Source: arXiv 1909.08593, section 2.2, in the form of its code.

    Args: coef: κ at the start (and the state to save); target: in nats a response; horizon: in
    responses.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        assert target > 0 and horizon > 0, f"target {target} and horizon {horizon} must be above 0"
        self.coef, self.target, self.horizon = float(coef), float(target), float(horizon)

    def update(self, kl: float | Tensor, n: int) -> None:
        """Adapts κ once: `kl` is the mean over `n` responses of the *sum* over a response's tokens.

        A KL that is NaN leaves κ as it is: one bad step must not spoil all later ones.
        """
        error = float(kl) / self.target - 1
        if error == error:
            self.coef *= 1 + min(max(error, -0.2), 0.2) * n / self.horizon

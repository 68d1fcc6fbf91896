"""What the losses are computed from: masked statistics, shaped rewards, GAE, group advantages.

Pure functions on tensors, torch only: no text, no config, no randomness, nothing edited in place.
Response tensors are `(B, R)`, right-padded; column t belongs to action aₜ, and `values[:, t]` is
V(sₜ) *before* aₜ. `mask` is bool, True = counts, and includes the stop token; it is built from
lengths. Padding is never read: every input is masked before the formula, so NaN or inf in the
padding reaches neither a result nor a gradient, and results are 0 there. Inputs of lower precision
are computed in float32; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_EPS = 1e-8  # inside the square root of masked_whiten, as in OpenAI's code and TRL
GROUP_EPS = 1e-4  # added to the standard deviation of a group


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def counted(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in float32 (or float64) with everything outside the mask set to 0, gradient included."""
    assert mask.dtype == torch.bool, f"mask must be bool (True = counts), not {mask.dtype}"
    assert x.shape == mask.shape, f"shape {tuple(x.shape)} against mask {tuple(mask.shape)}"
    return full_precision(x).masked_fill(~mask, 0.0)


def token_count(mask: Tensor, denominator: float | Tensor | None = None) -> float | Tensor:
    """What a sum over tokens is divided by: `denominator` if given, else the mask's own count.

    A count of 0 becomes 1: a sum over no token is 0, and so is its mean.
    """
    count = mask.sum() if denominator is None else denominator
    return count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else count or 1


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over the counted elements: Σₜ mₜxₜ / Σₜ mₜ, and 0 where nothing counts.

    Args: x, mask: any one shape.  Returns: a scalar.
    """
    return counted(x, mask).sum() / token_count(mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales the counted elements to variance 1 and, with `shift_mean`, subtracts their mean.

    y = (x − μ) / √(σ² + 1e-8), plus μ again when `shift_mean=False` (used for rewards).
    μ and the unbiased σ² = Σ m(x − μ)² / (n − 1) are those of the counted elements.

    Source: OpenAI lm-human-preferences (arXiv 1909.08593); the meaning of `shift_mean` is theirs.
    The variance is unbiased as in TRL, which the paper's code runs on; OpenAI's own is biased.

    Args: x, mask: any one shape.  Returns: that shape, 0 outside the mask. A single element has
    variance 0 and becomes 0 (with `shift_mean=False` it stays as it is).
    """
    x, n = counted(x, mask), token_count(mask)
    mean = x.sum() / n
    mean = mean + counted(x - mean, mask).sum() / n  # rounding of a large mean would be whitened
    centred = counted(x - mean, mask)
    variance = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    white = centred * torch.rsqrt(variance + VARIANCE_EPS)
    return white if shift_mean else counted(white + mean, mask)


def shaped_rewards(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    kl_coef: float | Tensor,
    *,
    kl: Tensor | None = None,
) -> Tensor:
    """The reward of every token: the score on the last counted one, the KL penalty on each.

    rₜ = −κ·KLₜ + [t = L]·R,  KLₜ = log π(aₜ|sₜ) − log π_ref(aₜ|sₜ)  (k1), or `kl` where given

    Source: arXiv 1909.08593, equation 2; R sits on the last token itself, not one slot later.
    Departure from arXiv 2410.11020, whose text has no KL term: `kl_coef=0`.

    Args:
        scores: (B,) one a response; dropped where a row has no counted token.
        logprobs, ref_logprobs: (B, R), not read (and may be None) when `kl` is given.
        mask: (B, R) bool.
        kl_coef: κ.
        kl: (B, R) a per-token KL measured otherwise: `exact_kl`, or `kl_penalty` with k2 or k3.
    Returns: (B, R), 0 outside the mask.
    """
    assert scores.shape == mask.shape[:1], f"scores {tuple(scores.shape)} are not one per response"
    if kl is None:
        assert logprobs is not None and ref_logprobs is not None, "log-probs or `kl` is needed"
        kl = counted(logprobs, mask) - counted(ref_logprobs, mask)
    counts_from_here = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (counts_from_here == 1)
    return counted(scores[:, None].expand(mask.shape), is_last) - kl_coef * counted(kl, mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns that the critic learns.

    δₜ = rₜ + γVₜ₊₁ − Vₜ,  Âₜ = δₜ + γλÂₜ₊₁,  Gₜ = Âₜ + Vₜ;  V and Â after the last token are 0

    Source: arXiv 1506.02438, equations 11–16; the recursion as written in arXiv 2410.11020.
    An answer cut by the length limit is terminal too: there is no bootstrap.

    Args: rewards, values, mask: (B, R), right-padded, rows of any length.
    Returns: advantages (not whitened) and returns, both (B, R), 0 outside the mask.
    """
    assert mask.dim() == 2, f"mask must be (B, R), not {tuple(mask.shape)}"
    rewards, values = counted(rewards, mask), counted(values, mask)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values


def group_advantages(scores: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """How much better each response is than the others to its prompt.

    Âᵢ = (Rᵢ − mean(R)) / (std(R) + 1e-4) over the group, std unbiased; 0 where all Rᵢ are equal

    Source: arXiv 2402.03300 (GRPO), section 4.1.2; `scale=False` is Dr. GRPO (arXiv 2503.20783).

    Args: scores: (B,), the `group_size` responses to one prompt side by side.  Returns: (B,).
    """
    assert scores.dim() == 1 and group_size > 0 and scores.shape[0] % group_size == 0, (
        f"scores {tuple(scores.shape)} do not fall into groups of {group_size}"
    )
    groups = full_precision(scores).reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        variance = centred.square().sum(1, keepdim=True) / max(group_size - 1, 1)
        centred = centred / (variance.sqrt() + GROUP_EPS)
    no_spread = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return centred.masked_fill(no_spread, 0.0).reshape(-1)


def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """How much better each response is than the mean of the others to its prompt.

    Âᵢ = Rᵢ − 1/(G − 1)·Σⱼ≠ᵢ Rⱼ;  0 where all Rᵢ are equal

    Source: arXiv 2402.14740 (RLOO), equation 7. It is G/(G − 1) times the unscaled group advantage.

    Args: scores: (B,), the `group_size` responses to one prompt side by side, 2 or more.
    Returns: (B,).
    """
    assert group_size > 1, "leaving one out needs two"
    return group_advantages(scores, group_size, scale=False) * (group_size / (group_size - 1))

"""Proximal policy optimisation (arXiv 1707.06347) for short answers: collect, then update.

Departures from arXiv 2410.11020, each with the key that takes it back:
1. KL to the reference is in the reward, as in the paper's released code (`ppo.kl_coef=0`).
2. The critic's target is the GAE return, not one step of TD (`ppo.critic_target=td0`).
3. Advantages are whitened over the batch (`ppo.whiten_advantages=false`).
4. The response ends with the token that completes `</Judgement>`; nothing behind it is trained.
5. The gradient's norm is clipped (`optim.max_grad_norm=0`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppo_nlu import losses, ops
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.model import Policy, trainable
from ppo_nlu.optim import clip_gradients
from ppo_nlu.rewards import RunningScale
from ppo_nlu.rollout import Rollout, collect_answers, seeded
from ppo_nlu.tasks import Example, TaskSpec

Metrics = dict[str, float]
LARGEST = ("policy/ratio_max", "policy/ratio_gap")  # the largest counts, not the sum


@dataclass
class Batch:
    """A rollout with what PPO derives from it, all (B, R)."""

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def collect(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    kl: losses.AdaptiveKL,
    examples: Sequence[Example],
    step: int,
    scale: RunningScale | None = None,
) -> tuple[Batch, Metrics]:
    """Sample answers, score them, shape the rewards with KL, estimate advantages and returns.

    With `scale` (`reward.normalise`) each task's scores are put on one scale first.
    """
    rollout = collect_answers(policy, specs, cfg, examples, step)
    mask, ppo = rollout.mask, cfg.ppo
    scores = rollout.scores if scale is None else _normalised(scale, rollout)
    rewards = losses.shaped_rewards(
        scores, rollout.logprobs, rollout.logprobs, mask, kl.coef, kl=rollout.kl
    )
    if ppo.whiten_rewards:
        rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = ops.gae(rewards, rollout.values, mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:
        advantages = losses.masked_whiten(advantages, mask)
    divergence = float(rollout.kl.masked_fill(~mask, 0.0).sum(1).mean())
    metrics = {
        "reward/mean": float(rollout.scores.mean()),
        "reward/std": float(rollout.scores.std(correction=0)),
        "answer/accuracy": _mean(_right(specs, rollout)),
        "answer/unparsed": sum(p is None for p in rollout.predictions) / rollout.size,
        "answer/tokens": float(mask.sum()) / rollout.size,
        "answer/truncated_prompts": float(rollout.truncated),
        "answer/dropped_shots": float(rollout.dropped),
        "kl/ref": divergence,
        "kl/coef": kl.coef,
        "value/mean": float(losses.masked_mean(rollout.values, mask)),
        "value/explained_variance": float(losses.explained_variance(rollout.values, returns, mask)),
    }
    if len(specs) > 1:
        metrics |= by_task(rollout)
    if ppo.kl_adaptive:
        kl.update(divergence, rollout.size)
    return Batch(rollout, rewards, advantages, returns), metrics


def by_task(rollout: Rollout) -> Metrics:
    """The mean reward of each task in the batch, as it was earned."""
    earned: dict[str, list[float]] = {}
    for row, score in zip(rollout.examples, rollout.scores.tolist(), strict=True):
        earned.setdefault(row.task, []).append(score)
    return {f"reward/{task}/mean": _mean(scores) for task, scores in sorted(earned.items())}


def _normalised(scale: RunningScale, rollout: Rollout) -> Tensor:
    pairs = list(zip(rollout.examples, rollout.scores.tolist(), strict=True))
    for row, score in pairs:
        scale.update(row.task, score)
    return rollout.scores.new_tensor([scale.apply(row.task, score) for row, score in pairs])


def _right(specs: Mapping[str, TaskSpec], rollout: Rollout) -> list[bool]:
    """Whether each answer is the gold one as it would be written."""
    return [
        guess == specs[row.task].written(row.label or "")
        for guess, row in zip(rollout.predictions, rollout.examples, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def update(policy: Policy, optimizer: Optimizer, cfg: Config, batch: Batch, step: int) -> Metrics:
    """`epochs` passes over the batch, one optimizer step a minibatch, each in a fresh order."""
    totals: Metrics = {}
    taken = skipped = 0
    first_gap = math.nan
    for epoch in range(cfg.ppo.epochs):
        order = torch.randperm(
            batch.rollout.size, generator=seeded("update", cfg.seed, step, epoch)
        ).tolist()
        stop = False
        for index in chunks(order, cfg.ppo.minibatch_size):
            metrics = backward(policy, cfg, batch, index)
            if taken + skipped == 0:
                first_gap = metrics["policy/ratio_gap"]
            norm = float(clip_gradients(trainable(policy), cfg.optim.max_grad_norm))
            metrics["optim/grad_norm"] = norm
            finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
            if not finite:
                optimizer.zero_grad(set_to_none=True)
                raise BadStep(index, metrics)
            if cfg.ppo.max_ratio and metrics["policy/ratio_mean"] > cfg.ppo.max_ratio:
                skipped += 1
            else:
                optimizer.step()
                taken += 1
            optimizer.zero_grad(set_to_none=True)
            add(totals, metrics)
            limit = cfg.ppo.target_kl
            if limit is not None and metrics["policy/approx_kl"] > 1.5 * limit:
                stop = True
                break
        if stop:
            break
    count = taken + skipped
    means = {n: x if n in LARGEST else x / count for n, x in totals.items()}
    means |= {
        "policy/first_ratio_gap": first_gap,
        "optim/steps": float(taken),
        "optim/skipped": float(skipped),
    }
    return means


class BadStep(Exception):
    """A loss or gradient that is not finite; the minibatch's rows and metrics go with it."""

    def __init__(self, index: Sequence[int], metrics: Metrics):
        super().__init__("loss or gradient is not finite")
        self.index, self.metrics = list(index), metrics


def backward(policy: Policy, cfg: Config, batch: Batch, index: Sequence[int]) -> Metrics:
    """Gradients of one minibatch, summed over micro-batches; its metrics.

    Losses are sums over the micro-batch divided by the token count of the whole minibatch, so the
    gradient does not depend on the size of the micro-batches.
    """
    ppo, rollout = cfg.ppo, batch.rollout
    device = rollout.mask.device
    count = float(rollout.mask[list(index)].sum())
    totals: Metrics = {}
    for micro in chunks(index, ppo.micro_batch_size or len(index)):
        rows = torch.tensor(micro, device=device)
        scored = policy.score(
            *rollout.rows(micro),
            cfg.rollout.temperature,
            values=True,
            entropy_grad=ppo.entropy_coef != 0,
        )
        width = scored.mask.shape[1]
        mask = rollout.mask[rows, :width]
        assert scored.values is not None and torch.equal(mask, scored.mask)
        td0 = ppo.critic_target == "td0"
        loss, metrics = ops.ppo_loss(
            scored.logprobs,
            rollout.logprobs[rows, :width],
            batch.advantages[rows, :width],
            None if td0 else scored.values,
            rollout.values[rows, :width],
            batch.returns[rows, :width],
            mask,
            ppo.clip,
            ppo.clip_high,
            ppo.dual_clip,
            ppo.value_clip,
            ppo.value_coef,
            count,
            scored.entropy if ppo.entropy_coef else scored.entropy.detach(),  # no gradient of 0
            ppo.entropy_coef,
        )
        if td0:
            rewards = batch.rewards[rows, :width]
            critic = losses.td_error_loss(scored.values, rewards, mask, ppo.gamma, count)
            loss, metrics["value/loss"] = loss + ppo.value_coef * critic, critic.detach()
        loss.backward()
        metrics["loss"] = loss.detach()
        numbers = torch.stack(list(metrics.values())).tolist()  # one copy from the device
        add(totals, dict(zip(metrics, numbers, strict=True)))
    return totals


def add(totals: Metrics, metrics: Metrics) -> None:
    """Sum metrics up, in place; of those in `LARGEST` the largest is kept."""
    for name, value in metrics.items():
        old = totals.get(name, 0.0)
        totals[name] = max(old, value) if name in LARGEST else old + value


def chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def check_first_ratio(gap: float, exact: bool) -> str | None:
    """What to say of the ratio's distance from 1 at the first minibatch; fp32 ends over 1e-3.

    The policy has not moved yet, so any distance means dropout, padding, temperature or a mismatch
    between the decode and the training pass.
    """
    if not exact:
        return f"largest distance of the first ratio from 1 in low precision: {gap:.1e}"
    if gap > 1e-3:
        raise UserError(
            f"model.name_or_path: the first PPO ratio is {gap:.1e} away from 1 before any update; "
            "decode and training pass disagree for this model. Try model.path=plain, "
            "model.attention=eager or model.dtype=float32"
        )
    if gap > 1e-4:
        return f"warning: the first ratio is {gap:.1e} away from 1 (expected below 1e-4)"
    return None

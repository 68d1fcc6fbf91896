"""Proximal policy optimisation (arXiv 1707.06347) for short answers: collect, then update.

Departures from arXiv 2410.11020, each with the key that takes it back:
1. KL to the reference is in the reward, as in the paper's released code (`ppo.kl_coef=0`).
2. The critic's target is the GAE return, not one step of TD (`ppo.critic_target=td0`).
3. Advantages are whitened over the batch (`ppo.whiten_advantages=false`).
4. The response ends with the token that completes `</Judgement>`; nothing behind it is trained.
5. The gradient's norm is clipped (`optim.max_grad_norm=0`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppo_nlu import losses, ops
from ppo_nlu.config import Config
from ppo_nlu.methods import updates
from ppo_nlu.methods.reference_cache import ReferenceCache
from ppo_nlu.methods.rollout import (
    Divergence,
    Rollout,
    collect_answers,
    metrics_of,
    normalised,
    score_rows,
    seeded,
)
from ppo_nlu.methods.updates import Budget, Metrics
from ppo_nlu.model.policy import Policy, trainable
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.rewards import RunningScale


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
    reference: ReferenceCache | None = None,
    reuse: bool | None = None,
    keep_graph: int = 0,
) -> tuple[Batch, Metrics]:
    """Sample answers, score them, shape the rewards with KL, estimate advantages and returns.

    With `scale` (`reward.normalise`) each task's scores are put on one scale first. `reference`,
    `reuse` and `keep_graph` are those of `rollout.collect_answers`. A `ppo.kl_coef` of 0 stays 0,
    so nothing is asked of the reference.
    """
    ppo = cfg.ppo
    how = cast(Divergence, ppo.kl_estimator) if ppo.kl_coef else None
    rollout = collect_answers(
        policy, specs, cfg, examples, step, True, reference, how, reuse, keep_graph
    )
    mask = rollout.mask
    assert rollout.values is not None
    scores = rollout.scores if scale is None else normalised(scale, rollout)
    divergence = torch.zeros_like(rollout.logprobs) if rollout.kl is None else rollout.kl
    rewards = losses.shaped_rewards(scores, None, None, mask, kl.coef, kl=divergence)
    if ppo.whiten_rewards:
        rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = ops.gae(rewards, rollout.values, mask, ppo.gamma, ppo.lam)
    if ppo.whiten_advantages:
        advantages = losses.masked_whiten(advantages, mask)
    metrics = metrics_of(rollout, specs) | {
        "kl/coef": kl.coef,
        "value/mean": float(losses.masked_mean(rollout.values, mask)),
        "value/explained_variance": float(losses.explained_variance(rollout.values, returns, mask)),
    }
    if ppo.kl_adaptive and how is not None:
        kl.update(metrics["kl/ref"], rollout.size)
    return Batch(rollout, rewards, advantages, returns), metrics


def update(
    policy: Policy,
    optimizer: Optimizer,
    cfg: Config,
    batch: Batch,
    step: int,
    budget: Budget | None = None,
) -> Metrics:
    """`epochs` passes over the batch, one optimizer step a minibatch, each in a fresh order."""

    def order(epoch: int) -> list[int]:
        draw = seeded("update", cfg.seed, step, epoch)
        return torch.randperm(batch.rollout.size, generator=draw).tolist()

    parameters = trainable(policy)
    with profiling.phase("update"):
        return updates.run(
            parameters,
            optimizer,
            cfg,
            cfg.ppo,
            order,
            lambda index: backward(policy, cfg, batch, index, budget),
        )


def backward(
    policy: Policy,
    cfg: Config,
    batch: Batch,
    index: Sequence[int],
    budget: Budget | None = None,
) -> Metrics:
    """Gradients of one minibatch, summed over micro-batches; its metrics.

    Losses are sums over the micro-batch divided by the token count of the whole minibatch, so the
    gradient does not depend on the size of the micro-batches.
    """
    ppo, rollout = cfg.ppo, batch.rollout
    budget = budget or Budget(ppo.micro_batch_size, cfg.train.micro_batch_tokens)
    count = float(rollout.mask[list(index)].sum())

    def part(micro: list[int]) -> Metrics:
        rows = torch.tensor(micro, device=rollout.mask.device)
        temperature, bonus = cfg.rollout.temperature, ppo.entropy_coef != 0
        trunk = rollout.take_trunk(micro)
        scored = score_rows(policy, rollout, micro, temperature, True, bonus, trunk)
        width = scored.mask.shape[1]
        mask = rollout.mask[rows, :width]
        assert scored.values is not None and rollout.values is not None
        assert torch.equal(mask, scored.mask)
        td0 = ppo.critic_target == "td0"
        loss, metrics = ops.ppo_loss(
            logprobs=scored.logprobs,
            old_logprobs=rollout.logprobs[rows, :width],
            advantages=batch.advantages[rows, :width],
            values=None if td0 else scored.values,
            old_values=rollout.values[rows, :width],
            returns=batch.returns[rows, :width],
            mask=mask,
            clip=ppo.clip,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip,
            value_clip=ppo.value_clip,
            value_coef=ppo.value_coef,
            denominator=count,
            entropy=scored.entropy if bonus else scored.entropy.detach(),  # no gradient of 0
            entropy_coef=ppo.entropy_coef,
        )
        if td0:
            rewards = batch.rewards[rows, :width]
            critic = losses.td_error_loss(scored.values, rewards, mask, ppo.gamma, count)
            loss, metrics["value/loss"] = loss + ppo.value_coef * critic, critic.detach()
        loss.backward()
        metrics["loss"] = loss.detach()
        numbers = torch.stack(list(metrics.values())).tolist()  # one copy from the device
        return dict(zip(metrics, numbers, strict=True))

    return updates.accumulate(trainable(policy), rollout, index, budget, part, policy.tree)

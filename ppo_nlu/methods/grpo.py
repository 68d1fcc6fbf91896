"""Group relative policy optimisation (arXiv 2402.03300): answers to one prompt against each other.

No critic: an answer's advantage is how much better it scored than its group. Departures from the
paper, with the key that takes it back where there is one:
1. The loss is a mean over the tokens of the minibatch, not first over each answer (DAPO, arXiv
   2503.14476, section 3.3).
2. Groups whose scores are all equal teach nothing and are left out, with their KL and their tokens
   (`grpo.drop_even=false`).
3. KL to the reference is off (`grpo.kl_coef=0.04` is the paper's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppo_nlu import losses
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
from ppo_nlu.model import lora
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.rewards import RunningScale


@dataclass
class Batch:
    """A rollout, the advantage of each answer (B,), and the groups that count, as rows of each."""

    rollout: Rollout
    advantages: Tensor
    groups: list[list[int]]


def collect(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    examples: Sequence[Example],
    step: int,
    scale: RunningScale | None = None,
    reference: ReferenceCache | None = None,
    reuse: bool | None = None,
    keep_graph: int = 0,
) -> tuple[Batch, Metrics]:
    """Sample a group of answers to each row, score them, compare them inside their group.

    `scale`, `reference`, `reuse` and `keep_graph` as in `ppo.collect`.
    """
    grpo, size = cfg.grpo, cfg.rollout.samples_per_prompt
    kl: Divergence | None = "k3" if grpo.kl_coef else None
    rollout = collect_answers(
        policy, specs, cfg, examples, step, False, reference, kl, reuse, keep_graph
    )
    scores = rollout.scores if scale is None else normalised(scale, rollout)
    if grpo.advantage == "rloo":
        advantages = losses.rloo_advantages(scores, size)
    else:
        advantages = losses.group_advantages(scores, size, grpo.scale)
    earned = rollout.scores.view(-1, size)
    even = (earned.amax(1) == earned.amin(1)).tolist()
    groups = [
        list(range(g * size, (g + 1) * size))
        for g in range(len(even))
        if not (even[g] and grpo.drop_even)
    ]
    metrics = metrics_of(rollout, specs) | {"grpo/even_groups": float(sum(even))}
    return Batch(rollout, advantages, groups), metrics


def update(
    policy: Policy,
    optimizer: Optimizer,
    cfg: Config,
    batch: Batch,
    step: int,
    budget: Budget | None = None,
) -> Metrics:
    """`epochs` passes over the groups that count, in a fresh order, the answers of one together."""

    def order(epoch: int) -> list[int]:
        draw = seeded("update", cfg.seed, step, epoch)
        shuffled = torch.randperm(len(batch.groups), generator=draw).tolist()
        return [j for g in shuffled for j in batch.groups[g]]

    parameters = lora.lora_parameters(policy.model)
    with profiling.phase("update"):
        return updates.run(
            parameters,
            optimizer,
            cfg,
            cfg.grpo,
            order,
            lambda index: backward(policy, cfg, batch, index, budget),
        )


def backward(
    policy: Policy,
    cfg: Config,
    batch: Batch,
    index: Sequence[int],
    budget: Budget | None = None,
) -> Metrics | None:
    """Gradients of one minibatch, summed over micro-batches; its metrics.

    Without KL an answer of advantage 0 has no gradient: it is not run, but its tokens count in the
    loss's mean. Metrics other than the losses are means over the tokens that are run. None where
    that leaves nothing to run.
    """
    grpo, rollout = cfg.grpo, batch.rollout
    budget = budget or Budget(grpo.micro_batch_size, cfg.train.micro_batch_tokens)
    advantages = batch.advantages.tolist()
    trained = [j for j in index if grpo.kl_coef or advantages[j] != 0]
    if not trained:
        return None
    count = float(rollout.mask[trained].sum())
    share = count / float(rollout.mask[list(index)].sum())

    def part(micro: list[int]) -> Metrics:
        rows = torch.tensor(micro, device=rollout.mask.device)
        trunk = rollout.take_trunk(micro)
        scored = score_rows(policy, rollout, micro, cfg.rollout.temperature, trunk=trunk)
        width = scored.mask.shape[1]
        mask, old = rollout.mask[rows, :width], rollout.logprobs[rows, :width]
        assert torch.equal(mask, scored.mask)
        loss, metrics = losses.grpo_loss(
            scored.logprobs,
            old,
            rollout.ref_logprobs[rows, :width] if rollout.ref_logprobs is not None else None,
            batch.advantages[rows],
            mask,
            grpo.clip,
            grpo.clip_high,
            grpo.kl_coef,
            count,
        )
        loss = loss * share
        loss.backward()
        log_ratio = (losses.counted(scored.logprobs, mask) - losses.counted(old, mask)).detach()
        metrics |= {
            "loss": loss.detach(),
            "policy/loss": metrics["policy/loss"] * share,
            "policy/entropy": losses.counted(scored.entropy, mask).sum().detach() / count,
            "policy/ratio_gap": torch.expm1(log_ratio).abs().amax(),
        }
        if "kl/ref" in metrics:
            metrics["kl/loss"] = metrics.pop("kl/ref")  # kl/ref is that of a whole answer
        numbers = torch.stack(list(metrics.values())).tolist()  # one copy from the device
        return dict(zip(metrics, numbers, strict=True))

    parameters = lora.lora_parameters(policy.model)
    found = updates.accumulate(parameters, rollout, trained, budget, part, policy.tree)
    return found | {"grpo/trained": float(len(trained))}

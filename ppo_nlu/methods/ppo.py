"""Proximal policy optimisation (arXiv 1707.06347) for short answers: collect, then update.

Departures from arXiv 2410.11020, with the key that takes each back where there is one:
1. KL to the reference is in the reward, as in the paper's released code (`ppo.kl_coef=0`).
2. The critic's target is the GAE return, not one step of TD (`ppo.critic_target=td0`).
3. Advantages are whitened over the batch (`ppo.whiten_advantages=false`).
4. An answer ends with the token that completes `</Judgement>`; nothing behind it is trained.
5. The norm of the gradient is clipped (`optim.max_grad_norm=0`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppo_nlu import losses, ops
from ppo_nlu.config import Config
from ppo_nlu.losses import AdaptiveKL
from ppo_nlu.methods.base import Groups, Method
from ppo_nlu.methods.minibatch import Budget, Epochs, Metrics, OptimizerStep
from ppo_nlu.methods.report import FirstRatio, Report, check_form, report_of
from ppo_nlu.methods.rollout import Rollout, metrics_of, seeded
from ppo_nlu.methods.sampler import Divergence, Sampler, score_rows
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model import lora
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec


@dataclass
class Batch:
    """A rollout, and what PPO computes from it before the update."""

    rollout: Rollout
    rewards: Tensor  # (B, R)
    advantages: Tensor  # (B, R)
    returns: Tensor  # (B, R)
    metrics: Metrics


class PPO(Method):
    """Proximal policy optimisation with a critic, on LoRA weights."""

    model: Policy
    budget: Budget
    title = "PPO"
    unit = "answers"

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec], model: Policy | None = None):
        super().__init__(cfg, specs, model or load_policy(cfg))
        ppo, roll = cfg.ppo, cfg.rollout
        self.batch_size, self.samples = roll.batch_size, roll.samples_per_prompt
        self.section, self.kl = ppo, AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
        # A coefficient of 0 stays 0, so the reference is not run.
        divergence = cast(Divergence, ppo.kl_estimator) if ppo.kl_coef else None
        self.sampler = Sampler(
            self.model, specs, cfg, critic=True, estimator=divergence, shots=self.shots
        )
        self.budget = Budget(ppo.micro_batch_size, cfg.train.micro_batch_tokens)
        self.first_ratio = FirstRatio(exact=cfg.model.dtype == "float32")

    def collect(self, rows: Sequence[Example], step: int) -> Batch:
        """Steps 1 to 5: answers to these rows, and how much better they are than expected."""
        ppo, kl = self.section, self.kl
        # 1. Sample answers, with the log-probs and values of their tokens before the update.
        keep_graph = self.sampler.graph_room(ppo, self.budget)  # for the first pass of `update`
        rollout = self.sampler.sample(rows, step, keep_graph)
        mask, values = rollout.mask, rollout.values
        assert values is not None
        # 2. Scores: each parsed answer against its label.
        scores = self.sampler.score(rollout)
        # 3. KL to the reference on each token; 0 where it is off.
        divergence = self.sampler.kl(rollout)
        # 4. Rewards: the score on the last token, minus the KL on each.
        rewards = losses.shaped_rewards(scores, None, None, mask, kl.coef, kl=divergence)
        if ppo.whiten_rewards:
            rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
        # 5. Advantages and returns, by generalised advantage estimation.
        advantages, returns = ops.gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.lam)
        if ppo.whiten_advantages:
            advantages = losses.masked_whiten(advantages, mask)
        metrics = metrics_of(rollout, self.specs) | {
            "kl/coef": kl.coef,
            "value/mean": float(losses.masked_mean(values, mask)),
            "value/explained_variance": float(losses.explained_variance(values, returns, mask)),
        }
        if ppo.kl_adaptive and rollout.kl is not None:  # the coefficient of the next step
            kl.update(metrics["kl/ref"], rollout.size)
        if step == 0:
            rollout.messages += check_form(metrics["answer/unparsed"])
        return Batch(rollout, rewards, advantages, returns, metrics)

    def update(self, batch: Batch, step: int) -> Report:
        """Step 6: epochs over the answers, each in a fresh order, with one optimizer step a
        minibatch."""
        rollout, epochs = batch.rollout, Epochs(self.section)
        with profiling.phase("update"):
            for index in epochs.minibatches(lambda epoch: self.order(batch, step, epoch)):
                count = float(rollout.mask[index].sum())  # tokens of the minibatch
                minibatch = OptimizerStep(self.optimizer, self.cfg.optim.max_grad_norm)
                for micro in minibatch.micro_batches(rollout, index, self.budget, self.model.tree):
                    with minibatch.part(micro):
                        minibatch.backward(*self.loss(batch, micro, count))
                epochs.take(minibatch, index)
        rollout.prompt_pass = None  # frees it where no forward reused it
        reuses = self.sampler.graph_room(self.section, self.budget) > 0
        messages = self.budget.taken_messages() + self.first_ratio.look(epochs, rollout, reuses)
        return report_of(batch, epochs, messages)

    def order(self, batch: Batch, step: int, epoch: int) -> list[int]:
        """The answers in the order in which an epoch cuts them into minibatches."""
        draw = seeded("update", self.cfg.seed, step, epoch)
        return torch.randperm(batch.rollout.size, generator=draw).tolist()

    def loss(
        self, batch: Batch, micro: Sequence[int], count: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Surrogate, critic and entropy bonus of some answers.

        The loss is a sum over their tokens, divided by `count`, the tokens of the whole minibatch;
        so micro-batches change memory only.
        """
        ppo, rollout = self.section, batch.rollout
        rows = torch.tensor(micro, device=rollout.mask.device)
        temperature, bonus = self.cfg.rollout.temperature, ppo.entropy_coef != 0
        prompt_pass = rollout.take_prompt_pass(micro)
        scored = score_rows(
            self.model,
            rollout,
            micro,
            temperature,
            values=True,
            entropy_grad=bonus,
            prompt_pass=prompt_pass,
        )
        width = scored.mask.shape[1]
        mask = rollout.mask[rows, :width]
        assert scored.values is not None and rollout.values is not None
        assert torch.equal(mask, scored.mask)
        td0 = ppo.critic_target == "td0"
        ppo_loss = ops.ppo_loss_form(scored.logprobs)  # one launch on CUDA
        loss, metrics = ppo_loss(
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
            entropy=scored.entropy if bonus else scored.entropy.detach(),  # then a metric only
            entropy_coef=ppo.entropy_coef,
        )
        if td0:
            critic = losses.td_error_loss(
                values=scored.values,
                rewards=batch.rewards[rows, :width],
                mask=mask,
                gamma=ppo.gamma,
                denominator=count,
            )
            loss, metrics["value/loss"] = loss + ppo.value_coef * critic, critic.detach()
        return loss, metrics

    def workload(self) -> Workload:
        return Workload.on_rollouts(self.cfg.rollout, self.section, critic=True)

    # --- what a run keeps -------------------------------------------------------------------------

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return lora.lora_parameters(self.model.model), list(self.model.value_head.parameters())

    def weights(self) -> Groups:
        head = {k: v.detach().cpu() for k, v in self.model.value_head.state_dict().items()}
        return super().weights() | {"value_head": head}

    def restore(self, groups: Groups, place: str) -> None:
        super().restore(groups, place)
        lora.take(self.model.value_head.state_dict(), groups["value_head"], place)

    def state(self) -> dict[str, Any]:
        return self.sampler.state() | self.first_ratio.state() | {"kl_coef": self.kl.coef}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.sampler.set_state(state)
        self.first_ratio.set_state(state)
        self.kl.coef = state["kl_coef"]


METHOD = PPO

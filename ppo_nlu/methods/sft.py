"""Supervised fine-tuning: the next-token loss on right answers, behind the prompts that PPO uses.

By default the loss is on the answer only, as in the code of arXiv 2410.11020; `sft.loss=all` is as
in its text. Label words, parser and prompts are those of PPO, so the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_nlu import losses
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.methods.base import Method
from ppo_nlu.methods.minibatch import Budget, OptimizerStep
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt, sealed
from ppo_nlu.methods.report import BadStep, Report, row_for_a_human
from ppo_nlu.methods.rollout import seeded
from ppo_nlu.model import lora
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import profiling
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.prompts import gold_answer
from ppo_nlu.tree import prefixes


@dataclass
class Batch:
    """Rows as token ids; answer j belongs to prompt j."""

    examples: Sequence[Example]
    prompts: list[list[int]]  # to read
    answers: list[list[int]]  # to learn
    prompt_of: list[int]
    truncated: int  # prompts that were cut
    dropped: int  # shots left out of the prompts


class SFT(Method):
    """Supervised fine-tuning of LoRA weights on the right answers."""

    model: Policy
    budget: Budget
    title = "SFT"

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec], model: Policy | None = None):
        super().__init__(cfg, specs, model or load_policy(cfg))
        self.batch_size = cfg.sft.batch_size
        self.budget = Budget(cfg.sft.micro_batch_size, cfg.train.micro_batch_tokens)

    def collect(self, rows: Sequence[Example], step: int) -> Batch:
        """Step 1: the right answers to these rows, as token ids behind their prompts."""
        shots = {name: self.shots.pool(spec) for name, spec in self.specs.items()}
        found = [
            targets(self.model, self.specs[row.task], self.cfg, row, shots[row.task])
            for row in rows
        ]
        return Batch(
            examples=rows,
            prompts=[prompt for prompt, _, _ in found],
            answers=[answer for _, answer, _ in found],
            prompt_of=list(range(len(rows))),
            truncated=sum(cut for _, _, (cut, _) in found),
            dropped=sum(dropped for _, _, (_, dropped) in found),
        )

    def update(self, batch: Batch, step: int) -> Report:
        """Step 2: one optimizer step on the log-probs of these answers."""
        rows, count = range(len(batch.examples)), float(sum(map(len, batch.answers)))
        minibatch = OptimizerStep(self.optimizer, self.cfg.optim.max_grad_norm)
        # Dropout masks have a seed of their own, so a resumed run draws the same.
        with torch.random.fork_rng(devices=[]), lora.dropout_on(self.model.model):
            torch.manual_seed(seeded("dropout", self.cfg.seed, step).initial_seed())
            with profiling.phase("update"):
                for micro in minibatch.micro_batches(batch, rows, self.budget, self.model.tree):
                    with minibatch.part(micro):
                        minibatch.backward(*self.loss(batch, micro, count))
                finite = minibatch.take()
        found = minibatch.metrics
        metrics = {
            "loss": found["loss"],
            "answer/likelihood": math.exp(found["logprob"] / len(rows)),
            "answer/tokens": count / len(rows),
            "answer/truncated_prompts": float(batch.truncated),
            "answer/dropped_shots": float(batch.dropped),
            "optim/grad_norm": found["optim/grad_norm"],
        }
        messages = self.budget.taken_messages()
        if finite:
            return Report(metrics, messages, batch.truncated)
        told = [row_for_a_human(row) for row in batch.examples]
        return Report({}, messages, batch.truncated, BadStep(told, metrics))

    def loss(
        self, batch: Batch, micro: Sequence[int], count: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some rows: a sum over their tokens, divided by `count`, the tokens of all
        rows; so micro-batches change memory only."""
        prompts, answers = ([kind[j] for j in micro] for kind in (batch.prompts, batch.answers))
        scored = self.model.score(prompts, answers)
        loss = losses.sft_loss(logprobs=scored.logprobs, mask=scored.mask, denominator=count)
        return loss, {"logprob": scored.logprobs.detach().sum()}


def targets(
    policy: Policy,
    spec: TaskSpec,
    cfg: Config,
    example: Example,
    shots: Sequence[Example] = (),
) -> tuple[list[int], list[int], tuple[int, int]]:
    """Token ids to read and to learn, tokenised as one text; and (1 if the prompt was cut, how many
    shots were dropped)."""
    wanted = gold_answer(spec, sealed(policy, example), cfg.prompt.form)
    room = max(cfg.rollout.max_new_tokens, len(policy.encode(wanted)))
    longest = longest_prompt(policy, cfg, room)
    fit = fit_prompt(policy, spec, example, longest, cfg.prompt, shots)
    whole = policy.encode(fit.text + wanted)
    start = 1 if cfg.sft.loss == "all" else prefixes.common(fit.ids, whole)
    if start >= len(whole):
        raise UserError(f"data.path: {spec.name} {example.id} has an empty answer; drop the row")
    return whole[:start], whole[start:], (int(fit.cut), fit.dropped)


METHOD = SFT

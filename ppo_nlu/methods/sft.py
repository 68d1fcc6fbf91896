"""Supervised fine-tuning: the next-token loss on right answers, behind the prompts PPO uses.

The loss is on the answer alone by default (arXiv 2410.11020's code; `sft.loss=all` is its text).
Label words, parser and prompts are those of PPO, so the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from ppo_nlu import losses
from ppo_nlu.config import Config
from ppo_nlu.data import demonstrations
from ppo_nlu.errors import UserError
from ppo_nlu.methods.rollout import fit_prompt, longest_prompt, sealed
from ppo_nlu.methods.updates import BadStep, Budget, Metrics, accumulate
from ppo_nlu.model.lora import lora_parameters
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import profiling
from ppo_nlu.runtime.optim import clip_gradients
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.prompts import gold_answer
from ppo_nlu.tree import prefixes


@dataclass
class Batch:
    """Token ids to read and to learn; answer j belongs to prompt j."""

    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]


def update(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    optimizer: Optimizer,
    cfg: Config,
    examples: Sequence[Example],
    budget: Budget | None = None,
) -> Metrics:
    """One optimizer step on these rows; raises BadStep where loss or gradient is not finite.

    The loss is summed over micro-batches and divided by the count of all trained tokens, so the
    size of the micro-batches changes nothing but memory.
    """
    batch, cut, dropped = Batch([], [], list(range(len(examples)))), 0, 0
    for example in examples:
        prompt, answer, fit = targets(policy, specs[example.task], cfg, example)
        batch.prompts.append(prompt)
        batch.answers.append(answer)
        cut, dropped = cut + fit[0], dropped + fit[1]
    count = float(sum(map(len, batch.answers)))

    def part(micro: list[int]) -> Metrics:
        scored = policy.score([batch.prompts[i] for i in micro], [batch.answers[i] for i in micro])
        loss = losses.sft_loss(scored.logprobs, scored.mask, denominator=count)
        loss.backward()
        return {"loss": float(loss.detach()), "logprob": float(scored.logprobs.detach().sum())}

    parameters = lora_parameters(policy.model)
    budget = budget or Budget(cfg.sft.micro_batch_size, cfg.train.micro_batch_tokens)
    with profiling.phase("update"):
        totals = accumulate(parameters, batch, batch.owners, budget, part, policy.tree)
        norm = float(clip_gradients(parameters, cfg.optim.max_grad_norm))
    metrics = {
        "loss": totals["loss"],
        "answer/likelihood": math.exp(totals["logprob"] / len(examples)),
        "answer/tokens": count / len(examples),
        "answer/truncated_prompts": float(cut),
        "answer/dropped_shots": float(dropped),
        "optim/grad_norm": norm,
    }
    if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
        raise BadStep(range(len(examples)), metrics)
    with profiling.phase("update"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return metrics


def targets(
    policy: Policy, spec: TaskSpec, cfg: Config, example: Example
) -> tuple[list[int], list[int], tuple[int, int]]:
    """Token ids to read and token ids to learn, tokenised as one text; prompts cut and worked
    examples dropped for them."""
    wanted = gold_answer(spec, sealed(policy, example), cfg.prompt.form)
    room = max(cfg.rollout.max_new_tokens, len(policy.encode(wanted)))
    longest = longest_prompt(policy, cfg, room)
    shots = demonstrations.of(spec, cfg)
    fit = fit_prompt(policy, spec, example, longest, cfg.prompt, shots)
    whole = policy.encode(fit.text + wanted)
    start = 1 if cfg.sft.loss == "all" else prefixes.common(fit.ids, whole)
    if start >= len(whole):
        raise UserError(f"data.path: {spec.name} {example.id} has an empty answer; drop the row")
    return whole[:start], whole[start:], (int(fit.cut), fit.dropped)

"""Supervised fine-tuning: the next-token loss on right answers, behind the prompts PPO uses.

The loss is on the answer alone by default (arXiv 2410.11020's code; `sft.loss=all` is its text).
Label words, parser and prompts are those of PPO, so the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from ppo_nlu import demonstrations, losses, prefix_tree
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.lora import lora_parameters
from ppo_nlu.model import Policy
from ppo_nlu.optim import clip_gradients
from ppo_nlu.ppo import BadStep, Metrics, chunks
from ppo_nlu.prompts import gold_answer
from ppo_nlu.rollout import fit_prompt, longest_prompt
from ppo_nlu.tasks import Example, TaskSpec


def update(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    optimizer: Optimizer,
    cfg: Config,
    examples: Sequence[Example],
) -> Metrics:
    """One optimizer step on these rows; raises BadStep where loss or gradient is not finite.

    The loss is summed over micro-batches and divided by the count of all trained tokens, so the
    size of the micro-batches changes nothing but memory.
    """
    rows, cut, dropped = [], 0, 0
    for example in examples:
        prompt, answer, fit = targets(policy, specs[example.task], cfg, example)
        rows.append((prompt, answer))
        cut, dropped = cut + fit[0], dropped + fit[1]
    count = float(sum(len(answer) for _, answer in rows))
    total = logprob = 0.0
    for index in chunks(range(len(rows)), cfg.sft.micro_batch_size or len(rows)):
        prompts, answers = [rows[i][0] for i in index], [rows[i][1] for i in index]
        scored = policy.score(prompts, answers)
        loss = losses.sft_loss(scored.logprobs, scored.mask, denominator=count)
        loss.backward()
        total += float(loss.detach())
        logprob += float(scored.logprobs.detach().sum())
    norm = float(clip_gradients(lora_parameters(policy.model), cfg.optim.max_grad_norm))
    metrics = {
        "loss": total,
        "answer/likelihood": math.exp(logprob / len(rows)),
        "answer/tokens": count / len(rows),
        "answer/truncated_prompts": float(cut),
        "answer/dropped_shots": float(dropped),
        "optim/grad_norm": norm,
    }
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise BadStep(range(len(rows)), metrics)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def targets(
    policy: Policy, spec: TaskSpec, cfg: Config, example: Example
) -> tuple[list[int], list[int], tuple[int, int]]:
    """Token ids to read and token ids to learn, tokenised as one text; prompts cut and worked
    examples dropped for them."""
    wanted = gold_answer(spec, example, cfg.prompt.form)
    room = max(cfg.rollout.max_new_tokens, len(policy.encode(wanted)))
    longest = longest_prompt(policy, cfg, room)
    shots = demonstrations.of(spec, cfg)
    fit = fit_prompt(policy, spec, example, longest, cfg.prompt, shots)
    whole = policy.encode(fit.text + wanted)
    start = 1 if cfg.sft.loss == "all" else prefix_tree.common(fit.ids, whole)
    if start >= len(whole):
        raise UserError(f"data.path: {spec.name} {example.id} has an empty answer; drop the row")
    return whole[:start], whole[start:], (int(fit.cut), fit.dropped)

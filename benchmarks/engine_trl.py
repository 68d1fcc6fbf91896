"""TRL's side of `engines.py`: PPOTrainer of 1.12.0 and GRPOTrainer of 1.16.0.

Driven as their documentation says, with one departure that favours nobody: both sides see the same
prompts in the same order.
"""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine_job import (
    ADAM,
    EPOCHS,
    KL,
    LINEAR,
    LORA,
    Job,
    Meter,
    bundled_tokenizer,
    load_tokenizer_classes,
    random_model,
    reward_of,
)


def causal_lm(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if job.get("shape"):
        return random_model(job)
    return AutoModelForCausalLM.from_pretrained(job["model_folder"], dtype=torch.float32)


def rival_tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    if job.get("shape"):
        tokenizer = bundled_tokenizer()
        tokenizer.padding_side = "left"
    else:
        tokenizer = AutoTokenizer.from_pretrained(job["model_folder"], padding_side="left")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token  # another id than eos, or eos is not trained
    return tokenizer


def tag_token(tokenizer: Any) -> int | None:
    """The id of ` </Judgement>` where it is one token: then TRL, too, can stop there."""
    ids = tokenizer(" </Judgement>", add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def adapter(task: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0, target_modules=LINEAR,
        bias="none", task_type=task,
    )  # fmt: skip


def rival_arguments(job: Job) -> dict[str, Any]:
    """The training arguments that PPO and GRPO of TRL share."""
    answers = job["prompts"] * job["group"]
    micro = job["micro"] or answers
    assert answers % micro == 0
    return {
        "output_dir": str(Path(job["out"]).with_suffix("")), "report_to": "none",
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": answers // micro,
        "learning_rate": job["lr"], "lr_scheduler_type": "constant", "warmup_steps": 0,
        "optim": "adamw_torch", "adam_beta1": ADAM["beta1"], "adam_beta2": ADAM["beta2"],
        "adam_epsilon": ADAM["eps"], "weight_decay": 0.0, "max_grad_norm": 1.0,
        "gradient_checkpointing": False, "use_cpu": job["device"] == "cpu",
        "bf16": job["dtype"] == "bfloat16", "save_strategy": "no", "eval_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "seed": job["seed"],
        "dataloader_num_workers": 0, "temperature": 1.0,
    }  # fmt: skip


def clock_callback(meter: Meter) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark()

    return Clock()


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def trl_ppo(job: Job, meter: Meter) -> None:
    """PPOTrainer of TRL 1.12.0: LoRA on the policy and on the value model, reference by LoRA off.

    `num_mini_batches` has no effect there, and neither has `max_grad_norm`.
    """
    import torch
    from datasets import Dataset
    from peft import inject_adapter_in_model
    from torch import nn
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    load_tokenizer_classes()
    meter.imported()
    tokenizer, rate = rival_tokenizer(job), reward_of(job)
    known = {tuple(row["ids"]): row for row in job["rows"]}
    lengths = sorted({len(ids) for ids in known}, reverse=True)
    scores: list[float] = []
    sizes: list[int] = []

    def score(ids: list[int]) -> float:
        cut = next(n for n in lengths if tuple(ids[:n]) in known)
        sizes.append(len(ids) - cut)
        return rate(tokenizer.decode(ids[cut:], skip_special_tokens=True), known[tuple(ids[:cut])])

    class Reward(nn.Module):
        """A Python function behind the interface of a reward model."""

        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))
            self.backbone = self.run

        def run(self, input_ids: Any, attention_mask: Any, **ignored: Any) -> Any:
            kept = [i[m.bool()].tolist() for i, m in zip(input_ids, attention_mask, strict=True)]
            found = [score(ids) for ids in kept]
            scores.extend(found)
            column = torch.tensor(found, device=input_ids.device)[:, None, None]
            states = column.expand(-1, input_ids.shape[1], 1)
            return types.SimpleNamespace(hidden_states=[states])

        def score(self, states: Any) -> Any:
            return states

    policy = causal_lm(job)
    if job.get("shape"):
        critic = random_model(job, "AutoModelForSequenceClassification")
    else:
        critic = AutoModelForSequenceClassification.from_pretrained(
            job["model_folder"], num_labels=1, dtype=torch.float32
        )
    critic.requires_grad_(False)
    inject_adapter_in_model(adapter("SEQ_CLS"), critic)
    critic.score.requires_grad_(True)
    size, answers, steps = job["prompts"], job["prompts"] * job["group"], 2 * job["steps"]
    assert job["group"] == 1, "PPO of TRL takes one answer a prompt"
    stop = tag_token(tokenizer) if job["stop"] == "natural" else None
    ends = {"stop_token_id": stop} if stop else {"stop_token": "eos"}
    args = PPOConfig(
        **rival_arguments(job),
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=steps * answers,
        response_length=job["tokens"],
        missing_eos_penalty=None,
        kl_coef=KL,
        kl_estimator="k1",
        vf_coef=0.1,
        cliprange=0.2,
        cliprange_value=0.2,
        gamma=1.0,
        lam=0.95,
        num_sample_generations=0,
        local_rollout_forward_batch_size=job["micro"] or answers,
        **(ends if job["stop"] == "natural" else {}),
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=Reward(),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [row["ids"] for row in job["rows"]]}),
        peft_config=adapter("CAUSAL_LM"),
        callbacks=[clock_callback(meter)],
    )
    # The same prompts in the same order as ours; its own loader shuffles them.
    order = [{"input_ids": row["ids"]} for row in job["rows"]]
    trainer.dataloader = [trainer.data_collator(batch) for batch in batches(order, size)]
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    trainer.train()
    meter.rewards = [sum(part) / len(part) for part in batches(scores, answers)]
    meter.more = {
        "answer_tokens": sum(sizes) / len(sizes),
        "trained_weights": sum(p.numel() for p in trained if p.requires_grad),
        "version": importlib.metadata.version("trl"),
    }


def trl_grpo(job: Job, meter: Meter) -> None:
    """GRPOTrainer of TRL 1.16.0, generating with Hugging Face's `generate`; the DAPO loss."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    load_tokenizer_classes()
    meter.imported()
    tokenizer, rate = rival_tokenizer(job), reward_of(job)
    known = {row["text"]: row for row in job["rows"]}
    sizes: list[int] = []

    def reward(prompts: list[str], completions: list[str], **more: Any) -> list[float]:
        found = [rate(c, known[p]) for p, c in zip(prompts, completions, strict=True)]
        meter.rewards.append(sum(found) / len(found))
        sizes.extend(map(len, more["completion_ids"]))
        return found

    policy = causal_lm(job)
    stop = tag_token(tokenizer) if job["stop"] == "natural" else None
    if stop:
        policy.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    forced = {"min_new_tokens": job["tokens"]} if job["stop"] == "equal" else {}
    if job["task"] != "synthetic":
        for row in job["rows"][:8]:
            assert tokenizer(row["text"])["input_ids"] == row["ids"], "prompts differ from ours"
    args = GRPOConfig(
        **rival_arguments(job),
        max_steps=2 * job["steps"],
        num_generations=job["group"],
        max_completion_length=job["tokens"],
        num_iterations=1,
        beta=KL,
        shuffle_dataset=False,
        top_p=1.0,
        top_k=0,
        generation_kwargs=forced or None,
    )
    texts = [row["text"] for row in job["rows"]]
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        peft_config=adapter("CAUSAL_LM"),
        callbacks=[clock_callback(meter)],
    )
    if job["task"] == "synthetic":  # whose ids do not come from their text
        trainer._tokenize_prompts = lambda texts: ([known[t]["ids"] for t in texts], None, {})
    trainer.train()
    meter.more = {
        "answer_tokens": sum(sizes) / len(sizes),
        "trained_weights": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "version": importlib.metadata.version("trl"),
    }


RUN = {"ppo": trl_ppo, "grpo": trl_grpo}

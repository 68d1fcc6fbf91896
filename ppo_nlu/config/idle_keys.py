"""Which keys that the user has set have no effect on a training run, and why.

A key counts as set where its value is not the default. That it has no effect is no mistake, since
one file may serve several methods; but the user should know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ppo_nlu.config import METHODS, Config, defaults
from ppo_nlu.config.strict_config import values

BY_REWARD = ("ppo", "grpo")  # the methods that learn from what their answers earn
WRITING = tuple(name for name in METHODS if name != "encoder")  # by a language model
# {key or section: the methods that read it}; a key wins over its section.
READ_BY: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in METHODS},  # a method's own section
    "ppo.preset": METHODS,  # it sets keys of other sections too
    "rollout": BY_REWARD,
    "rollout.max_new_tokens": WRITING,  # of the answers in the evaluation too
    "rollout.cuda_graph": WRITING,
    "reward": BY_REWARD,
    "custom.reward": BY_REWARD,
    "lora": WRITING,
    "lora.dropout": ("sft",),
    "prompt": WRITING,
    "model.path": WRITING,
    "model.checkpointing": WRITING,
    "model.value_head": ("ppo",),
    "model.value_hidden": ("ppo",),
    "model.detach_value": ("ppo",),
    "data.exclude_pretraining_labels": WRITING,
    "data.max_prompt_tokens": WRITING,
    "optim.value_lr": ("ppo",),
    "train.micro_batch_tokens": WRITING,
    "eval.before": WRITING,
    "eval.base": WRITING,
    "eval.label_scores": WRITING,
    "eval.top_k": WRITING,
    "eval.top_p": WRITING,
}


def reads(cfg: Config, key: str) -> bool:
    """Whether the method of a config reads this key or section."""
    return cfg.method in READ_BY.get(key, READ_BY.get(key.partition(".")[0], (cfg.method,)))


def idle_keys(cfg: Config, said: Collection[str], saw_labels: bool) -> Iterator[tuple[str, str]]:
    """(key, why it has no effect) of the keys that the user gave, in their order."""
    default, mine = defaults(), values(cfg)
    for key in said:
        changed = key in mine and mine[key] != default[key]
        if changed and (why := _why(cfg, key, saw_labels)):
            yield key, why


def _why(cfg: Config, key: str, saw_labels: bool) -> str:
    if not reads(cfg, key):
        return f"with method {cfg.method}"
    conditions = {
        "mixture": (len(cfg.names) > 1, "with one task"),
        "mixture.cap": (
            len(cfg.names) > 1 and cfg.mixture.mixing == "capped",
            "with one task, or where mixture.mixing is not capped",
        ),
        "custom": (
            cfg.custom.name in cfg.names or (cfg.custom.name is None and not cfg.custom.fields),
            "where task does not name custom.name",
        ),
        "prompt.balanced": (cfg.prompt.shots > 0, "while prompt.shots is 0"),
        "data.exclude_pretraining_labels": (saw_labels, "with another model than the bundled one"),
        "optim.beta1": (cfg.optim.name == "adamw", "with optim.name adafactor"),
        "optim.beta2": (cfg.optim.name == "adamw", "with optim.name adafactor"),
        "optim.eps": (cfg.optim.name == "adamw", "with optim.name adafactor"),
        "optim.min_lr_ratio": (
            cfg.optim.schedule != "constant",
            "with optim.schedule constant",
        ),
        "eval.base": (cfg.init_from is not None, "without init_from"),
        "ppo.kl_target": (cfg.ppo.kl_adaptive, "while ppo.kl_adaptive is false"),
        "ppo.kl_horizon": (cfg.ppo.kl_adaptive, "while ppo.kl_adaptive is false"),
        "grpo.scale": (cfg.grpo.advantage == "group", "with grpo.advantage rloo"),
        "log.project": (cfg.log.wandb, "while log.wandb is false"),
        "custom.step": (cfg.custom.low is not None, "without custom.low and custom.high"),
    }
    used, why = conditions.get(key, conditions.get(key.partition(".")[0], (True, "")))
    return "" if used else why

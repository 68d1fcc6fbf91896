"""The configuration of a run: its sections together, the checks between them, how it is loaded.

A YAML file states only what differs from the defaults, under the names of the keys in `sections`.
Later layers win: defaults < preset < method < task of the user's own < file < command line
(`section.key=value`). How a file is read, and what is said of mistakes in it, is in
`strict_config`. A relative path in a config is relative to the current directory; once loaded it is
absolute (`paths`). Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import ClassVar

from ppo_nlu.config import strict_config
from ppo_nlu.config.checks import checked
from ppo_nlu.config.fields import below_one, number, one_of, positive, schema, share
from ppo_nlu.config.foreign_names import ABSENT, FOREIGN_NAMES, NEAR_MISSES, NOTES
from ppo_nlu.config.paths import PATHS, absolute
from ppo_nlu.config.presets import (
    METHOD_DEFAULTS,
    OWN_TASK_BUNDLED,
    OWN_TASK_BUNDLED_PPO,
    OWN_TASK_DEFAULTS,
    PRESETS,
)
from ppo_nlu.config.sections import (
    CustomConfig,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    GRPOConfig,
    LogConfig,
    LoraConfig,
    MixtureConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
)
from ppo_nlu.config.strict_config import (
    diff,
    dump,
    load_dataclass,
    parse_overrides,
    to_dict,
)
from ppo_nlu.errors import UserError

__all__ = [
    "METHODS", "METHOD_DEFAULTS", "PRESETS", "Config", "CustomConfig", "DataConfig",
    "EncoderConfig", "EvalConfig", "GRPOConfig", "LogConfig", "LoraConfig", "MixtureConfig",
    "ModelConfig", "OptimConfig", "PPOConfig", "PromptConfig", "RewardConfig", "RolloutConfig",
    "SFTConfig", "TrainConfig",
    "below_one", "defaults", "diff", "dump", "load_config", "load_dataclass", "number", "one_of",
    "parse_overrides", "positive", "share", "to_dict",
]  # fmt: skip

MOST_ANSWERS = 1 << 20  # of a step
MOST_RATINGS = 10_000  # on the grid of a rating task
METHODS = ("ppo", "grpo", "sft", "encoder")  # for `method`; a new algorithm adds its name here


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    foreign_names: ClassVar[Mapping[str, tuple[str, ...]]] = FOREIGN_NAMES
    near_misses: ClassVar[Mapping[str, tuple[str, ...]]] = NEAR_MISSES
    foreign_notes: ClassVar[Mapping[str, str]] = NOTES
    foreign_absent: ClassVar[Mapping[str, str]] = ABSENT

    task: str | None = None  # a name from the task table, such as sst2, or that of custom.name
    tasks: list[str] = field(default_factory=list)  # several tasks at once, in place of `task`
    method: str = one_of("ppo", *METHODS)  # the algorithm; some defaults depend on it
    seed: int = number(0, min=0, max=2**32 - 1)  # of everything that is drawn at random
    init_from: str | None = None  # a run or adapter folder to start from (and to stay near)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    custom: CustomConfig = field(default_factory=CustomConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for key, problem in _conflicts(self):
            raise UserError(f"{key}: {problem}")

    @property
    def names(self) -> list[str]:
        """The tasks of the run, one or several."""
        return self.tasks or [str(self.task)]


def _conflicts(cfg: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of what no field can check by itself."""
    if cfg.task is None and not cfg.tasks:
        yield "task", "is missing; add `task: ...`, or `tasks: [...]` for several"
    if cfg.task is not None and cfg.tasks:
        yield "tasks", "is given beside task; keep one of the two"
    if cfg.method == "encoder" and cfg.tasks:
        yield "tasks", "an encoder has one head for one task; give `task: ...`"
    full = "training needs the log-probabilities of the full distribution"
    if cfg.rollout.top_k:
        yield "rollout.top_k", f"{cfg.rollout.top_k} is refused: {full}; leave it at 0 (off)"
    if cfg.rollout.top_p < 1:
        yield "rollout.top_p", f"{cfg.rollout.top_p} is refused: {full}; leave it at 1 (off)"
    for name, limit in (("ppo", cfg.ppo.max_ratio), ("grpo", cfg.grpo.max_ratio)):
        if 0 < limit <= 1:
            problem = (
                "would skip every minibatch (the ratio starts at 1); use more than 1, or 0 for off"
            )
            yield f"{name}.max_ratio", f"{limit} {problem}"
    if cfg.method == "grpo" and cfg.rollout.samples_per_prompt < 2:
        problem = "1 leaves nothing to compare an answer with; give 2 or more (8 is usual)"
        yield "rollout.samples_per_prompt", problem
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", cfg.model.device):
        # Answers are drawn in float64, which mps does not have; the others were never tried.
        problem = "is not a device that runs this; use auto, cpu, cuda or cuda:<number>"
        yield "model.device", f"{short(cfg.model.device)} {problem}"
    answers = cfg.rollout.batch_size * cfg.rollout.samples_per_prompt
    if answers > MOST_ANSWERS:
        problem = f"rollout.batch_size times it is {answers:,} answers a step"
        yield "rollout.samples_per_prompt", f"{problem}; at most {MOST_ANSWERS:,} are allowed"
    low, high, step = cfg.custom.low, cfg.custom.high, cfg.custom.step
    if low is not None and high is not None and (high - low) / step > MOST_RATINGS:
        problem = f"{step:g} makes {(high - low) / step:,.0f} ratings from {low:g} to {high:g}"
        yield "custom.step", f"{problem}; at most {MOST_RATINGS:,} are allowed, so take a wider one"
    if cfg.prompt.form == "analysis" and cfg.rollout.max_new_tokens < 32:
        problem = (
            f"{cfg.rollout.max_new_tokens} tokens hold no reason and an answer; give 64 or more"
        )
        yield "rollout.max_new_tokens", problem
    if cfg.lora.targets == []:
        yield "lora.targets", "is empty; use all-linear, attention, or module name endings"


def defaults() -> dict[str, object]:
    """The default of every dotted key."""
    return strict_config.values(Config(task="")) | {"task": None}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file and `section.key=value` overrides; its method, a task of the
    user's own, and its preset change the defaults."""
    given = strict_config.given(Config, path, overrides)
    method = given.get("method", ("", "ppo"))[1]
    if isinstance(method, str) and method in METHOD_DEFAULTS:
        where = given.get("method", (str(path), method))[0]
        changed = METHOD_DEFAULTS[method] | _own_task_defaults(given, method)
        given = {key: (where, value) for key, value in changed.items()} | given
    if "ppo.preset" in given:
        where, name = given["ppo.preset"]
        leaf = schema(Config)["ppo.preset"]
        name = checked(leaf, name, where, "ppo.preset")
        given = {key: (where, value) for key, value in PRESETS[name].items()} | given
    return strict_config.build(Config, given | dict(_absolute(given)), str(path))


def _own_task_defaults(given: strict_config.Given, method: str) -> dict[str, object]:
    """The defaults that a task of the user's own changes; none for the tasks of the tables, and
    none where a preset is asked for."""
    task, own, model = (
        given.get(key, ("", None))[1] for key in ("task", "custom.name", "model.name_or_path")
    )
    preset = given.get("ppo.preset", ("", "default"))[1]
    if own is None or task != own or preset != "default":
        return {}
    if model not in (None, "bundled") or method == "encoder":
        return OWN_TASK_DEFAULTS[method]
    more = OWN_TASK_BUNDLED_PPO if method == "ppo" else {}
    return OWN_TASK_DEFAULTS[method] | OWN_TASK_BUNDLED | more


def _absolute(given: strict_config.Given) -> Iterator[tuple[str, tuple[str, object]]]:
    """The keys that hold paths, with these as absolute ones."""
    for key in PATHS:
        if key in given:
            where, value = given[key]
            yield key, (where, absolute(key, checked(schema(Config)[key], value, where, key)))

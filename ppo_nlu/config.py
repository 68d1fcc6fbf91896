"""The configuration: one frozen dataclass per YAML section, read strictly, with overrides.

A YAML file states only what differs from the defaults below, under the same names. Later layers
win: defaults < preset < file < command line (`section.key=value`). Every mistake is a UserError of
one line: where (the file and line, or "command line"), the dotted key, what is wrong, how to mend
it. `load_dataclass` does the same for any other tree of dataclasses. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ppo_nlu.errors import UserError

T = TypeVar("T")

METHODS = ("ppo",)  # what `method` may name; a new algorithm adds its name here
COMMAND_LINE = "command line"


def number(
    default: Any,
    min: float | None = None,
    max: float | None = None,
    exclusive_min: bool = False,
    exclusive_max: bool = False,
) -> Any:
    """A field with a range; a bound counts as allowed unless it is called exclusive."""
    ends = {"min": min, "max": max, "exclusive_min": exclusive_min, "exclusive_max": exclusive_max}
    return field(default=default, metadata=ends)


def positive(default: Any) -> Any:
    """A field above 0."""
    return number(default, min=0, exclusive_min=True)


def share(default: Any) -> Any:
    """A field from 0 to 1, both allowed."""
    return number(default, min=0, max=1)


def below_one(default: Any) -> Any:
    """A field from 0 (allowed) to 1 (not allowed)."""
    return number(default, min=0, max=1, exclusive_max=True)


def one_of(default: str, *choices: str) -> Any:
    """A field that takes one of a few words."""
    return field(default=default, metadata={"choices": choices})


# --- the sections; null = not set, and 0 means "off" only where the comment says so ---------------


@dataclass(frozen=True)
class ModelConfig:
    """The language model and the value head."""

    name_or_path: str = "bundled"  # "bundled", a folder, or a Hugging Face name
    dtype: str = one_of("float32", "float32", "bfloat16", "float16")  # of the frozen weights
    device: str = "auto"  # auto, cpu, cuda, cuda:<number> or mps
    attention: str = one_of("sdpa", "sdpa", "eager")  # attention implementation
    trust_remote_code: bool = False  # run Python code that comes with the model
    path: str = one_of("auto", "auto", "tree", "plain")  # shared prefixes once, or row by row
    value_head: str = one_of("mlp", "mlp", "linear")  # two layers, or one
    value_hidden: int = number(0, min=0)  # width of the MLP; 0 = the model's hidden size
    value_dropout: float = below_one(0.0)  # dropout before the value head; 0 = off
    detach_value: bool = False  # true: the value loss does not reach the LoRA weights


@dataclass(frozen=True)
class LoraConfig:
    """The trained low-rank part."""

    r: int = number(16, min=1)  # rank
    alpha: float = positive(32.0)  # the update is scaled by alpha / r
    rslora: bool = False  # true: scaled by alpha / sqrt(r)
    dropout: float = below_one(0.0)  # dropout on the input of LoRA; 0 = off
    targets: str | list[str] = "all-linear"  # all-linear, attention, or module name endings


@dataclass(frozen=True)
class DataConfig:
    """Where the labelled examples come from."""

    path: str | None = None  # a folder with the task's files, or a benchmark root
    fallback: str = one_of("none", "none", "bundled")  # where no files are found
    cache: str | None = None  # where a download is kept; null = the user's cache folder
    url: str = "https://dl.fbaipublicfiles.com/glue/data"  # where a download comes from
    exclude_pretraining_labels: bool = True  # leave out what the bundled model saw labelled
    min_words: int = number(0, min=0)  # leave out shorter training sentences; 0 = keep all
    limit: int = number(0, min=0)  # training examples to use; 0 = all
    max_prompt_tokens: int = number(0, min=0)  # longest prompt; 0 = what the context allows


@dataclass(frozen=True)
class RewardConfig:
    """What an answer earns."""

    scale: str = one_of("paper", "paper", "code")  # right/wrong/none: 1/0/-1, or 1/-1/-3


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled in training."""

    batch_size: int = number(16, min=1)  # prompts a step
    samples_per_prompt: int = number(1, min=1)  # answers to each prompt
    max_new_tokens: int = number(16, min=1)  # longest answer
    temperature: float = positive(1.0)  # of sampling, and of every log-probability
    top_k: int = number(0, min=0)  # 0 = off, and training needs it off
    top_p: float = number(1.0, min=0, max=1, exclusive_min=True)  # 1 = off, as training needs


@dataclass(frozen=True)
class PPOConfig:
    """The PPO update."""

    preset: str = one_of("default", "default", "legacy")  # legacy: the paper's released code
    epochs: int = number(4, min=1)  # passes over each step's answers
    minibatch_size: int = number(16, min=1)  # answers per optimizer step; the last may be smaller
    micro_batch_size: int = number(0, min=0)  # answers per forward (memory only); 0 = minibatch
    clip: float = number(0.2, min=0, max=1, exclusive_min=True, exclusive_max=True)  # of the ratio
    clip_high: float | None = positive(None)  # upper clip of the ratio; null = same as clip
    dual_clip: float | None = number(None, min=1, exclusive_min=True)  # null = off
    value_clip: float | None = positive(0.2)  # how far a value may move; null = off
    gamma: float = share(1.0)  # discount
    lam: float = share(0.95)  # lambda of GAE
    kl_coef: float = number(0.2, min=0)  # penalty per token (start value if adaptive); 0 = off
    kl_estimator: str = one_of("k1", "k1", "k2", "k3", "exact")  # how the KL is measured
    kl_adaptive: bool = True  # steer kl_coef towards kl_target
    kl_target: float = positive(6.0)  # KL of a whole answer to steer towards
    kl_horizon: int = number(10000, min=1)  # answers over which the steering acts
    value_coef: float = number(0.1, min=0)  # weight of the value loss; 0 = off
    entropy_coef: float = number(0.0, min=0)  # weight of the entropy bonus; 0 = off
    whiten_advantages: bool = True  # mean 0, deviation 1 over the step's tokens
    whiten_rewards: bool = False  # deviation 1, the mean kept
    critic_target: str = one_of("gae", "gae", "td0")  # td0: the paper's equation 1
    target_kl: float | None = positive(None)  # stop a step's epochs beyond it; null = off
    max_ratio: float = number(10.0, min=0)  # skip a minibatch with a mean ratio above; 0 = off


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = one_of("adafactor", "adafactor", "adamw")  # the paper uses adafactor
    lr: float = positive(9e-6)  # highest learning rate
    value_lr: float | None = positive(None)  # of the value head; null = lr
    weight_decay: float = number(0.0, min=0)  # 0 = off
    beta1: float = below_one(0.9)  # adamw only
    beta2: float = below_one(0.95)  # adamw only
    eps: float = positive(1e-5)  # adamw only
    max_grad_norm: float = number(1.0, min=0)  # gradients are scaled down to it; 0 = off
    schedule: str = one_of("cosine", "cosine", "constant")  # after the warm-up
    warmup: float = share(0.1)  # share of the updates spent climbing to lr; 0 = off
    min_lr_ratio: float = share(0.1)  # cosine ends at this share of lr


@dataclass(frozen=True)
class TrainConfig:
    """The length of a run, and what it leaves on disk."""

    steps: int = number(100, min=1)  # PPO iterations
    eval_every: int = number(0, min=0)  # steps between evaluations; 0 = only at the end
    checkpoint_every: int = number(50, min=0)  # steps between checkpoints; 0 = only at the end
    keep_checkpoints: int = number(2, min=1)  # older ones are deleted
    max_bad_steps: int = number(5, min=1)  # stop after so many steps in a row without an update


@dataclass(frozen=True)
class EvalConfig:
    """How the model is scored."""

    split: str = "dev"  # which part of the data
    limit: int = number(0, min=0)  # examples to use; 0 = all
    batch_size: int = number(64, min=1)  # prompts at a time
    before: bool = True  # score the untrained model too
    bootstrap: int = number(1000, min=0)  # resamples for the confidence interval; 0 = off


@dataclass(frozen=True)
class LogConfig:
    """What is shown and recorded."""

    tensorboard: bool = False  # write TensorBoard files
    wandb: bool = False  # send metrics to Weights & Biases
    project: str = "ppo_nlu"  # project name there
    progress: bool = True  # one line a step
    plot: bool = True  # draw curves.png at the end


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    task: str  # a name from the task table, such as sst2
    method: str = one_of("ppo", *METHODS)
    seed: int = number(0, min=0, max=2**32 - 1)
    init_from: str | None = None  # an adapter folder to start from (and to stay near)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for key, problem in _conflicts(self):
            raise UserError(f"{key}: {problem}")

    @property
    def answers_per_step(self) -> int:
        """Answers that one rollout yields."""
        return self.rollout.batch_size * self.rollout.samples_per_prompt

    @property
    def ppo_micro_batch(self) -> int:
        """Answers per forward of the update."""
        return self.ppo.micro_batch_size or self.ppo.minibatch_size


def _conflicts(cfg: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) for what no field can know by itself."""
    full = "training needs the log-probabilities of the full distribution"
    if cfg.rollout.top_k:
        yield "rollout.top_k", f"{cfg.rollout.top_k} is refused: {full}; leave it at 0 (off)"
    if cfg.rollout.top_p < 1:
        yield "rollout.top_p", f"{cfg.rollout.top_p} is refused: {full}; leave it at 1 (off)"
    minibatch, micro = cfg.ppo.minibatch_size, cfg.ppo.micro_batch_size
    if minibatch > cfg.answers_per_step:
        yield (
            "ppo.minibatch_size",
            (
                f"{minibatch} is more than the {cfg.answers_per_step} answers of a step "
                "(rollout.batch_size x rollout.samples_per_prompt); lower it, or raise those"
            ),
        )
    if micro > minibatch:
        yield (
            "ppo.micro_batch_size",
            (
                f"{micro} is more than ppo.minibatch_size ({minibatch}); "
                "lower it, or use 0 for the whole minibatch"
            ),
        )
    if 0 < cfg.ppo.max_ratio <= 1:
        yield (
            "ppo.max_ratio",
            (
                f"{cfg.ppo.max_ratio} would skip every minibatch (the ratio starts at 1); "
                "use more than 1, or 0 for off"
            ),
        )
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.model.device):
        yield (
            "model.device",
            (f"{cfg.model.device!r} is not a device; use auto, cpu, cuda, cuda:<number> or mps"),
        )
    if cfg.lora.targets == []:
        yield "lora.targets", "is empty; use all-linear, attention, or module name endings"


# The semantics of the paper's released code: PPOTrainer.step of TRL 0.11. Values that equal today's
# defaults are stated too, so that a change of the defaults does not move the preset. One departure:
# the code drops out 0.05 in LoRA and 0.1 in the value head; dropout here is off unless asked for,
# because it moves the ratio away from 1 before the first update.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "legacy": {
        "model.value_head": "linear",
        "lora.r": 16,
        "lora.alpha": 32.0,
        "lora.rslora": True,
        "lora.targets": ["q_proj", "v_proj"],
        "reward.scale": "code",
        "rollout.batch_size": 16,
        "rollout.samples_per_prompt": 1,
        "rollout.max_new_tokens": 32,
        "rollout.temperature": 1.0,
        "ppo.epochs": 4,
        "ppo.minibatch_size": 16,
        "ppo.micro_batch_size": 8,
        "ppo.clip": 0.2,
        "ppo.clip_high": None,
        "ppo.dual_clip": None,
        "ppo.value_clip": 0.2,
        "ppo.gamma": 1.0,
        "ppo.lam": 0.95,
        "ppo.kl_coef": 0.2,
        "ppo.kl_estimator": "k1",
        "ppo.kl_adaptive": True,
        "ppo.kl_target": 6.0,
        "ppo.kl_horizon": 10000,
        "ppo.value_coef": 0.1,
        "ppo.entropy_coef": 0.0,
        "ppo.whiten_advantages": True,
        "ppo.whiten_rewards": False,
        "ppo.critic_target": "gae",
        "ppo.target_kl": None,
        "ppo.max_ratio": 10.0,
        "optim.name": "adafactor",
        "optim.lr": 9e-6,
        "optim.value_lr": None,
        "optim.weight_decay": 0.0,
        "optim.max_grad_norm": 0.0,
        "optim.schedule": "constant",
        "optim.warmup": 0.0,
    },
}


# --- what programs call ---------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, its preset, and `section.key=value` overrides."""
    given = _given(Config, path, overrides)
    if "ppo.preset" in given:
        where, name = given["ppo.preset"]
        name = _checked(_schema(Config)["ppo.preset"], name, where, "ppo.preset")
        given = {key: (where, value) for key, value in PRESETS[name].items()} | given
    return _build(Config, given, str(path))


def load_dataclass(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """An instance of any dataclass (sections are nested dataclasses), read as strictly as Config.

    Its `__post_init__` may raise UserError("section.key: what is wrong"); the place is put before.
    """
    return _build(cls, _given(cls, path, overrides), str(path))


def parse_overrides(overrides: Sequence[str], cls: type = Config) -> dict[str, Any]:
    """`section.key=value` texts as {dotted key: YAML value}; of a repeated key the last wins."""
    found: dict[str, Any] = {}
    for text in overrides:
        found |= _override(cls, text)
    return found


def _override(cls: type, text: str) -> dict[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise _error(COMMAND_LINE, short(text), "expected section.key=value, as in seed=3")
    tree, _ = _parse(value, lambda _: f"{COMMAND_LINE}: {key}")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(_flatten(cls, tree, lambda _: COMMAND_LINE))


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain values, sections in their order."""
    return asdict(cfg)


def dump(cfg: Any) -> str:
    """YAML text with every value; loading it gives an equal configuration."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True, width=1000)


def save_config(cfg: Any, path: str | Path) -> None:
    """Write `dump(cfg)`; whoever reads the file sees the old text or the new, never a part."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(dump(cfg))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def diff(a: Any, b: Any, allowed: Collection[str] = ()) -> list[str]:
    """The dotted keys whose values differ, apart from the allowed ones (keys or whole sections)."""
    left, right = _leaves(to_dict(a)), _leaves(to_dict(b))
    missing = object()
    return [
        key
        for key in dict.fromkeys([*left, *right])
        if left.get(key, missing) != right.get(key, missing)
        and key not in allowed
        and key.partition(".")[0] not in allowed
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        found |= _leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


# --- YAML, without its surprises ------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Plain words stay words: only true/false are booleans, and 1:30, 010, dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # this class's own; the global one is untouched


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",  # no wider than PyYAML's own, so that what it writes as text is read as text
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )

# 1e-5 has no dot, so YAML 1.1 calls it text; where a number is wanted it is one.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


def _read_file(path: Path) -> tuple[Any, dict[str, int]]:
    """The value in a YAML file, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _error(str(path), "", f"no such file; {_similar_file(path)}") from None
    except OSError as error:
        raise _error(str(path), "", f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _error(str(path), "", "is not UTF-8 text; save it as UTF-8") from None
    tree, lines = _parse(text, lambda line: f"{path}:{line}" if line else str(path))
    if tree is not None and not isinstance(tree, dict):
        raise _error(str(path), "", "expected `key: value` lines at the top level")
    return tree or {}, lines


def _parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of each dotted key; `place` names a line (0: none)."""
    lines: dict[str, int] = {}
    mend = "check indentation, colons, quotes and brackets there"
    try:
        node = yaml.compose(text, Loader=_Loader)
        if isinstance(node, yaml.MappingNode):
            _note_lines(node, place, "", lines)
        return yaml.load(text, Loader=_Loader), lines
    except _Placed:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line + 1, len(text.splitlines())) if mark else 0  # the end is past the last
        raise _error(place(line), "", f"not valid YAML: {error.problem}; {mend}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _error(place(0), "", f"not valid YAML: {error}; {mend}") from None


def _note_lines(
    node: yaml.MappingNode, place: Callable[[int], str], prefix: str, lines: dict[str, int]
) -> None:
    """Note where each key stands; refuse a repeated one (PyYAML would let the last win)."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            name = short(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list"
            raise _error(place(line), "", f"{name} cannot be a key; keys are words")
        key = prefix + key_node.value
        if key in lines:
            again = f"is given twice (first on line {lines[key]}); keep one"
            raise _error(place(line), key, again)
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _note_lines(value_node, place, f"{key}.", lines)


def _similar_file(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.with_name(near[0])}?" if near else "check the path"


# --- from plain values to dataclasses -------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """One key that takes a value: its type and its metadata."""

    kind: Any
    limits: Mapping[str, Any]


def _schema(cls: Any, prefix: str = "") -> dict[str, _Leaf]:
    """Every key of a tree of dataclasses, dotted, in order."""
    kinds = get_type_hints(cls)
    found: dict[str, _Leaf] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        leaf = {key: _Leaf(kind, item.metadata)}
        found |= _schema(kind, f"{key}.") if is_dataclass(kind) else leaf
    return found


def _given(cls: type, path: str | Path, overrides: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """{dotted key: (where it was said, value)} of the file and the overrides, keys checked."""
    tree, lines = _read_file(Path(path))

    def place(key: str) -> str:
        return f"{path}:{lines[key]}" if key in lines else str(path)

    given = {key: (place(key), value) for key, value in _flatten(cls, tree, place)}
    said = parse_overrides(overrides, cls)
    return given | {key: (COMMAND_LINE, value) for key, value in said.items()}


def _flatten(
    cls: Any, tree: Mapping[str, Any], place: Callable[[str], str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; unknown keys and misused sections are errors."""
    schema = _schema(cls)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        inside = [known for known in schema if known.startswith(f"{key}.")]
        if key in schema and "." not in str(name):
            yield key, value
        elif not inside or "." in str(name):
            raise _error(place(key), key, f"unknown key; {_nearest(key, schema)}")
        elif isinstance(value, Mapping):
            yield from _flatten(cls, value, place, f"{key}.")
        elif value is not None:  # an empty section is one with all its lines commented out
            mend = f"it is a section; set keys inside it, such as {inside[0]}"
            raise _error(place(key), key, f"got {short(value)}, but {mend}")


def _nearest(key: str, known: Collection[str]) -> str:
    """What was probably meant: the same name elsewhere, then a similar one here, then anywhere."""
    section, _, name = key.lstrip("-").rpartition(".")
    if section and f"{section}.{name}" in known:
        return f"in a file, write `{name}:` indented under `{section}:`"
    parts = [(*other.rpartition(".")[::2], other) for other in known]  # (section, name, dotted)
    here = {own: other for where, own, other in parts if where == section}
    near = [other for _, own, other in parts if own == name]
    near = near or [here[own] for own in get_close_matches(name, here, n=1)]
    if not near:
        names = {own: other for _, own, other in parts}
        sections = dict.fromkeys(where for where, _, _ in parts if where)
        near = [names[own] for own in get_close_matches(name, names, n=1)]
        near = near or get_close_matches(key, sections, n=1) * (not section)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known keys: {', '.join(here.values() or known)}"


def _build(cls: Any, given: Mapping[str, tuple[str, Any]], path: str) -> Any:
    """The instance; a problem found by a `__post_init__` gets the place of the key it names."""
    try:
        return _section(cls, given, path, "", None)
    except _Placed:
        raise
    except UserError as error:
        where = given.get(str(error).partition(":")[0], (path, None))[0]
        raise _Placed(f"{where}: {error}") from None


def _section(
    cls: Any, given: Mapping[str, tuple[str, Any]], path: str, prefix: str, base: Any
) -> Any:
    """One dataclass of the tree; `base`, where there is one, holds what was not given."""
    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    for item in fields(cls):
        key, kind = prefix + item.name, kinds[item.name]
        default = _default(item) if base is None else getattr(base, item.name)
        if is_dataclass(kind):
            start = None if default is MISSING else default
            values[item.name] = _section(kind, given, path, f"{key}.", start)
        elif key in given:
            where, value = given[key]
            values[item.name] = _checked(_Leaf(kind, item.metadata), value, where, key)
        elif default is MISSING:
            raise _error(path, key, f"is missing; add `{item.name}: ...`")
        else:
            values[item.name] = default
    return cls(**values)


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _checked(leaf: _Leaf, value: Any, where: str, key: str) -> Any:
    """The value in its field's type and within its limits."""
    try:
        value = _convert(leaf.kind, value)
    except TypeError:
        hint = _type_hint(leaf.kind, value, where, key)
        raise _error(
            where, key, f"expected {_describe(leaf.kind)}, got {_name(value)}{hint}"
        ) from None
    problem = _out_of_limits(leaf.limits, value)
    if problem:
        raise _error(where, key, f"{_name(value)} {problem}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    """The value as that type, or TypeError; the only changes are to float."""
    if get_origin(kind) in (Union, types.UnionType):
        for arm in get_args(kind):
            try:
                return _convert(arm, value)
            except TypeError:
                continue
    elif get_origin(kind) is list and isinstance(value, list):
        return [_convert(get_args(kind)[0], item) for item in value]
    elif kind is float and not isinstance(value, bool):
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)
        if isinstance(value, int) and abs(value) < 1e300:
            value = float(value)
        if isinstance(value, float) and math.isfinite(value):
            return value
    elif kind is str and isinstance(value, str) and value.strip() and value != "None":
        return value
    elif kind in (bool, int, type(None)) and type(value) is kind:
        return value
    raise TypeError


def _describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in get_args(kind))
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0]).removeprefix('a ')}s"
    return {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }[kind]


def _type_hint(kind: Any, value: Any, where: str, key: str) -> str:
    """How to mend the commonest wrong types."""
    kinds = get_args(kind) or (kind,)
    number_like = _EXPONENT.fullmatch(value) if isinstance(value, str) else type(value) is not bool
    if value == "None" and type(None) in kinds:
        return "; write null"
    if str in kinds and isinstance(value, bool | int | float):
        quoted = f"'{key}=\"{_name(value)}\"'" if where == COMMAND_LINE else f"'{_name(value)}'"
        return f"; quote it: {quoted}"
    if float in kinds and isinstance(value, str | int | float) and number_like:
        return "; it must be finite"
    if bool in kinds and str(value).lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if str(value).lower() in ('yes', 'on') else 'false'}"
    return ""


def _name(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else short(value)


def _out_of_limits(limits: Mapping[str, Any], value: Any) -> str:
    """What a value breaks of its field's metadata, and the mend; "" when nothing."""
    if value is None:
        return ""
    if "choices" in limits and value not in limits["choices"]:
        near = get_close_matches(str(value), [str(c) for c in limits["choices"]], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"is not a choice; {hint}use {' or '.join(map(str, limits['choices']))}"
    low, high = limits.get("min"), limits.get("max")
    over = limits.get("exclusive_min", False)
    under = limits.get("exclusive_max", False)
    too_low = low is not None and (value <= low if over else value < low)
    too_high = high is not None and (value >= high if under else value > high)
    if not (too_low or too_high):
        return ""
    bounds = []
    if low is not None:
        bounds.append(f"more than {low}" if over else f"at least {low}")
    if high is not None:
        bounds.append(f"less than {high}" if under else f"at most {high}")
    return f"is out of range; it must be {' and '.join(bounds)}"


class _Placed(UserError):
    """A UserError whose message already starts with the place."""


def _error(where: str, key: str, text: str) -> UserError:
    """`where: key: text` on one line."""
    parts = [part for part in (where, key, text) if part]
    return _Placed(" ".join(": ".join(parts).split()))

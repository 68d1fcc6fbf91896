"""The configuration: what it accepts, what it refuses and in which words, and that it reloads."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from ppo_nlu import config
from ppo_nlu.config import (
    PRESETS,
    Config,
    LogConfig,
    LoraConfig,
    PPOConfig,
    diff,
    dump,
    load_config,
    load_dataclass,
    number,
    parse_overrides,
    strict_config,
    to_dict,
)
from ppo_nlu.config.fields import schema
from ppo_nlu.config.idle_keys import idle_keys, reads
from ppo_nlu.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TASK = "task: sst2\n"
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a YAML text to `run.yaml` and returns its path."""

    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message(path: Path, overrides: tuple[str, ...] = ()) -> str:
    """The one line that refuses this file."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Each row: what stands below `task: sst2` in the file; the line of the place (0: no line); the
# dotted key ("" where there is none); words that say what is wrong and how to mend it.
FILE_ERRORS = [
    # names
    ("lr: 1", 2, "lr", ["unknown key", "did you mean optim.lr?"]),
    ("ppo: {lr: 1}", 2, "ppo.lr", ["did you mean optim.lr?"]),
    ("seed: 1\nppo:\n  clipp: 1", 4, "ppo.clipp", ["did you mean ppo.clip?"]),
    (
        "train: {batch_size: 1}",
        2,
        "train.batch_size",
        ["rollout.batch_size or sft.batch_size or encoder.batch_size or eval.batch_size?"],
    ),
    ("optm: {lr: 1}", 2, "optm", ["did you mean optim?"]),
    ("methd: ppo", 2, "methd", ["did you mean method?"]),
    ("lora: {zzz: 1}", 2, "lora.zzz", ["known keys: lora.r, lora.alpha"]),
    ("ppo.clip: 0.1", 2, "ppo.clip", ["write `clip:` indented under `ppo:`"]),
    ("<<: {seed: 1}", 2, "<<", ["unknown key"]),
    # shape of the file
    ("seed: 1\nseed: 2", 3, "seed", ["given twice", "first on line 2", "keep one"]),
    ("ppo:\n  clip: 0.1\n  clip: 0.1", 4, "ppo.clip", ["given twice", "first on line 3"]),
    ("ppo: {clip: 0.1}\nppo: {gamma: 1}", 3, "ppo", ["given twice"]),
    ("ppo: 3", 2, "ppo", ["got 3", "it is a section", "ppo.preset"]),
    ("1: 2", 2, "", ["'1' cannot be a key", "keys are words"]),
    ("? [a]\n: 2", 2, "", ["a list cannot be a key"]),
    ("seed: 1: 2", 2, "", ["not valid YAML", "check indentation"]),
    ("seed: 1\n\tmethod: ppo", 3, "", ["not valid YAML"]),
    ("lora: [1", 2, "", ["not valid YAML"]),
    ("---\ntask: cola", 2, "", ["not valid YAML", "another document"]),
    ("seed: !!python/name:os.system", 2, "", ["not valid YAML", "tag"]),
    ("a: &a {b: *a}", 2, "", ["not valid YAML", "anchors and aliases", "write the value out"]),
    ("a: &a [1]\nb: [*a, *a]", 2, "", ["anchors and aliases"]),
    ("seed: !!int x", 2, "", ["not valid YAML", "tags such as", "write the plain value"]),
    ("log: {wandb: !!bool maybe}", 2, "", ["tags such as"]),
    ("seed: !!timestamp x", 2, "", ["tags such as"]),
    ("seed: !x 3", 2, "", ["tags such as !x"]),
    ("seed: " + "[" * 5000, 0, "", ["not valid YAML", "nested too deeply"]),
    ("seed: " + "9" * 5000, 0, "", ["not valid YAML", "4300"]),
    ('data: {path: "a\\0b"}', 2, "data.path", ["control character U+0000", "leave it out"]),
    ('data: {path: "a\\ud800b"}', 2, "data.path", ["control character U+D800"]),
    ('lora: {targets: [q, "\\e[2J"]}', 2, "lora.targets", ["control character U+001B"]),
    ("task: x\0y", 0, "", ["not valid YAML", "#x0000"]),
    ("data: {path: " + "x" * 5000 + "}", 2, "data.path", ["5,000 characters", "at most 4,096"]),
    ("lora: {targets: [" + "q," * 10001 + "]}", 2, "lora.targets", ["10,001 items"]),
    # types
    ("seed: true", 2, "seed", ["expected a whole number, got true"]),
    ("seed: 1.0", 2, "seed", ["expected a whole number, got 1.0"]),
    ("seed: 1e3", 2, "seed", ["expected a whole number, got '1e3'"]),
    ("seed: 1:30", 2, "seed", ["expected a whole number, got '1:30'"]),
    ("seed: 010", 2, "seed", ["expected a whole number, got '010'"]),
    ("seed: null", 2, "seed", ["expected a whole number, got null"]),
    ("seed: {a: 1}", 2, "seed", ["expected a whole number, got {'a': 1}"]),
    ("optim: {lr: true}", 2, "optim.lr", ["expected a number, got true"]),
    ("optim: {lr: fast}", 2, "optim.lr", ["expected a number, got 'fast'"]),
    ("optim: {lr: '0.1'}", 2, "optim.lr", ["expected a number, got '0.1'"]),
    ("optim: {lr: .nan}", 2, "optim.lr", ["got nan", "finite"]),
    ("optim: {lr: .inf}", 2, "optim.lr", ["got inf", "finite"]),
    ("optim: {lr: 1e999}", 2, "optim.lr", ["got '1e999'", "finite"]),
    (f"optim: {{lr: {'9' * 400}}}", 2, "optim.lr", ["expected a number", "finite"]),
    ("log: {wandb: yes}", 2, "log.wandb", ["expected true or false, got 'yes'", "write true"]),
    ("log: {wandb: off}", 2, "log.wandb", ["got 'off'", "write false"]),
    ("log: {wandb: 1}", 2, "log.wandb", ["expected true or false, got 1"]),
    ("log: {project: 12}", 2, "log.project", ["expected a text, got 12", "quote it: '12'"]),
    ("log: {project: ''}", 2, "log.project", ["expected a text, got ''"]),
    ("log: {project: null}", 2, "log.project", ["expected a text, got null"]),
    ("data: {path: None}", 2, "data.path", ["a text or null", "write null"]),
    ("lora: {targets: [q, 1]}", 2, "lora.targets", ["a text or a list of texts", "['q', 1]"]),
    ("lora: {targets: []}", 2, "lora.targets", ["is empty", "all-linear"]),
    # limits
    ("ppo: {clip: -1}", 2, "ppo.clip", ["-1.0 is out of range", "more than 0 and less than 1"]),
    ("ppo: {clip: 0}", 2, "ppo.clip", ["out of range"]),
    ("ppo: {clip: 1}", 2, "ppo.clip", ["out of range"]),
    ("ppo: {lam: 1.01}", 2, "ppo.lam", ["at least 0 and at most 1"]),
    ("ppo: {dual_clip: 1}", 2, "ppo.dual_clip", ["more than 1"]),
    ("lora: {r: 0}", 2, "lora.r", ["0 is out of range", "at least 1"]),
    ("lora: {dropout: 1}", 2, "lora.dropout", ["at least 0 and less than 1"]),
    ("optim: {lr: 0}", 2, "optim.lr", ["more than 0"]),
    ("rollout: {temperature: 0}", 2, "rollout.temperature", ["at least 0.001"]),
    ("seed: -1", 2, "seed", ["at least 0"]),
    ("model: {attention: spda}", 2, "model.attention", ["did you mean sdpa?", "sdpa or eager"]),
    ("model: {dtype: float64}", 2, "model.dtype", ["float32 or bfloat16 or float16"]),
    ("method: dpo", 2, "method", ["'dpo' is not a choice", "use ppo"]),
    ("ppo: {preset: legcy}", 2, "ppo.preset", ["did you mean legacy?"]),
    # keys that disagree
    ("rollout: {top_k: 5}", 2, "rollout.top_k", ["full distribution", "leave it at 0 (off)"]),
    ("rollout: {top_p: 0.9}", 2, "rollout.top_p", ["full distribution", "leave it at 1 (off)"]),
    ("lora: {targets: []}\nseed: 1", 2, "lora.targets", ["is empty"]),
    ("ppo: {preset: legacy, max_ratio: 1}", 2, "ppo.max_ratio", ["more than 1, or 0 for off"]),
    ("seed: 1\nppo: {max_ratio: 0.5}", 3, "ppo.max_ratio", ["more than 1, or 0 for off"]),
    ("method: grpo\nrollout: {samples_per_prompt: 1}", 3, "rollout.samples_per_prompt", ["2 or"]),
    ("grpo: {max_ratio: 1}", 2, "grpo.max_ratio", ["more than 1, or 0 for off"]),
    ("grpo: {advantage: loo}", 2, "grpo.advantage", ["group or rloo"]),
    ("model: {device: gpu}", 2, "model.device", ["'gpu' is not a device", "cuda"]),
    *(
        (f"model: {{device: '{name}'}}", 2, "model.device", ["use auto, cpu, cuda"])
        for name in ("mps", "meta", "xpu", "cpu:3", "cuda:", "cuda:-1", "cuda:\u0663", "CUDA")
    ),
    (
        "rollout: {batch_size: 65536, samples_per_prompt: 4096}",
        2,
        "rollout.samples_per_prompt",
        ["268,435,456 answers a step", "at most 1,048,576"],
    ),
    ("custom: {low: 0, high: 1e6, step: 1e-3}", 2, "custom.step", ["1,000,000,000 ratings"]),
]


@pytest.mark.parametrize(("text", "line", "key", "words"), FILE_ERRORS)
def test_a_wrong_file_is_refused_in_one_line(
    write: Write, text: str, line: int, key: str, words: list[str]
) -> None:
    path = write(TASK + text + "\n")
    said = message(path)
    place = f"{path}:{line}" if line else str(path)
    assert said.startswith(f"{place}: {key}: " if key else f"{place}: ")
    for word in words:
        assert word in said


OVERRIDE_ERRORS = [
    ("seed", "'seed'", ["expected section.key=value"]),
    ("=3", "'=3'", ["expected section.key=value"]),
    ("lr=3", "lr", ["unknown key", "did you mean optim.lr?"]),
    ("--seed=3", "--seed", ["did you mean seed?"]),
    ("ppo.clipp=3", "ppo.clipp", ["did you mean ppo.clip?"]),
    ("ppo=3", "ppo", ["it is a section"]),
    ("ppo.clip.x=3", "ppo.clip", ["expected a number"]),
    ("ppo.clip=[", "ppo.clip", ["not valid YAML"]),
    ("ppo.clip=2", "ppo.clip", ["out of range"]),
    ("ppo={clip: 0.1, clip: 0.2}", "ppo", ["clip: is given twice"]),
    ("seed=", "seed", ["expected a whole number, got null"]),
    ("log.wandb=on", "log.wandb", ["write true"]),
    ("log.project=12", "log.project", ["quote it: 'log.project=\"12\"'"]),
    ("ppo.preset=x", "ppo.preset", ["default or legacy"]),
    ("rollout.top_k=5", "rollout.top_k", ["full distribution"]),
    ("model.value_dropout=0.1", "model.value_dropout", ["did you mean model.value_head?"]),
]


@pytest.mark.parametrize(("override", "key", "words"), OVERRIDE_ERRORS)
def test_a_wrong_override_names_the_command_line(
    write: Write, override: str, key: str, words: list[str]
) -> None:
    said = message(write(TASK), (override,))
    assert said.startswith(f"command line: {key}: ")
    for word in words:
        assert word in said


def test_files_that_cannot_be_read(tmp_path: Path, write: Write) -> None:
    path = write("seed: 1\n")
    assert (
        message(path) == f"{path}: task: is missing; add `task: ...`, or `tasks: [...]` for several"
    )
    assert message(write("")).startswith(f"{path}: task: is missing")
    assert message(write("- task")).startswith(f"{path}: expected `key: value`")
    assert (
        message(tmp_path / "rum.yaml") == f"{tmp_path}/rum.yaml: no such file; did you mean {path}?"
    )
    assert "check the path" in message(tmp_path / "none" / "x.yaml")
    assert message(tmp_path).startswith(f"{tmp_path}: cannot be read")
    path.write_bytes(b"task: \xff")
    assert "save it as UTF-8" in message(path)
    path.write_bytes("task: sst2\n".encode("utf-16"))
    assert "save it as UTF-8" in message(path)
    path.write_bytes(b"#" * 1_000_001)
    assert "larger than 1,000,000 bytes" in message(path)
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe or a device" in message(tmp_path / "pipe")
    assert "a pipe or a device" in message(Path("/dev/zero"))
    assert "no such file" in message(Path("~nobody/x.yaml"))
    assert "too long" in message(tmp_path / ("x" * 5000))
    assert "null" in message(tmp_path / "a\0b")
    assert len(message(tmp_path / ("x" * 5000))) < 600


def test_a_mark_at_the_head_of_the_file_is_no_letter(write: Write) -> None:
    assert load_config(write("\ufeff" + TASK)).task == "sst2"


NUMBERS = {
    key: leaf
    for key, leaf in schema(Config).items()
    if {int, float} & {leaf.kind, *get_args(leaf.kind)}
}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_its_range(write: Write, key: str) -> None:
    """A value just outside is refused in words that name the range; so is what is not a number."""
    limits, whole = NUMBERS[key].limits, int in (NUMBERS[key].kind, *get_args(NUMBERS[key].kind))
    low, high = limits["min"], limits["max"]
    assert low is not None and high is not None
    outside = [low if limits["exclusive_min"] else low - 1, high + (1 if whole else high)]
    outside += [] if not limits["exclusive_max"] else [high]
    path = write(TASK)
    for value in [*outside, -(10**40), 10**40]:
        assert "out of range; it must be" in message(path, (f"{key}={value!r}",))
    odd = ["nan", ".nan", ".inf", "-.inf", "1e400", "-1e400", "true", "''", "[]", "{}", "\u0661"]
    odd += ["'3'", "0x10", "3,5", "3 4", "None", "9" * 5000, *(["1.5", "1e1"] * whole)]
    for text in odd:
        said = message(path, (f"{key}={text}",))
        assert said.startswith(f"command line: {key}: ") and len(said) < 600
    if type(None) not in get_args(NUMBERS[key].kind):
        assert "got null" in message(path, (f"{key}=",))


@pytest.mark.parametrize("name", config.FOREIGN_NAMES)
def test_every_foreign_name_leads_to_keys_that_exist(write: Write, name: str) -> None:
    """Alone, in a section of ours, and in capitals; no such name hides a key of ours there."""
    known = schema(Config)
    targets = config.FOREIGN_NAMES[name]
    assert name not in known
    assert all(key in known or key in ("--output", "--resume") for key in targets)
    path = write(TASK)
    for written in (name, f"log.{name}", name.upper()):
        assert any(key in message(path, (f"{written}=1",)) for key in targets)
    assert set(config.NOTES) <= set(config.FOREIGN_NAMES)


def test_every_near_miss_leads_to_keys_that_exist(write: Write) -> None:
    known, path = schema(Config), write(TASK)
    for name, targets in config.NEAR_MISSES.items():
        assert name not in known and set(targets) <= set(known)
        assert f"did you mean {' or '.join(targets)}?" in message(path, (f"{name}=1",))


@pytest.mark.parametrize("name", config.ABSENT)
def test_a_foreign_name_without_counterpart_is_told_so(write: Write, name: str) -> None:
    assert name not in config.FOREIGN_NAMES and name not in schema(Config)
    for written in (name, f"model.{name}", name.upper()):
        said = message(write(TASK), (f"{written}=1",))
        assert f"there is no such thing here: {config.ABSENT[name]}" in said
        assert "did you mean" not in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("beta=0.1", ["ppo.kl_coef or grpo.kl_coef"]),
        ("grpo.beta=0.1", ["did you mean grpo.kl_coef?"]),
        ("optim.learning_rate=1", ["did you mean optim.lr?"]),
        ("rollout.num_generations=4", ["did you mean rollout.samples_per_prompt?"]),
        ("num_train_epochs=3", ["did you mean train.steps?", "not passes over the rows"]),
        ("output_dir=x", ["did you mean --output?"]),
        ("train.seed=3", ["did you mean seed?"]),
        ("learnig_rate=3", ["did you mean optim.lr?"]),
        ("temperature=1", ["rollout.temperature"]),
        ("max_grad_norm=1", ["optim.max_grad_norm"]),
        ("weight_decay=1", ["optim.weight_decay"]),
        ("gamma=1", ["ppo.gamma"]),
        ("train.epochs=3", ["did you mean train.steps?", "not passes over the rows"]),
        ("sft.epochs=3", ["did you mean train.steps?"]),
        ("epochs=3", ["ppo.epochs or grpo.epochs or train.steps?"]),
        ("model.name=gpt2", ["did you mean model.name_or_path?"]),
        ("model.id=gpt2", ["did you mean model.name_or_path?"]),
        ("per_device_train_batch_size=8", ["rollout.batch_size or sft.batch_size or"]),
        ("lora_r=8", ["did you mean lora.r?"]),
        ("lora.lora_alpha=8", ["did you mean lora.alpha?"]),
        ("lora.target_modules=[q]", ["did you mean lora.targets?"]),
        ("lora.task_type=CAUSAL_LM", ["method: encoder"]),
        ("lora.bias=none", ["biases are not trained"]),
        ("data.max_length=512", ["data.max_prompt_tokens"]),
        ("train.bf16=true", ["did you mean model.dtype? (bfloat16)"]),
        ("optim.warmup_ratio=0.1", ["did you mean optim.warmup?"]),
        ("train.load_best_model_at_end=true", ["checkpoints/best"]),
        ("optim.betas=[0.9, 0.99]", ["optim.beta1 or optim.beta2"]),
        ("data.file=x.csv", ["did you mean custom.train?"]),
        ("custom.text=body", ["did you mean custom.fields?"]),
    ],
)
def test_names_of_other_libraries(write: Write, override: str, words: list[str]) -> None:
    said = message(write(TASK), (override,))
    for word in words:
        assert word in said


def test_only_differences_are_stated(write: Write) -> None:
    assert load_config(write(TASK)) == Config(task="sst2")
    expected = Config(task="sst2", ppo=PPOConfig(clip=0.1))
    assert load_config(write(TASK + "lora:\nppo:\n  clip: 0.1\n")) == expected


def test_numbers_of_yaml_1_1(write: Write) -> None:
    """1e-5 is text in YAML 1.1; here it is a number where a key takes numbers, else text."""
    cfg = load_config(write(TASK + "optim: {lr: 1e-5, weight_decay: 1}\nlog: {project: 1e-5}\n"))
    assert cfg.optim.lr == 1e-5
    assert cfg.optim.weight_decay == 1.0 and type(cfg.optim.weight_decay) is float
    assert cfg.log.project == "1e-5"
    for text in ("1E-5", "1.0e-5", "10e-6", ".1e-4", "1.e-5", "+1e-5"):
        assert load_config(write(f"{TASK}optim: {{lr: {text}}}\n")).optim.lr == 1e-5
    assert load_config(write(TASK + "seed: 1_000\n")).seed == 1000


def test_words_stay_words(write: Write) -> None:
    targets = "[no, yes, on, off, y, n, 1:30, 010, 2024-01-01, 0x1f]"
    cfg = load_config(write(f"{TASK}lora: {{targets: {targets}}}\nlog: {{project: no}}\n"))
    assert cfg.lora.targets == targets.strip("[]").split(", ")
    assert cfg.log.project == "no"
    assert load_config(write(TASK + "log: {wandb: True, plot: false}\n")).log.wandb is True


def test_the_global_yaml_loader_is_untouched() -> None:
    assert yaml.safe_load("[no, 1:30, 010]") == [False, 90, 8]


def test_null_only_where_it_means_something(write: Write) -> None:
    cfg = load_config(write(TASK + "ppo: {value_clip: null}\ndata: {path: ~}\n"))
    assert cfg.ppo.value_clip is None and cfg.data.path is None


def test_overrides_win_over_the_file(write: Write) -> None:
    path = write(TASK + "seed: 1\nppo: {clip: 0.1, gamma: 0.9}\nlora: {r: 4}\n")
    cfg = load_config(
        path, ["seed=3", "ppo.clip = 0.3", "lora.targets=[q_proj,v_proj]", "optim.lr=1e-5",
               "task=glue/rte", "ppo.value_clip=null", "lora={r: 2}", "seed=4"],
    )  # fmt: skip
    assert (cfg.seed, cfg.ppo.clip, cfg.ppo.gamma) == (4, 0.3, 0.9)
    assert (cfg.task, cfg.lora, cfg.optim.lr) == (
        "glue/rte",
        LoraConfig(r=2, targets=["q_proj", "v_proj"]),
        1e-5,
    )
    assert cfg.ppo.value_clip is None


OWN = "task: mine\ncustom: {name: mine, train: t.csv, fields: [text], labels: [a, b]}\n"


@pytest.mark.parametrize(
    ("text", "lr", "rank"),
    [
        (OWN, 1e-3, 32),  # the bundled model
        (OWN + "model: {name_or_path: org/half-billion}\n", 1e-4, 16),
        (OWN + "model: {name_or_path: org/half-billion}\nmethod: grpo\n", 1e-4, 16),
        (OWN + "model: {name_or_path: org/half-billion}\nmethod: sft\n", 2e-4, 16),
        (OWN + "method: encoder\n", 2e-5, 16),
        (OWN + "optim: {lr: 0.5}\nlora: {r: 2}\n", 0.5, 2),  # the file wins
        (OWN + "ppo: {preset: legacy}\n", 9e-6, 16),  # and so does a preset
        (OWN.replace("task: mine", "task: sst2"), 9e-6, 16),  # another task is trained
        (TASK, 9e-6, 16),
    ],
)
def test_a_task_of_ones_own_has_defaults_that_learn(
    write: Write, text: str, lr: float, rank: int
) -> None:
    cfg = load_config(write(text))
    assert (cfg.optim.lr, cfg.lora.r) == (lr, rank)
    assert cfg.rollout.batch_size == (64 if lr in (1e-3, 0.5) else 16)
    assert cfg.ppo.kl_adaptive == (cfg.method != "ppo" or lr == 9e-6)


def test_parse_overrides_gives_dotted_keys() -> None:
    found = parse_overrides(["seed=3", "optim.lr=1e-5", "lora={r: 2, targets: [q]}"], Config)
    assert found == {"seed": 3, "optim.lr": "1e-5", "lora.r": 2, "lora.targets": ["q"]}


def test_the_legacy_preset_is_the_released_code(write: Write) -> None:
    cfg = load_config(write(TASK + "ppo: {preset: legacy}\n"))
    assert (cfg.reward.scale, cfg.rollout.batch_size, cfg.rollout.max_new_tokens) == (
        "code",
        16,
        32,
    )
    lora, ppo, optim = cfg.lora, cfg.ppo, cfg.optim
    assert (lora.r, lora.alpha, lora.rslora, lora.targets) == (16, 32.0, True, ["q_proj", "v_proj"])
    assert (ppo.epochs, ppo.minibatch_size, ppo.micro_batch_size) == (4, 16, 8)
    assert (ppo.kl_coef, ppo.kl_estimator, ppo.kl_adaptive) == (0.2, "k1", True)
    assert (ppo.kl_target, ppo.kl_horizon, ppo.max_ratio) == (6.0, 10000, 10.0)
    assert (ppo.clip, ppo.value_clip, ppo.gamma, ppo.lam, ppo.value_coef) == (
        0.2,
        0.2,
        1,
        0.95,
        0.1,
    )
    assert ppo.whiten_advantages and not ppo.whiten_rewards and ppo.critic_target == "gae"
    assert (optim.name, optim.lr, optim.schedule, optim.warmup) == (
        "adafactor",
        9e-6,
        "constant",
        0,
    )
    assert optim.max_grad_norm == 0 and cfg.model.value_head == "linear"


def test_a_preset_yields_to_the_user(write: Write) -> None:
    """Even a value that equals the default counts as said."""
    text = TASK + "ppo: {preset: legacy, micro_batch_size: 0}\noptim: {max_grad_norm: 1.0}\n"
    cfg = load_config(write(text), ["rollout.max_new_tokens=16", "lora.rslora=false"])
    assert cfg.ppo.micro_batch_size == 0 and cfg.optim.max_grad_norm == 1.0
    assert cfg.rollout.max_new_tokens == 16 and cfg.lora.rslora is False
    assert cfg.reward.scale == "code"  # not said, so the preset's


def test_a_preset_can_come_from_the_command_line(write: Write) -> None:
    path = write(TASK + "ppo: {preset: legacy, value_clip: null}\n")
    assert load_config(path, ["ppo.preset=default"]).reward.scale == "paper"
    cfg = load_config(write(TASK + "optim: {lr: 1.0e-3}\n"), ["ppo.preset=legacy"])
    assert (cfg.reward.scale, cfg.optim.lr) == ("code", 1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_known_keys_and_legal_values(write: Write, name: str) -> None:
    """A preset written out as a file passes every check that a user's file passes."""
    tree: dict[str, Any] = {"task": "sst2"}
    for key, value in PRESETS[name].items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    cfg = load_config(write(yaml.safe_dump(tree)))
    assert replace(cfg, ppo=replace(cfg.ppo, preset=name)) == load_config(
        write(TASK), [f"ppo.preset={name}"]
    )


ODD_TEXTS = ["no", "true", "null", "~", "1e-5", "1.5e3", "3", "1:30", "010", "2024-01-01", "a: b"]
ODD_TEXTS += [
    "# x",
    "é 中",
    "two\nlines",
    "- a",
    "{",
    "'",
    '"',
    "word " * 400,
    "@a",
    "*a",
    "=",
    "<<",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_reloads(write: Write, text: str) -> None:
    lora, log = LoraConfig(targets=[text, "b"]), LogConfig(project=text)
    cfg = Config(task="sst2", lora=lora, log=log)
    assert load_config(write(dump(cfg))) == cfg
    assert not any(letter in text for letter in "é中") or text in dump(cfg)


@pytest.mark.parametrize("value", [9e-6, 1e-5, 1e-300, 1e20, 0.1, 3.0])
def test_any_number_reloads(write: Write, value: float) -> None:
    cfg = load_config(write(TASK), [f"optim.max_grad_norm={value!r}"])
    assert cfg.optim.max_grad_norm == value
    assert load_config(write(dump(cfg))).optim.max_grad_norm == value


def test_the_resolved_config_reloads_and_the_preset_stays_out(write: Write) -> None:
    overrides = ["ppo.preset=legacy", "ppo.value_clip=null", "lora.rslora=false", "seed=7"]
    cfg = load_config(write(TASK), overrides)
    text = dump(cfg)
    assert load_config(write(text)) == cfg
    assert list(yaml.safe_load(text)) == [item.name for item in fields(Config)]
    assert to_dict(cfg)["ppo"]["value_clip"] is None


def test_diff_names_the_keys_that_differ() -> None:
    a = Config(task="sst2")
    b = replace(a, seed=1, ppo=replace(a.ppo, clip=0.1, lam=0.9), log=replace(a.log, plot=False))
    assert diff(a, a) == []
    assert diff(a, b) == ["seed", "ppo.clip", "ppo.lam", "log.plot"]
    assert diff(a, b, allowed={"ppo.clip", "log"}) == ["seed", "ppo.lam"]
    assert diff(a, replace(a, lora=LoraConfig(targets=["q"]))) == ["lora.targets"]


def test_frozen() -> None:
    cfg = Config(task="sst2")
    for part, name in ((cfg, "seed"), (cfg.ppo, "clip")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, 1)


def test_a_config_built_in_python_is_cross_checked_too() -> None:
    with pytest.raises(UserError, match=r"^ppo\.max_ratio: 0\.5 would skip every minibatch"):
        Config(task="sst2", ppo=PPOConfig(max_ratio=0.5))


def test_a_batch_larger_than_what_it_splits_is_no_mistake(write: Write) -> None:
    """A minibatch of more than a step's answers is all of them, so one key alone can be changed."""
    cfg = load_config(write(TASK), ["rollout.batch_size=8", "ppo.micro_batch_size=32"])
    assert (cfg.rollout.batch_size, cfg.ppo.minibatch_size, cfg.ppo.micro_batch_size) == (8, 16, 32)


@dataclass(frozen=True)
class Inner:
    """A section of another program's configuration."""

    width: int = number(8, min=1)
    rate: float | None = None


@dataclass(frozen=True)
class Outer:
    """Another program's configuration, with a default for a section that is not the section's."""

    name: str
    inner: Inner = field(default_factory=lambda: Inner(width=16))
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.inner.width > 100:
            raise UserError("inner.width: is too wide; use 100 or less")


def test_other_dataclasses_are_read_as_strictly(write: Write) -> None:
    path = write("name: x\ninner: {rate: 1e-5}\n")
    assert load_dataclass(Outer, path) == Outer("x", Inner(16, 1e-5))
    cfg = load_dataclass(Outer, path, ["inner.width=3", "lora.r=2"])
    assert cfg == Outer("x", Inner(3, 1e-5), LoraConfig(r=2))
    assert load_dataclass(Outer, write(dump(cfg))) == cfg
    path = write("name: x\ninner:\n  width: 101\n")
    with pytest.raises(UserError) as caught:
        load_dataclass(Outer, path)
    assert str(caught.value) == f"{path}:3: inner.width: is too wide; use 100 or less"
    with pytest.raises(UserError, match=r"^command line: width: .*did you mean inner\.width\?"):
        load_dataclass(Outer, path, ["width=3"])
    with pytest.raises(UserError, match=r"^command line: inner\.width: 0 is out of range"):
        load_dataclass(Outer, path, ["inner.width=0"])


def sections() -> dict[str, type]:
    """The section classes by name."""
    kinds = get_type_hints(Config)
    return {
        item.name: kinds[item.name] for item in fields(Config) if is_dataclass(kinds[item.name])
    }


@pytest.mark.parametrize("name", sections())
def test_defaults_pass_their_own_limits(write: Write, name: str) -> None:
    assert load_config(write(yaml.safe_dump({"task": "sst2", name: to_dict(sections()[name]())})))


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_the_shipped_configs_load(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.names
    if path.name == "sst2.yaml":
        assert (cfg.task, cfg.method, cfg.data.fallback) == ("sst2", "ppo", "bundled")


def test_every_field_is_read_somewhere() -> None:
    """A key that nothing reads is a promise not kept."""
    read: set[str] = set()
    for path in (ROOT / "ppo_nlu").rglob("*.py"):
        if path != Path(config.__file__):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keys = [key for key in schema(Config) if key != "ppo.preset"]  # done once loaded
    unread = [key for key in keys if key.rpartition(".")[2] not in read]
    if unread and not (ROOT / "ppo_nlu" / "train.py").is_file():
        pytest.skip(f"no engine yet; not read: {', '.join(unread)}")
    assert unread == []


IDLE = [
    ("ppo: {clip: 0.1}\nmethod: sft", ["ppo.clip"]),
    ("grpo: {epochs: 2}", ["grpo.epochs"]),
    ("method: sft\nrollout: {batch_size: 4, max_new_tokens: 8}", ["rollout.batch_size"]),
    ("method: encoder\nlora: {r: 4}\nprompt: {shots: 2}", ["lora.r", "prompt.shots"]),
    ("mixture: {cap: 10}", ["mixture.cap"]),
    ("mixture: {mixing: equal}", ["mixture.mixing"]),
    ("lora: {dropout: 0.1}", ["lora.dropout"]),
    ("optim: {beta1: 0.5}", ["optim.beta1"]),
    ("optim: {name: adamw, beta1: 0.5}", []),
    ("data: {exclude_pretraining_labels: false}", []),  # the model is the bundled one
    (
        "data: {exclude_pretraining_labels: false}\nmodel: {name_or_path: x}",
        ["data.exclude_pretraining_labels"],
    ),
    ("grpo: {epochs: 1}", []),  # the default, said again
    ("method: sft\nppo: {preset: legacy}", []),  # it sets the rank too
    ("method: grpo", []),
    ("custom: {name: mine, fields: [a]}", ["custom.name", "custom.fields"]),
]


@pytest.mark.parametrize(("text", "keys"), IDLE)
def test_keys_without_effect_are_found(write: Write, text: str, keys: list[str]) -> None:
    path = write(TASK + text)
    cfg = load_config(path)
    said = strict_config.given(Config, path, ())
    found = dict(idle_keys(cfg, said, cfg.model.name_or_path == "bundled"))
    assert list(found) == keys
    assert all(found.values())


def test_which_method_reads_a_key() -> None:
    """Its own line counts, then its section's; else every method reads it."""
    ppo, sft = (Config(task="sst2", method=name) for name in ("ppo", "sft"))
    assert reads(ppo, "reward") and not reads(sft, "reward")
    assert reads(sft, "rollout.max_new_tokens") and not reads(sft, "rollout.batch_size")
    assert reads(sft, "data.path") and reads(sft, "optim")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_configs_set_nothing_without_effect(path: Path) -> None:
    cfg = load_config(path)
    said = strict_config.given(Config, path, ())
    assert not list(idle_keys(cfg, said, cfg.model.name_or_path == "bundled"))

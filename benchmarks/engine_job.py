"""What the processes of `engines.py` share: clock, memory, rewards, models, settings.

Imported in our environment and in TRL's.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LORA = {"r": 16, "alpha": 32.0}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KL = 0.05
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5}
EPOCHS = 4
Job = dict[str, Any]


@dataclass
class Meter:
    """What a cell leaves; `mark` is called before the first step and after each."""

    device: str
    import_mb: float = 0.0
    clocks: list[list[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    def imported(self) -> None:
        """All is imported and nothing is loaded."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        self.import_mb = 0.0 if self.device == "cuda" else status_mb("VmRSS")

    def mark(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.clocks.append([time.process_time(), time.perf_counter()])

    def result(self) -> dict[str, Any]:
        import torch
        import transformers

        peak = status_mb("VmHWM")
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        return {
            "clocks": self.clocks,
            "rewards": self.rewards,
            "import_mb": self.import_mb,
            "peak_mb": peak,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **self.more,
        }


def status_mb(name: str) -> float:
    """VmRSS or VmHWM of this process in MB of 2**20 bytes; nan where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def noise(text: str, row: Any = None) -> float:
    """A random reward from 0 to 1: every group has spread, so no engine has rows to leave out.

    Ours calls it by its path as it calls any user's reward; the seed is the job's.
    """
    return random.random()


def reward_of(job: Job) -> Callable[[str, dict[str, Any]], float]:
    """(answer's text, row of the job) -> reward, by the rule of the task or as noise."""
    if job["reward"] == "noise":
        return lambda text, row: noise(text)
    from ppo_nlu.tasks import get_task
    from ppo_nlu.tasks.answers import parse
    from ppo_nlu.tasks.rewards import score

    return lambda text, row: score(parse(get_task(row["task"]), text), row["label"])


def random_model(job: Job, kind: str = "AutoModelForCausalLM") -> Any:
    """A model of a shape with random weights, made on the device (too large to keep in a file)."""
    import torch
    import transformers

    from benchmarks.engine_setup import shape_config

    config = shape_config(job["shape"])
    config.num_labels = 1  # of a value model
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    try:
        with torch.device(job["device"]):
            return getattr(transformers, kind).from_config(config)
    finally:
        torch.set_default_dtype(before)


def load_tokenizer_classes() -> None:
    """Classes that transformers imports when they are first asked for: they count as imports."""
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )


def bundled_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "ppo_nlu" / "assets" / "tiny")

"""A short run of the bundled model, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppo_nlu import train
from ppo_nlu.runtime import cli

CONFIG = """
task: sst2
data: {fallback: bundled, url: "http://127.0.0.1:9", limit: 64}
rollout: {batch_size: 8, max_new_tokens: 4}
ppo: {minibatch_size: 4, epochs: 2}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 4, eval_every: 2, checkpoint_every: 1}
eval: {limit: 16, batch_size: 8, bootstrap: 50}
"""
QUICK = ("eval.before=false", "log.plot=false", "log.progress=false")


def run(*arguments: object) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = load_file(folder / "adapter" / "value_head.safetensors")
    return found | {f"value.{name}": value for name, value in head.items()}


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

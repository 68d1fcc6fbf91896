"""Small runs of every method for the campaigns, each in a process of its own, and their results."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMON = """
model: {device: cpu}
data: {path: DATA}
lora: {r: 4, targets: attention}
rollout: {batch_size: 4, max_new_tokens: 4}
ppo: {minibatch_size: 4, epochs: 1}
sft: {batch_size: 4}
encoder: {batch_size: 4}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 4, eval_every: 2, checkpoint_every: 1}
eval: {before: false, limit: 4, batch_size: 4, bootstrap: 0}
log: {plot: false, progress: false}
"""
KINDS = {
    "ppo": "task: sst2\nmethod: ppo\n",
    "grpo": "task: sst2\nmethod: grpo\n",
    "sft": "task: sst2\nmethod: sft\n",
    "encoder": "task: sst2\nmethod: encoder\n",
    "two tasks": "tasks: [sst2, cola]\nmethod: ppo\n",
    "init_from": "task: sst2\nmethod: ppo\ninit_from: START\n",
}
Hook = Callable[..., None]  # what a process does before its program starts

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["ppo_nlu.train", "transformers.models.llama", "transformers.models.bert"]
)


def write_data(root: Path) -> None:
    """Small SST-2 and CoLA files in the official layouts."""
    for name in ("SST-2", "CoLA"):
        (root / name).mkdir(parents=True)
    for split, rows in (("train", 24), ("dev", 8)):
        sst2 = [f"film {split} number {i} is long \t{i % 2}" for i in range(rows)]
        cola = [f"x\t{i % 2}\t\tBill {split} sang {i} songs." for i in range(rows)]
        text = "\n".join(["sentence\tlabel", *sst2, ""])
        (root / "SST-2" / f"{split}.tsv").write_text(text)
        (root / "CoLA" / f"{split}.tsv").write_text("\n".join([*cola, ""]))


class Place:
    """A folder with data, the configs of all kinds, and a whole run of each that is asked for."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0
        write_data(root / "glue")
        self.whole: dict[str, Path] = {}

    def config(self, kind: str) -> Path:
        path = self.root / f"{kind.replace(' ', '-')}.yaml"
        text = KINDS[kind] + COMMON.replace("DATA", str(self.root / "glue"))
        if "START" in text:
            text = text.replace("START", str(self.reference("sft")))
        path.write_text(text)
        return path

    def reference(self, kind: str) -> Path:
        """A run of the kind that nothing disturbed."""
        if kind not in self.whole:
            folder = self.root / f"whole {kind}"
            code, said = self.run("train", [self.config(kind), "--output", folder])
            assert code == 0, said
            self.whole[kind] = folder
        return self.whole[kind]

    def new(self, kind: str) -> Path:
        """A folder that is not there yet; its name holds a space."""
        self.count += 1
        return self.root / f"{kind} {self.count}"

    def go_on(self, kind: str, folder: Path) -> list[object]:
        """The arguments that begin a run, or continue it where there is one."""
        if (folder / "run.json").exists() and (folder / "config.yaml").exists():
            return [folder / "config.yaml", "--resume", folder]
        return [self.config(kind), "--output", folder]

    def start(self, program: str, arguments: list[Any], hook: Hook | None, *more: Any) -> Any:
        """The process of a program, and the file that takes what it says."""
        log = self.root / "log"
        texts = [str(argument) for argument in arguments]
        process = _FORK.Process(target=_child, args=(program, texts, str(log), hook, more))
        process.start()
        return process, log

    def run(
        self, program: str, arguments: list[Any], hook: Hook | None = None, *more: Any
    ) -> tuple[int | None, str]:
        """The exit code of a program and what it said; the code is negative for a signal."""
        process, log = self.start(program, arguments, hook, *more)
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            return None, "it did not end within 120 s"
        return process.exitcode, log.read_text() if log.exists() else ""


def _child(program: str, arguments: list[str], log: str, hook: Hook | None, more: Any) -> None:
    import importlib

    import torch

    from ppo_nlu.runtime import cli

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    main = importlib.import_module(f"ppo_nlu.{program}").main
    if hook is not None:
        hook(*more)
    code = cli.run(main, arguments)
    sys.stdout.flush()
    sys.exit(code)


def result(folder: Path, metrics: bool = True) -> dict[str, Any]:
    """All that a run leaves but times: weights, predictions, metrics, the best checkpoint."""
    found: dict[str, Any] = {}
    best = sorted((folder / "checkpoints").glob("best/*.safetensors"))
    kept = [*(folder / "adapter").glob("*"), *(folder / "encoder").glob("*"), *best]
    for path in [*kept, folder / "predictions.jsonl"]:
        found[str(path.relative_to(folder))] = path.read_bytes()
    if metrics:
        found |= {f"step {row['step']}": row for row in metrics_of(folder)}
    return found


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of each step but times, which are those of the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time/" not in k} for line in lines]


def leftovers(folder: Path) -> list[str]:
    """What a finished run must not leave."""
    begin = (".tmp-", ".old-", ".lock", "damaged-")
    return [str(path) for path in folder.rglob("*") if path.name.startswith(begin)]


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    """The first thing in which two results differ; empty where there is none."""
    names = sorted({*wanted, *found})
    return next((name for name in names if wanted.get(name) != found.get(name)), "")

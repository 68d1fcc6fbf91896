"""Train short runs of every method in two checkouts of this project, and compare them bit by bit.

    python -m tests.campaigns.adapters OLD NEW [--cases ppo,grpo,...] [--steps 12]

For a change that must not move a number: OLD is a checkout without it (`git worktree add OLD ...`),
NEW one with it. Each case is one run in either, a process on one core with the checkout's own code.
The trained tensors, the optimizer's state, metrics (times left out) and predictions must be the
same to the last bit. A line a case says so, or the first difference, and the CPU seconds of both.
The exit code is 1 where a case differs or fails.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import runs

# The rows are the sentences that come with the package; the address answers nobody.
COMMON = """
model: {device: cpu}
data: {fallback: bundled, url: "http://127.0.0.1:9"}
lora: {r: 8, alpha: 16}
rollout: {batch_size: 16, max_new_tokens: 8}
ppo: {minibatch_size: 8, epochs: 2}
sft: {batch_size: 16}
encoder: {batch_size: 16}
eval: {before: false, limit: 16, bootstrap: 0}
log: {plot: false, progress: false}
"""
# Of each case the kind of run (`runs.KINDS`) and what it sets otherwise.
CASES: dict[str, tuple[str, str]] = {
    "ppo": ("ppo", "optim.lr=1e-3"),
    "grpo": ("grpo", "optim.lr=1e-3 rollout.samples_per_prompt=4"),
    "sft": ("sft", "optim.lr=1e-3"),
    "encoder": ("encoder", "optim.lr=1e-3"),
    "two-tasks": ("two tasks", "optim.lr=1e-3 data.path=MADE_UP"),
    "real-tasks": (
        "ppo",
        "task=null tasks=[sst2,stsb,glue/rte] optim.lr=1e-3 data.path=REAL "
        "reward.normalise=true mixture.mixing=equal",
    ),
    "init_from": ("init_from", "optim.lr=1e-3"),
    "resume": ("ppo", "optim.lr=1e-3"),
    "resume-old": ("ppo", "optim.lr=1e-3"),
    "ppo-checkpointing": ("ppo", "optim.lr=1e-3 model.checkpointing=true"),
    "ppo-plain": ("ppo", "optim.lr=1e-3 model.path=plain"),
    "ppo-micro": (
        "ppo",
        "optim.lr=2e-3 optim.name=adafactor optim.value_lr=1e-3 ppo.micro_batch_size=3 "
        "ppo.critic_target=td0 ppo.kl_estimator=exact ppo.whiten_rewards=true "
        "ppo.entropy_coef=0.01 ppo.dual_clip=3 ppo.target_kl=0.05 ppo.gamma=0.99 "
        "rollout.temperature=1.2 rollout.reuse_logprobs=never rollout.reference_cache=false",
    ),
    "ppo-legacy": ("ppo", "optim.lr=1e-3 ppo.preset=legacy rollout.max_new_tokens=8"),
    "grpo-variants": (
        "grpo",
        "optim.lr=1e-3 rollout.samples_per_prompt=4 grpo.advantage=rloo grpo.kl_coef=0.05 "
        "grpo.epochs=2 grpo.minibatch_size=32 grpo.micro_batch_size=12 grpo.clip_high=0.28 "
        "grpo.drop_even=false train.micro_batch_tokens=900",
    ),
    "sft-variants": (
        "sft",
        "optim.lr=1e-3 sft.loss=all sft.micro_batch_size=5 lora.dropout=0.1 lora.rslora=true "
        "lora.targets=attention prompt.shots=1 optim.schedule=linear optim.weight_decay=0.01",
    ),
}
NEEDS_DATA = "real-tasks"
FIRST = ("adapter", "encoder", "checkpoints/best")  # the trained weights; then the optimizer

# Older checkouts run a Llama block as one autograd node of their own (`ppo_nlu.llama_block`), which
# adds numbers up in another order than the library's block: the last bits differ though nothing is
# wrong. For a NEW that has no such block OLD runs without it too, so that all else is compared.
WITHOUT_BLOCKS = """
import runpy
from ppo_nlu import llama_block
llama_block.attach = lambda decoder: 0
runpy.run_module("ppo_nlu.train", run_name="__main__", alter_sys=True)
"""


class Failed(Exception):
    """A program that did not end as it must."""


@dataclass(frozen=True)
class Ran:
    """A finished run: its folder, and the CPU seconds of its processes."""

    folder: Path
    seconds: float


class Side:
    """The runs of one checkout; each case is run once."""

    def __init__(self, checkout: Path, root: Path, steps: int, blocks: bool = True):
        self.checkout, self.root, self.steps = checkout, root, steps
        self.program = ["-m", "ppo_nlu.train"] if blocks else ["-c", WITHOUT_BLOCKS]
        self.done: dict[str, Ran] = {}
        runs.write_data(root / "made-up")

    def run(self, case: str) -> Ran:
        """The whole run of a case, with nothing that disturbs it."""
        if case not in self.done:
            folder = self.root / case
            arguments = self._begin(case, folder)
            began = _cpu_seconds()
            self._ended(self.start(*arguments), 0)
            self.done[case] = Ran(folder, _cpu_seconds() - began)
        return self.done[case]

    def resumed(self, case: str, by: Side) -> Ran:
        """A run of the case that SIGTERM stops after half of its steps, and `by` goes on with."""
        folder = self.root / case
        began = _cpu_seconds()
        process = self.start(*self._begin(case, folder))
        halfway = folder / "checkpoints" / f"step_{self.steps // 2:06d}"
        while process.poll() is None and not halfway.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        self._ended(process, 128 + signal.SIGTERM)
        by._ended(by.start(folder / "config.yaml", "--resume", folder), 0)
        return Ran(folder, _cpu_seconds() - began)

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """The training program of this checkout; what it says goes to a file."""
        unset = ("PPO_NLU_DATA", "PPO_NLU_BACKEND", "TRITON_INTERPRET")
        environment = {key: text for key, text in os.environ.items() if key not in unset}
        environment |= {
            "PYTHONPATH": str(self.checkout),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),  # no data of an earlier download
        }
        command = [sys.executable, *self.program, *map(str, arguments)]
        with (self.root / "log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.checkout, env=environment, stdout=log, stderr=log
            )

    def _begin(self, case: str, folder: Path) -> list[object]:
        """The arguments that begin the case's run."""
        kind, settings = CASES[case]
        text = runs.KINDS[kind]
        if "START" in text:
            text = text.replace("START", str(self.run("sft").folder))
        config = self.root / f"{case}.yaml"
        config.write_text(text + COMMON)
        given = Path(os.environ.get("PPO_NLU_DATA", "")).resolve()
        folders = {"data.path=MADE_UP": self.root / "made-up", "data.path=REAL": given}
        said = [f"data.path={folders[key]}" if key in folders else key for key in settings.split()]
        half = self.steps // 2
        train = [f"train.{name}={half}" for name in ("eval_every", "checkpoint_every")]
        train.append(f"train.steps={self.steps}")
        return [config, *said, *train, "--output", folder]

    def _ended(self, process: subprocess.Popen[bytes], code: int) -> None:
        """Wait for a process; Failed where it ends with another exit code."""
        if process.wait() != code:
            said = (self.root / "log").read_text(errors="replace").strip().splitlines()
            raise Failed(
                f"{self.checkout}: exit code {process.returncode} in place of {code}: "
                f"{said[-1] if said else 'nothing was said'}"
            )


def _cpu_seconds() -> float:
    """CPU seconds, of user and system, of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- what two runs left ------------------------------------------------------------------------


def difference(old: Path, new: Path, steps: int) -> str:
    """In what two run folders differ: the first tensor, and the first metric; empty for nothing."""
    found = (_in_tensors(old, new, steps), _in_metrics(old, new), _in_predictions(old, new))
    return "; ".join(told for told in found if told)


def _tensors(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """The trained tensors by file and name, and the state in which the last step left them."""
    places = [folder / name for name in (*FIRST, f"checkpoints/step_{steps:06d}")]
    files = [path for place in places for path in sorted(place.glob("*.safetensors"))]
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in files
        for name, tensor in sorted(load_file(path).items())
    }


def _in_tensors(old: Path, new: Path, steps: int) -> str:
    before, after = _tensors(old, steps), _tensors(new, steps)
    if not before:
        return f"no tensors in {old}"
    names = list(before | after)
    apart = [(name, _apart(before.get(name), after.get(name))) for name in names]
    other = [f"{name} {how}" for name, how in apart if how]
    return f"{other[0]} ({len(other)} of {len(names)} tensors)" if other else ""


def _apart(old: torch.Tensor | None, new: torch.Tensor | None) -> str:
    """How two tensors differ; empty where they are the same to the bit."""
    if old is None or new is None:
        return f"is only in {'NEW' if old is None else 'OLD'}"
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"is {new.dtype} {tuple(new.shape)}, was {old.dtype} {tuple(old.shape)}"
    if torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (old, new))):
        return ""
    return f"differs by up to {(old.double() - new.double()).abs().max():.3g}"


def _in_metrics(old: Path, new: Path) -> str:
    before, after = runs.metrics_of(old), runs.metrics_of(new)
    for number, (row, other) in enumerate(zip(before, after, strict=False), start=1):
        for key in row | other:
            if repr(row.get(key)) != repr(other.get(key)):
                return f"metrics: line {number}: {key}: {row.get(key)} and {other.get(key)}"
    return "" if len(before) == len(after) else f"metrics: {len(before)} and {len(after)} lines"


def _in_predictions(old: Path, new: Path) -> str:
    before, after = (
        (folder / "predictions.jsonl").read_text().splitlines() for folder in (old, new)
    )
    other = [
        number for number, (a, b) in enumerate(zip(before, after, strict=False), start=1) if a != b
    ]
    if other:
        return f"predictions: line {other[0]} ({len(other)} of {len(before)} lines)"
    return "" if len(before) == len(after) else f"predictions: {len(before)} and {len(after)} lines"


# --- the program -------------------------------------------------------------------------------


def pairs(case: str, old: Side, new: Side) -> Iterator[tuple[str, Ran, Ran]]:
    """The runs of a case to compare, by twos, and what to call the two."""
    if case == "resume":
        whole = old.run("ppo")
        stopped = old.resumed(case, by=old)
        yield "OLD whole and OLD resumed", whole, stopped
        yield (
            "OLD whole and NEW resumed",
            Ran(whole.folder, stopped.seconds),
            new.resumed(case, new),
        )
    elif case == "resume-old":
        yield "OLD whole and OLD resumed by NEW", old.run("ppo"), old.resumed(case, by=new)
    else:
        yield "", old.run(case), new.run(case)


def compare(case: str, old: Side, new: Side) -> tuple[bool, str]:
    """Whether a case is the same in both, and its line."""
    try:
        for what, before, after in pairs(case, old, new):
            seconds = f"{before.seconds:6.1f} s {after.seconds:6.1f} s"
            if told := difference(before.folder, after.folder, old.steps):
                return False, f"{seconds}  DIFFERS: {what + ': ' if what else ''}{told}"
    except Failed as error:
        return False, f"{'':17}  FAILED: {error}"
    return True, f"{seconds}  same to the bit"


def _checkout(text: str) -> Path:
    folder = Path(text).resolve()
    if not (folder / "ppo_nlu" / "train.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a checkout: it has no ppo_nlu/train.py")
    return folder


def _cases(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    return text.split(",")


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 4:
        raise argparse.ArgumentTypeError(f"{text!r}; give 4 or more, so that a stop has a middle")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        "python -m tests.campaigns.adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD", type=_checkout)
    parser.add_argument("new", metavar="NEW", type=_checkout)
    parser.add_argument(
        "--cases", type=_cases, default=list(CASES), metavar="A,B,...", help=", ".join(CASES)
    )
    parser.add_argument("--steps", type=_steps, default=12)
    parser.add_argument(
        "--without-blocks", action="store_true", help="run OLD without its own Llama block"
    )
    args = parser.parse_args(argv)
    compared = other = 0
    with tempfile.TemporaryDirectory() as root:
        old = Side(args.old, Path(root) / "old", args.steps, blocks=not args.without_blocks)
        new = Side(args.new, Path(root) / "new", args.steps)
        print(f"{'':18} {'CPU: OLD':>8} {'NEW':>8}")
        for case in args.cases:
            if case == NEEDS_DATA and not os.environ.get("PPO_NLU_DATA"):
                print(f"{case:18} skipped: $PPO_NLU_DATA does not name a folder of GLUE")
                continue
            same, line = compare(case, old, new)
            print(f"{case:18} {line}", flush=True)
            compared += 1
            other += not same
    print(f"{compared} cases: {other} differ")
    return int(bool(other))


if __name__ == "__main__":
    sys.exit(main())

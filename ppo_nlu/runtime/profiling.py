"""Where the time of a run goes: seconds, tokens and FLOPs by phase, and a trace of a few steps.

The code that does the work names what it does, `with profiling.phase("decode"): ...`, and counts
it, `profiling.count(tokens_run=120)`. Both do nothing unless a `Profile` is open, and nothing here
changes what is computed. Times are exclusive: the time of a phase inside another one is not in the
outer one. Phases inside `evaluation` are kept apart, as `evaluation/decode`.

`flops` says how FLOPs are counted. A pass under autograd counts as forward and backward, but the
backward of a rollout's kept pass is booked under the update that uses it. What is run a second
time, under checkpointing or inside a fused op, is not counted again. Elementwise work is not
counted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from ppo_nlu.runtime.flops import FORMULA, Weights, gemm_rate
from ppo_nlu.storage.files import TEMP, atomic_open

PHASES = ("prefill", "decode", "score", "reference", "update", "evaluation", "io")
OTHER = "other"  # the time outside every phase
_WARM = 2  # steps before the traced ones
_TRACED = 2

# The profile that is open, or None. It is kept here because the counting happens deep inside the
# model: as an argument it would go through every function on the way. `Profile` makes sure that at
# most one is open, and removes it when it is closed.
_active: Profile | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """A region whose time is booked under this name, one of `PHASES`."""
    return _NOTHING if _active is None else _Region(_active, name)


def count(
    tokens_run: int = 0,
    tokens_saved: int = 0,
    flops: float | None = None,
    positions: int = 0,
    pairs: int = 0,
    predicting: int | None = None,
) -> None:
    """Book a pass of the model under the phase that is open.

    `tokens_run` went through the blocks; `tokens_saved` would have gone too if every row had been
    run by itself. The head ran at `positions`. `pairs` counts each token with each one it attends
    to, itself included. `predicting` tokens (None: all) went through the trimmed part of the last
    block. FLOPs follow from these by the formula of `flops`, unless they are given.
    """
    if _active is not None:
        _active.add(
            tokens_run=tokens_run,
            tokens_saved=tokens_saved,
            flops=flops,
            positions=positions,
            pairs=pairs,
            predicting=predicting,
        )


def count_backward(tokens: int, pairs: int, predicting: int | None = None) -> None:
    """Book the backward of a pass that was booked before as a forward alone: the rollout's pass
    over the prompts, which an update reuses."""
    import torch

    if _active is not None and _active.weights is not None and torch.is_grad_enabled():
        flops = _active.weights.backward(tokens, positions=0, pairs=pairs, predicting=predicting)
        _active.add(flops=flops)


def active() -> bool:
    """Whether a profile is open; for counts that take time themselves."""
    return _active is not None


def step() -> AbstractContextManager[None]:
    """A region that is one step of training: the third and fourth are traced."""
    return _NOTHING if _active is None else _Step(_active)


@dataclass
class Row:
    """What was booked under one name."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process, all threads
    tokens_run: int = 0
    tokens_saved: int = 0
    flops: float = 0.0

    def __add__(self, other: Row) -> Row:
        return Row(
            seconds=self.seconds + other.seconds,
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
            tokens_run=self.tokens_run + other.tokens_run,
            tokens_saved=self.tokens_saved + other.tokens_saved,
            flops=self.flops + other.flops,
        )


class Profile:
    """An open profile books all phases and counts of the process, and traces two steps.

    `steps` is how many will be trained: the traced ones are the third and fourth, or the last of a
    shorter run. Since tracing slows a step down, these are left out of the times (unless there is
    no other). Each change of phase waits for a GPU, so that its time is booked under the phase that
    started the work. `dtype` is that of the products by which the machine's rate is measured.
    """

    def __init__(
        self,
        steps: int,
        device: Any = "cpu",
        dtype: Any = None,
        weights: Weights | None = None,
        trace: Path | None = None,
    ) -> None:
        import torch

        self.device, self.dtype = torch.device(device), dtype or torch.float32
        self.weights, self.trace = weights, trace
        first = max(min(_WARM, steps - 1), 0)
        self.traced = range(first, min(first + _TRACED, steps)) if trace else range(0)
        self.apart = len(self.traced) < steps
        self.rows: dict[str, Row] = {}
        self.steps = 0
        self.gemm = 0.0  # FLOP/s
        self._names: list[str] = []
        self._regions: list[Any] = []  # the phases in the trace
        self._tracer: Any = None
        self._mark = self._cpu = 0.0

    def __enter__(self) -> Profile:
        global _active
        assert _active is None, "a profile is open already"
        self.gemm = gemm_rate(self.device, self.dtype)
        self._mark, self._cpu = time.perf_counter(), time.process_time()
        _active = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        place: TracebackType | None,
    ) -> None:
        global _active
        self._book()
        self._end_trace()
        _active = None

    def add(
        self,
        tokens_run: int = 0,
        tokens_saved: int = 0,
        flops: float | None = None,
        positions: int = 0,
        pairs: int = 0,
        predicting: int | None = None,
    ) -> None:
        """See `count`."""
        if flops is None:
            flops = self._flops(tokens_run, positions, pairs, predicting)
        row = self._row()
        row.tokens_run += tokens_run
        row.tokens_saved += tokens_saved
        row.flops += flops

    def _flops(self, tokens: int, positions: int, pairs: int, predicting: int | None) -> float:
        import torch

        if self.weights is None:
            return 0.0
        lora = "reference" not in self._names
        flops = self.weights.forward(tokens, positions, pairs, lora, predicting)
        if torch.is_grad_enabled():
            flops += self.weights.backward(tokens, positions, pairs, predicting)
        return flops

    def _enter(self, name: str) -> None:
        assert name in PHASES, f"{name} is not a phase"
        self._book()
        self._names.append(name)
        if self._tracer is not None:
            import torch

            region: Any = torch.profiler.record_function(name)
            region.__enter__()
            self._regions.append(region)

    def _leave(self) -> None:
        self._book()
        self._names.pop()
        if self._regions:
            self._regions.pop().__exit__(None, None, None)

    def _row(self) -> Row:
        """The row to book in now; one that is thrown away while a step is traced."""
        if self._tracer is not None and self.apart:
            return Row()
        name = self._names[-1] if self._names else OTHER
        if "evaluation" in self._names and name != "evaluation":
            name = f"evaluation/{name}"
        return self.rows.setdefault(name, Row())

    def _book(self) -> None:
        """Book the time since the last change of phase under the phase that was open."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        now, cpu = time.perf_counter(), time.process_time()
        row = self._row()
        row.seconds += now - self._mark
        row.cpu_seconds += cpu - self._cpu
        self._mark, self._cpu = now, cpu

    def _begin_step(self) -> None:
        if self.steps == self.traced.start and self.traced:
            import torch

            self._book()
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._tracer = torch.profiler.profile(activities=kinds)
            self._tracer.start()

    def _end_step(self) -> None:
        self.steps += 1
        if self.steps == self.traced.stop:
            self._end_trace()

    def _end_trace(self) -> None:
        if self._tracer is None:
            return
        self._book()
        self._tracer.stop()
        assert self.trace is not None
        near = TemporaryDirectory(prefix=TEMP, dir=self.trace.parent)  # $TMPDIR may be full
        with near as folder, atomic_open(self.trace, binary=True) as file:
            made = Path(folder) / "trace.json"
            self._tracer.export_chrome_trace(str(made))  # which takes a name, not a file
            with made.open("rb") as raw:
                shutil.copyfileobj(raw, file)
        if self.apart:  # writing the trace belongs to no phase either
            self._mark, self._cpu = time.perf_counter(), time.process_time()
        self._tracer = None

    def report(self) -> dict[str, Any]:
        """What was booked, for profile.json: seconds, shares of 1, tokens, TFLOP/s by phase."""
        import torch

        total = sum(self.rows.values(), Row())
        order = [*PHASES, OTHER]
        names = sorted(self.rows, key=lambda name: (order.index(name.split("/")[0]), name))
        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "gemm_tflops_per_s": self.gemm / 1e12,
            "flops_formula": FORMULA,
            "steps": self.steps,
            "traced_steps": [number + 1 for number in self.traced if number < self.steps],
            "traced_steps_timed": not self.apart,
            "phases": {name: self._described(self.rows[name], total) for name in names},
            "total": self._described(total, total),
        }

    def _described(self, row: Row, total: Row) -> dict[str, float]:
        rate = row.flops / row.seconds if row.seconds else 0.0
        return {
            "seconds": row.seconds,
            "share": row.seconds / total.seconds if total.seconds else 0.0,
            "cpu_seconds": row.cpu_seconds,
            "tokens_run": row.tokens_run,
            "tokens_saved": row.tokens_saved,
            "tflop": row.flops / 1e12,
            "tflops_per_s": rate / 1e12,
            "gemm_share": rate / self.gemm if self.gemm else 0.0,
        }


class _Region(AbstractContextManager[None]):
    def __init__(self, profile: Profile, name: str) -> None:
        self.profile, self.name = profile, name

    def __enter__(self) -> None:
        self.profile._enter(self.name)

    def __exit__(self, *error: object) -> None:
        self.profile._leave()


class _Step(AbstractContextManager[None]):
    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def __enter__(self) -> None:
        self.profile._begin_step()

    def __exit__(self, *error: object) -> None:
        self.profile._end_step()


def device_name(device: Any) -> str:
    """The GPU's name, or the device's type."""
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def table(report: Mapping[str, Any]) -> str:
    """The report as a short table, with evaluation as one line."""
    lines = [
        "phase        seconds   share   CPU s   tokens run        saved   TFLOP/s  of GEMM rate",
    ]
    rows: dict[str, dict[str, float]] = {}
    for name, row in report["phases"].items():
        whole = rows.setdefault(name.split("/")[0], dict.fromkeys(row, 0.0))
        for key in ("seconds", "share", "cpu_seconds", "tokens_run", "tokens_saved", "tflop"):
            whole[key] += row[key]
    peak = report["gemm_tflops_per_s"]
    for name, row in [*rows.items(), ("all", report["total"])]:
        rate = row["tflop"] / row["seconds"] if row["seconds"] else 0.0
        lines.append(
            f"{name:<11}{row['seconds']:>9.2f}{100 * row['share']:>6.1f} %"
            f"{row['cpu_seconds']:>8.2f}{int(row['tokens_run']):>13,}{int(row['tokens_saved']):>13,}{rate:>10.4f}"
            f"{100 * rate / peak if peak else 0.0:>11.1f} %"
        )
    return "\n".join(lines)

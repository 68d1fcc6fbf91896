"""How a callable is timed, how much memory it takes, and where that was.

On CUDA a call lies between two events, after a write of 512 MiB that empties the L2 cache and keeps
the GPU busy while Python prepares the launches. On the CPU: wall time and CPU time of the process.
Callables that are to be compared are interleaved round by round, so that a machine that slows down
slows all of them down.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
FLUSH_BYTES = 512 << 20  # ten times the L2 of an H100
SHORTEST_MS = 3.0
FEWEST = 3  # rounds, however slow the callable is
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: 20th, 50th and 80th percentile of the wall time, median of the CPU time."""

    p20: float
    p50: float
    p80: float
    cpu: float
    repeats: int


def time_interleaved(
    calls: Mapping[str, Sequence[Call]], device: str, repeats: int, seconds_each: float = 60.0
) -> dict[str, Timing]:
    """Time warmed-up callables in rounds of all of them, each round begun by the next.

    Args:
        calls: for each name the same callable over several sets of inputs, used in turn.
        seconds_each: a callable too slow for `repeats` rounds in this time takes part in fewer.
    """
    names, rounds = list(calls), dict.fromkeys(calls, repeats)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    batch = {name: 1 if device == "cuda" else _batch(sets[0]) for name, sets in calls.items()}
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if i >= rounds[name]:
                continue
            sets = calls[name]
            if device == "cuda":
                samples[name].append(cuda_clock(sets[i % len(sets)]))
            else:
                samples[name].append(host_clock([sets[j % len(sets)] for j in range(batch[name])]))
            fit = int(1e3 * seconds_each / max(samples[name][0][0], 1e-3))
            rounds[name] = max(min(FEWEST, repeats), min(repeats, fit))
    return {name: summarize(taken) for name, taken in samples.items()}


def _batch(call: Call) -> int:
    """How many calls to time as one on the CPU, where the clock is as slow as a short call."""
    return max(1, math.ceil(SHORTEST_MS / max(host_clock([call])[0], 1e-3)))


def summarize(samples: Sequence[tuple[float, float]]) -> Timing:
    """Percentiles of (wall, cpu) pairs, by the nearest sample."""
    wall, cpu = sorted(w for w, _ in samples), sorted(c for _, c in samples)
    at = {q: wall[round(q * (len(wall) - 1))] for q in (0.2, 0.5, 0.8)}
    return Timing(at[0.2], at[0.5], at[0.8], cpu[round(0.5 * (len(cpu) - 1))], len(wall))


def host_clock(calls: Sequence[Call]) -> tuple[float, float]:
    """Mean wall and process CPU milliseconds (all threads) of calls made one after another."""
    cpu, wall = time.process_time(), time.perf_counter()
    for call in calls:
        call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1e3 * wall / len(calls), 1e3 * cpu / len(calls)


def cuda_clock(call: Call) -> tuple[float, float]:
    """GPU milliseconds between two events around a call, and the host's CPU milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    cpu = time.process_time()
    start.record()
    call()
    end.record()
    cpu = time.process_time() - cpu
    end.synchronize()
    return start.elapsed_time(end), 1e3 * cpu


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def graph_ms(calls: Sequence[Call], replays: int = 30) -> float:
    """Median GPU milliseconds of one of the calls, all of them captured in one CUDA graph.

    The launches cost nothing there, and calls on different inputs find a cold cache.
    """
    graph, results = captured(calls)
    taken = time_interleaved({"graph": [graph.replay]}, "cuda", replays)["graph"].p50
    del results
    return taken / len(calls)


def captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """The calls as one CUDA graph and their results, which each replay overwrites.

    Each is called on a side stream first, as capture asks for.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    return graph, results


def launches(call: Call) -> int:
    """Kernels that one call starts on the GPU, copies and fills by the driver left out."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() or () if e.device_type == device]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def peak_mib(call: Call, device: str) -> float:
    """The most memory that one call holds beyond what was there before it, results included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _peak_cpu_bytes(call) / 2**20


def _peak_cpu_bytes(call: Call) -> int:
    """From the profiler's memory events: exact for what torch allocates, on whatever machine."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()  # held, so that it counts until the end
    del result
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = top = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        top = max(top, held)
    return top


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing to stderr: some builds of the profiler report each start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ---- where it was measured


def commit() -> str:
    """The short commit, "+changes" when the tree differs from it; $PPO_NLU_COMMIT without git."""
    given = os.environ.get("PPO_NLU_COMMIT")
    if given:
        return given
    try:
        name = _git("rev-parse", "--short", "HEAD")
        # Rows measured before are no change of what is measured.
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changed else "")


def _git(*args: str) -> str:
    command = ["git", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's as Linux has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

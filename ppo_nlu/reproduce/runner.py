"""Runs the cells of a grid side by side, each in a process of its own, until none is left.

A finished cell is kept, an unfinished one resumed, and a failed one does not stop the others.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ppo_nlu.errors import UserError
from ppo_nlu.reproduce import results
from ppo_nlu.reproduce.commands import command_of
from ppo_nlu.reproduce.grid import FORM, Cell, Grid
from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.storage import files, locks


def last_error(log: Path) -> str:
    """The line of a log that says why the program ended: the last `error:`, or the last of all."""
    lines = log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or ["no output"])[-1]


# --- running them all -----------------------------------------------------------------------------

Build = Callable[[Grid, Cell], tuple[list[str], str]]


class Runner:
    """The cells that wait, run, are finished or have failed; `run` goes through them all."""

    def __init__(self, grid: Grid, cells: Sequence[Cell], jobs: int, build: Build = command_of):
        self.grid, self.jobs, self.build = grid, jobs, build
        self.total = len(cells)
        self.finished = [cell for cell in cells if grid.finished(cell.name)]
        self.waiting = [cell for cell in cells if cell not in self.finished]
        self.running: dict[str, tuple[Cell, subprocess.Popen[bytes], float]] = {}
        self.started = results.read_table(grid.folder / "cells.json")
        kept = results.read_table(grid.folder / "failures.json")
        names = {cell.name for cell in cells}
        self.failed = {k: v for k, v in kept.items() if k not in names and not grid.finished(k)}
        self.failed_now = 0
        self.machine = describe_machine(threads(jobs))
        self.settings = results.read_json(grid.folder / "grid.json")
        self.before = float(self.settings.get("elapsed_s", 0.0)) - time.perf_counter()

    def run(self) -> int:
        """0, or 1 where a cell failed, or 130 and 143 where a signal stopped the grid."""
        if kept := self.total - len(self.waiting):
            print(f"{kept} of {self.total} cells are finished and kept", flush=True)
        with StopRequest() as stop, locked(self.grid.folder) as lock:
            try:
                while (self.waiting or self.running) and not stop:
                    self._start_ready(lock)
                    self._collect()
                    time.sleep(0.05)
                self._stop_children(stop.signal)
            finally:
                for _, child, _ in self.running.values():
                    child.kill()
        self._write()
        return stop.exit_code or int(self.failed_now > 0)

    def _start_ready(self, lock: int | None) -> None:
        for cell in list(self.waiting):
            if len(self.running) >= self.jobs:
                return
            missing = [name for name in cell.awaits if not self.grid.finished(name)]
            coming = {other.name for other in self.waiting} | set(self.running)
            if not missing:
                self.waiting.remove(cell)
                self._start(cell, lock)
            elif lost := [name for name in missing if name not in coming]:
                self.waiting.remove(cell)
                self._fail(cell, None, f"needs the finished cell {lost[0]}")

    def _start(self, cell: Cell, lock: int | None) -> None:
        try:
            command, note = self.build(self.grid, cell)
        except (UserError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            self._fail(cell, None, f"its command cannot be made: {error!r}")
            return
        if cell.evaluates:
            self.grid.clear(cell)
        log = self._log(cell)
        log.parent.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads(self.jobs)), "PYTHONUNBUFFERED": "1"}
        before = self.started.get(cell.name, {})
        self.started[cell.name] = self.machine | {
            "jobs": self.jobs,
            "note": note,
            "seconds": before.get("seconds", 0.0),
            "command": shlex.join(command),
        }
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            # A session of its own: Ctrl-C reaches the cell once, through us.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env,
                start_new_session=True, pass_fds=() if lock is None else (lock,),
            )  # fmt: skip
        self.running[cell.name] = (cell, child, time.perf_counter())
        self._write()

    def _collect(self) -> None:
        for name, (cell, child, began) in list(self.running.items()):
            if child.poll() is None:
                continue
            del self.running[name]
            self.started[name]["seconds"] += time.perf_counter() - began
            if child.returncode == 0 and self.grid.finished(name):
                self.finished.append(cell)
                self._say(cell, f"{_duration(self.started[name]['seconds'])}, {self._scores(name)}")
            elif child.returncode == 0:
                self._fail(cell, 0, "ended without a summary.json")
            else:
                self._fail(cell, child.returncode, last_error(self._log(cell)))
            self._write()

    def _fail(self, cell: Cell, code: int | None, error: str) -> None:
        self.failed[cell.name] = {
            "exit": code,
            "error": error,
            "log": f"logs/{cell.name}.log" if code is not None else None,
        }
        self.failed_now += 1
        self._say(cell, f"FAILED: {error}")

    def _stop_children(self, number: int | None) -> None:
        """Pass the signal on and wait: a run finishes its step and saves."""
        if number is None:
            return
        for _, child, _ in self.running.values():
            child.send_signal(number)
        try:
            for _, child, _ in self.running.values():
                child.wait()
        except KeyboardInterrupt:
            print("stopping at once", flush=True)
        now = time.perf_counter()
        for name, (_, _, began) in self.running.items():
            self.started[name]["seconds"] += now - began

    def _log(self, cell: Cell) -> Path:
        return self.grid.folder / "logs" / f"{cell.name}.log"

    def _write(self) -> None:
        files.atomic_write_json(self.grid.folder / "cells.json", self.started)
        files.atomic_write_json(self.grid.folder / "failures.json", self.failed)
        self.settings["elapsed_s"] = self.before + time.perf_counter()
        files.atomic_write_json(self.grid.folder / "grid.json", self.settings)

    def _say(self, cell: Cell, text: str) -> None:
        done = self.total - len(self.waiting) - len(self.running)
        left = self._seconds_left()
        tail = f"; {_duration(left)} left" if left else ""
        print(f"[{done}/{self.total}] {cell.name}: {text}{tail}", flush=True)

    def _scores(self, name: str) -> str:
        """Mean over the cell's tasks under each way of decoding, in percent."""
        found = self.grid.summary(name)
        shown = []
        for decode, title in results.DECODES.items():
            values = [
                task["reports"][decode]["score"]
                for task in found.get("tasks", {}).values()
                if task.get("reports", {}).get(decode)
            ]
            if values:
                shown.append(f"{title} {100 * sum(values) / len(values):.1f}")
        return " ".join(shown) or "no scores"

    def _seconds_left(self) -> float:
        """What the waiting and running cells may take; 0 where nothing can be said yet."""
        spent: dict[str, list[float]] = {}
        for cell in self.finished:
            if seconds := self.started.get(cell.name, {}).get("seconds"):
                spent.setdefault(kind_of(cell), []).append(seconds / len(cell.tasks))
        means = {kind: sum(values) / len(values) for kind, values in spent.items()}
        running = [cell for cell, _, _ in self.running.values()]
        coming = [(cell, seconds_of(cell, means)) for cell in (*self.waiting, *running)]
        if any(seconds is None for _, seconds in coming):
            return 0.0
        now = time.perf_counter()
        seconds = sum(seconds or 0.0 for _, seconds in coming)
        seconds -= sum(now - began for _, _, began in self.running.values())
        return max(seconds, 0.0) / min(self.jobs, max(len(coming), 1))


def kind_of(cell: Cell) -> str:
    """Cells of one kind take about as long: those of a method, and those that measure its runs on
    another task."""
    return "measured" if cell.source else cell.method


def seconds_of(cell: Cell, means: Mapping[str, float]) -> float | None:
    """What a cell may take, by the mean seconds a task of each kind: of its own, or else of those
    that, like it, train or evaluate. None where no such cell has finished."""
    alike = [mean for kind, mean in means.items() if _evaluates(kind) == cell.evaluates]
    mean = means.get(kind_of(cell), sum(alike) / len(alike) if alike else None)
    return None if mean is None else mean * len(cell.tasks)


def _evaluates(kind: str) -> bool | None:
    """Whether cells of a kind evaluate or train; None for the form and the encoder, which are like
    no other."""
    if kind in (FORM, "encoder"):
        return None
    return kind not in METHODS or not METHODS[kind].trains


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def locked(folder: Path, keep: bool = True) -> Iterator[int | None]:
    """Inside, nobody else runs this grid. The cells inherit the lock, so that one whose grid was
    killed still holds it."""
    try:
        lock = locks.FolderLock(folder)
    except locks.InUse as error:
        raise UserError(
            f"--output {folder}: this grid, or a cell of it, is still running ({error.holder}); "
            "wait or stop it"
        ) from None
    try:
        yield lock.handle if lock.locked else None
    finally:
        lock.release(keep)  # a cell may hold it still


def cores() -> int:
    """The CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(jobs: int) -> int:
    """The CPU threads of each of `jobs` cells side by side."""
    return max(1, cores() // jobs)


def describe_machine(count: int) -> dict[str, Any]:
    """What a row of results must say of where it was measured."""
    device = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu ({cores()} cores)"
    )
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": device,
        "threads": count,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def commit() -> str:
    """The commit of the checkout this package lies in; empty for an installed one."""
    root = Path(__file__).parents[2]
    if not ((root / ".git").exists() and (root / "setup.py").is_file()):
        return ""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()

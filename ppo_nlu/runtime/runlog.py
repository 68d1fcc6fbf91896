"""The numbers of a run, step by step: metrics.jsonl, and the loggers that take them too.

tensorboard and wandb are imported only when asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import open_regular, read_bytes, write_errors
from ppo_nlu.storage.files import atomic_write_bytes, atomic_write_text
from ppo_nlu.storage.sealed import parse_object, plain

if TYPE_CHECKING:
    from ppo_nlu.config import LogConfig

METRICS = "metrics.jsonl"


class ScalarSink(Protocol):
    """Anything that takes a step's numbers besides metrics.jsonl."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends one JSON object a step to metrics.jsonl, and hands its numbers to the sinks."""

    def __init__(self, run_dir: str | Path, sinks: Sequence[ScalarSink] = ()) -> None:
        self.path = Path(run_dir) / METRICS
        self.sinks = sinks
        self._file: TextIO | None = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line and flush it; what is not a finite number becomes null."""
        record = {"step": step, **plain(metrics)}
        with write_errors(self.path):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8", opener=open_regular)  # noqa: SIM115
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        scalars = {k: v for k, v in record.items() if k != "step" and is_number(v)}
        for sink in self.sinks:
            sink.log(step, scalars)

    def truncate_after(self, step: int) -> list[str]:
        """On resume: drop the lines of later steps, which will be run again, and torn lines.

        Returns warnings for the user, such as which steps up to `step` have no line. A link
        becomes a file.
        """
        self._close_file()
        with write_errors(self.path):
            lines = read_bytes(self.path).splitlines(True) if self.path.exists() else []
        places = [_step_of(line) for line in lines]
        both = zip(places, lines, strict=True)
        kept = {int(place): line for place, line in both if place <= step}
        if lines != [kept[at] for at in sorted(kept)] or self.path.is_symlink():
            atomic_write_bytes(self.path, b"".join(kept[at] for at in sorted(kept)))
        told = []
        if torn := sum(place == math.inf for place in places):
            told.append(f"{self.path}: {torn} torn line(s) left out")
        if again := sum(place <= step for place in places) - len(kept):
            told.append(f"{self.path}: {again} line(s) of a step that has another left out")
        if missing := [at for at in range(1, step + 1) if at not in kept]:
            told.append(
                f"{self.path}: no line of {_spans(missing)}, lost before the disk had them; the "
                "weights of these steps are in the checkpoint"
            )
        return told

    def close(self) -> None:
        self._close_file()
        for sink in self.sinks:
            sink.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl, in order."""
    path = Path(run_dir) / METRICS
    lines = read_bytes(path).splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _step_of(line: bytes) -> float:
    """The step of a complete line; infinity for a torn one."""
    try:
        step = parse_object(line.decode())["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError):
        return math.inf
    return step if type(step) is int and step > 0 else math.inf


def _spans(numbers: Sequence[int]) -> str:
    """Rising numbers as "step 3" or "steps 3, 5 to 9"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [f"{a} to {b}" if a < b else f"{a}" for a, b in spans]
    word = "step" if len(numbers) == 1 else "steps"
    return f"{word} {', '.join(shown[:5])}{' and others' if len(shown) > 5 else ''}"


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class TensorBoardSink:
    """Scalars for TensorBoard, in the run folder's `tensorboard/`."""

    def __init__(self, run_dir: str | Path, start_step: int = 0) -> None:
        _require("tensorboard", "log.tensorboard", "tensorboard")
        module = importlib.import_module("torch.utils.tensorboard")
        folder = str(Path(run_dir) / "tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=start_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Scalars for Weights & Biases; a resumed run keeps its id there."""

    def __init__(
        self, run_dir: str | Path, project: str, config: Mapping[str, Any] | None = None
    ) -> None:
        wandb = _require("wandb", "log.wandb", "wandb")
        run_dir = Path(run_dir)
        identity = run_dir / "wandb_id.txt"
        if not identity.exists():
            atomic_write_text(identity, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            dir=str(run_dir),
            id=read_bytes(identity).decode().strip(),
            resume="allow",
            config=dict(config or {}),
        )
        # wandb's own step only rises; the step of a run goes back when it resumes.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


def open_sinks(
    cfg: LogConfig,
    run_dir: str | Path,
    config: Mapping[str, Any] | None = None,
    start_step: int = 0,
) -> list[ScalarSink]:
    """The loggers that `log.tensorboard` and `log.wandb` ask for."""
    sinks: list[ScalarSink] = []
    if cfg.tensorboard:
        sinks.append(TensorBoardSink(run_dir, start_step))
    if cfg.wandb:
        sinks.append(WandbSink(run_dir, cfg.project, config))
    return sinks


def _require(package: str, key: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{key}: true needs the package {package}, which is not installed; "
            f"pip install 'ppo_nlu[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
        ) from error

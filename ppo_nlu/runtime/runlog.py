"""What a run tells while it works and leaves behind: metrics, progress, curves, tables, summary.

Nothing here decides anything. matplotlib, tensorboard and wandb are imported only when asked for.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import open_regular, read_bytes, write_errors
from ppo_nlu.storage.files import atomic_write_bytes, atomic_write_json, atomic_write_text
from ppo_nlu.storage.sealed import parse_object, plain

if TYPE_CHECKING:
    from ppo_nlu.config import LogConfig


METRICS = "metrics.jsonl"


# --- metrics ----------------------------------------------------------------------------------


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
                self._file = open(self.path, "a", encoding="utf-8", opener=open_regular)
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        scalars = {k: v for k, v in record.items() if k != "step" and _is_number(v)}
        for sink in self.sinks:
            sink.log(step, scalars)

    def truncate_after(self, step: int) -> list[str]:
        """On resume: drop the lines of later steps, which will be run again, and torn ones; what
        is to be told, such as the steps up to `step` that have no line. A link becomes a file."""
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


def _is_number(value: Any) -> bool:
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
    """Scalars for Weights & Biases; a resumed run goes on under its old identity."""

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
        # Their own step only ever rises; ours goes back when a run resumes.
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


# --- progress ---------------------------------------------------------------------------------


class Progress:
    """A bar on a terminal; in a file or a pipe a plain line about every tenth of the run."""

    def __init__(
        self, total: int, start: int = 0, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.step, self.enabled = total, start, enabled
        self.stream = sys.stderr if stream is None else stream
        self._start, self._samples, self._began = start, 0, time.monotonic()
        self._bar = self._open_bar() if enabled and self.stream.isatty() else None

    def _open_bar(self) -> Any:
        return importlib.import_module("tqdm").tqdm(
            total=self.total,
            initial=self.step,
            file=self.stream,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
        )

    def update(
        self, samples: int = 0, reward: float | None = None, kl: float | None = None
    ) -> None:
        """One step is done: `samples` answers in it, its mean reward and KL to the reference."""
        self.step += 1
        self._samples += samples
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._facts(reward, kl)), refresh=False)
            self._bar.update(1)
        elif self.enabled and self._is_due():
            facts = [f"step {self.step}/{self.total}", *self._facts(reward, kl), self._left()]
            self._print(", ".join(facts))

    def write(self, text: str, stream: TextIO | None = None) -> None:
        """Print a line of the program's own without breaking the bar; also when disabled."""
        stream = self.stream if stream is None else stream
        if self._bar is not None:
            self._bar.write(text, file=stream)
        else:
            print(text, file=stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def _is_due(self) -> bool:
        """After the first step, at each tenth of the whole, and at the end."""
        tenth = self.step * 10 // self.total > (self.step - 1) * 10 // self.total
        return tenth or self.step in (self._start + 1, self.total)

    def _facts(self, reward: float | None, kl: float | None) -> list[str]:
        facts = [f"{n} {v:.3f}" for n, v in (("reward", reward), ("KL", kl)) if v is not None]
        seconds = time.monotonic() - self._began
        if self._samples and seconds > 0:
            facts.append(f"{self._samples / seconds:.1f} samples/s")
        return facts

    def _left(self) -> str:
        done = self.step - self._start
        seconds = (time.monotonic() - self._began) / done * (self.total - self.step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"


# --- curves -----------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _GREY = "#2a6fbb", "#d9822b", "#3a8f5c", "#6b7280"
_EVAL_COLOURS = (_BLUE, _ORANGE, _GREEN, "#8a5bb5")


def draw_curves(
    run_dir: str | Path,
    title: str,
    subtitle: str | None = None,
    before: Mapping[str, float | None] | None = None,
) -> Path | None:
    """Draw metrics.jsonl to curves.png; None where matplotlib or the metrics are missing.

    `before` holds the base model's numbers, drawn as dashed lines: `reward` in the reward panel,
    any other under the last part of its `eval/<task>/<metric>` name.
    """
    records = read_metrics(run_dir)
    rewards = _series(records, "reward/mean")
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return None
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    evals = {name: _series(records, name) for name in _eval_names(records)}
    panels = [name for name, data in (("kl", _series(records, "kl/ref")), ("eval", evals)) if data]
    losses = _series(records, "loss") if not rewards else []
    if not rewards and not losses and not panels:
        return None
    before = before or {}
    figure = plt.figure(figsize=(9.6, 4.6), layout="constrained")
    grid = figure.add_gridspec(max(len(panels), 1), 2 if panels else 1)
    first = figure.add_subplot(grid[:, 0])
    if losses:
        _draw_main(first, losses, None, "loss per token (nats)")
    else:
        _draw_main(first, rewards, before.get("reward"), "mean reward per answer")
        _draw_tasks(first, records)
    for row, name in enumerate(panels):
        axes = figure.add_subplot(grid[row, 1])
        if name == "kl":
            _draw_kl(axes, _series(records, "kl/ref"))
        else:
            _draw_evals(axes, evals, before)
    last = max(record["step"] for record in records)
    for axes in figure.axes:
        axes.set_xlim(0, last * 1.02)
    figure.suptitle(title + (f"\n{subtitle}" if subtitle else ""), fontsize=12)
    path = Path(run_dir) / "curves.png"
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    atomic_write_bytes(path, image.getvalue())
    return path


Series = list[tuple[int, float]]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(r["step"], r[name]) for r in records if _is_number(r.get(name))]


def _eval_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of evaluation metrics, in the order of their appearance."""
    names = {name: None for r in records for name in r if name.startswith("eval/")}
    return [name for name in names if _series(records, name)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values (of fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def _style(axes: Any, ylabel: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    """Above the panel, where it hides no line."""
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    room = {"columnspacing": 1.2, "handlelength": 1.6}
    axes.legend(frameon=False, fontsize=9, ncols=3, **place, **room)


def _draw_main(axes: Any, series: Series, baseline: float | None, ylabel: str) -> None:
    steps, values = [s for s, _ in series], [v for _, v in series]
    window = max(1, min(20, len(values) // 5))
    if window > 1:
        axes.plot(steps, values, color=_BLUE, alpha=0.25, linewidth=0.9, label="each step")
        label = f"mean of {window} steps"
        axes.plot(steps, moving_average(values, window), color=_BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, values, color=_BLUE, linewidth=1.5, marker="o", ms=3, label="each step")
    if baseline is not None:
        axes.axhline(baseline, color=_GREY, linestyle="--", linewidth=1.2, label="before training")
    _style(axes, ylabel)
    _legend(axes)


def _draw_tasks(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """The reward of each task of several, as a smoothed line of its own."""
    names = sorted({n for r in records for n in r if re.fullmatch(r"reward/.+/mean", n)})
    for index, name in enumerate(names):
        series = _series(records, name)
        means = moving_average([v for _, v in series], max(1, min(20, len(series) // 5)))
        colour, task = f"C{(index + 1) % 10}", name.removeprefix("reward/").removesuffix("/mean")
        axes.plot([s for s, _ in series], means, color=colour, linewidth=1.1, label=task)
    if names:
        _legend(axes)


def _draw_kl(axes: Any, kl: Series) -> None:
    axes.plot([s for s, _ in kl], [v for _, v in kl], color=_ORANGE, linewidth=1.2)
    _style(axes, "KL to reference\n(nats per answer)")


def _draw_evals(axes: Any, evals: Mapping[str, Series], before: Mapping[str, float | None]) -> None:
    for index, (name, series) in enumerate(evals.items()):
        colour, short = _EVAL_COLOURS[index % len(_EVAL_COLOURS)], name.rsplit("/", 1)[-1]
        steps, values = [s for s, _ in series], [100 * v for _, v in series]
        axes.plot(steps, values, color=colour, linewidth=1.5, marker="o", ms=3, label=short)
        baseline = before.get(short)
        if baseline is not None:
            dash = colour if len(evals) > 1 else _GREY
            axes.axhline(100 * baseline, color=dash, linestyle="--", linewidth=1.2)
    if any(before.get(name.rsplit("/", 1)[-1]) is not None for name in evals):
        axes.plot([], [], color=_GREY, linestyle="--", linewidth=1.2, label="before training")
    _style(axes, "evaluation (%)")
    _legend(axes)


# --- the end of a run -------------------------------------------------------------------------

_COLUMNS = (("sample", "sample T=1"), ("greedy", "greedy"), ("score", "score"))


def results_table(
    before: Mapping[str, float | None] | None, after: Mapping[str, float | None] | None
) -> str:
    """Base and tuned model side by side, in percent; what was not measured is a dash."""
    columns = (*_COLUMNS, ("unparsed", "unparsed"))
    lines = ["(%)    " + "".join(f"{title:>12}" for _, title in columns)]
    for name, row in (("base", before), ("tuned", after)):
        if row is not None:
            lines.append(f"{name:<7}" + "".join(f"{_percent(row.get(k)):>12}" for k, _ in columns))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def peak_memory_mb(device: torch.device | str) -> float:
    """The most memory held so far, in MiB: of the GPU's tensors, or of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write summary.json whole or not at all."""
    path = Path(run_dir) / "summary.json"
    atomic_write_json(path, summary)
    return path

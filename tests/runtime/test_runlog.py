"""What a run records and shows: metrics.jsonl, sinks, progress, curves, table, summary."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_nlu.config import LogConfig
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import runlog


class Sink:
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, scalars: Any) -> None:
        self.seen.append((step, dict(scalars)))

    def close(self) -> None:
        self.closed = True


# --- metrics.jsonl ----------------------------------------------------------------------------


def test_a_line_a_step_flushed_and_exact(tmp_path: Path) -> None:
    sink = Sink()
    with runlog.MetricsLog(tmp_path, [sink]) as log:
        log.log(1, {"reward/mean": 1 / 3, "kl/ref": torch.tensor(0.5), "n": 3, "bad": math.nan})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed
        assert lines == [
            '{"step": 1, "reward/mean": 0.3333333333333333, "kl/ref": 0.5, "n": 3, "bad": null}'
        ]
        log.log(2, {"answers": {"Positive": 3}, "note": "x", "on": True, "inf": -math.inf})
    assert sink.seen == [(1, {"reward/mean": 1 / 3, "kl/ref": 0.5, "n": 3}), (2, {})]
    assert sink.closed
    assert runlog.read_metrics(tmp_path)[1] == {
        "step": 2,
        "answers": {"Positive": 3},
        "note": "x",
        "on": True,
        "inf": None,
    }


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    def write(log: runlog.MetricsLog, steps: range) -> None:
        for step in steps:
            log.log(step, {"x": step / 7})

    (tmp_path / "whole").mkdir()
    with runlog.MetricsLog(tmp_path / "whole") as log:
        log.truncate_after(0)  # nothing there yet
        write(log, range(1, 6))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()

    with runlog.MetricsLog(tmp_path) as log:
        write(log, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    for torn in (b'{"step": 5, "x": 0.71', b'{"step": 5, "x": 1.0}', b""):  # no newline: torn
        path.write_bytes(path.read_bytes() + torn)
        assert [record["step"] for record in runlog.read_metrics(tmp_path)][:3] == [1, 2, 3]
        with runlog.MetricsLog(tmp_path) as log:
            log.truncate_after(3)
            assert [record["step"] for record in runlog.read_metrics(tmp_path)] == [1, 2, 3]
            write(log, range(4, 6))
        assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["metrics.jsonl"]


def test_the_resumed_steps_own_line_may_lack_its_end(tmp_path: Path) -> None:
    """All of it but the newline was written: kept, it would run into the next line."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert runlog.read_metrics(tmp_path) == [{"step": 1}]
    with runlog.MetricsLog(tmp_path) as log:
        log.truncate_after(2)
        log.log(3, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_what_is_missing_torn_or_double_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 2, 5, 6, 9)]
    path.write_text("".join(lines) + "{}\n" + '{"step": 1e999}\n' + '{"step": 10')
    with runlog.MetricsLog(tmp_path) as log:
        told = " ".join(log.truncate_after(9))
        assert "3 torn" in told and "1 line(s) of a step that has another" in told
        assert "no line of steps 3 to 4, 7 to 8" in told
        assert " ".join(log.truncate_after(9)).count("metrics.jsonl") == 1  # the gap, again
    assert path.read_text() == "".join(lines[:1] + lines[2:])


def test_no_line_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "metrics.jsonl").symlink_to("theirs")
    with runlog.MetricsLog(tmp_path) as log:
        log.truncate_after(0)
        log.log(1, {})
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_truncating_an_open_log(tmp_path: Path) -> None:
    with runlog.MetricsLog(tmp_path) as log:
        for step in (1, 2, 1):
            log.truncate_after(step - 1)
            log.log(step, {})
    assert [record["step"] for record in runlog.read_metrics(tmp_path)] == [1]


# --- TensorBoard and Weights & Biases ---------------------------------------------------------


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    assert runlog.open_sinks(LogConfig(), tmp_path) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    cfg = LogConfig(**{name: True})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"log.{name}: .*pip install 'ppo_nlu\[{name}\]'"):
        runlog.open_sinks(cfg, tmp_path)


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    events_module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = importlib.import_module(events_module).EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after 3, resumed from 2
        sinks = runlog.open_sinks(LogConfig(tensorboard=True), tmp_path, start_step=start)
        with runlog.MetricsLog(tmp_path, sinks) as log:
            for step in steps:
                log.log(step, {"reward/mean": step + start, "text": "no number"})
    events = accumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    found = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert found == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_wandb_goes_on_under_the_same_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None
    )

    def init(**options: Any) -> Any:
        started.append(options)
        return run

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (5, 3):  # resumed from an earlier step
        sinks = runlog.open_sinks(LogConfig(wandb=True, project="p"), tmp_path, {"seed": 1})
        with runlog.MetricsLog(tmp_path, sinks) as log:
            log.log(step, {"kl/ref": 0.5})
    assert logged == [{"step": 5, "kl/ref": 0.5}, {"step": 3, "kl/ref": 0.5}]
    assert started[0] == started[1] and re.fullmatch("[0-9a-f]{8}", started[0]["id"])
    assert (started[0]["project"], started[0]["resume"]) == ("p", "allow")
    assert started[0]["config"] == {"seed": 1}


# --- progress ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the progress display sees."""
    now = [100.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_plain_line_every_tenth(clock: list[float]) -> None:
    stream = io.StringIO()
    with runlog.Progress(200, stream=stream) as progress:
        for step in range(1, 201):
            clock[0] += 2.0
            progress.update(16, reward=step / 200, kl=0.25)
    lines = stream.getvalue().splitlines()
    assert [int(re.findall(r"\d+", line)[0]) for line in lines] == [1, *range(20, 201, 20)]
    # step 20: 20 steps in 40 s, 320 answers; the 180 steps left take 360 s
    assert lines[1] == "step 20/200, reward 0.100, KL 0.250, 8.0 samples/s, 0:06:00 left"
    assert "\r" not in stream.getvalue()


def test_a_resumed_run_counts_its_own_time_only(clock: list[float]) -> None:
    stream = io.StringIO()
    with runlog.Progress(7, start=4, stream=stream) as progress:
        for _ in range(3):
            clock[0] += 1.0
            progress.update(10)
    assert stream.getvalue().splitlines() == [
        "step 5/7, 10.0 samples/s, 0:00:02 left",
        "step 6/7, 10.0 samples/s, 0:00:01 left",
        "step 7/7, 10.0 samples/s, 0:00:00 left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with runlog.Progress(4, start=1, stream=stream) as progress:
        progress.update(16, reward=0.5, kl=0.125)
        progress.write("a word between")
        for _ in range(2):
            progress.update(16, reward=0.75, kl=0.25)
    shown = stream.getvalue()
    last = shown.split("\r")[-1]
    assert "4/4" in last and "100%" in last and "|" in last
    assert "reward 0.750" in last and "KL 0.250" in last and "samples/s" in last
    assert "\ra word between\n" in re.sub(" {2,}", "", shown).replace("\r\r", "\r")


def test_progress_can_be_off_but_words_still_come() -> None:
    for stream in (io.StringIO(), Terminal()):
        with runlog.Progress(3, enabled=False, stream=stream) as progress:
            progress.update(1, 0.5, 0.1)
            progress.write("said")
        assert stream.getvalue() == "said\n"


# --- curves -----------------------------------------------------------------------------------


def fill(run_dir: Path, count: int = 60) -> None:
    with runlog.MetricsLog(run_dir) as log:
        for step in range(1, count + 1):
            share = step / count
            record = {"reward/mean": 0.5 + 0.4 * share + 0.05 * math.sin(9 * step)}
            record["kl/ref"] = 0.3 * share if step != 7 else math.nan
            if step % 10 == 0:
                record["eval/sst2/accuracy"] = 0.6 + 0.25 * share
            log.log(step, record)


def test_moving_average_by_hand() -> None:
    assert runlog.moving_average([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert runlog.moving_average([1, 2], 1) == [1, 2]
    assert runlog.moving_average([], 3) == []


def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The figure that was written."""
    plt = pytest.importorskip("matplotlib.pyplot")
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    path = runlog.draw_curves(tmp_path, "PPO on SST-2", **options)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert not list(tmp_path.glob(".tmp*"))
    return kept[0]


def test_curves_show_rewards_kl_evaluation_and_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    before = {"reward": 0.42, "accuracy": 0.55, "unparsed": None}
    figure = drawn(tmp_path, monkeypatch, subtitle="bundled data", before=before)
    assert figure._suptitle.get_text() == "PPO on SST-2\nbundled data"
    reward, kl, evals = figure.axes
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "mean reward per answer",
        "KL to reference",
        "evaluation (%)",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"training step"}
    raw, mean, start = reward.lines
    assert len(raw.get_ydata()) == 60 and start.get_linestyle() == "--"
    values = [record["reward/mean"] for record in runlog.read_metrics(tmp_path)]
    assert mean.get_ydata()[-1] == pytest.approx(sum(values[-12:]) / 12)  # window 60 / 5
    assert list(start.get_ydata()) == [0.42, 0.42]
    assert len(kl.lines[0].get_xdata()) == 59  # the NaN is left out
    assert list(evals.lines[0].get_ydata())[-1] == pytest.approx(85.0)
    assert list(evals.lines[1].get_ydata()) == pytest.approx([55.0, 55.0])
    labels = [text.get_text() for text in reward.get_legend().get_texts()]
    assert labels == ["each step", "mean of 12 steps", "before training"]


def test_curves_without_evaluation_or_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runlog.MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward/mean": 0.5})
    figure = drawn(tmp_path, monkeypatch, before={"reward": None})
    assert len(figure.axes) == 1 and len(figure.axes[0].lines) == 1
    assert figure._suptitle.get_text() == "PPO on SST-2"


def test_no_curves_without_matplotlib_or_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runlog.draw_curves(tmp_path, "empty") is None
    fill(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert runlog.draw_curves(tmp_path, "no library") is None
    assert not (tmp_path / "curves.png").exists()


# --- the end ----------------------------------------------------------------------------------


def test_results_table() -> None:
    before = {"sample": 0.5012, "greedy": 0.6, "score": None, "unparsed": 0.0306}
    after = {"sample": 0.91649, "greedy": 0.92, "score": 1.0, "unparsed": 0.0}
    assert runlog.results_table(before, after).splitlines() == [
        "(%)      sample T=1      greedy       score    unparsed",
        "base           50.1        60.0           -         3.1",
        "tuned          91.6        92.0       100.0         0.0",
    ]
    assert len(runlog.results_table(None, after).splitlines()) == 2
    assert "-" in runlog.results_table(None, {"sample": math.nan})


def test_peak_memory_is_in_mebibytes() -> None:
    """Against the operating system's own count, and it never falls."""
    before = runlog.peak_memory_mb("cpu")
    block = torch.ones(2**26)  # 256 MiB
    after = runlog.peak_memory_mb(torch.device("cpu"))
    del block
    assert runlog.peak_memory_mb("cpu") >= after >= before
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak is not None and after == pytest.approx(int(peak[1]) / 1024, rel=0.05)


def test_summary_is_strict_json(tmp_path: Path) -> None:
    path = runlog.write_summary(tmp_path, {"seed": 1, "after": {"score": math.nan}})
    assert path.name == "summary.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "seed": 1,
        "after": {"score": None},
    }

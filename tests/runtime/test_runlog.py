"""What a run records: metrics.jsonl, and the loggers that take its numbers."""

from __future__ import annotations

import importlib
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


# --- metrics.jsonl -----------------------------------------------------------------------------


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


# --- TensorBoard and Weights & Biases ----------------------------------------------------------


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

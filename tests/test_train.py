"""The main program: what a run leaves, that it survives a kill at any moment, and how it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import QUICK, adapter, run, steps

from ppo_nlu import train
from ppo_nlu.answering import answer, by_policy, predictions
from ppo_nlu.methods import ppo
from ppo_nlu.model import BUNDLED, peft_format
from ppo_nlu.runtime import checkpoint, cli

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)

# Processes of their own, forked from one that has done the imports, so each starts in no time.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["pytest", "ppo_nlu.train", "transformers.models.llama"])


def start(*arguments: object, moment: str = "", log: Path) -> Any:
    process = _FORK.Process(target=_child, args=([str(a) for a in arguments], moment, str(log)))
    process.start()
    return process


def _child(arguments: list[str], moment: str, log: str) -> None:
    """The program in a process of its own, which dies of kill -9 at the moment, if one is named."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    if moment:
        MOMENTS[moment]()
    sys.exit(cli.run(train.main, arguments))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(module: Any, name: str, due: Callable[..., bool], halfway: Any = None) -> None:
    """Let the call of `module.name` for which `due(*arguments)` holds be the process's last."""
    original = getattr(module, name)

    def last(*arguments: Any, **options: Any) -> Any:
        if due(*arguments):
            if halfway:
                halfway(*arguments)
            _die()
        return original(*arguments, **options)

    setattr(module, name, last)


def _half(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


# In the order in which a run of four steps comes to them; each kill but the first finds the
# checkpoint of an earlier step.
MOMENTS: dict[str, Callable[[], None]] = {
    "in the rollout of step 1": lambda: _die_at(ppo.PPO, "collect", lambda *a: a[2] == 0),
    "in the second epoch of step 2": lambda: _die_at(
        ppo, "seeded", lambda *a: a[0] == "update" and a[2:] == (1, 1)
    ),
    "step 2 logged and evaluated, not saved": lambda: _die_at(
        train, "save", lambda run: run.step == 2
    ),
    "inside the write of checkpoint 2": lambda: _die_at(
        checkpoint,
        "write_new",
        lambda path, data: "step_000002" in str(path) and path.name == "optimizer.safetensors",
        _half,
    ),
    "checkpoint 3 written, not renamed": lambda: _die_at(
        checkpoint, "_replace_folder", lambda temp, final: final.name == "step_000003"
    ),
    "checkpoint 3 renamed, 1 not deleted": lambda: _die_at(
        checkpoint, "_remove", lambda path: path.name == "step_000001"
    ),
    "in the evaluation of step 4": lambda: _die_at(
        answer, "ask", lambda answerer, spec, rows, decodes, *a: decodes == ("greedy",)
    ),
    "at the end, half an adapter written": lambda: _die_at(
        peft_format, "save_adapter", lambda *a: True
    ),
    "at the end, before the summary": lambda: _die_at(
        predictions, "write_predictions", lambda *a: True
    ),
}


def wait_for(happened: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def test_a_run_leaves_what_it_promises(config: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(config, "--output", folder) == 0
    out = capsys.readouterr().out
    assert "bundled data, not SST-2" in out and str(folder) in out
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "predictions.jsonl", "run.json"):
        assert (folder / name).is_file(), name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"] == "bundled" and summary["task"] == "sst2" and summary["seed"] == 0
    assert summary["train_samples"] == 4 * 8
    for when in ("before", "after"):
        row = summary[when]
        assert set(row) == {"sample", "greedy", "score", "unparsed"}
        assert all(0 <= value <= 1 for value in row.values())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["policy/first_ratio_gap"] < 1e-4
    assert steps[0]["kl/ref"] == pytest.approx(0, abs=1e-4)  # LoRA is zero at the start
    # 2 epochs of 8 answers in minibatches of 4
    assert all(step["optim/steps"] == 4 for step in steps)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert set(rows[0]) == {"id", "label", "prediction", "response", "probabilities"}
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    # the same folder again: refused in one line, nothing lost
    assert run(config, "--output", folder) == 2
    assert "--resume" in capsys.readouterr().err
    assert (folder / "summary.json").is_file()


def test_the_first_step_comes_soon(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 2 s of processor time from the call of the program, with torch imported, to the end
    of the first step of the bundled model."""
    ends = []
    original = train._told

    def told(*arguments: Any) -> dict[str, Any]:
        ends.append(time.process_time())  # the step has been taken
        return original(*arguments)

    monkeypatch.setattr(train, "_told", told)
    began = time.process_time()
    assert run(config, *QUICK, "train.steps=1", "--output", tmp_path / "run") == 0
    assert ends[0] - began < 2


@pytest.mark.slow
def test_resume_after_kills_is_bit_exact(config: Path, tmp_path: Path, whole: Path) -> None:
    """One run, killed -9 at nine moments, each time resumed: to the last bit as if never killed."""
    folder, log = tmp_path / "killed", tmp_path / "log"
    where: tuple[object, ...] = (config, *QUICK, "--output", folder)
    for moment in MOMENTS:
        process = start(*where, moment=moment, log=log)
        process.join(180)
        assert process.exitcode == -signal.SIGKILL, f"{moment}: not reached: {log.read_text()}"
        assert not (folder / "summary.json").exists(), moment
        where = (folder / "config.yaml", "--resume", folder)
    process = start(*where, log=log)
    process.join(180)
    assert process.exitcode == 0, log.read_text()
    assert "resumed after step 4 of 4" in log.read_text()
    wanted, found = adapter(whole), adapter(folder)
    assert wanted.keys() == found.keys()
    for key in wanted:
        assert torch.equal(wanted[key], found[key]), f"{key} differs"
    assert steps(folder) == steps(whole)
    best, _ = checkpoint.load(folder / "checkpoints" / "best")
    assert torch.equal(
        best["value_head"]["out.weight"],
        checkpoint.load(whole / "checkpoints" / "best")[0]["value_head"]["out.weight"],
    )
    name = "predictions.jsonl"
    assert (folder / name).read_text() == (whole / name).read_text()
    leftovers = [p.name for p in folder.rglob("*") if p.name.startswith((".tmp-", ".old-"))]
    assert not leftovers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_from_outside_saves_and_tells_how_to_go_on(
    config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    more = ("train.steps=5000", "train.eval_every=0", "train.checkpoint_every=0")
    process = start(config, *QUICK, *more, "--output", folder, log=log)
    wait_for(lambda: (folder / "metrics.jsonl").exists() or not process.is_alive())
    assert process.is_alive(), log.read_text()
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == code, log.read_text()
    assert f"--resume {folder}" in log.read_text()
    assert (folder / "checkpoints" / f"step_{len(steps(folder)):06d}" / "state.json").is_file()


STOPS: dict[str, Callable[[], tuple[Any, str, Callable[..., bool]]]] = {
    "in a rollout": lambda: (ppo.PPO, "collect", lambda *a: a[2] == 1),
    "in an update": lambda: (ppo.PPO, "update", lambda *a: a[2] == 1),
    "in a midway evaluation": lambda: (by_policy, "generate", lambda *a: True),
    "behind the checkpoint": lambda: (checkpoint, "prune", lambda *a: True),
    "in the evaluation at the end": lambda: (by_policy, "label_probabilities", lambda *a: True),
}


@pytest.mark.parametrize("moment", STOPS)
def test_a_stop_at_any_moment_loses_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, moment: str
) -> None:
    """A signal: the step it falls into is saved, and the resumed run ends as if never stopped."""
    module, name, due = STOPS[moment]()
    original = getattr(module, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        if due(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    folder = tmp_path / "run"
    every = ("train.checkpoint_every=3",)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        assert run(config, *QUICK, *every, "--output", folder) == 143
    assert not (folder / "summary.json").exists()
    last = checkpoint.latest(folder)
    assert last is not None and checkpoint.step_of(last) >= len(steps(folder))
    assert run(folder / "config.yaml", "--resume", folder) == 0
    wanted, found = adapter(whole), adapter(folder)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert steps(folder) == steps(whole)


def test_bad_steps_are_skipped_dumped_and_stop_the_run(
    config: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A NaN advantage makes the loss NaN: two such steps are survived, five in a row are not."""
    collect, calls = ppo.PPO.collect, []

    def poisoned(*arguments):
        batch = collect(*arguments)
        calls.append(1)
        if len(calls) in bad:
            batch.advantages[:] = float("nan")
        return batch

    monkeypatch.setattr(ppo.PPO, "collect", poisoned)
    bad = {2, 3}
    folder = tmp_path / "survives"
    assert run(config, *QUICK, "--output", folder) == 0
    assert len(list((folder / "bad_steps").glob("*.json"))) == 2
    assert json.loads((folder / "summary.json").read_text())["bad_steps"] == 2
    assert all(torch.isfinite(value).all() for value in adapter(folder).values())
    capsys.readouterr()
    calls.clear()
    bad = set(range(100))
    folder = tmp_path / "stops"
    assert run(config, *QUICK, "train.steps=9", "train.max_bad_steps=5", "--output", folder) == 2
    error = capsys.readouterr().err
    assert "5 steps in a row" in error and "optim.lr" in error
    dumped = json.loads(next((folder / "bad_steps").glob("*.json")).read_text())
    assert dumped["rows"][0]["response"] is not None

"""The main program: what a run leaves, that it survives a kill at any moment, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_nlu import cli, ppo, train
from ppo_nlu.model import BUNDLED

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)

CONFIG = """
task: sst2
data: {fallback: bundled, url: "http://127.0.0.1:9", limit: 64}
rollout: {batch_size: 8, max_new_tokens: 4}
ppo: {minibatch_size: 4, epochs: 2}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 4, eval_every: 2, checkpoint_every: 1}
eval: {limit: 16, batch_size: 16, bootstrap: 50}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def run(*arguments: object) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "ppo_nlu.train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = load_file(folder / "adapter" / "value_head.safetensors")
    return found | {f"value.{name}": value for name, value in head.items()}


def wait_for(happened, seconds: float = 60.0) -> None:
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


def test_resume_after_kill_is_bit_exact(config: Path, tmp_path: Path) -> None:
    """kill -9 during the first step, between steps, and inside a checkpoint's write."""
    whole = tmp_path / "whole"
    assert start(config, "--output", whole).wait() == 0
    wanted = adapter(whole)

    def steps(folder: Path) -> int:
        log = folder / "metrics.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def half_written(folder: Path) -> bool:
        place = folder / "checkpoints"
        return steps(folder) >= 1 and place.exists() and any(place.glob(".tmp*"))

    moments = {
        "before the first step ends": lambda f: (f / "config.yaml").exists(),
        "between steps": lambda f: steps(f) >= 2,
        "inside the checkpoint's write": half_written,
    }
    for name, moment in moments.items():
        folder = tmp_path / name.replace(" ", "-")
        process = start(config, "--output", folder)
        wait_for(lambda f=folder, m=moment, p=process: m(f) or p.poll() is not None)
        process.kill()
        process.wait()
        assert not (folder / "adapter").exists(), f"{name}: the run was over before the kill"
        again = start(folder / "config.yaml", "--resume", folder)
        output, _ = again.communicate()
        assert again.returncode == 0, output
        found = adapter(folder)
        assert wanted.keys() == found.keys()
        for key in wanted:
            assert torch.equal(wanted[key], found[key]), f"{name}: {key} differs"
        assert steps(folder) == 4, name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_tells_how_to_go_on(
    config: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "run"
    process = start(config, "train.steps=500", "train.eval_every=0", "--output", folder)
    wait_for(lambda: (folder / "metrics.jsonl").exists() or process.poll() is not None)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert f"--resume {folder}" in output
    done = len((folder / "metrics.jsonl").read_text().splitlines())
    assert list((folder / "checkpoints").glob(f"step_{done:06d}")), output


def test_resume_from_another_config_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(config, "eval.before=false", "--output", folder) == 0
    capsys.readouterr()
    assert run(config, "ppo.clip=0.1", "--resume", folder) == 2
    error = capsys.readouterr().err
    assert "ppo.clip" in error and error.count("\n") == 1
    assert run(config, "--resume", tmp_path / "nowhere") == 2


def test_bad_steps_are_skipped_dumped_and_stop_the_run(
    config: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A NaN advantage makes the loss NaN: two such steps are survived, five in a row are not."""
    collect, calls = ppo.collect, []

    def poisoned(*arguments):
        batch, metrics = collect(*arguments)
        calls.append(1)
        if len(calls) in bad:
            batch.advantages[:] = float("nan")
        return batch, metrics

    monkeypatch.setattr(ppo, "collect", poisoned)
    bad = {2, 3}
    folder = tmp_path / "survives"
    assert run(config, "eval.before=false", "--output", folder) == 0
    assert len(list((folder / "bad_steps").glob("*.json"))) == 2
    assert json.loads((folder / "summary.json").read_text())["bad_steps"] == 2
    assert all(torch.isfinite(value).all() for value in adapter(folder).values())
    capsys.readouterr()
    calls.clear()
    bad = set(range(100))
    folder = tmp_path / "stops"
    assert run(config, "train.steps=9", "train.max_bad_steps=5", "--output", folder) == 2
    error = capsys.readouterr().err
    assert "5 steps in a row" in error and "optim.lr" in error
    dumped = json.loads(next((folder / "bad_steps").glob("*.json")).read_text())
    assert dumped["rows"][0]["response"] is not None

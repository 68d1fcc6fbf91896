"""The main program: what a run leaves, that it survives a kill at any moment, and how it ends."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppo_nlu import train
from ppo_nlu.answering import answer, by_policy, predictions
from ppo_nlu.methods import memory, ppo
from ppo_nlu.model import BUNDLED, peft_format
from ppo_nlu.runtime import checkpoint, cli
from ppo_nlu.storage import files, sealed

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
eval: {limit: 16, batch_size: 8, bootstrap: 50}
"""
QUICK = ("eval.before=false", "log.plot=false", "log.progress=false")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def run(*arguments: object) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the test's config that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    (root / "tiny.yaml").write_text(CONFIG)
    assert run(root / "tiny.yaml", *QUICK, "--output", root / "run") == 0
    return root / "run"


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = load_file(folder / "adapter" / "value_head.safetensors")
    return found | {f"value.{name}": value for name, value in head.items()}


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


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


def test_a_profile_tells_the_phases_and_changes_nothing(
    config: Path, tmp_path: Path, capsys, whole: Path
) -> None:
    folder = tmp_path / "run"
    assert run(config, *QUICK, "--profile", "--output", folder) == 0
    out = capsys.readouterr().out
    report = json.loads((folder / "profile.json").read_text())
    phases = report["phases"]
    assert {"prefill", "decode", "update", "evaluation", "io", "other"} <= phases.keys()
    assert report["steps"] == 4 and report["traced_steps"] == [3, 4]
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in phases.values())
    # Two of four steps are timed. Each runs 8 prompts, up to three more tokens behind each, and the
    # answers in two epochs.
    assert phases["prefill"]["tokens_saved"] > phases["prefill"]["tokens_run"] > 0
    assert phases["update"]["tokens_run"] > phases["prefill"]["tokens_run"]
    assert 2 * 8 * 3 >= phases["decode"]["tokens_run"] > 0
    assert all(0 < phases[name]["gemm_share"] < 1 for name in ("prefill", "decode", "update"))
    table = out[out.index("phase ") :].splitlines()
    assert table[-1] == f"profile: {folder}/profile.json and trace.json"
    names = {
        event.get("name")
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
    }
    assert {"prefill", "decode", "update", "aten::mm"} <= names
    wanted, found = adapter(whole), adapter(folder)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert steps(folder) == steps(whole)


def test_the_memory_plan_comes_before_the_first_step(config: Path, tmp_path: Path, capsys) -> None:
    assert run(config, *QUICK, "train.steps=1", "--output", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    plan = out.index("memory plan: ")
    assert out.index("model: ") < plan < out.index("run folder: ")
    assert "weights 14 MiB" in out and "micro-batch: no limit of tokens" in out
    # nor is any other word that is no warning on stderr
    assert out.index("run folder: ") < out.index("old log-probs are taken") and err == ""


def test_a_gpus_limit_reaches_the_method(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's number of tokens, while the run's own config stays as it was given."""
    seen = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * 2**20)
    original = train.train

    def spy(at: train.Run, stop: Any) -> None:
        assert at.method.budget is not None
        seen.append(at.method.budget.tokens)
        original(at, stop)

    monkeypatch.setattr(train, "train", spy)
    assert run(config, *QUICK, "train.steps=1", "--output", tmp_path / "run") == 0
    assert 100 < seen[0] < 40 * 2**20 / (20 * 2**10)  # at least 20 KiB a token and layer
    assert "micro_batch_tokens: 0\n" in (tmp_path / "run" / "config.yaml").read_text()


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


def test_resume_from_another_config_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(config, *QUICK, "--output", folder) == 0
    capsys.readouterr()
    assert run(config, "ppo.clip=0.1", "--resume", folder) == 2
    error = capsys.readouterr().err
    assert "ppo.clip" in error and error.count("\n") == 1
    assert run(config, "--resume", tmp_path / "nowhere") == 2


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


def damaged(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 4
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `whole`, interrupted behind step 3: with checkpoints of steps 2 and 3."""
    root = tmp_path_factory.mktemp("unfinished")
    (root / "tiny.yaml").write_text(CONFIG)
    told = train._told

    def interrupted(at: train.Run, *rest: Any) -> dict[str, Any]:
        if at.step == 3:
            raise KeyboardInterrupt
        return told(at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_told", interrupted)
        assert run(root / "tiny.yaml", *QUICK, "--output", root / "run") == 130
    return root / "run"


@pytest.mark.parametrize(
    "name", ["step_000003/adapter.safetensors", "step_000003/state.json", "best/state.json"]
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    unfinished: Path, tmp_path: Path, whole: Path, capsys, name: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    damaged(folder / "checkpoints" / name)
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 0
    out, err = capsys.readouterr()
    assert str(folder / "checkpoints" / name) in err and err.count("\n") == 1
    assert f"resumed after step {3 if 'best' in name else 2} of 4" in out
    wanted, found = adapter(whole), adapter(folder)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert steps(folder) == steps(whole)
    kept = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("damaged-")]
    assert kept == [f"damaged-{name.partition('/')[0]}-1"]


@pytest.mark.parametrize("what", ["a file", "a dead link", "an empty folder", "another step"])
def test_what_is_no_checkpoint_is_told(
    unfinished: Path, tmp_path: Path, whole: Path, capsys, what: str
) -> None:
    """In the place of the newest: the one before it is taken."""
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    newest = folder / "checkpoints" / "step_000003"
    shutil.rmtree(newest)
    {
        "a file": lambda: newest.write_text("mine"),
        "a dead link": lambda: newest.symlink_to("nowhere"),
        "an empty folder": lambda: newest.mkdir(),
        "another step": lambda: newest.symlink_to("step_000002"),
    }[what]()
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 0
    out, err = capsys.readouterr()
    assert str(newest) in err and err.count("\n") == 1 and "resumed after step 2 of 4" in out
    assert steps(folder) == steps(whole)


def test_without_a_whole_checkpoint_nothing_is_changed(
    unfinished: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    for path in (folder / "checkpoints").glob("step_*"):
        damaged(path / "optimizer.safetensors")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 2
    err = capsys.readouterr().err
    assert "none of its 2 checkpoint(s)" in err and "--output" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_without_checkpoints_what_is_dropped_is_told(
    unfinished: Path, tmp_path: Path, whole: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    shutil.rmtree(folder / "checkpoints")
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 0
    out, err = capsys.readouterr()
    assert f"{folder}: no checkpoint is there; 3 line(s) of metrics are dropped" in err
    assert err.count("\n") == 1 and "begins at the start" in out and "resumed" not in out
    assert steps(folder) == steps(whole)


@pytest.mark.parametrize("what", ["a file", "a dead link", "a pipe"])
def test_what_is_no_folder_of_checkpoints_is_refused_first(
    unfinished: Path, tmp_path: Path, capsys, what: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    place = folder / "checkpoints"
    shutil.rmtree(place)
    {
        "a file": lambda: place.write_text("mine"),
        "a dead link": lambda: place.symlink_to("nowhere"),
        "a pipe": lambda: os.mkfifo(place),
    }[what]()
    before = (folder / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 2
    out, err = capsys.readouterr()
    assert f"{place}: the checkpoints cannot be read" in err and err.count("\n") == 1
    assert (folder / "metrics.jsonl").read_bytes() == before and "step" not in out


ALL = {"samples": 4, "train_s": 1.0, "truncated": 0, "bad_steps": 0, "wall_s": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learner", None), ("learner", []), ("optimizer", {}), ("totals", 3), ("totals", {}),
        ("totals", {"wall_s": "long"}), ("pending", None), ("bad_in_a_row", None),
        ("totals", {"wall_s": 1.0}), ("totals", dict(ALL, samples="4")),
        ("totals", dict(ALL, train_s=True)), ("totals", dict(ALL, bad_steps=math.nan)),
        ("made_of", 5), ("made_of", []), ("pending", 7), ("pending", []), ("bad_in_a_row", "1"),
    ],
)  # fmt: skip
def test_an_odd_state_is_one_line(
    unfinished: Path, tmp_path: Path, capsys, key: str, value: Any
) -> None:
    """Sealed, so that its checksum holds, and yet not what this version writes."""
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    for path in (folder / "checkpoints").glob("step_*"):
        head = sealed.unseal((path / "state.json").read_text())
        head["state"][key] = value
        if value is None:
            del head["state"][key]
        (path / "state.json").write_text(sealed.seal(head))
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 2
    err = capsys.readouterr().err
    assert "does not hold what a checkpoint" in err or "optimizer state is not whole" in err
    assert err.count("\n") == 1


def test_what_metrics_jsonl_lacks_is_told(
    unfinished: Path, tmp_path: Path, whole: Path, capsys
) -> None:
    """A line lost with the power, a torn one, and one that a second process wrote."""
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    log = folder / "metrics.jsonl"
    first, _second, third = log.read_bytes().splitlines(True)
    log.write_bytes(first + third + third + b'{"step": 4, "rew')
    capsys.readouterr()
    assert run(folder / "config.yaml", "--resume", folder) == 0
    err = capsys.readouterr().err
    assert "no line of step 2," in err and "1 torn line" in err and "1 line(s) of a step" in err
    assert [row["step"] for row in steps(folder)] == [1, 3, 4]
    assert steps(folder)[1:] == steps(whole)[2:]


def test_metrics_are_on_the_disk_before_their_checkpoint(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a checkpoint gets its name, its steps' lines have been forced to the disk."""
    folder, synced, seen = tmp_path / "run", [0], []
    sync, name = files.sync_file, checkpoint._replace_folder

    def synced_file(path: Path) -> None:
        sync(path)
        synced[0] = path.stat().st_size

    def named(temp: Path, final: Path) -> None:
        if final.name.startswith("step_"):
            log = (folder / "metrics.jsonl").read_bytes()[: synced[0]]
            seen.append((int(final.name[5:]), log.count(b"\n")))
        name(temp, final)

    monkeypatch.setattr(files, "sync_file", synced_file)
    monkeypatch.setattr(checkpoint, "_replace_folder", named)
    assert run(config, *QUICK, "--output", folder) == 0
    assert seen == [(step, step) for step in (1, 2, 3, 4)]

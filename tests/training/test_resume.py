"""Checkpoints of a run: damaged ones, missing ones, and what a resumed run is told."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import CONFIG, QUICK, adapter, run, steps

from ppo_nlu import train
from ppo_nlu.model import BUNDLED
from ppo_nlu.runtime import checkpoint
from ppo_nlu.storage import files, sealed
from ppo_nlu.training.run import Run

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


def test_resume_from_another_config_is_refused(config: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(config, *QUICK, "--output", folder) == 0
    capsys.readouterr()
    assert run(config, "ppo.clip=0.1", "--resume", folder) == 2
    error = capsys.readouterr().err
    assert "ppo.clip" in error and error.count("\n") == 1
    assert run(config, "--resume", tmp_path / "nowhere") == 2


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

    def interrupted(at: Run, *rest: Any) -> dict[str, Any]:
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

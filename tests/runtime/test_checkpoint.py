"""Checkpoints: to the last bit, damaged, under kills and on a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_a_child, on_call

from ppo_nlu.errors import UserError
from ppo_nlu.runtime import checkpoint
from ppo_nlu.storage import sealed
from ppo_nlu.storage.sealed import Damaged

CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")  # of os: every step of a write


class Killed(BaseException):
    """Stands in for the end of the process: no `except Exception` may see it."""


def content(number: int) -> tuple[checkpoint.Tensors, dict[str, Any]]:
    tensors = {
        "adapter": {"w": torch.full((5,), float(number))},
        "optimizer": {"0.step": torch.tensor(float(number))},
    }
    return tensors, {"step": number, "kl_coef": number / 3}


def check(path: Path | None, number: int) -> None:
    """The folder holds exactly `content(number)`."""
    assert path is not None
    tensors, state = checkpoint.load(path)
    wanted, wanted_state = content(number)
    assert state == wanted_state and tensors.keys() == wanted.keys()
    for name, group in wanted.items():
        assert all(torch.equal(tensors[name][key], value) for key, value in group.items())


def die() -> None:
    raise Killed


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


# --- writing and reading ----------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    shared = torch.randn(4, requires_grad=True)
    tensors = {
        "adapter": {"a": base[:, 1], "b": base.T, "c": shared, "d": shared},  # views, shared memory
        "rng": {"state": torch.get_rng_state()},
        "optimizer": {},
        "half": {"x": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16)},
    }
    floats = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    state = {"floats": floats, "step": 7, "nested": {"best": None, "on": True}, "bad": math.nan}
    loaded, back = checkpoint.load(checkpoint.save(tmp_path, 7, tensors, state))
    assert loaded.keys() == tensors.keys()
    for name, group in tensors.items():
        assert loaded[name].keys() == group.keys()
        for key, value in group.items():
            found, wanted = loaded[name][key], value.detach().contiguous()
            assert found.dtype == wanted.dtype
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    assert math.isnan(back.pop("bad"))
    assert math.copysign(1, back["floats"][-1]) == -1
    assert back == {key: value for key, value in state.items() if key != "bad"}


def test_no_pickle_and_readable_by_the_group(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        path = checkpoint.save(tmp_path, 1, *content(1))
    finally:
        os.umask(umask)
    assert sorted(p.name for p in path.iterdir()) == [
        "adapter.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o644}
    json.loads((path / "state.json").read_text())


def test_latest_goes_by_number_and_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (2, 999_999, 1_000_000, 30):
        checkpoint.save(tmp_path, step, *content(step))
    checkpoint.save_best(tmp_path, 2, 0.5, *content(2))
    (tmp_path / "checkpoints" / "step_abc").mkdir()
    check(checkpoint.latest(tmp_path), 1_000_000)  # by name, step_999999 would be last
    assert checkpoint.step_of(checkpoint.latest(tmp_path) or "") == 1_000_000
    checkpoint.prune(tmp_path, 2)
    assert names(tmp_path) == {"step_999999", "step_1000000", "best", "step_abc"}
    checkpoint.prune(tmp_path, 0)
    assert names(tmp_path) == {"step_1000000", "best", "step_abc"}


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, *content(1))
    check(checkpoint.save(tmp_path, 5, *content(2)), 2)
    assert names(tmp_path) == {"step_000005"}


def test_best_is_replaced_only_by_a_better_metric(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path) is None and checkpoint.best_metric(tmp_path) is None
    for step, metric, stays in (
        (1, 0.5, 1),
        (2, 0.5, 1),
        (3, 0.4, 1),
        (4, math.nan, 1),
        (5, 0.6, 5),
    ):
        written = checkpoint.save_best(tmp_path, step, metric, *content(step))
        assert (written is not None) == (stays == step)
        check(checkpoint.best(tmp_path), stays)
    assert checkpoint.best_metric(tmp_path) == 0.6
    assert checkpoint.latest(tmp_path) is None  # best is no step to resume from


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "adapter.safetensors").write_bytes(b"x" * 9), "damaged"),
        (lambda p: (p / "adapter.safetensors").unlink(), "damaged"),
        (lambda p: (p / "state.json").write_text("{"), "not a checkpoint"),
        (lambda p: (p / "state.json").write_text('{"format": 9, "files": [], "state": {}}'), "9"),
        (lambda p: p.rename(p.with_name("gone")), "no such checkpoint"),
    ],
)
def test_a_spoilt_checkpoint_is_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    path = checkpoint.save(tmp_path, 1, *content(1))
    spoil(path)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- damage -----------------------------------------------------------------------------------


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Bits flipped in every file of a checkpoint: all of state.json, samples of the others."""
    path = checkpoint.save(tmp_path, 1, *content(1))
    draw = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        places = range(len(whole)) if file.suffix == ".json" else draw.sample(range(len(whole)), 60)
        for place in places:
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << draw.randrange(8)
            file.write_bytes(spoilt)
            with pytest.raises(Damaged) as error:
                checkpoint.load(path)
            assert str(file) in str(error.value) and "\n" not in str(error.value)
        file.write_bytes(whole)
    check(path, 1)


SPOILS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b" "),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a dead link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "binary": lambda file: file.write_bytes(b"\xff\x00" * 50),
    **{
        f"other JSON: {text[:25]}": lambda file, text=text: file.write_text(text)
        for text in (
            "null", "[]", "{}", "1e999", '{"files": {}, "state": {}}', '{"format": 2}',
            '{"format": 2, "step": 1, "files": {"adapter": "x"}, "state": {}}',
            '{"format": "2", "step": [], "files": [], "state": 3}',
            '{"format": 2, "step": ' + "9" * 5000 + "}", "[" * 100_000,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors"])
def test_a_spoilt_file_of_any_kind_is_damage(tmp_path: Path, name: str, spoil: str) -> None:
    path = checkpoint.save(tmp_path, 1, *content(1))
    SPOILS[spoil](path / name)
    with pytest.raises(Damaged) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"files": ["adapter"]}, {"files": {"../x": "0"}}, {"state": []}, {"step": "1"}, {"step": 2}],
)
def test_a_sealed_state_of_another_shape_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = checkpoint.save(tmp_path, 1, *content(1))
    head = sealed.unseal((path / "state.json").read_text())
    (path / "state.json").write_text(sealed.seal(head | changes))
    with pytest.raises(Damaged):
        checkpoint.load(path)


def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, *content(1))
    head = sealed.unseal((path / "state.json").read_text())
    for text in (sealed.seal(head | {"format": 3}), '{"format": 1, "files": [], "state": {}}'):
        (path / "state.json").write_text(text)
        with pytest.raises(UserError, match="this version reads 2") as error:
            checkpoint.load(path)
        assert not isinstance(error.value, Damaged)


def test_a_damaged_best_is_told_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save_best(tmp_path, 1, 0.5, *content(1))
    (tmp_path / "checkpoints" / "best" / "state.json").write_text("{}")
    assert checkpoint.best_metric(tmp_path) is None
    assert "best" in capsys.readouterr().err
    assert checkpoint.save_best(tmp_path, 2, 0.1, *content(2)) is not None
    check(checkpoint.best(tmp_path), 2)


def test_set_aside_keeps_the_folder_under_another_name(tmp_path: Path) -> None:
    for number in (1, 2):
        path = checkpoint.save(tmp_path, 3, *content(3))
        aside = checkpoint.set_aside(path)
        assert aside is not None and aside.name == f"damaged-step_000003-{number}"
    assert checkpoint.latest(tmp_path) is None and len(names(tmp_path)) == 2
    checkpoint.save(tmp_path, 4, *content(4))
    checkpoint.prune(tmp_path, 1)
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == {"damaged-step_000003-1", "damaged-step_000003-2", "step_000004"}


def test_links_in_checkpoints_lose_only_the_link(tmp_path: Path) -> None:
    """Pruning, cleaning and replacing take the link away, and leave what it leads to."""
    theirs = tmp_path / "theirs"
    checkpoint.save(theirs, 1, *content(1))
    held = theirs / "checkpoints" / "step_000001"
    run = tmp_path / "run"
    folder = run / "checkpoints"
    checkpoint.save(run, 2, *content(2))
    for name in ("step_000001", ".tmp-link", ".old-step_000002", "step_000007"):
        (folder / name).symlink_to(held, target_is_directory=True)
    (folder / "step_000008").symlink_to("step_000008")
    check(folder / "step_000001", 1)
    assert [p.name for p in checkpoint.candidates(run)] == [
        "step_000008",
        "step_000007",
        "step_000002",
        "step_000001",
    ]
    with pytest.raises(Damaged, match="is not a folder"):
        checkpoint.load(folder / "step_000008")
    with pytest.raises(Damaged, match="holds the checkpoint of step 1"):
        checkpoint.load(folder / "step_000007")
    checkpoint.clean(run)
    checkpoint.set_aside(folder / "step_000007")
    checkpoint.save(run, 2, *content(2))
    checkpoint.prune(run, 1)
    assert names(run) == {"step_000002", "damaged-step_000007-1", "step_000008"}
    check(held, 1)
    checkpoint.save(run, 8, *content(8))
    check(folder / "step_000008", 8)


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    assert checkpoint.latest(tmp_path) is None and checkpoint.best(tmp_path) is None
    checkpoint.clean(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save(tmp_path, 1, *content(1))
    assert (tmp_path / "checkpoints").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS, errno.EXDEV, errno.EBUSY])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_what_the_system_refuses_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    checkpoint.save(tmp_path, 1, *content(1))
    with monkeypatch.context() as patch:
        on_call(patch, 0, fail, (call,))
        with pytest.raises(UserError, match="cannot be written") as error:
            checkpoint.save(tmp_path, 2, *content(2))
    assert "\n" not in str(error.value)
    check(checkpoint.latest(tmp_path), 1)
    assert names(tmp_path) == {"step_000001"}


# --- kills ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Path, int], Any]] = {
    "best": lambda run, n: checkpoint.save_best(run, n, float(n), *content(n)),
    "same step": lambda run, n: checkpoint.save(run, 1, *content(n)),
}
FIND: dict[str, Callable[[Path], Path | None]] = {
    "best": checkpoint.best,
    "same step": checkpoint.latest,
}


def survive(run: Path, kind: str) -> int:
    """After a kill: old (1) or new (2) is readable, still so after cleaning; which one it is."""
    for _ in range(2):
        found = FIND[kind](run)
        assert found is not None
        number = 1 + (checkpoint.load(found)[1] == content(2)[1])
        check(found, number)
        checkpoint.clean(run)
    assert names(run) == {"best" if kind == "best" else "step_000001"}
    return number


@pytest.mark.parametrize("cleaned", [True, False])
@pytest.mark.parametrize("kind", list(WRITES))
def test_a_replacement_survives_a_stop_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cleaned: bool
) -> None:
    outcomes = []
    for kill_at in range(100):
        run = tmp_path / str(kill_at)
        WRITES[kind](run, 1)
        with monkeypatch.context() as patch:
            on_call(patch, kill_at, die, CALLS)
            try:
                WRITES[kind](run, 2)
                finished = True
            except Killed:
                finished = False
        if not cleaned:  # the next write has to cope with the leftovers
            WRITES[kind](run, 3)
            check(FIND[kind](run), 3)
            checkpoint.clean(run)
            assert len(names(run)) == 1
        else:
            outcomes.append(survive(run, kind))
        if finished:
            break
    assert finished and kill_at >= 12  # 3 files, folders, 2 renames, the old folder's files
    assert outcomes == sorted(outcomes) and (not cleaned or set(outcomes) == {1, 2})


def test_a_second_kill_while_cleaning_up_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first in range(8, 22):  # around the renames; before them, only the temporary folder
        for second in range(5):
            run = tmp_path / f"{first}-{second}"
            WRITES["best"](run, 1)
            for kill_at, act in (
                (first, lambda r: WRITES["best"](r, 2)),
                (second, checkpoint.clean),
            ):
                with monkeypatch.context() as patch:
                    on_call(patch, kill_at, die, CALLS)
                    with contextlib.suppress(Killed):
                        act(run)
            survive(run, "best")


def test_a_new_step_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for kill_at in range(100):
        run = tmp_path / str(kill_at)
        checkpoint.save(run, 1, *content(1))
        with monkeypatch.context() as patch:
            on_call(patch, kill_at, die, CALLS)
            try:
                checkpoint.save(run, 2, *content(2))
                checkpoint.prune(run, 1)
                finished = True
            except Killed:
                finished = False
        last = checkpoint.latest(run)
        number = checkpoint.step_of(last or "")
        check(last, number)
        seen.add(number)
        checkpoint.clean(run)
        assert names(run) <= {"step_000001", "step_000002"} and number in (1, 2)
        for path in (run / "checkpoints").iterdir():  # no half-deleted folder under a final name
            check(path, int(path.name[-1]))
        if finished:
            break
    assert finished and seen == {1, 2}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
@pytest.mark.parametrize("kind", list(WRITES))
def test_kill_9_at_every_call(tmp_path: Path, kind: str) -> None:
    """The same with real processes: nothing of the writer is left to tidy up."""
    outcomes = []
    for kill_at in range(100):
        run = tmp_path / str(kill_at)
        WRITES[kind](run, 1)

        def work(run: Path = run, kill_at: int = kill_at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                on_call(patch, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL), CALLS)
                WRITES[kind](run, 2)

        status = in_a_child(work)
        outcomes.append(survive(run, kind))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0 and kill_at >= 12 and set(outcomes) == {1, 2}


def test_kill_9_from_outside_in_the_middle_of_the_bytes(tmp_path: Path) -> None:
    """A writer that never rests is killed at arbitrary moments, three times over one folder."""
    program = textwrap.dedent("""
        import sys, torch
        from ppo_nlu.runtime import checkpoint
        run, start = sys.argv[1], int(sys.argv[2])
        checkpoint.clean(run)
        print("ready", flush=True)
        for step in range(start, start + 10_000):
            tensors = {"adapter": {"w": torch.full((200_000,), float(step))}}
            checkpoint.save(run, step, tensors, {"step": step})
            checkpoint.save_best(run, step, float(step), tensors, {"step": step})
            checkpoint.prune(run, 2)
            print(step, flush=True)
    """)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    start = 1
    for trial in range(3):
        command = [sys.executable, "-c", program, str(tmp_path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(0.05 + 0.013 * trial)
            writer.kill()
            told = [int(line) for line in writer.stdout if line.endswith("\n")]
        last = checkpoint.latest(tmp_path)
        for path in (last, checkpoint.best(tmp_path)):
            if path is None:
                assert not told
                continue
            tensors, state = checkpoint.load(path)
            assert state["step"] >= max(told, default=0)  # what was reported as saved is there
            assert torch.equal(
                tensors["adapter"]["w"], torch.full((200_000,), float(state["step"]))
            )
            start = max(start, state["step"] + 1)
    checkpoint.clean(tmp_path)
    assert start > 1 and not [name for name in names(tmp_path) if name.startswith(".")]


# --- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["best", "same step", "new step"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    refused = 0
    for fail_at in range(6):
        run = tmp_path / str(fail_at)
        write = WRITES.get(kind, lambda run, n: checkpoint.save(run, n, *content(n)))
        find = FIND.get(kind, checkpoint.latest)
        write(run, 1)
        before = names(run)
        with monkeypatch.context() as patch:  # the disk can still rename and delete
            on_call(patch, fail_at, full, ("fsync", "mkdir"))
            try:
                write(run, 2)
            except UserError as error:
                refused += 1
                said = str(error)
                assert "no space left" in said and "--resume" in said
                assert str(run) in said and "\n" not in said
                if fail_at < 5:  # mkdir, 3 files, their folder; later the new one has its name
                    check(find(run), 1)
                    assert names(run) == before
    assert refused >= 5


def test_a_failed_second_rename_brings_the_old_best_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITES["best"](tmp_path, 1)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".tmp-best" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(UserError, match="cannot be written"):
            WRITES["best"](tmp_path, 2)
    assert names(tmp_path) == {"best"}
    check(checkpoint.best(tmp_path), 1)


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, *content(1))
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, {}, {"x": object()})
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path, 2, {"adapter": {"w": 3.0}}, {})  # type: ignore[dict-item]
    assert names(tmp_path) == {"step_000001"}

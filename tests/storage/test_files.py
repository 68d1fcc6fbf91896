"""The atomic write under kills, links and full disks; what has the place of a file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import on_call

from ppo_nlu.errors import UserError
from ppo_nlu.runtime import runlog
from ppo_nlu.storage import access, files, folders, locks, sealed

CALLS = ("replace", "fsync", "unlink", "open")


class Killed(BaseException):
    """Stands in for the end of the process."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_leaves_the_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise Killed

    path, seen = tmp_path / "summary.json", set()
    for kill_at in range(8):
        files.atomic_write_json(path, {"n": 1})
        with monkeypatch.context() as patch:
            on_call(patch, kill_at, die, CALLS)
            with contextlib.suppress(Killed):
                files.atomic_write_json(path, {"n": 2})
        seen.add(json.loads(path.read_text())["n"])
    assert seen == {1, 2}
    files.atomic_write_json(path, {"n": 2})  # deletes what the kills have left
    assert names(tmp_path) == ["summary.json"]
    with open(path) as reader:  # an open reader goes on with the old file
        files.atomic_write_json(path, {"n": 4})
        assert json.load(reader) == {"n": 2}


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"x": (math.nan, math.inf, torch.tensor(2.5)), "p": Path("a/b"), "s": "ü"}
    files.atomic_write_json(path, value)
    assert json.loads(path.read_text()) == {"x": [None, None, 2.5], "p": "a/b", "s": "ü"}
    assert "ü" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EIO, "input/output error"),
        (errno.EXDEV, "file systems"),
        (errno.EBUSY, "is using it"),
        (errno.ENXIO, "check the folder"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    path = tmp_path / "a"
    files.atomic_write_text(path, "old")

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    for fail_at in range(4):  # open, fsync, replace, fsync of the folder
        with monkeypatch.context() as patch:
            on_call(patch, fail_at, fail, CALLS)
            patch.setattr(os, "unlink", os.unlink)
            with pytest.raises(UserError, match=words) as error:
                files.atomic_write_text(path, "new")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert path.read_text() == ("old" if fail_at < 3 else "new")
    files.atomic_write_text(path, "end")
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    def put(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    pipe, log = put("pipe"), runlog.MetricsLog(tmp_path)
    reads: list[Callable[[], object]] = [
        lambda: access.read_bytes(pipe),
        lambda: access.read_bytes("/dev/zero"),
        lambda: access.read_bytes(tmp_path),
        lambda: sealed.read_object(pipe),
        lambda: folders.read_checked(pipe),
        lambda: runlog.read_metrics(put(runlog.METRICS).parent),
    ]
    for read in reads:
        with pytest.raises(OSError, match="is not a regular file"):
            read()
    refused: list[Callable[[], object]] = [
        lambda: files.sync_file(pipe),
        lambda: log.truncate_after(1),
        lambda: log.log(1, {}),
        lambda: locks.FolderLock(put(locks.LOCK).parent),
        lambda: folders.check_folder(put(folders.CHECKSUMS).parent, but=""),
    ]
    for act in refused:
        with pytest.raises(UserError, match="is not a regular file"):
            act()


def test_an_error_of_the_caller_stays_what_it_is(tmp_path: Path) -> None:
    """Only an error of the writing is reported as one: another error in the block stays itself."""
    for error in (OSError(errno.EIO, "of the input"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, files.atomic_open(tmp_path / "a") as file:
            file.write("part")
            raise error
        assert caught.value is error
    assert names(tmp_path) == []


def test_a_write_that_fails_is_told_with_the_file(tmp_path: Path) -> None:
    """/dev/full takes no byte; the buffer is written by the flush at the latest."""
    with pytest.raises(UserError, match="no space left"), files.atomic_open(tmp_path / "a") as out:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, out.file.fileno())
        os.close(full)
        out.write("x" * 100_000)
        out.write("y")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_no_link_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a link with the file's name nor one with the temporary name is followed."""
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    place = tmp_path / "place"
    place.mkdir()
    (place / "a").symlink_to(theirs)
    files.atomic_write_text(place / "a", "ours")
    assert theirs.read_text() == "theirs" and (place / "a").read_text() == "ours"
    assert not (place / "a").is_symlink()

    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    for target in (theirs, tmp_path / "not there"):
        link = files.temporary_name(place / "a")
        link.symlink_to(target)
        with pytest.raises(UserError):
            files.atomic_write_text(place / "a", "ours again")
        with pytest.raises(FileExistsError):
            files.write_new(link, b"ours again")
        link.unlink()
    assert theirs.read_text() == "theirs" and not (tmp_path / "not there").exists()


def test_a_new_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that found the name free the first gets it; a dead link is not followed either."""
    path = tmp_path / "answers.csv"
    with pytest.raises(UserError, match="exists already"), files.atomic_open(path, new=True) as two:
        two.write("second")
        with files.atomic_open(path, new=True) as one:
            one.write("first")
    assert path.read_text() == "first"
    link = tmp_path / "link"
    link.symlink_to("theirs")
    with pytest.raises(UserError, match="exists already"), files.atomic_open(link, new=True) as two:
        two.write("x")
    assert names(tmp_path) == ["answers.csv", "link"]

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with files.atomic_open(tmp_path / "b", new=True) as file:
        file.write("x")
    assert (tmp_path / "b").read_text() == "x"


def test_temporary_names_cannot_be_foretold(tmp_path: Path) -> None:
    found = {files.temporary_name(tmp_path / "a").name for _ in range(50)}
    assert len(found) == 50 and not any(str(os.getpid()) == name.split("-")[-1] for name in found)
    for long in ("x" * 255, "ü" * 127, "漢" * 85):  # the longest that a file system takes
        files.atomic_write_text(tmp_path / long, "x")
        assert (tmp_path / long).read_text() == "x"
    with pytest.raises(UserError, match="too long"):
        files.atomic_write_text(tmp_path / ("x" * 256), "x")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        files.atomic_write_text(tmp_path / "a", "x")
        files.write_new(tmp_path / "b", b"x")
    finally:
        os.umask(before)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    dead = files.temporary_name(path)
    dead.write_text("half")
    other = tmp_path / ".tmp-predictions.jsonl-mine"  # no name of ours
    other.write_text("mine")
    with files.atomic_open(path) as first:
        first.write("first")
        assert not dead.exists()
        files.atomic_write_text(path, "second")
    assert path.read_text() == "first"  # the last to end has the name
    assert names(tmp_path) == [other.name, path.name]

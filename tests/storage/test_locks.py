"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_nlu.errors import UserError
from ppo_nlu.storage import files, locks

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_another_process(folder: Path) -> str:
    """What another process that wants to work in the folder is told."""
    code = (
        "import sys; from ppo_nlu import errors; from ppo_nlu.storage import locks\n"
        "try:\n    locks.FolderLock(sys.argv[1])\n    print('free')\n"
        "except errors.UserError as error:\n    print(error)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def test_a_folder_has_one_worker(tmp_path: Path) -> None:
    with locks.FolderLock(tmp_path):
        said = in_another_process(tmp_path)
        assert f"process {os.getpid()} on " in said and said.count("\n") == 1
        assert str(tmp_path) in said
    assert names(tmp_path) == []
    assert in_another_process(tmp_path) == "free\n"


def test_kill_9_gives_the_folder_back(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            lock = locks.FolderLock(tmp_path)
            os.kill(os.getpid(), signal.SIGKILL if lock.locked else signal.SIGTERM)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert names(tmp_path) == [locks.LOCK]
    with locks.FolderLock(tmp_path) as lock:
        assert lock.locked
    assert names(tmp_path) == []


@pytest.mark.slow
def test_of_many_processes_one_has_the_folder(tmp_path: Path) -> None:
    """Twenty forks at once, ten times over; each holds the lock for a moment."""
    for number in range(10):
        log = tmp_path / f"log{number}"
        folder = tmp_path / str(number)
        folder.mkdir()
        children = []
        for _ in range(20):
            child = os.fork()
            if child == 0:
                try:
                    with locks.FolderLock(folder), log.open("a") as file:
                        file.write("in ")
                        file.flush()
                        file.write("out ")
                except UserError:
                    pass
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        words = log.read_text().split()
        assert words and words == ["in", "out"] * (len(words) // 2)


def test_without_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locks.FolderLock(tmp_path):
        assert "has no locks" in capsys.readouterr().err
    files.atomic_write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_a_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / locks.LOCK).symlink_to(theirs)
    with pytest.raises(UserError, match="symbolic link"):
        locks.FolderLock(tmp_path)
    assert theirs.read_text() == "theirs"

"""Run folders: numbered, claimed by one process, left alone where they are another's."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from helpers import in_a_child, on_call

from ppo_nlu.errors import UserError
from ppo_nlu.runtime import run_folder
from ppo_nlu.storage import locks

CALLS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")  # of os: every step of a write


def test_new_run_folders_are_numbered(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    assert run_folder.new_run_dir(root).name == "0001"
    (root / "notes").mkdir()
    (root / "0041").mkdir()
    (root / "0042").write_text("a file takes the name too")
    assert run_folder.new_run_dir(root).name == "0043"
    (root / "12345").mkdir()
    assert run_folder.new_run_dir(root).name == "12346"


def test_racing_programs_get_different_folders(tmp_path: Path) -> None:
    found: list[Path] = []
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        for _ in range(5):
            found.append(run_folder.new_run_dir(tmp_path))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 40


def test_a_name_taken_between_look_and_make_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0001").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # the other came after the look
    assert run_folder.new_run_dir(tmp_path).name == "0002"


def test_claim_takes_new_and_empty_folders_only(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    run_folder.claim(new, "task: sst2\n").release()
    assert run_folder.is_run_dir(new) and run_folder.require_run_dir(new) == new
    assert (new / "config.yaml").read_text() == "task: sst2\n"
    assert json.loads((new / "run.json").read_text())["format"] == run_folder.RUN_FORMAT

    empty = tmp_path / "empty"
    empty.mkdir()
    run_folder.claim(empty, "x: 1\n").release()

    with pytest.raises(UserError, match=r"unfinished run.*--resume .*/b"):
        run_folder.claim(new)
    (new / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"a finished run.*--resume"):
        run_folder.claim(new)
    assert (new / "config.yaml").read_text() == "task: sst2\n"

    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_folder.claim(file)


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml", "run.json"])
def test_a_strangers_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_folder.claim(tmp_path, "x: 1\n")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    assert not run_folder.is_run_dir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_claim_cut_short_can_be_made_again(tmp_path: Path) -> None:
    ends = []
    for kill_at in range(12):
        run = tmp_path / str(kill_at)

        def work(run: Path = run, kill_at: int = kill_at) -> None:
            with pytest.MonkeyPatch.context() as patch:
                on_call(patch, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL), CALLS)
                run_folder.claim(run, "x: 1\n")

        ends.append(in_a_child(work))
        if not run_folder.is_run_dir(run):
            run_folder.claim(run, "x: 1\n").release()
        assert run_folder.is_run_dir(run)
    assert os.WTERMSIG(ends[0]) == signal.SIGKILL and ends[-1] == 0


def test_a_claim_that_fails_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "atomic_write_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_folder.claim(tmp_path / "run", "x: 1\n")
    with run_folder.claim(tmp_path / "run", "x: 1\n") as lock:
        assert run_folder.is_run_dir(lock.folder)
        with pytest.raises(UserError, match="is working in it"):
            run_folder.require_free(tmp_path / "run")


def test_require_run_dir_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        run_folder.require_run_dir(tmp_path / "none")
    with pytest.raises(UserError, match="not a run folder"):
        run_folder.require_run_dir(tmp_path)
    run = tmp_path / "run"
    run_folder.claim(run, "x: 1\n").release()
    (run / "run.json").write_text('{"program": "ppo_nlu", "format": 99}')
    with pytest.raises(UserError, match="format 99"):
        run_folder.require_run_dir(run)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for act in (run_folder.claim, run_folder.new_run_dir):
        with pytest.raises(UserError, match="cannot be written"):
            act(tmp_path / "file" / "runs")


@pytest.mark.slow
def test_of_processes_that_claim_one_folder_one_succeeds(tmp_path: Path) -> None:
    """50 tries of two processes, each behind a pipe that lets both go at once."""
    for number in range(50):
        folder, ready = tmp_path / str(number), os.pipe()
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    os.close(ready[1])
                    os.read(ready[0], 1)
                    run_folder.claim(folder, "task: sst2\n")
                    code = 0
                except UserError as error:
                    told = ("is working in it", "holds an unfinished run")
                    code = 2 if any(words in str(error) for words in told) else 4
                finally:
                    os._exit(code)
            children.append(child)
        os.close(ready[0])
        os.close(ready[1])
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == [0, 2], number
        assert run_folder.is_run_dir(folder)


def test_without_locks_one_claim_succeeds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "try_lock", lambda handle: None)
    # Both have looked.
    monkeypatch.setattr(run_folder, "require_free", lambda output, held=False: None)
    run_folder.claim(tmp_path / "run", "task: sst2\n").release()
    with pytest.raises(UserError, match="File exists"):
        run_folder.claim(tmp_path / "run", "task: cola\n")
    assert (tmp_path / "run" / "config.yaml").read_text() == "task: sst2\n"

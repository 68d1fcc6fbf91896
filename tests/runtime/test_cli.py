"""How programs end: exit codes, one line on stderr, and output that nobody takes."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ends, raiser

from ppo_nlu import evaluate, predict, train
from ppo_nlu.errors import UserError, one_line
from ppo_nlu.runtime import cli

ROOT = Path(__file__).parents[2]
CONFIG = """\
task: sst2
data: {fallback: bundled}
rollout: {batch_size: 4, max_new_tokens: 4}
ppo: {epochs: 1}
train: {steps: 3, checkpoint_every: 1}
eval: {before: false, limit: 4, batch_size: 4, bootstrap: 0}
log: {plot: false}
"""
Capture = pytest.CaptureFixture[str]


# ---- faults of the machine -------------------------------------------------------------------

FAULTS = {
    "quota": (OSError(errno.EDQUOT, "Quota exceeded", "a/b"), ["disk full: a/b", "make room"]),
    "no name": (OSError(errno.ENOSPC, "No space left"), ["disk full: a file", "No space left"]),
    "broken disk": (OSError(errno.EIO, "I/O error", "a/b"), ["a/b: I/O error", "check"]),
    "two places": (OSError(errno.EXDEV, "cross", "a", None, "b"), ["a -> b: cross"]),
    "busy": (OSError(errno.EBUSY, "Busy", b"a\xff"), ["Busy"]),
    "reset": (ConnectionResetError(errno.ECONNRESET, "reset by peer"), ["reset by", "network"]),
    "too slow": (TimeoutError("timed out"), ["timed out", "check the network"]),
    "no such host": (socket.gaierror(-2, "Name not known"), ["Name not known", "the network"]),
    "a slow disk": (TimeoutError(errno.ETIMEDOUT, "timed out", "a/b"), ["a/b: timed", "disk"]),
    "rust": (ValueError("Io: No space left (os error 28)"), ["disk full: a file"]),
    "rust again": (Exception("IoError(Os { code: 5, kind: x })"), ["Input/output error"]),
    "memory": (MemoryError(), ["out of memory", "rollout.batch_size", "micro_batch_tokens"]),
    "of the system": (OSError(errno.ENOMEM, "no memory"), ["out of memory", "eval.batch_size"]),
    "of torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.\nmore"),
        ["out of memory", "9 bytes", "model.checkpointing"],
    ),
    "of CUDA": (RuntimeError("CUDA out of memory. Tried to allocate"), ["out of memory (CUDA"]),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_the_machine_are_one_line(kind: str, capsys: Capture) -> None:
    error, words = FAULTS[kind]
    assert ends(raiser(error)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert "--resume" not in err and not ("the network" in err and "the path" in err)
    for word in words:
        assert word in err


def test_a_run_that_was_cut_short_says_how_to_go_on(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "a run"

    def act() -> int:
        with cli.works_in(folder, f"train --resume '{folder}'"):
            raise MemoryError

    assert ends(act) == 2
    assert f"go on with: train --resume '{folder}'" in capsys.readouterr().err
    assert ends(raiser(MemoryError())) == 2  # the next program is another one
    assert "--resume" not in capsys.readouterr().err


# ---- crash.txt -------------------------------------------------------------------------------


class Panic(BaseException):
    """As libraries in Rust raise them."""


@pytest.mark.parametrize(
    "error",
    [ValueError("a\nbug"), RecursionError("deep"), Panic("\x1b[2J"), OSError("no number, no name")],
)
def test_an_unforeseen_error_leaves_its_traceback_in_the_run_folder(
    tmp_path: Path, capsys: Capture, error: BaseException
) -> None:
    def act() -> int:
        with cli.works_in(tmp_path, "train --resume run"):
            raise error

    for _ in range(2):  # a resumed run may end the same way
        assert ends(act) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err
        assert str(tmp_path / "crash.txt") in err and type(error).__name__ in err
    assert [path.name for path in tmp_path.iterdir()] == ["crash.txt"]
    assert "in act" in (tmp_path / "crash.txt").read_text()
    assert stat.S_IMODE((tmp_path / "crash.txt").stat().st_mode) == 0o600


def test_without_a_run_folder_it_goes_to_a_temporary_file(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ends(raiser(KeyError("a bug"))) == 1
    named = re.search(r"traceback in (\S+)", capsys.readouterr().err)
    assert named and "KeyError" in Path(named[1]).read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))

    def bug() -> int:
        raise KeyError("a bug")

    assert ends(bug) == 1
    err = capsys.readouterr().err
    assert "test_cli.py:" in err and err.count("\n") == 1


# ---- messages --------------------------------------------------------------------------------


def test_a_message_is_one_short_printable_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("a\x1b[2J\x00\u202e\udcff") == "a\\x1b[2J\\x00\\u202e\\udcff"
    assert one_line("é 中") == "é 中"
    shown = one_line("place: " + "x" * 9000 + "; mend")
    assert len(shown) == 560 and shown.startswith("place: x") and shown.endswith("x; mend")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "1e-4"], ["--learning_rate", "did you mean optim.lr?"]),
        (["--num-generations=4"], ["did you mean rollout.samples_per_prompt?"]),
        (["--beta", "0.1"], ["ppo.kl_coef or grpo.kl_coef"]),
        (["--ouptut", "x"], ["did you mean --output?"]),
        (["--seed", "3"], ["write seed=value"]),
        (["--optim.lr", "3"], ["write optim.lr=value"]),
        (["--zzzzzz"], ["unrecognized arguments: --zzzzzz", "--help"]),
    ],
)
def test_unknown_flags(flags: list[str], words: list[str], capsys: Capture) -> None:
    def main(argv: list[str]) -> int:
        parser = cli.Parser("program")
        parser.add_argument("config")
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--output")
        parser.parse_intermixed_args(argv)
        return 0

    assert cli.run(main, ["a.yaml", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("file/run", "is no folder"),
        ("file/a/b/run", "is no folder"),
        ("x" * 300, "too long"),
        ("a/" + "x" * 5000, "too long"),
        ("a/" * 3000, "too long"),
        ("loop/x", "cannot be"),
    ],
)
def test_places_where_nothing_can_be_made(tmp_path: Path, path: str, word: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=word):
        cli.require_place("--output", tmp_path / path)
    assert cli.require_place("--output", tmp_path / "new" / "run") == tmp_path / "new" / "run"
    assert cli.require_place("--output", Path("run")) == Path("run")


# ---- output that nobody takes ----------------------------------------------------------------

_FORK = multiprocessing.get_context("fork")
Stream = str | int | None  # a file, a file descriptor, or None: closed


_open_here: list[int] = []  # ends of pipes that a child must not hold


def program(module: str, *words: object) -> list[str]:
    return [sys.executable, "-m", f"ppo_nlu.{module}", *map(str, words)]


def child(main: Any, arguments: list[object], out: Stream, err: Stream, printed: bool) -> None:
    """The program in a process whose standard streams are those."""
    sys.stdin = None
    for number in _open_here:
        os.close(number)
    for number, name, given in ((1, "stdout", out), (2, "stderr", err)):
        os.close(number)
        setattr(sys, name, None)
        if given is not None:
            found = os.open(given, os.O_WRONLY) if isinstance(given, str) else given
            os.dup2(found, number)
            setattr(sys, name, open(number, "w", closefd=False, encoding="utf-8"))  # noqa: SIM115
    torch.set_num_threads(1)
    code = cli.run(main, [str(argument) for argument in arguments], printed)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)


def forked(
    main: Any, arguments: list[object], out: Stream, err: Stream, printed: bool = False
) -> int | None:
    """The exit code of the program with these streams."""
    process = _FORK.Process(target=child, args=(main, arguments, out, err, printed))
    process.start()
    process.join(120)
    return process.exitcode


def read_one_line(pipe: int, lines: list[bytes]) -> None:
    """Read as `head -1` does, and leave."""
    with open(pipe, "rb", buffering=0) as file:
        lines.append(file.readline())


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "said.txt"
    path.touch()
    return path


@pytest.fixture
def left() -> Iterator[int]:
    """The writing end of a pipe whose reader takes one line and leaves."""
    reading, writing = os.pipe()
    os.set_inheritable(reading, False)
    _open_here[:] = [reading]
    thread = threading.Thread(target=read_one_line, args=(reading, []), daemon=True)
    thread.start()
    yield writing
    os.close(writing)
    _open_here.clear()


@pytest.mark.parametrize("kind", ["the reader of stdout", "the reader of both", "full", "closed"])
def test_training_outlives_its_output(tmp_path: Path, said: Path, left: int, kind: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG)
    out: Stream = {"full": "/dev/full", "closed": None}.get(kind, left)
    err: Stream = str(said) if kind == "the reader of stdout" else out
    assert forked(train.main, [config, "--output", tmp_path / "run"], out, err) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_steps"] == 3
    assert ("step 3/3" in said.read_text()) == (kind == "the reader of stdout")


def test_a_real_process_without_streams(tmp_path: Path) -> None:
    """No file that the run opens gets the number of a closed stream, and with it what is said."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    line = f"exec {shlex.join(program('train', 'c.yaml', '--output', 'run'))} <&- >&- 2>&-"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, timeout=120).returncode == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in metrics] == [1, 2, 3]


def test_only_the_product_of_a_program_needs_its_reader(
    finished_run: Path, tmp_path: Path, said: Path, left: int
) -> None:
    (tmp_path / "a.txt").write_text("a good film\n" * 900)
    asked = [finished_run, "--input", tmp_path / "a.txt"]
    assert forked(predict.main, asked, left, str(said)) == 0
    assert said.read_text() == ""
    assert forked(predict.main, asked, "/dev/full", str(said)) == 2
    assert said.read_text().startswith("error: stdout: No space left on device; make room")
    assert forked(predict.main, asked, None, str(said)) == 2
    assert said.read_text().startswith("error: stdout: is closed; name a file with --output")
    asked += ["--output", tmp_path / "a.jsonl"]
    assert forked(predict.main, asked, None, None) == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 900


def test_evaluation_outlives_its_output(finished_run: Path, tmp_path: Path, said: Path) -> None:
    arguments = [finished_run, "--decode", "greedy", "--output", tmp_path / "e"]
    assert forked(evaluate.main, arguments, "/dev/full", str(said)) == 0
    assert "warning: stdout: No space left on device; the program goes on" in said.read_text()
    assert (tmp_path / "e" / "summary.json").is_file()


def listing(argv: list[str]) -> int:
    print("a line")
    return 0


def test_a_listing_that_cannot_be_written_has_failed(said: Path) -> None:
    assert forked(listing, [], "/dev/null", str(said), True) == 0
    assert forked(listing, [], "/dev/full", str(said), True) == 2
    assert forked(listing, [], "/dev/full", str(said)) == 0
    assert "printed=True" in (ROOT / "ppo_nlu" / "data" / "__main__.py").read_text()


def test_letters_that_the_terminal_does_not_have(capsys: Capture) -> None:
    """What is printed on an ASCII stdout is escaped, and nothing is lost."""
    code = (
        "import sys; from ppo_nlu.runtime import cli\n"
        "def main(argv):\n    print('é', chr(0xd800)); print('é', file=sys.stderr)\n"
        "sys.exit(cli.run(main))"
    )
    for env in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT, capture_output=True
        )
        assert done.returncode == 0
        assert done.stdout.strip() in (b"\\xe9 \\ud800", "é \\ud800".encode())


def test_ctrl_c_before_training_starts(tmp_path: Path) -> None:
    """Within the first imports, and a little later."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    for seconds in (0.5, 1.0):  # within the imports
        process = subprocess.Popen(
            program("train", "c.yaml"),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            # A shell's background job, as these tests may be, ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and b"Traceback" not in err, err


def starve(main: Any, arguments: list[object], err: str) -> None:
    """The program in an address space that holds 256 MiB more than it has already."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (1 << 28)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    child(main, arguments, "/dev/null", err, False)


def test_too_little_memory_is_one_line(tmp_path: Path, said: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG)
    arguments = [config, "rollout.batch_size=6000", "--output", tmp_path / "run"]
    process = _FORK.Process(target=starve, args=(train.main, arguments, str(said)))
    process.start()
    process.join(120)
    assert process.exitcode == 2
    err = said.read_text()
    assert "error: out of memory" in err and f"--resume {tmp_path}/run" in err
    assert "Traceback" not in err and err.count("error:") == 1


@pytest.mark.parametrize(
    "module",
    "train evaluate predict export submit reproduce report data pretrain teach_form".split(),
)
def test_help_of_every_program(module: str, capsys: Capture) -> None:
    folder = (ROOT / "ppo_nlu" / module).is_dir()
    program = importlib.import_module(f"ppo_nlu.{module}" + ".__main__" * folder)
    with pytest.raises(SystemExit) as caught:
        cli.run(program.main, ["--help"])
    assert caught.value.code == 0 and "usage:" in capsys.readouterr().out

"""How programs end: exit codes, one line on stderr, and the traceback of a fault of their own."""

from __future__ import annotations

import importlib
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from helpers import THREE_STEPS, ends, program, raiser

from ppo_nlu.errors import one_line
from ppo_nlu.runtime import cli

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def test_a_message_is_one_short_printable_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("a\x1b[2J\x00\u202e\udcff") == "a\\x1b[2J\\x00\\u202e\\udcff"
    assert one_line("é 中") == "é 中"
    shown = one_line("place: " + "x" * 9000 + "; mend")
    assert len(shown) == 560 and shown.startswith("place: x") and shown.endswith("x; mend")


def test_a_run_that_was_cut_short_says_how_to_go_on(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "a run"

    def act() -> int:
        with cli.works_in(folder, f"train --resume '{folder}'"):
            raise MemoryError

    assert ends(act) == 2
    assert f"go on with: train --resume '{folder}'" in capsys.readouterr().err
    assert ends(raiser(MemoryError())) == 2  # the next program is another one
    assert "--resume" not in capsys.readouterr().err


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


def test_ctrl_c_before_training_starts(tmp_path: Path) -> None:
    """Within the first imports, and a little later."""
    (tmp_path / "c.yaml").write_text(THREE_STEPS)
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

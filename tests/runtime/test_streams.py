"""Output that nobody takes: the program goes on, unless it was its product."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import THREE_STEPS, Stream, forked, open_here, program

from ppo_nlu import evaluate, predict, train

ROOT = Path(__file__).parents[2]


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
    open_here[:] = [reading]
    thread = threading.Thread(target=read_one_line, args=(reading, []), daemon=True)
    thread.start()
    yield writing
    os.close(writing)
    open_here.clear()


@pytest.mark.parametrize("kind", ["the reader of stdout", "the reader of both", "full", "closed"])
def test_training_outlives_its_output(tmp_path: Path, said: Path, left: int, kind: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(THREE_STEPS)
    out: Stream = {"full": "/dev/full", "closed": None}.get(kind, left)
    err: Stream = str(said) if kind == "the reader of stdout" else out
    assert forked(train.main, [config, "--output", tmp_path / "run"], out, err) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_steps"] == 3
    assert ("step 3/3" in said.read_text()) == (kind == "the reader of stdout")


@pytest.mark.slow
def test_a_real_process_without_streams(tmp_path: Path) -> None:
    """No file that the run opens gets the number of a closed stream, and with it what is said."""
    (tmp_path / "c.yaml").write_text(THREE_STEPS)
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


def test_letters_that_the_terminal_does_not_have() -> None:
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

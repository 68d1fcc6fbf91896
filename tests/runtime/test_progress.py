"""The bar on a terminal, and the lines in a log file."""

from __future__ import annotations

import io
import re

import pytest

from ppo_nlu.runtime import progress
from ppo_nlu.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the progress display sees."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_plain_line_every_tenth(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(200, stream=stream) as progress:
        for step in range(1, 201):
            clock[0] += 2.0
            progress.update(16, reward=step / 200, kl=0.25)
    lines = stream.getvalue().splitlines()
    assert [int(re.findall(r"\d+", line)[0]) for line in lines] == [1, *range(20, 201, 20)]
    # step 20: 20 steps in 40 s, 320 answers; the 180 steps left take 360 s
    assert lines[1] == "step 20/200, reward 0.100, KL 0.250, 8.0 samples/s, 0:06:00 left"
    assert "\r" not in stream.getvalue()


def test_a_resumed_run_counts_its_own_time_only(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(7, start=4, stream=stream) as progress:
        for _ in range(3):
            clock[0] += 1.0
            progress.update(10)
    assert stream.getvalue().splitlines() == [
        "step 5/7, 10.0 samples/s, 0:00:02 left",
        "step 6/7, 10.0 samples/s, 0:00:01 left",
        "step 7/7, 10.0 samples/s, 0:00:00 left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(4, start=1, stream=stream) as progress:
        progress.update(16, reward=0.5, kl=0.125)
        progress.write("a word between")
        for _ in range(2):
            progress.update(16, reward=0.75, kl=0.25)
    shown = stream.getvalue()
    last = shown.split("\r")[-1]
    assert "4/4" in last and "100%" in last and "|" in last
    assert "reward 0.750" in last and "KL 0.250" in last and "samples/s" in last
    assert "\ra word between\n" in re.sub(" {2,}", "", shown).replace("\r\r", "\r")


def test_progress_can_be_off_but_words_still_come() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress(3, enabled=False, stream=stream) as progress:
            progress.update(1, 0.5, 0.1)
            progress.write("said")
        assert stream.getvalue() == "said\n"

"""Rows as they are answered, and what is shown meanwhile."""

from __future__ import annotations

import io
import sys

import pytest

from ppo_nlu.answering import answer


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def told(monkeypatch: pytest.MonkeyPatch, terminal: bool, progress: bool, step: float) -> str:
    """What is shown over 5 rows, each of which takes so many seconds."""
    stream, now = Stream(terminal), [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(answer.time, "monotonic", lambda: now[0])

    def rows() -> object:
        for number in range(5):
            now[0] += step
            yield number

    assert list(answer.shown(rows(), "SST-2: greedy", 5, progress)) == [0, 1, 2, 3, 4]
    return stream.getvalue()


def test_a_file_gets_no_bar_but_a_line_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, False, True, 1.0) == ""
    # 31 s a row: a minute is over at rows 2 and 4
    lines = "SST-2: greedy: 2 of 5 rows\nSST-2: greedy: 4 of 5 rows\n"
    assert told(monkeypatch, False, True, 31.0) == lines
    assert told(monkeypatch, False, False, 31.0) == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SST-2: greedy:   0%|" in told(monkeypatch, True, True, 1.0)
    assert told(monkeypatch, True, False, 1.0) == ""

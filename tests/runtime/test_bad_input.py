"""A seeded part of the campaign of wrong input; all of it is `tests.campaigns.bad_input`."""

from __future__ import annotations

import random

import pytest

from ppo_nlu.config import Config
from ppo_nlu.config.fields import schema
from ppo_nlu.runtime import streams
from tests.campaigns import bad_input
from tests.campaigns.bad_input import Case

EVERY = bad_input.cases(seed=0, per_key=2)


@pytest.mark.parametrize("kind", dict.fromkeys(case.kind for case in EVERY))
def test_a_part_of_the_campaign(kind: str) -> None:
    chunk = random.Random(1).sample([case for case in EVERY if case.kind == kind], 16)
    problems = zip(chunk, bad_input.run(chunk), strict=True)
    assert [f"{case.name}: {problem}" for case, problem in problems if problem] == []


def test_every_key_has_its_cases() -> None:
    found = bad_input.wrong_values(random.Random(0), per_key=8)
    words = {text.partition("=")[0] for case in found for text in case.arguments}
    assert set(schema(Config)) <= words


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("accepts", "exit code 0"),
        ("crashes", "exit code 1"),
        ("tells two lines", "2 lines"),
        ("tells a long line", "1200 characters"),
        ("leaves a file", "left behind"),
        ("dies", "died with"),
    ],
)
def test_the_campaign_sees_what_is_wrong(program: str, word: str, monkeypatch) -> None:
    def main(argv: list[str]) -> int:
        if program == "crashes":
            raise KeyError("a bug")
        if program == "dies":
            bad_input.os._exit(9)
        if program == "leaves a file":
            open("left", "w").close()
        if program != "accepts":
            streams.tell("error: " + ("x" * 1193 if program == "tells a long line" else "x"))
        if program == "tells two lines":
            streams.tell("error: y")
        return 0 if program == "accepts" else 2

    monkeypatch.setitem(bad_input.PROGRAMS, "train", main)
    (problem,) = bad_input.run([Case("x", "train", ())])
    assert word in problem

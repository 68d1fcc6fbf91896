"""The answers to new rows: strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import tiny

from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.new_rows import writer


def test_a_probability_that_is_no_number_is_null(tmp_path: Path) -> None:
    """No reader of JSON takes NaN."""
    row = Answer(tiny.examples(1)[0], None, "", {"Positive": math.nan, "Negative": 0.5})
    with writer(tmp_path / "a.jsonl", tiny.SST2, ["sentence"]) as write:
        write(row)
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(line)["probabilities"] == {"Positive": None, "Negative": 0.5}

"""The answers to new rows: strict JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
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


def test_a_row_with_an_id_of_its_own_gets_no_other(tmp_path: Path) -> None:
    """`index` and `idx` name a row too; where there is none, its number stands first."""
    row = tiny.examples(1)[0]
    for given, first in (({"text": "x", "idx": 7}, "text"), ({"text": "x"}, "id")):
        answer = Answer(replace(row, extra={"given": given}), "Positive", "")
        with writer(tmp_path / f"{first}.jsonl", tiny.SST2, list(given)) as write:
            write(answer)
        with writer(tmp_path / f"{first}.tsv", tiny.SST2, list(given)) as write:
            write(answer)
        found = json.loads((tmp_path / f"{first}.jsonl").read_text())
        number = {} if first == "text" else {"id": row.id}
        assert found == {**number, **given, "prediction": "Positive", "probabilities": None}
        head = (tmp_path / f"{first}.tsv").read_text().split("\n")[0].split("\t")
        assert head == [*number, *given, "prediction", "p_Positive", "p_Negative"]

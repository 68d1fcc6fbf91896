"""The predictions.jsonl of an evaluation: strict JSON, whole or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.predictions import read_predictions, recorded, write_predictions
from ppo_nlu.tasks import Example


def test_predictions_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [
        Answer(Example("0", {"sentence": "a"}, "Positive"), "Positive", "Positive"),
        Answer(Example("1", {"sentence": "a"}, "Negative"), None, "..."),
    ]
    seen = []
    for row in recorded(path, iter(rows)):
        seen.append(row)
        assert not path.exists()  # the name comes with the last row
    assert seen == rows
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {
        "id": "1",
        "label": "Negative",
        "prediction": None,
        "response": "...",
        "probabilities": None,
    }
    written = path.read_text()
    broken: Any = recorded(path, iter(rows))
    next(broken)
    broken.close()  # an error in the middle leaves the old file, and nothing else
    assert path.read_text() == written
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_predictions_are_strict_json(tmp_path: Path) -> None:
    """A probability that is no number is null there: no reader of JSON takes NaN."""
    row = Answer(tiny.examples(1)[0], None, "", {"Positive": math.nan, "Negative": 0.5})
    write_predictions(tmp_path / "p.jsonl", [row])
    (line,) = (tmp_path / "p.jsonl").read_text().splitlines()
    assert json.loads(line)["probabilities"] == {"Positive": None, "Negative": 0.5}


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    path, rows = tmp_path / "p.jsonl", tiny.examples(2)
    written = [
        Answer(rows[0], "Positive", " Positive </Judgement>", {"Positive": 0.75, "Negative": 0.25}),
        Answer(rows[1], None, "..."),
    ]
    write_predictions(path, written)
    assert read_predictions(path, rows) == written


@pytest.mark.parametrize(
    ("old", "new"),
    [('"id": "', '"id": "x'), ('"response"', '"said"'), ("}\n", "\n"), ('{"id', '[{"id')],
)
def test_a_file_of_other_answers_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path, rows = tmp_path / "p.jsonl", tiny.examples(2)
    write_predictions(path, [Answer(row, None, "") for row in rows])
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"p.jsonl|JSON|Expecting|delimiter"):
        read_predictions(path, rows)
    with pytest.raises(ValueError, match="other rows"):
        write_predictions(path, [Answer(rows[0], None, "")])
        read_predictions(path, rows)

"""The program that evaluates: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ppo_nlu.answering.answer import DECODES
from ppo_nlu.evaluate import main
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.storage import locks
from ppo_nlu.tasks import get_task
from ppo_nlu.tasks.answers import parse

SPEC = get_task("sst2")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_program_on_a_run(finished_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results"
    assert cli.run(main, [str(finished_run), "eval.limit=6", "--output", str(out)]) == 0
    shown = capsys.readouterr()
    assert "bundled stand-in" in shown.out and "score: accuracy" in shown.out
    assert "Traceback" not in shown.err
    report = json.loads((out / "report.json").read_text())
    assert report["data"] == "bundled" and report["split"] == "dev"
    both = read(out / "predictions.jsonl")  # greedy answers with the scored probabilities
    greedy = read(out / "predictions-greedy.jsonl")
    assert [row["prediction"] for row in both] == [row["prediction"] for row in greedy]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in both)
    assert {p.name for p in out.iterdir()} == {
        "report.json",
        "summary.json",
        "predictions.jsonl",
        *(f"predictions-{decode}.jsonl" for decode in DECODES),
    }
    for decode in DECODES:
        lines = read(out / f"predictions-{decode}.jsonl")
        assert len(lines) == 6
        assert set(lines[0]) == {"id", "label", "prediction", "response", "probabilities"}
        right = [line["prediction"] == line["label"] for line in lines]
        assert report[decode]["accuracy"] == pytest.approx(sum(right) / 6)
        for line in lines:
            assert parse(SPEC, line["response"]) == line["prediction"]
            assert (line["probabilities"] is None) == (decode != "score")
    # again, over its own results
    again = [str(finished_run), "eval.limit=6", "--decode", "score", "--output", str(out)]
    assert cli.run(main, again) == 0
    assert run_folder.is_run_dir(finished_run)


def test_the_program_on_a_config_is_the_base(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(finished_run / "config.yaml")
    more = ["eval.limit=6", "log.progress=false", "--decode", "score"]
    assert cli.run(main, [config, *more]) == 0
    assert capsys.readouterr().err == ""
    base = read(tmp_path / "eval-sst2-dev" / "predictions-score.jsonl")
    assert cli.run(main, [str(finished_run), *more, "--output", "tuned"]) == 0
    tuned = read(tmp_path / "tuned" / "predictions-score.jsonl")
    assert [row["id"] for row in base] == [row["id"] for row in tuned]
    assert [row["probabilities"] for row in base] != [row["probabilities"] for row in tuned]


def test_against_the_prior_each_rows_log_odds_move_by_the_same(
    finished_run: Path, tmp_path: Path
) -> None:
    """By log π(Positive) - log π(Negative) of the prompt without text, which all rows share."""

    def log_odds(how: str) -> list[float]:
        more = ["eval.limit=4", "--decode", "score", f"eval.label_scores={how}"]
        assert cli.run(main, [str(finished_run), *more, "--output", str(tmp_path / how)]) == 0
        rows = read(tmp_path / how / "predictions-score.jsonl")
        chances = [row["probabilities"] for row in rows]
        return [math.log(row["Positive"] / row["Negative"]) for row in chances]

    moved = [one - other for one, other in zip(log_odds("sum"), log_odds("prior"), strict=True)]
    assert abs(moved[0]) > 0.01
    assert moved == pytest.approx([moved[0]] * 4, abs=1e-4)


def test_a_split_without_labels_has_predictions_and_no_scores(
    finished_run: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "results"
    more = ["eval.limit=5", "--split", "test", "--decode", "greedy", "--output", str(out)]
    assert cli.run(main, [str(finished_run), *more]) == 0
    shown = capsys.readouterr().out
    assert "no scores" in shown and "accuracy" not in shown
    assert {p.name for p in out.iterdir()} == {"predictions-greedy.jsonl", "predictions.jsonl"}
    lines = read(out / "predictions-greedy.jsonl")
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert all(line["label"] is None for line in lines)


def test_a_folder_in_which_another_evaluation_works_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.FolderLock(tmp_path):
        argv = [str(finished_run), "--output", str(tmp_path), "--decode", "greedy"]
        assert cli.run(main, argv) == 2
    error = capsys.readouterr().err
    assert "is working in it" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""The program that evaluates: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu import evaluate
from ppo_nlu.answering.answer import DECODES
from ppo_nlu.config import load_config
from ppo_nlu.evaluate import folder_name, main, print_report
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.storage import locks
from ppo_nlu.tasks import Example, get_task, metrics
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
    assert run_folder.is_run_dir(finished_run)


def test_results_are_never_overwritten(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    more = ["eval.limit=3", "--decode", "score"]
    for wanted in ("eval-sst2-dev-ppo-0shot", "eval-sst2-dev-ppo-0shot-2"):
        assert cli.run(main, [str(run), *more]) == 0
        assert f"written: {run / wanted}\n" in capsys.readouterr().out
        assert len(read(run / wanted / "predictions.jsonl")) == 3
    before = {path: path.read_bytes() for path in (run / wanted).iterdir()}
    assert cli.run(main, [str(run), *more, "--output", str(run / wanted)]) == 2
    error = capsys.readouterr().err
    assert "holds results already; name a new folder" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in (run / wanted).iterdir()} == before


@pytest.mark.parametrize(
    ("more", "is_run", "name"),
    [
        (["method=ppo"], True, "eval-sst2-dev-ppo-0shot"),
        (["method=ppo"], False, "eval-sst2-dev-base-0shot"),
        (["prompt.shots=5", "eval.split=test"], False, "eval-sst2-test-base-5shot"),
        (
            ["task=null", "tasks=[cb, glue/rte]", "method=sft"],
            True,
            "eval-cb+glue-rte-dev-sft-0shot",
        ),
        (["method=encoder"], True, "eval-sst2-dev-encoder"),
    ],
)
def test_the_folder_says_task_split_method_and_shots(
    config: Path, more: list[str], is_run: bool, name: str
) -> None:
    assert folder_name(load_config(config, more), is_run) == name


def test_results_that_came_while_the_model_was_loaded_stay(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    load = evaluate.load_trained

    def slow(*given: Any) -> Any:
        out.mkdir()
        (out / "summary.json").write_text("of another process")
        return load(*given)

    monkeypatch.setattr(evaluate, "load_trained", slow)
    assert cli.run(main, [str(finished_run), "eval.limit=3", "--output", str(out)]) == 2
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    assert (out / "summary.json").read_text() == "of another process"


def test_the_program_on_a_config_is_the_base(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(finished_run / "config.yaml")
    more = ["eval.limit=6", "log.progress=false", "--decode", "score"]
    assert cli.run(main, [config, *more]) == 0
    assert capsys.readouterr().err == ""
    base = read(tmp_path / "eval-sst2-dev-base-0shot" / "predictions-score.jsonl")
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


def test_a_report_names_macro_f1_and_the_largest_class(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Example("", {}, label) for label in ("Negative", "Negative", "Positive", "Negative")]
    report = metrics.report(SPEC, rows, ["Positive", "Negative", "Positive", None], resamples=0)
    print_report("SST-2, greedy", report)
    out = capsys.readouterr().out
    # Positive: 2 * 1 / (2 + 1), Negative: 2 * 1 / (1 + 3)
    assert "accuracy 50.0 %, macro-F1 58.3 %, unparsed 25.0 %" in out
    assert "largest class: Negative, 75.0 % of the rows" in out

"""Evaluation: label scoring against a naive computation, order, seeds, reports, the program."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ppo_nlu import data, evaluate, predict
from ppo_nlu.config import Config
from ppo_nlu.evaluate import Answer
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.storage import locks
from ppo_nlu.tasks import Example, get_task
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import answer, render
from ppo_nlu.tree import prefixes

SPEC = get_task("sst2")


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> tuple[Config, Policy]:
    cfg = evaluate.run_config(finished_run)
    return cfg, evaluate.load_trained(cfg, finished_run)


@pytest.fixture(scope="module")
def rows(loaded: tuple[Config, Policy]) -> list[Example]:
    """Sentences of very different lengths, so that sorting by length moves them."""
    found = data.load_split(SPEC, "dev", loaded[0].data).examples[:12]
    return [
        replace(row, fields={"sentence": row.fields["sentence"] * (1 + 3 * (i % 4))})
        for i, row in enumerate(found)
    ]


def naive(policy: Policy, row: Example) -> list[float]:
    """Label probabilities by the plain Hugging Face model, one unpadded sequence at a time."""
    prompt = render(SPEC, row.fields)
    start = len(policy.tokenizer(prompt)["input_ids"])
    sums = []
    for word in SPEC.words:
        ids = policy.tokenizer(prompt + answer(word))["input_ids"]
        assert ids[:start] == policy.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        sums.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))))
    return torch.tensor(sums).softmax(0).tolist()


@pytest.mark.parametrize("tree", [True, False])
def test_label_scores_equal_the_naive_computation(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    tree: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, policy = loaded
    monkeypatch.setattr(policy, "tree", tree)
    found = list(evaluate.answer_all(policy, SPEC, cfg, rows, "score"))
    for row, got in zip(rows, found, strict=True):
        wanted = naive(policy, row)
        assert got.probabilities is not None and list(got.probabilities) == list(SPEC.words)
        assert list(got.probabilities.values()) == pytest.approx(wanted, abs=1e-5)
        assert got.prediction == SPEC.words[wanted.index(max(wanted))]
    assert len({got.prediction for got in found}) == 2  # else the argmax has not been tested


@pytest.mark.parametrize("decode", evaluate.DECODES)
def test_the_order_is_that_of_the_examples(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    decode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Across windows too (of 16 batches), and greedy and scored answers ignore the batching."""
    cfg, policy = loaded
    few = replace(cfg, eval=replace(cfg.eval, batch_size=2))
    many = (rows * 3)[:33]  # a window of 16 batches of 2, and one row
    found = list(evaluate.answer_all(policy, SPEC, few, many, decode))
    assert [got.example for got in found] == many
    if decode != "sample":
        alone = [
            next(evaluate.answer_all(policy, SPEC, few, [row], decode)).response for row in rows
        ]
        assert [got.response for got in found[:12]] == alone


@pytest.mark.parametrize("decode", ["greedy", "score"])
def test_what_all_prompts_begin_with_is_run_once_a_window(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    decode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens of the first pass of each batch: without the opening, which one pass has run. The
    scores are those of batches that run it themselves."""
    cfg, policy = loaded
    few = replace(cfg, eval=replace(cfg.eval, batch_size=4))
    sizes = tiny.sizes_of_passes(monkeypatch)
    found = list(evaluate.answer_all(policy, SPEC, few, rows, decode))
    prompts = [policy.encode(render(SPEC, row.fields)) for row in rows]
    opening = min(prefixes.common(prompts[0], prompt) for prompt in prompts)
    longest = sorted(map(len, prompts), reverse=True)[:4]  # the first batch
    own = sum(longest) - 4 * opening
    labels = 0 if decode == "greedy" else sizes[1] - own  # their tokens but the last
    assert opening > 40 and sizes[0] == opening and sizes[1] == own + labels
    assert 0 <= labels < 4 * 2 * 4
    monkeypatch.setattr(type(policy), "opening", lambda self, prompts: None)
    sizes.clear()
    again = list(evaluate.answer_all(policy, SPEC, few, rows, decode))
    assert sizes[0] > opening and [got.response for got in again] == [got.response for got in found]
    for one, other in zip(found, again, strict=True):
        if one.probabilities is not None:
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_stop_ends_the_answers_early(loaded: tuple[Config, Policy], rows: list[Example]) -> None:
    cfg, policy = loaded
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    assert list(evaluate.answer_all(policy, SPEC, cfg, rows, "greedy", stop)) == []
    assert len(asked) == 2


def samples(policy: Policy, cfg: Config, rows: list[Example], seed: int) -> list[str]:
    found = evaluate.answer_all(policy, SPEC, replace(cfg, seed=seed), rows, "sample")
    return [got.response for got in found]


def test_samples_depend_on_the_seed_alone(
    loaded: tuple[Config, Policy], rows: list[Example]
) -> None:
    cfg, policy = loaded
    first = samples(policy, cfg, rows, 1)
    assert samples(policy, cfg, rows, 1) == first
    assert samples(policy, cfg, rows, 2) != first


def test_samples_come_as_often_as_their_probability_says(
    loaded: tuple[Config, Policy], rows: list[Example]
) -> None:
    """The rate of right samples is within four standard errors of what the model's own
    probabilities of the two whole answers give; other texts that parse to a word count apart."""
    cfg, policy = loaded
    few, seeds = rows[:4], 60
    right = total = 0
    for seed in range(seeds):
        for row, text in zip(few, samples(policy, cfg, few, seed), strict=True):
            exact = [word for word in SPEC.words if text == answer(word)]
            right += exact == [row.label]
            total += bool(exact)
    assert total > seeds  # enough whole answers to measure by
    # P(right | one of the two whole answers), weighted by how often that happens in each row.
    weights, expected = [], []
    for row in few:
        prompt = render(SPEC, row.fields)
        ids = [policy.encode(prompt + answer(word)) for word in SPEC.words]
        start = len(policy.encode(prompt))
        with torch.no_grad():
            scored = policy.score([ids[0][:start]], [i[start:] for i in ids], [0, 0])
        mass = scored.logprobs.sum(1).exp()
        weights.append(float(mass.sum()))
        assert row.label is not None
        expected.append(float(mass[SPEC.words.index(row.label)]))
    rate = sum(expected) / sum(weights)
    error = (rate * (1 - rate) / total) ** 0.5
    assert right / total == pytest.approx(rate, abs=4 * error + 0.01)
    assert total / (4 * seeds) == pytest.approx(sum(weights) / 4, abs=0.12)


def given(*pairs: tuple[str, str | None]) -> list[Answer]:
    """Answers with these (label, prediction) pairs."""
    return [
        Answer(Example(str(i), {"sentence": "a"}, label), prediction, prediction or "...")
        for i, (label, prediction) in enumerate(pairs)
    ]


def test_the_report_and_the_headline_count_unparsed_as_wrong() -> None:
    pos, neg = SPEC.words
    rows = given((pos, pos), (pos, None), (neg, neg), (neg, pos), (neg, None))
    report = evaluate.report(SPEC, rows, resamples=100)
    assert report["accuracy"] == pytest.approx(2 / 5)
    assert report["unparsed"] == pytest.approx(2 / 5)
    low, high = report["accuracy_interval"]
    assert 0 <= low <= 0.4 <= high <= 1
    assert set(report["per_class"]) == {pos, neg}
    # Positive: 2 predicted, 1 right, 2 there; Negative: 1 predicted, 1 right, 3 there.
    assert report["per_class"][pos]["precision"] == pytest.approx(1 / 2)
    assert report["per_class"][pos]["recall"] == pytest.approx(1 / 2)
    assert report["per_class"][neg]["precision"] == pytest.approx(1)
    assert report["per_class"][neg]["recall"] == pytest.approx(1 / 3)
    assert report["per_class"][neg]["support"] == 3
    assert sum(report["predicted"].values()) == 5
    row = {"sample": 2 / 5, "greedy": None, "score": None, "unparsed": 2 / 5}
    assert evaluate.headline({"sample": report}) == row
    scored = given((pos, pos), (pos, pos), (neg, neg), (neg, pos), (neg, neg))
    both = {"score": evaluate.report(SPEC, scored), "sample": report}
    assert evaluate.headline(both) == row | {"score": pytest.approx(4 / 5)}
    with pytest.raises(ValueError, match=r"eval\.split: row 0 has no label"):
        evaluate.report(SPEC, given((None, pos)))  # type: ignore[arg-type]


def test_predictions_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = given(("Positive", "Positive"), ("Negative", None))
    seen = []
    for row in evaluate.recorded(path, iter(rows)):
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
    broken: Any = evaluate.recorded(path, iter(rows))
    next(broken)
    broken.close()  # an error in the middle leaves the old file, and nothing else
    assert path.read_text() == written
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_program_on_a_run(finished_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results"
    assert cli.run(evaluate.main, [str(finished_run), "eval.limit=6", "--output", str(out)]) == 0
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
        *(f"predictions-{decode}.jsonl" for decode in evaluate.DECODES),
    }
    for decode in evaluate.DECODES:
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
    assert cli.run(evaluate.main, again) == 0
    assert run_folder.is_run_dir(finished_run)


def test_the_program_on_a_config_is_the_base(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(finished_run / "config.yaml")
    more = ["eval.limit=6", "log.progress=false", "--decode", "score"]
    assert cli.run(evaluate.main, [config, *more]) == 0
    assert capsys.readouterr().err == ""
    base = read(tmp_path / "eval-sst2-dev" / "predictions-score.jsonl")
    assert cli.run(evaluate.main, [str(finished_run), *more, "--output", "tuned"]) == 0
    tuned = read(tmp_path / "tuned" / "predictions-score.jsonl")
    assert [row["id"] for row in base] == [row["id"] for row in tuned]
    assert [row["probabilities"] for row in base] != [row["probabilities"] for row in tuned]


def test_a_split_without_labels_has_predictions_and_no_scores(
    finished_run: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "results"
    more = ["eval.limit=5", "--split", "test", "--decode", "greedy", "--output", str(out)]
    assert cli.run(evaluate.main, [str(finished_run), *more]) == 0
    shown = capsys.readouterr().out
    assert "no scores" in shown and "accuracy" not in shown
    assert {p.name for p in out.iterdir()} == {"predictions-greedy.jsonl", "predictions.jsonl"}
    lines = read(out / "predictions-greedy.jsonl")
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert all(line["label"] is None for line in lines)


def test_predictions_are_strict_json(tmp_path: Path) -> None:
    """A probability that is no number is null there: no reader of JSON takes NaN."""
    row = Answer(tiny.examples(1)[0], None, "", {"Positive": math.nan, "Negative": 0.5})
    evaluate.write_predictions(tmp_path / "p.jsonl", [row])
    (line,) = (tmp_path / "p.jsonl").read_text().splitlines()
    assert json.loads(line)["probabilities"] == {"Positive": None, "Negative": 0.5}
    assert json.loads(predict._json(row))["probabilities"] == {"Positive": None, "Negative": 0.5}


def test_a_folder_in_which_another_evaluation_works_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.FolderLock(tmp_path):
        argv = [str(finished_run), "--output", str(tmp_path), "--decode", "greedy"]
        assert cli.run(evaluate.main, argv) == 2
    error = capsys.readouterr().err
    assert "is working in it" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

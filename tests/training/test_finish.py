"""How a run ends."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from short_run import QUICK, run

from ppo_nlu.answering import baselines
from ppo_nlu.config import Config, EvalConfig
from ppo_nlu.model import BUNDLED
from ppo_nlu.training import finish, tables
from tests import tickets

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


@pytest.mark.parametrize(("method", "title"), [("ppo", "PPO"), ("encoder", "Encoder")])
def test_the_curves_title_names_method_and_task(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, title: str
) -> None:
    titles = []
    monkeypatch.setattr(tables, "draw_curves", lambda _, title, before: titles.append(title))
    more = (f"method={method}", "train.steps=1", "eval.before=false", "log.progress=false")
    assert run(config, *more, "--output", tmp_path / "run") == 0
    assert titles == [f"{title} on bundled data, not SST-2, seed 0"]


TICKETS = """
task: tickets
method: sft
custom:
  {name: tickets, train: FILE, dev_share: 0.3, fields: [text], label_column: category,
   query: 'Judge "{text}".', labels: LABELS}
sft: {batch_size: 4}
train: {steps: 2}
eval: {batch_size: 32, bootstrap: 0}
"""
GOOD = ["wonderful", "charming", "delightful", "beautiful", "funny", "moving", "clever", "warm"]
BAD = ["terrible", "boring", "awful", "dull", "stupid", "tedious", "pointless", "bad"]


def write_tickets(folder: Path) -> Path:
    """A config, and 200 tickets that all have a text and a label."""
    rows = [row for row in tickets.rows(200) if row["category"] and row["text"].strip()]
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, tickets.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    text = TICKETS.replace("FILE", str(folder / "tickets.csv"))
    config = folder / "tickets.yaml"
    config.write_text(text.replace("LABELS", json.dumps(list(tickets.SHARES))))
    return config


def write_films(folder: Path) -> Path:
    """SST-2's files: plain judgements to measure by, of whose words training has none."""
    place = folder / "films" / "SST-2"
    place.mkdir(parents=True)
    pairs = zip(GOOD, GOOD[1:], BAD, BAD[1:], strict=False)
    dev = [f"a {g} and {h} film\t1\na {b} and {c} mess\t0\n" for g, h, b, c in pairs]
    train = [f"we saw it in {month} with friends\t{i % 2}\n" for i, month in enumerate(MONTHS)]
    (place / "dev.tsv").write_text("".join(["sentence\tlabel\n", *dev]))
    (place / "train.tsv").write_text("".join(["sentence\tlabel\n", *train]))
    return place.parent


MONTHS = ("january", "march", "april", "may", "june", "august")


@pytest.mark.slow
def test_a_useless_model_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run(write_tickets(tmp_path), *QUICK, "--output", folder) == 0
    out, err = capsys.readouterr()
    entry = json.loads((folder / "summary.json").read_text())["tasks"]["tickets"]
    labels = [json.loads(line)["label"] for line in (folder / "predictions.jsonl").open()]
    largest = labels.count("Billing and payments") / len(labels)
    constant, tfidf = entry["baselines"]["constant"], entry["baselines"]["tfidf"]
    assert constant["accuracy"] == pytest.approx(largest)
    macro_f1 = 2 * largest / (1 + largest) / 5  # of one class recall is 1, precision its share
    assert constant["macro_f1"] == pytest.approx(macro_f1)
    assert tfidf["accuracy"] > largest and tfidf["train_rows"] + len(labels) >= 190
    assert {k: row["support"] for k, row in entry["per_class"].items()} == Counter(labels)
    assert set(entry["macro_f1"]) == {"base", "before", "after"}
    table = out[out.index("(%) ") :].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["(%)", "tuned", "constant", "TF-IDF"]
    assert table[0].endswith("macro-F1")
    figures = [f"{100 * share:.1f}" for share in (largest, macro_f1)]
    assert table[2].split() == ["constant", "-", figures[0], "-", "-", figures[1]]
    assert "constant: always 'Billing and payments', the largest class" in out
    assert f"\n{'Praise':<20}" in out and "precision" in out
    warned = [line for line in err.splitlines() if line.startswith("warning: tickets: ")]
    assert [f"warning: {line}" for line in entry["warnings"]] == warned
    for said in ("never answered: ", "is not above the constant", "TF-IDF is better than tuned"):
        assert sum(said in line for line in warned) == 1, said


@pytest.mark.slow
def test_a_good_model_is_not_doubted(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    films = f"data.path={write_films(tmp_path)}"
    more = (*QUICK, "train.steps=1", "train.eval_every=0", "optim.lr=1e-6", films)
    assert run(config, *more, "--output", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    entry = json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"]["sst2"]
    assert entry["baselines"]["constant"]["accuracy"] == 0.5 and entry["warnings"] == []
    assert "warning" not in err
    assert "TF-IDF: logistic regression" in out and "macro-F1" not in out  # of two labels


@pytest.mark.parametrize("wanted", [True, False])
def test_baselines_can_be_left_out(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setattr(baselines, "measure", lambda *rows: {"constant": {"score": 0.5}})
    cfg = Config(task="sst2", eval=EvalConfig(baselines=wanted))
    held = SimpleNamespace(examples=[])
    given: Any = SimpleNamespace(cfg=cfg, train_rows={"a": []}, held={"a": held}, specs={"a": None})
    summary: dict[str, Any] = {"tasks": {"a": {"per_class": None}}}
    finish.compare(given, summary)
    assert bool(summary["tasks"]["a"]["baselines"]) is wanted


def test_what_is_said_of_a_baseline() -> None:
    said = tables.said_of({"error": baselines.MISSING}, {})
    assert said.startswith("not measured, since") and "pip install -e '.[baselines]'" in said
    entry = {"reports": {"greedy": {"mean_error": 0.5}}}
    said = tables.said_of({"answer": "2.700", "mean_error": 1.25}, entry)
    assert "mean error 1.25, of the tuned greedy answers 0.50" in said

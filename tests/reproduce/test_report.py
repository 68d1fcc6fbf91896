"""The report of made-up cells: numbers, words, what is missing; the page needs no other file."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu.errors import UserError
from ppo_nlu.reproduce import (
    comparisons,
    document,
    plots,
    published,
    question,
    report,
    results,
    tables,
)
from ppo_nlu.reproduce.grid import GRIDS, Backbone, Grid, plan, settle
from ppo_nlu.tasks import get_task

METHODS = (
    "zero-shot",
    "few-shot",
    "encoder",
    "sft-st",
    "ppo-st",
    "sft-seconds",
    "sft-mt",
    "ppo-mt",
)
LEVEL = {  # sampled, greedy
    "zero-shot": (0.48, 0.55), "few-shot": (0.50, 0.56), "encoder": (0.7, 0.7),
    "sft-st": (0.62, 0.70), "sft-seconds": (0.64, 0.71), "ppo-st": (0.69, 0.705),
    "sft-mt": (0.60, 0.66), "ppo-mt": (0.65, 0.665),
}  # fmt: skip


def made_report(task: str, score: float, seed: int) -> dict[str, Any]:
    """A report as metrics.report writes it, with every metric equal to `score`."""
    spec, draw = get_task(task), random.Random(seed)
    names = {*spec.metrics, *spec.shown}
    row: dict[str, Any] = {
        "count": 100,
        "metrics": dict.fromkeys(names, score),
        "score": score,
        "interval": [score - 0.04, score + 0.04],
        "unparsed": 0.01 * draw.random(),
    }
    if spec.kind == "rating":
        edges = [f"{i / 2:g}-{i / 2 + 0.5:g}" for i in range(10)]
        return row | {"predicted": {name: draw.randrange(60) for name in edges} | {"unparsed": 3}}
    words = [*spec.words, "unparsed"]
    table = {
        gold: {word: draw.randrange(10, 60) * (3 if word == gold else 1) for word in words}
        for gold in spec.words
    }
    for line in table.values():
        line["unparsed"] = draw.randrange(3)
    predicted = {word: sum(line[word] for line in table.values()) for word in words}
    return row | {"confusion": table, "predicted": predicted}


def made_summary(
    method: str, tasks: list[str], seed: int, model: str = "bundled"
) -> dict[str, Any]:
    trains = method not in ("zero-shot", "few-shot")
    entries = {}
    for place, task in enumerate(tasks):
        draw = random.Random(f"{method}{task}{seed}")
        low, high = (
            x + 0.03 * math.sin(place + len(task)) + draw.gauss(0, 0.01) for x in LEVEL[method]
        )
        reports = {"sample": low, "greedy": high, "score": high + 0.002}
        entries[task] = {
            "title": task,
            "data": "real",
            "rows": 100,
            "note": f"{task} from /home/someone/data/glue/{task}",
            "partial": task == "boolq",
            "reports": {d: made_report(task, x, seed) for d, x in reports.items()},
        }
    if method == "encoder":
        for entry in entries.values():
            entry["reports"] = {"score": entry["reports"]["score"]}
    costs = {"train_labels": 3840 * len(tasks), "train_steps": 60, "train_s": 0.0, "wall_s": 8.0}
    costs["train_s"] = {"sft-st": 30.0, "sft-mt": 150.0, "ppo-mt": 300.0}.get(method, 60.0)
    if trains:
        for task in {"qnli", "mnli"} & set(tasks):
            said = f"a part of the official train: /home/someone/data/{task}/train.subset10k.tsv.gz"
            entries[task] |= {"train_note": said, "train_partial": True}
    found = {"method": method, "seed": seed, "model": model, "tasks": entries}
    return found | (costs if trains else {"wall_s": 5.0})


def made_grid(
    folder: Path,
    benchmark: str = "tiny",
    methods: tuple[str, ...] = METHODS,
    tasks: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    backbones: tuple[Backbone, ...] = (Backbone("tiny"),),
) -> Path:
    """A grid's folder of which every cell is finished."""
    table = GRIDS[benchmark]
    cells = plan(table, methods, tasks or table.tasks, seeds, backbones)
    grid = Grid(folder, benchmark, 3840)
    settle(grid, cells, backbones, f"python -m ppo_nlu.reproduce {benchmark} --output runs/x")
    started = {}
    for cell in cells:
        where = grid.cell_dir(cell.name)
        where.mkdir(parents=True)
        found = made_summary(cell.method, list(cell.tasks), cell.seed, cell.backbone.name)
        (where / "summary.json").write_text(json.dumps(found))
        if cell.method.startswith("ppo"):
            (where / "metrics.jsonl").write_text(_log(cell.method, cell.tasks, cell.seed))
        started[cell.name] = {
            "commit": "v0-12-gabcdef", "torch": "2.13", "transformers": "5.23",
            "device": "cpu (2 cores)", "threads": 1, "jobs": 2, "note": "", "seconds": 61.0,
        }  # fmt: skip
    (folder / "cells.json").write_text(json.dumps(started))
    (folder / "failures.json").write_text("{}")
    return folder


def _log(method: str, tasks: tuple[str, ...], seed: int) -> str:
    draw, lines = random.Random(seed), []
    for step in range(1, 61):
        row: dict[str, Any] = {"step": step}
        for place, task in enumerate(tasks):
            rise = 0.4 + 0.04 * place + 0.3 * (1 - math.exp(-step / 20)) + draw.gauss(0, 0.05)
            row[f"reward/{task}/mean"] = rise
        row["reward/mean"] = statistics.fmean(v for k, v in row.items() if k != "step")
        if method == "ppo-st":
            row = {"step": step, "reward/mean": row["reward/mean"]}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_grid(tmp_path_factory.mktemp("report") / "grid")
    assert report.main([str(folder)]) == 0
    return folder


def edit(folder: Path, name: str, change: Any) -> None:
    path = folder / "cells" / name / "summary.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def set_scores(folder: Path, scores: dict[tuple[str, str, int], dict[str, float]]) -> None:
    """{(method, task, seed): {decode: score}} into the cells' summaries."""
    for (method, task, seed), values in scores.items():

        def change(
            found: dict[str, Any], task: str = task, values: dict[str, float] = values
        ) -> None:
            for decode, value in values.items():
                part = found["tasks"][task]["reports"][decode]
                part["score"] = value
                part["metrics"] = dict.fromkeys(part["metrics"], value)

        edit(folder, f"s{seed}-{method}-{task.replace('/', '-')}", change)


# --- the question -------------------------------------------------------------------------------


def test_the_mean_difference_counts_every_task_the_same(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb", "copa"), (0, 1))
    same = {"sample": 0.5, "greedy": 0.5, "score": 0.5}
    set_scores(folder, {("sft-st", t, s): same for t in ("cb", "copa") for s in (0, 1)})
    ahead = {("cb", 0): 0.6, ("cb", 1): 0.8, ("copa", 0): 0.45, ("copa", 1): 0.55}
    set_scores(folder, {("ppo-st", t, s): {"sample": v} for (t, s), v in ahead.items()})
    found = comparisons.compare(results.load(folder), "ppo-st", "sft-st", "sample")
    assert found is not None and (found.pairs, found.tasks) == (4, 2)
    # (10 + 30) / 2 = 20 points on CB, (-5 + 5) / 2 = 0 on COPA
    assert found.by_task == pytest.approx({"cb": 20, "copa": 0})
    assert (found.a, found.b, found.difference) == pytest.approx((60, 50, 10))
    assert found.interval[0] < 10 < found.interval[1]
    (folder / "cells" / "s1-ppo-st-copa" / "summary.json").unlink()
    found = comparisons.compare(results.load(folder), "ppo-st", "sft-st", "sample")
    # COPA has one seed left and counts as much as CB: (20 - 5) / 2
    assert found is not None and (found.pairs, found.difference) == (3, pytest.approx(7.5))


def test_the_interval_is_that_of_a_bootstrap(tmp_path: Path) -> None:
    """With two pairs of differences 0 and 10 the resampled means are 0, 5, 10 with shares 1/4, 1/2,
    1/4, so that the 95 % interval is 0 to 10; equal pairs have no width."""
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb",), (0, 1))
    set_scores(folder, {("sft-st", "cb", s): {"greedy": 0.5} for s in (0, 1)})
    set_scores(folder, {("ppo-st", "cb", s): {"greedy": 0.5 + 0.1 * s} for s in (0, 1)})
    found = comparisons.compare(results.load(folder), "ppo-st", "sft-st", "greedy")
    assert found is not None and found.interval == pytest.approx((0, 10))
    set_scores(folder, {("ppo-st", "cb", s): {"greedy": 0.6} for s in (0, 1)})
    found = comparisons.compare(results.load(folder), "ppo-st", "sft-st", "greedy")
    assert found is not None and found.interval == pytest.approx((10, 10))


def test_seeds_of_one_task_are_no_independent_draws(tmp_path: Path) -> None:
    """Two tasks with differences 0 and 10 and no spread over three seeds: as with two draws, the
    interval is 0 to 10; six independent pairs would give 1.7 to 8.3."""
    tasks, seeds = ("cb", "copa"), (0, 1, 2)
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), tasks, seeds)
    set_scores(folder, {("sft-st", t, s): {"greedy": 0.5} for t in tasks for s in seeds})
    ahead = {"cb": 0.5, "copa": 0.6}
    set_scores(folder, {("ppo-st", t, s): {"greedy": ahead[t]} for t in tasks for s in seeds})
    found = comparisons.compare(results.load(folder), "ppo-st", "sft-st", "greedy")
    assert found is not None and found.pairs == 6
    assert found.interval == pytest.approx((0, 10))


def comparison(a: float, b: float, low: float, high: float) -> comparisons.Comparison:
    return comparisons.Comparison(a, b, a - b, (low, high), 33, 11, {})


@pytest.mark.parametrize(
    ("sampled", "greedy", "said"),
    [
        ((70, 65, 3, 7), (71, 71, -1, 1), "All of the 5.0 points"),
        ((70, 65, 3, 7), (73, 71, 1, 3), "Of the 5.0 points .* 2.0 are left .* the other 3.0"),
        ((70, 65, 3, 7), (78, 71, 5, 9), "does not come from the sampling"),
        ((66, 65, -3, 5), (71, 71, -1, 1), "may be chance"),
        ((60, 65, -7, -3), (66, 71, -7, -3), "no advantage that this could explain"),
    ],
)
def test_the_sentence_follows_the_numbers(sampled: Any, greedy: Any, said: str) -> None:
    found = {"sample": comparison(*sampled), "greedy": comparison(*greedy)}
    assert re.search(said, question.sharpening("PPO-ST", "SFT-ST", found))


def test_the_verdict_is_that_of_the_interval() -> None:
    assert question.verdict(comparison(70, 65, 0.1, 9)) == "above"
    assert question.verdict(comparison(60, 65, -9, -0.1)) == "below"
    assert question.verdict(comparison(66, 65, -0.1, 2)) == "not distinguishable from"
    found = {"sample": comparison(60, 65, -9, -0.1)}
    text = question.sentence("At equal numbers of labels", "PPO-ST", "SFT-ST", found)
    assert "PPO-ST is below SFT-ST when both answer with one sample" in text and "−5.0" in text


def test_the_report_says_where_an_expectation_fails(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb",), (0,))
    set_scores(folder, {("sft-st", "cb", 0): {"sample": 0.5, "greedy": 0.60}})
    for sampled, greedy, fails in ((0.6, 0.591, 0), (0.6, 0.589, 1), (0.5, 0.7, 1), (0.4, 0.4, 2)):
        set_scores(folder, {("ppo-st", "cb", 0): {"sample": sampled, "greedy": greedy}})
        report.main([str(folder)])
        assert (folder / "report.md").read_text().count("**fails**") == fails


# --- tables -------------------------------------------------------------------------------------


def test_published_numbers_are_those_of_the_paper() -> None:
    glue, superglue = published.TABLES["glue"], published.TABLES["superglue"]
    assert glue["ppo-st"]["sst2"] == (96.4,) and glue["sft-st"]["sst2"] == (73.8,)
    assert glue["zero-shot"]["ax"] == (9.2,) and glue["sft-mt"]["wnli"] == (76.0,)
    assert glue["few-shot"]["qqp"] == (30.9,) and glue["ppo-mt"]["glue/rte"] == (86.9,)
    assert "wnli" not in glue["BERT-large"] and glue["BERT-base"]["average"] == (79.6,)
    assert superglue["ppo-st"]["multirc"] == (82.5, 50.0)
    assert superglue["BERT-large++"]["cb"] == (84.7, 90.4)
    assert superglue["few-shot"]["ax-g"] == (64.0, 55.1)
    assert superglue["zero-shot"]["average"] == (49.5,)
    assert published.BACKBONES["ppo-st"]["Qwen2.5-7B"] == (92.2, 97.0)
    assert published.BACKBONES["few-shot"]["MPT-7B"] == (21.7, 49.6)
    assert published.COST_RATIO == 1.32


def test_published_averages_are_the_means_of_their_columns() -> None:
    """GLUE the nine without WNLI and AX, SuperGLUE the eight main tasks with two metrics averaged
    first. Two of the paper's own averages are off: GLUE PPO-MT (its columns give 82.8) and
    SuperGLUE few-shot (50.5)."""
    own = {("glue", "ppo-mt"): 82.8, ("superglue", "few-shot"): 50.5}
    for benchmark, table in published.TABLES.items():
        for method, row in table.items():
            outside = {"average", "ax", "ax-b", "ax-g"} | (
                {"wnli"} if benchmark == "glue" else set()
            )
            mean = statistics.fmean(statistics.fmean(row[t]) for t in row if t not in outside)
            printed = own.get((benchmark, method), row["average"][0])
            assert mean == pytest.approx(printed, abs=0.0601), (benchmark, method)


def groups(parts: list[document.Part]) -> list[document.Group]:
    found = []
    for part in parts:
        if isinstance(part, document.Table):
            found += part.groups
        elif isinstance(part, document.Folded):
            found += groups(list(part.parts))
    return found


def test_published_numbers_never_stand_in_our_rows(tmp_path: Path) -> None:
    """Where all our scores are 12.34 and 87.66 percent, no other number stands in our tables."""
    folder = made_grid(tmp_path / "g", "glue", ("zero-shot", "ppo-st"), seeds=(0, 1))
    for path in (folder / "cells").glob("*/summary.json"):
        found = json.loads(path.read_text())
        score = 0.1234 if found["method"] == "zero-shot" else 0.8766
        for entry in found["tasks"].values():
            for part in entry["reports"].values():
                part["score"], part["metrics"] = score, dict.fromkeys(part["metrics"], score)
        path.write_text(json.dumps(found))
    loaded = results.load(folder)
    parts = list(tables.benchmark_table(loaded, "glue"))
    ours, theirs = groups(parts)
    assert not ours.foreign and theirs.foreign
    assert "arXiv 2410.11020" in theirs.title and "arXiv" not in ours.title
    cells = {cell for row in ours.rows for cell in row[3:]}
    assert cells == {"12.3 ± 0.0", "87.7 ± 0.0", "12.3 ± 0.0 (10)", "87.7 ± 0.0 (10)"}
    shown = {cell for row in theirs.rows for cell in row[3:]} - {tables.DASH}
    assert shown == {
        f"{v[0]:.1f}" for row in published.TABLES["glue"].values() for v in row.values()
    }
    page = document.html_part(next(p for p in parts if isinstance(p, document.Table)))
    first, second = re.findall(r"<tbody[^>]*>.*?</tbody>", page, flags=re.DOTALL)
    assert 'class="foreign"' not in first and 'class="foreign"' in second and "96.4" not in first


def test_columns_that_nobody_asked_for_are_hidden(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("zero-shot", "ppo-st"), ("sst2", "mrpc"), (0,))
    for path in (folder / "cells").glob("*ppo-st-mrpc/summary.json"):
        path.unlink()  # asked for, and not there yet: its column stays
    plan = json.loads((folder / "grid.json").read_text())
    form = {"method": "form", "tasks": ["sst2", "cola", "mrpc"], "seed": 0, "model": "tiny"}
    (folder / "grid.json").write_text(json.dumps(plan | {"plan": plan["plan"] | {"form": form}}))
    _, table, text = tables.benchmark_table(results.load(folder), "glue")
    assert isinstance(table, document.Table) and isinstance(text, document.Text)
    assert list(table.head) == [
        "method", "decoding", "seeds", "SST-2 (acc)", "MRPC (F1)",
        "mean of the tasks present (how many)",
    ]  # fmt: skip
    ours, theirs = table.groups
    assert {len(row) for row in (*ours.rows, *theirs.rows)} == {len(table.head)}
    assert "average" not in text.text
    assert tables.DASH in {row[4] for row in ours.rows}


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("ppo-st",), ("copa",))
    scores = {0: 0.60, 1: 0.62, 2: 0.70}
    set_scores(folder, {("ppo-st", "copa", s): {"greedy": v} for s, v in scores.items()})
    # mean 64; sd = sqrt((16 + 4 + 36) / 2) = 5.29
    cell = tables.paper_cell(results.load(folder), "ppo-st", "copa", "greedy")
    assert cell == "64.0 ± 5.3"
    edit(folder, "s0-ppo-st-copa", lambda found: found["tasks"].clear())
    edit(folder, "s1-ppo-st-copa", lambda found: found["tasks"].clear())
    assert tables.paper_cell(results.load(folder), "ppo-st", "copa", "greedy") == "70.0"


def test_an_average_needs_all_its_tasks(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "superglue", ("zero-shot",), seeds=(0,))
    loaded = results.load(folder)
    whole = comparisons.averages(loaded, "superglue", "zero-shot", "greedy", "official")
    values = [r.value("greedy") for r in loaded.scores if r.task not in ("ax-b", "ax-g")]
    assert whole is not None and whole.mean == pytest.approx(
        statistics.fmean(v for v in values if v)
    )
    (folder / "cells" / "s0-zero-shot-wic" / "summary.json").unlink()
    loaded = results.load(folder)
    assert comparisons.averages(loaded, "superglue", "zero-shot", "greedy", "official") is None
    tasks = GRIDS["superglue"].tasks
    found = comparisons.mean_of_present(loaded, "zero-shot", "greedy", tasks)
    assert found is not None and found[1] == 7
    (ours, _) = groups(list(tables.benchmark_table(loaded, "superglue")))
    assert all(row[-3:-1] == [tables.DASH, tables.DASH] for row in ours.rows)
    assert all(row[-1].endswith("(7)") for row in ours.rows)


def test_the_cost_ratio_takes_runs_that_both_have(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb", "copa"), (0,))
    for name, seconds in (("sft-st-cb", 10.0), ("ppo-st-cb", 15.0), ("ppo-st-copa", 99.0)):
        edit(folder, f"s0-{name}", lambda found, s=seconds: found.update(train_s=s))
    (folder / "cells" / "s0-sft-st-copa" / "summary.json").unlink()
    loaded = results.load(folder)
    assert comparisons.cost_ratio(loaded, "ppo-st", "sft-st") == (1.5, 1)
    (sft, ppo) = comparisons.costs(loaded)
    assert (sft.per_step, sft.per_label) == pytest.approx((10 / 60, 10 / 3840))
    assert (ppo.runs, ppo.seconds) == (2, 57.0)


# --- the files ----------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Whether tags are closed in order, and everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            str(v) for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")
        ]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(whole: Path) -> None:
    page = (whole / "report.html").read_text("utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(text.startswith("data:image/png;base64,") for text in checker.fetched)
    assert not re.search(r"https?://|url\(|@import|file:", page)
    assert "report_files" not in page
    if plots.available():
        assert len(checker.fetched) == 5


def test_the_markdown_names_figures_that_are_there(whole: Path) -> None:
    text = (whole / "report.md").read_text("utf-8")
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(named) == (5 if plots.available() else 0)
    assert all((whole / name).is_file() for name in named)
    for line in re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE):
        assert len({row.count("|") for row in line.strip().splitlines()}) == 1


def test_what_is_in_the_report(whole: Path) -> None:
    text = (whole / "report.md").read_text("utf-8")
    for words in (
        "Is PPO better than SFT", "At equal numbers of labels", "At equal seconds of training",
        "Table 1: GLUE", "Table 2: SuperGLUE", "Table 3: language models", "What it costs", "1.32",
        "Tasks measured or trained on partial data", "a part of the official train",
        "Answers that name no label",
        "python -m ppo_nlu.reproduce tiny", "torch 2.13",
    ):  # fmt: skip
        assert words in text, words
    assert "/home/someone" not in text and ".../glue/qnli" in text


def test_rows_are_one_for_each_cell_and_task(whole: Path) -> None:
    with (whole / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 3 seeds of 5 methods on 11 tasks, an encoder, and two mixtures of five tasks
    assert len(rows) == 3 * (5 * 11 + 1 + 2 * 5)
    row = next(r for r in rows if (r["method"], r["task"], r["seed"]) == ("ppo-st", "mrpc", "1"))
    report_of = made_summary("ppo-st", ["mrpc"], 1)["tasks"]["mrpc"]["reports"]
    assert row["greedy"] == row["sample"] or float(row["sample"]) < float(row["greedy"])
    assert abs(float(row["sample"]) - report_of["sample"]["score"]) < 5e-5
    assert "greedy f1" in row["metrics"] and "greedy accuracy" in row["metrics"]
    assert (row["commit"], row["threads"], row["train_labels"]) == ("v0-12-gabcdef", "1", "3840")
    partial = {(r["task"], r["method"]) for r in rows if r["partial"] == "yes"}
    trained = {"sft-st", "ppo-st", "sft-seconds"}
    assert {method for task, method in partial if task == "mnli"} == trained
    assert {task for task, method in partial if method == "zero-shot"} == {"boolq"}
    assert {task for task, _ in partial} == {"qnli", "mnli", "boolq"}
    note = next(r["note"] for r in rows if (r["task"], r["method"]) == ("mnli", "sft-st"))
    assert "trained on a part of the official train" in note and "train.subset10k" in note
    assert not any("/home" in value for r in rows for value in r.values())


@pytest.mark.parametrize(
    ("benchmark", "methods", "tasks"),
    [
        ("tiny", ("ppo-st",), ("stsb",)),
        ("tiny", ("zero-shot",), ("sst2", "copa")),
        ("tiny", ("sft-st", "sft-mt"), ("sst2", "cola")),
        ("tiny", ("encoder",), ("sst2",)),
        ("superglue", ("ppo-st", "ppo-mt"), None),
    ],
)
def test_a_report_with_little_in_it_is_still_written(
    tmp_path: Path, benchmark: str, methods: tuple[str, ...], tasks: tuple[str, ...] | None
) -> None:
    folder = made_grid(tmp_path / "g", benchmark, methods, tasks, (0,))
    assert report.main([str(folder), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Neither comparison can be made yet" in text
    assert not (folder / "report.md").exists()


def test_several_models_have_a_table_of_their_own(tmp_path: Path) -> None:
    models = (Backbone("tiny", "a/one"), Backbone("tiny", "b/two"))
    methods = ("zero-shot", "ppo-st")
    folder = made_grid(tmp_path / "g", "backbones", methods, None, (0, 1), models)
    loaded = results.load(folder)
    (ours, theirs) = groups(list(tables.backbone_table(loaded)))
    assert {row[0] for row in ours.rows} == {"one", "two"} and theirs.foreign
    assert ["Qwen2.5-7B", "PPO-ST", "sampled", "92.2", "97.0"] in [list(row) for row in theirs.rows]
    assert not list(tables.benchmark_table(loaded, "glue"))
    report.main([str(folder)])


def test_failed_and_missing_cells_are_named(tmp_path: Path) -> None:
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb", "copa"), (0,))
    for name in ("s0-ppo-st-cb", "s0-sft-st-copa"):
        (folder / "cells" / name / "summary.json").unlink()
    failure = {"s0-ppo-st-cb": {"exit": 1, "error": "out of <memory>", "log": "x"}}
    (folder / "failures.json").write_text(json.dumps(failure))
    report.main([str(folder)])
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert "s0-ppo-st-cb: out of <memory>" in text and "s0-sft-st-copa: not run yet" in text
    assert "out of &lt;memory&gt;" in page and "<memory>" not in page


def test_without_matplotlib_there_are_tables_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    folder = made_grid(tmp_path / "g", "tiny", ("sft-st", "ppo-st"), ("cb",), (0,))
    report.main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "matplotlib is missing" in page and "<img" not in page and "<table>" in page


def test_a_folder_that_is_no_grid_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no grid.json"):
        report.main([str(tmp_path)])

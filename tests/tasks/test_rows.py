"""A task is a row: what a made-up one says of itself is known wherever tasks are listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ppo_nlu.answering import leaderboard, leaderboard_files
from ppo_nlu.answering.answer import Answer
from ppo_nlu.config import Config, dump, load_config
from ppo_nlu.data.__main__ import main as data_program
from ppo_nlu.errors import UserError
from ppo_nlu.model import peft_format
from ppo_nlu.reproduce import comparisons
from ppo_nlu.reproduce.__main__ import main as reproduce
from ppo_nlu.reproduce.grid import GRIDS, Backbone, Cell, plan
from ppo_nlu.runtime import run_folder
from ppo_nlu.tasks import TASKS, Example, Label, get_task
from ppo_nlu.tasks.metrics import average

TONE = replace(
    TASKS["sst2"], name="tone", title="Tone", folder="Tone",
    leaderboard_file="Tone.tsv", leaderboard_rows=2,
)  # fmt: skip
PROBE = replace(
    TONE,
    name="tone-x",
    title="Tone-X",
    folder="Tone-X",
    files={"test": ("test.tsv",)},
    trained_with="tone",
    averages=(),
    leaderboard_file="Tone-X.tsv",
)


@pytest.fixture(autouse=True)
def _two_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (TONE, PROBE):
        monkeypatch.setitem(TASKS, spec.name, spec)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The official files of both tasks."""
    for spec in (TONE, PROBE):
        place = tmp_path / "data" / "glue" / spec.folder
        place.mkdir(parents=True)
        for split, (name,) in spec.files.items():
            head, rows = ("index", (0, 1)) if split == "test" else ("label", (0, 1))
            text = "".join(f"{row}\ta fine film\n" for row in rows)
            (place / name).write_text(f"{head}\tsentence\n{text}")
    return tmp_path / "data"


def cells(method: str) -> dict[str, Cell]:
    table = GRIDS["glue"]
    return {cell.name: cell for cell in plan(table, [method], table.tasks, [0], [Backbone("tiny")])}


def test_it_is_found_by_name() -> None:
    assert get_task("Tone") is TONE and get_task("TONE_X") is PROBE


def test_the_data_program_checks_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_program(["check", "tone", "tone-x", f"data.path={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in lines if line.startswith("tone")]
    assert found == [["tone", "train"], ["tone", "dev"], ["tone", "test"], ["tone-x", "test"]]


def test_training_on_the_probe_names_the_task_it_goes_with(folder: Path) -> None:
    from ppo_nlu.config import DataConfig
    from ppo_nlu.data import load_split

    with pytest.raises(UserError, match="no training rows; train on tone instead"):
        load_split(PROBE, "train", DataConfig(path=str(folder)))


def test_the_averages_need_it_and_not_its_probe() -> None:
    scores = {name: dict.fromkeys(spec.metrics, 0.5) for name, spec in TASKS.items()}
    for style in ("official", "paper"):
        whole = {name: row for name, row in scores.items() if name != "tone-x"}
        assert average("glue", whole, style) == pytest.approx(0.5)
        assert average("glue", {k: v for k, v in whole.items() if k != "tone"}, style) is None
        assert average("superglue", whole, style) == pytest.approx(0.5)
    # Ten columns, of which one is at 1: (9 * 0.5 + 1) / 10.
    assert average("glue", scores | {"tone": {"accuracy": 1.0}}) == pytest.approx(0.55)
    assert comparisons.is_diagnostic("tone-x") and not comparisons.is_diagnostic("tone")


def test_the_grid_trains_it_and_measures_the_probe_with_its_run() -> None:
    single, mixed = cells("ppo-st"), cells("ppo-mt")
    assert single["s0-ppo-st-tone"].source == ""
    assert single["s0-ppo-st-tone-x"].source == "s0-ppo-st-tone"
    assert "tone" in next(cell for cell in mixed.values() if not cell.source).tasks
    assert "s0-zero-shot-tone-x" in cells("zero-shot")


def test_the_grids_program_lists_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["glue", "--preset", "tiny", "--tasks", "tone", "--methods", "zero-shot", "--seeds"]
    assert reproduce([*words, "0", "--dry-run", "--output", str(tmp_path / "grid")]) == 0
    assert "s0-zero-shot-tone\n" in capsys.readouterr().out


def test_the_submission_holds_both_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f'task: tone\ndata: {{path: "{folder}"}}\n')
    run = tmp_path / "run"
    run_folder.claim(run, dump(load_config(tmp_path / "run.yaml"))).release()
    (run / "adapter").mkdir()
    (run / "adapter" / peft_format.CONFIG_FILE).write_text("{}")
    parts, missing = leaderboard.collect("glue", [leaderboard.FinishedRun.read(str(run), [])])
    assert [(part.name, part.rows, part.trained.name) for part in parts] == [
        ("Tone-X.tsv", 2, "tone"),
        ("Tone.tsv", 2, "tone"),
    ]
    assert any(line.startswith("CoLA.tsv: no run") for line in missing)
    assert json.dumps(missing).count("Tone") == 0


def test_its_file_for_the_leaderboard_is_laid_out_as_it_says() -> None:
    spec = replace(
        TONE,
        labels=(Label("Negative", "0", submitted=7), Label("Positive", "1", submitted="yes")),
        leaderboard_file="Tone.jsonl",
    )
    run = leaderboard.FinishedRun(Path("run"), Config(task="tone"), {"tone": spec})
    rows = [Example(str(i), {}, None, extra={"idx": i}) for i in range(2)]
    given = [Answer(rows[0], "Positive", ""), Answer(rows[1], "Negative", "")]
    fallback = leaderboard_files.Fallback("majority", 0)
    entry = leaderboard.Entry(spec, run, spec, rows)
    lines = b'{"idx": 0, "label": "yes"}\n{"idx": 1, "label": 7}\n'
    assert leaderboard_files.write(entry, given, fallback) == (lines, 0)
    table = replace(entry, spec=replace(spec, leaderboard_file="Tone.tsv"))
    lines = b"index\tprediction\n0\tyes\n1\t7\n"
    assert leaderboard_files.write(table, given, fallback) == (lines, 0)
    rows = [replace(row, extra={"idx": (3, 5, i)}) for i, row in enumerate(rows)]
    nested = replace(entry, spec=replace(spec, leaderboard_layout="paragraphs"), examples=rows)
    content, _ = leaderboard_files.write(nested, given, fallback)
    answers = [{"idx": 0, "label": "yes"}, {"idx": 1, "label": 7}]
    questions = [{"idx": 5, "answers": answers}]
    assert json.loads(content) == {"idx": 3, "passage": {"questions": questions}}


def test_every_layout_that_a_row_names_is_known() -> None:
    known = leaderboard_files.LAYOUTS
    assert all(spec.leaderboard_layout in known for spec in TASKS.values())

"""The grid: its plan, its commands, and how it goes on after failures, kills and stops.

The cells are a stub program in place of real training: it writes a summary and counts its starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu.config import load_config
from ppo_nlu.errors import UserError
from ppo_nlu.reproduce import __main__ as reproduce
from ppo_nlu.reproduce import commands, runner
from ppo_nlu.reproduce.grid import ASSETS, GRIDS, Backbone, Cell, Grid, plan, settle, with_form
from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.reproduce.runner import Runner
from ppo_nlu.runtime import cli
from ppo_nlu.storage import locks

ROOT = Path(__file__).parents[2]
TINY = Backbone("tiny")

STUB = """
import json, os, pathlib, sys, time
folder, said = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write(os.environ["OMP_NUM_THREADS"] + "\\n")
print("working", flush=True)
if said.get("sleep") and not (folder / "stopped").exists():
    import signal
    def stop(number, frame):
        (folder / "stopped").write_text(str(number))
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    (folder / "ready").write_text("")
    time.sleep(said["sleep"])
if "error" in said:
    print("Traceback: a long story", file=sys.stderr)
    print("error: " + said["error"], file=sys.stderr)
    print("cleaning up")
    sys.exit(2)
if not said.get("silent"):
    (folder / "summary.json").write_text(json.dumps(said["summary"]))
"""


def summary(method: str, task: str, seed: int, score: float = 0.5, **more: Any) -> dict[str, Any]:
    rows = {"count": 10, "score": score, "metrics": {"accuracy": score}, "unparsed": 0.0}
    rows["interval"] = [score - 0.1, score + 0.1]
    entry = {
        "title": task, "data": "real", "note": "whole", "partial": False, "rows": 10,
        "reports": {"sample": rows, "greedy": rows, "score": rows},
    }  # fmt: skip
    return {
        "task": task, "method": method, "seed": seed, "model": "bundled", "train_labels": 96,
        "train_steps": 4, "train_s": 2.0, "wall_s": 3.0, "tasks": {task: entry}, **more,
    }  # fmt: skip


def stub(special: dict[str, dict[str, Any]] | None = None) -> runner.Build:
    def build(grid: Grid, cell: Cell) -> tuple[list[str], str]:
        said = {"summary": summary(cell.method, cell.tasks[0], cell.seed)}
        said |= (special or {}).get(cell.name, {})
        folder = str(grid.cell_dir(cell.name))
        return [sys.executable, "-c", STUB, folder, json.dumps(said)], ""

    return build


def started(grid: Grid) -> dict[str, int]:
    return {
        path.parent.name: len(path.read_text().splitlines())
        for path in grid.folder.glob("cells/*/starts")
    }


def make(tmp_path: Path, methods: list[str], tasks: list[str]) -> tuple[Grid, list[Cell]]:
    grid = Grid(tmp_path / "grid", "tiny", 96)
    cells = plan(GRIDS["tiny"], methods, tasks, [0], [TINY])
    settle(grid, cells, [TINY], "python -m ppo_nlu.reproduce tiny")
    return grid, cells


# --- the plan -----------------------------------------------------------------------------------


def test_the_tiny_grid_is_what_it_says() -> None:
    table = GRIDS["tiny"]
    cells = plan(table, table.methods, table.tasks, [0, 1, 2], [TINY])
    # 5 single-task methods on 11 tasks, the encoder on one, two mixtures; three seeds
    assert len(cells) == 3 * (5 * 11 + 1 + 2)
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    mixed = next(cell for cell in cells if cell.method == "ppo-mt")
    assert sorted(mixed.tasks) == ["cola", "glue/rte", "mrpc", "qnli", "sst2"]
    for table in GRIDS.values():
        backbones = [Backbone(name) for name in table.presets]
        cells = plan(table, list(METHODS), table.tasks, [0], backbones)
        place = {cell.name: number for number, cell in enumerate(cells)}
        assert len(place) == len(cells)
        assert all(place[need] < place[cell.name] for cell in cells for need in cell.needs)


def test_sets_without_a_train_file_are_measured_with_the_run_of_their_task() -> None:
    cells = plan(GRIDS["glue"], ["ppo-st", "sft-mt"], ["mnli", "ax", "sst2"], [0], [TINY])
    source = {cell.name: cell.source for cell in cells}
    assert source == {
        "s0-sft-mt-mnli+sst2": "",
        "s0-sft-mt-ax": "s0-sft-mt-mnli+sst2",
        "s0-ppo-st-mnli": "",
        "s0-ppo-st-sst2": "",
        "s0-ppo-st-ax": "s0-ppo-st-mnli",
    }


def test_backbones_are_told_apart() -> None:
    backbones = [Backbone("tiny", "some/where/one"), Backbone("tiny", "two")]
    cells = plan(GRIDS["backbones"], ["ppo-st"], ["copa"], [3], backbones)
    assert [cell.name for cell in cells] == ["one-s3-ppo-st-copa", "two-s3-ppo-st-copa"]


# --- the commands ---------------------------------------------------------------------------------


def command(tmp_path: Path, method: str, tasks: list[str], **more: Any) -> list[str]:
    grid = Grid(tmp_path / "grid", "tiny", 1000, more.get("overrides", ()))
    backbone = Backbone("tiny", more.get("model"))
    cells = plan(GRIDS["tiny"], [method], tasks, [7], [backbone])
    settle(grid, cells, [backbone], "")
    return commands.command_of(grid, cells[0])[0][1:]


@pytest.mark.parametrize(
    ("method", "steps"),
    # ceil(1000 / 32), ceil(1000 / 24); the encoder's are those of its preset
    [("ppo-st", 32), ("sft-st", 42), ("encoder", 1000)],
)
def test_equal_labels(tmp_path: Path, method: str, steps: int) -> None:
    said = command(tmp_path, method, ["sst2"])
    assert said[:2] == ["-m", "ppo_nlu.train"]
    assert {"task=sst2", "seed=7", f"train.steps={steps}", "eval.before=false"} <= set(said)
    overrides = [text for text in said if "=" in text and not text.startswith("--")]
    assert load_config(said[2], overrides).train.steps == steps


@pytest.mark.parametrize(
    ("budget", "form", "encoder"),
    # 250 and 1000 steps at the preset's 672 labels: 250 · 336 / 672, 1000 · 64 / 672
    [(5000, 250, 1000), (672, 250, 1000), (336, 125, 500), (64, commands.FEWEST_FORM, 96)],
)
def test_what_has_steps_of_its_own_has_fewer_with_a_small_budget(
    tmp_path: Path, budget: int, form: int, encoder: int
) -> None:
    grid = Grid(tmp_path / "grid", "tiny", budget)
    cells = with_form(
        plan(GRIDS["tiny"], ["encoder", "ppo-st"], ["sst2"], [0], [TINY]), GRIDS["tiny"]
    )
    settle(grid, cells, [TINY], "")
    said = {cell.method: commands.command_of(grid, cell)[0] for cell in cells}
    assert f"train.steps={form}" in said["form"]
    assert f"train.steps={encoder}" in said["encoder"]


def test_a_mixture_gets_the_labels_of_its_tasks(tmp_path: Path) -> None:
    said = command(tmp_path, "sft-mt", ["sst2", "cola", "mrpc"])
    assert {"task=null", "tasks=[sst2, cola, mrpc]", "train.steps=125"} <= set(said)  # 3000 / 24
    overrides = [text for text in said if "=" in text]
    assert load_config(said[2], overrides).tasks == ["sst2", "cola", "mrpc"]


def test_overrides_and_the_model_reach_the_cells(tmp_path: Path) -> None:
    said = command(tmp_path, "ppo-st", ["cb"], overrides=("rollout.batch_size=10",), model="gpt2")
    assert {"rollout.batch_size=10", "train.steps=100", "model.name_or_path=gpt2"} <= set(said)


@pytest.mark.parametrize(("method", "shots"), [("zero-shot", 0), ("few-shot", 5)])
def test_evaluation_cells_train_nothing(tmp_path: Path, method: str, shots: int) -> None:
    said = command(tmp_path, method, ["cb"])
    assert said[:2] == ["-m", "ppo_nlu.evaluate"] and f"prompt.shots={shots}" in said
    assert not any(text.startswith("train.") for text in said)


def test_an_unfinished_run_is_resumed(tmp_path: Path) -> None:
    command(tmp_path, "ppo-st", ["sst2"])
    folder = tmp_path / "grid" / "cells" / "s7-ppo-st-sst2"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"program": "ppo_nlu", "format": 1}')
    (folder / "config.yaml").write_text("task: sst2\n")
    grid = Grid(tmp_path / "grid", "tiny", 1000)
    (cell,) = plan(GRIDS["tiny"], ["ppo-st"], ["sst2"], [7], [TINY])
    said, _ = commands.command_of(grid, cell)
    assert said[-3:] == [str(folder / "config.yaml"), "--resume", str(folder)]


def test_sft_for_the_seconds_of_ppo() -> None:
    sft = {"train_steps": 160, "train_s": 20.0}
    # 160 steps took 20 s, so 50 s are 400 steps; 33 s are 264
    assert commands.sft_seconds_steps(sft, {"train_s": 50.0}) == (400, "")
    assert commands.sft_seconds_steps(sft, {"train_s": 33.0}) == (264, "")
    steps, note = commands.sft_seconds_steps(sft, {"train_s": 2000.0})
    assert steps == 40 * 160 and "capped at 40 x" in note and "100 x" in note
    assert commands.sft_seconds_steps(sft, {"train_s": 0.001})[0] == 1


def test_sft_seconds_reads_the_cells_of_its_task_and_seed(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["sft-st", "ppo-st", "sft-seconds"], ["cb"])
    for cell, seconds in zip(cells, (2.0, 5.0), strict=False):
        folder = grid.cell_dir(cell.name)
        folder.mkdir(parents=True)
        found = summary(cell.method, "cb", 0, train_s=seconds)
        (folder / "summary.json").write_text(json.dumps(found))
    assert "train.steps=10" in commands.command_of(grid, cells[2])[0]  # 4 steps x 5 / 2


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_presets_load(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.method == {"sft": "sft", "form": "sft", "encoder": "encoder"}.get(
        path.stem.split("_")[-1], "ppo"
    )
    if path.stem.endswith("_form"):  # for teach_form, which reads `sft.batch_size` only
        assert set(cfg.tasks) == set(GRIDS["tiny"].tasks)
        return
    if not path.stem.startswith("tiny") and cfg.method != "encoder":
        # arXiv 2410.11020: learning rate, LoRA rank, batches, epochs, optimizers
        assert (cfg.optim.lr, cfg.lora.r, cfg.model.dtype) == (9e-6, 16, "bfloat16")
        assert cfg.optim.name == {"ppo": "adafactor", "sft": "adamw"}[cfg.method]
        assert cfg.sft.batch_size == 24 and cfg.ppo.epochs == 4
    if cfg.method == "sft":  # the prompts and answers of SFT and PPO are the same
        twin = load_config(path.with_name(path.name.replace("_sft", "")))
        assert (cfg.prompt, cfg.rollout.max_new_tokens) == (
            twin.prompt,
            twin.rollout.max_new_tokens,
        )
        assert (cfg.model, cfg.lora, cfg.eval, cfg.data) == (
            twin.model,
            twin.lora,
            twin.eval,
            twin.data,
        )


# --- running ------------------------------------------------------------------------------------


def test_finished_cells_are_kept_and_a_failed_one_does_not_stop_the_others(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["zero-shot"], ["sst2", "cola", "cb"])
    bad = {"s0-zero-shot-cola": {"error": "data.path: no such folder"}}
    assert Runner(grid, cells, 2, stub(bad)).run() == 1
    assert started(grid) == {cell.name: 1 for cell in cells}
    failures = json.loads((grid.folder / "failures.json").read_text())
    assert list(failures) == ["s0-zero-shot-cola"]
    assert failures["s0-zero-shot-cola"]["exit"] == 2
    assert failures["s0-zero-shot-cola"]["error"] == "error: data.path: no such folder"
    assert "working" in (grid.folder / "logs" / "s0-zero-shot-cola.log").read_text()
    # mended, the same command runs the failed cell alone and forgets the failure
    assert Runner(grid, cells, 2, stub()).run() == 0
    assert started(grid) == {cell.name: 1 + (cell.name in bad) for cell in cells}
    assert json.loads((grid.folder / "failures.json").read_text()) == {}
    assert Runner(grid, cells, 2, stub()).run() == 0
    assert sum(started(grid).values()) == 4


def test_an_evaluation_that_was_stopped_begins_anew_and_a_training_run_goes_on(
    tmp_path: Path,
) -> None:
    grid, cells = make(tmp_path, ["zero-shot", "sft-st"], ["cb"])
    for cell in cells:
        grid.cell_dir(cell.name).mkdir(parents=True)
        (grid.cell_dir(cell.name) / "predictions-sample.jsonl").write_text("half\n")
    assert Runner(grid, cells, 1, stub()).run() == 0
    left = {path.parent.name for path in grid.folder.glob("cells/*/predictions*")}
    assert left == {"s0-sft-st-cb"}


def test_the_time_is_estimated_by_kind_of_cell(tmp_path: Path) -> None:
    cells = plan(
        GRIDS["tiny"], ["zero-shot", "few-shot", "ppo-st", "ppo-mt"], ["sst2", "mrpc"], [0], [TINY]
    )
    kinds = {cell.name: cell for cell in cells}
    zero, few = kinds["s0-zero-shot-sst2"], kinds["s0-few-shot-sst2"]
    ppo, mixed = kinds["s0-ppo-st-sst2"], kinds["s0-ppo-mt-sst2+mrpc"]
    assert runner.seconds_of(zero, {}) is None
    # Nothing that trains has finished: the form's time and that of an evaluation say nothing.
    assert runner.seconds_of(ppo, {"form": 90.0, "encoder": 70.0, "zero-shot": 5.0}) is None
    known = {"form": 90.0, "zero-shot": 4.0, "few-shot": 6.0, "sft-st": 10.0, "ppo-st": 30.0}
    assert runner.seconds_of(few, known) == 6.0
    assert runner.seconds_of(ppo, known) == 30.0
    assert (
        runner.seconds_of(mixed, known) == 2 * 20.0
    )  # two tasks, as SFT-ST and PPO-ST on the mean
    del known["few-shot"], known["zero-shot"]
    assert runner.seconds_of(few, known) is None
    (_, source) = plan(GRIDS["glue"], ["ppo-st"], ["mnli", "ax"], [0], [TINY])
    assert runner.seconds_of(source, known | {"zero-shot": 4.0}) == 4.0


def test_a_grid_tells_the_time_left(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["zero-shot", "sft-st"], ["cb", "copa"])
    told = Runner(grid, cells, 2, stub())
    evaluated, trained = cells[:2], cells[2:]
    told.finished, told.waiting = [*evaluated, trained[0]], [trained[1]]
    told.started = {cell.name: {"seconds": 7.0} for cell in evaluated}
    told.started[trained[0].name] = {"seconds": 40.0}
    assert told._seconds_left() == pytest.approx(40.0)
    told.finished, told.waiting = evaluated[:1], [evaluated[1], trained[1]]
    assert told._seconds_left() == 0.0  # nothing is told while one of them is unknown


def test_a_cell_without_a_summary_has_failed(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["zero-shot"], ["cb"])
    assert Runner(grid, cells, 1, stub({cells[0].name: {"silent": True}})).run() == 1


def test_a_cell_whose_prerequisite_failed_says_so(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["sft-st", "ppo-st", "sft-seconds"], ["cb", "copa"])
    bad = {"s0-ppo-st-cb": {"error": "out of memory"}}
    assert Runner(grid, cells, 2, stub(bad)).run() == 1
    failures = json.loads((grid.folder / "failures.json").read_text())
    assert failures["s0-sft-seconds-cb"]["error"] == "needs the finished cell s0-ppo-st-cb"
    assert set(failures) == {"s0-ppo-st-cb", "s0-sft-seconds-cb"}
    assert grid.finished("s0-sft-seconds-copa")


def test_a_cell_whose_command_cannot_be_made_is_a_failure_too(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["zero-shot"], ["cb", "copa"])

    def build(grid: Grid, cell: Cell) -> tuple[list[str], str]:
        if cell.tasks == ("cb",):
            raise UserError("a mistake")
        return stub()(grid, cell)

    assert Runner(grid, cells, 1, build).run() == 1
    assert grid.finished("s0-zero-shot-copa")


def test_the_threads_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "cores", lambda: 8)
    assert [runner.threads(jobs) for jobs in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    grid, cells = make(tmp_path, ["zero-shot"], ["cb"])
    Runner(grid, cells, 2, stub()).run()
    assert (grid.cell_dir(cells[0].name) / "starts").read_text() == "4\n"


DRIVER = """
import json, sys
sys.path.insert(0, {tests!r})
from tests.reproduce.test_reproduce import *
grid, cells = make(Path(sys.argv[1]), ["zero-shot"], ["sst2", "cola", "cb"])
slow = {{cell.name: {{"sleep": 60}} for cell in cells}}
sys.exit(Runner(grid, cells, 2, stub(slow)).run())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_cells_politely_and_the_grid_goes_on_later(
    tmp_path: Path, number: int, code: int
) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = DRIVER.format(tests=str(ROOT / "tests"))
    running = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path)], env=env)
    ready = tmp_path / "grid" / "cells"
    limit = time.monotonic() + 60
    while len(list(ready.glob("*/ready"))) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    with pytest.raises(UserError, match="still running"), runner.locked(tmp_path / "grid"):
        pass
    running.send_signal(number)
    assert running.wait(30) == code
    stopped = {path.parent.name: path.read_text() for path in ready.glob("*/stopped")}
    assert stopped == {f"s0-zero-shot-{name}": str(int(number)) for name in ("sst2", "cola")}
    grid, cells = make(tmp_path, ["zero-shot"], ["sst2", "cola", "cb"])
    assert not any(grid.finished(cell.name) for cell in cells)
    assert json.loads((grid.folder / "failures.json").read_text()) == {}  # a stop is no failure
    assert Runner(grid, cells, 2, stub()).run() == 0


# --- settings and mistakes ------------------------------------------------------------------------


def test_a_grid_is_not_settled_while_another_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "grid"
    folder.mkdir()
    with locks.FolderLock(folder):
        assert cli.run(reproduce.main, ["tiny", "--output", str(folder)]) == 2
        assert os.listdir(folder) == [locks.LOCK]
    error = capsys.readouterr().err
    assert "is still running (process" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["[]", "{", '{"tasks": []}', '{"tasks": {"cb": 3}}', "[" * 99999])
def test_a_cell_with_a_damaged_summary_is_run_again(tmp_path: Path, text: str) -> None:
    grid, (cell, *_) = make(tmp_path, ["zero-shot"], ["cb"])
    grid.cell_dir(cell.name).mkdir(parents=True)
    (grid.cell_dir(cell.name) / "summary.json").write_text(text)
    assert not grid.finished(cell.name) and grid.summary(cell.name) == {}


def test_another_grid_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    grid, cells = make(tmp_path, ["zero-shot"], ["cb"])

    def again(backbone: Backbone = TINY, **changed: Any) -> None:
        other = Grid(grid.folder, **({"benchmark": "tiny", "budget": 96} | changed))
        settle(other, cells, [backbone], "again")

    again()
    for changed, said in (
        ({"budget": 97}, "another budget"),
        ({"benchmark": "glue"}, "another benchmark"),
        ({"overrides": ("ppo.clip=0.1",)}, "another overrides"),
        ({"backbone": Backbone("tiny", "gpt2")}, "another models"),
        ({"backbone": Backbone("mpt-7b")}, "another models"),
    ):
        with pytest.raises(UserError, match=said):
            again(**changed)
    (grid.folder / "configs" / "tiny.yaml").write_text("task: sst2\n")
    with pytest.raises(UserError, match=r"another version of the preset tiny.yaml"):
        again()


def test_the_plan_grows_and_remembers_its_commands(tmp_path: Path) -> None:
    grid, _ = make(tmp_path, ["zero-shot"], ["cb"])
    more = plan(GRIDS["tiny"], ["zero-shot"], ["cb"], [1], [TINY])
    settle(grid, more, [TINY], "second")
    stored = json.loads((grid.folder / "grid.json").read_text())
    assert sorted(stored["plan"]) == ["s0-zero-shot-cb", "s1-zero-shot-cb"]
    assert stored["commands"] == ["python -m ppo_nlu.reproduce tiny", "second"]


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files of other kinds"):
        settle(Grid(tmp_path, "tiny", 1), [], [TINY], "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tiny", "--methods", "ppo"], "--methods: unknown method 'ppo'; choose from zero-shot"),
        (["tiny", "--preset", "huge"], "--preset: unknown preset 'huge'; choose from tiny"),
        (["tiny", "--tasks", "rte"], "glue/rte or superglue/rte"),
        (["tiny", "--seeds", "one"], "are not whole numbers"),
        (["tiny", "--budget", "0"], "--budget: 0 is less than 1"),
        (["tiny", "--jobs", "0"], "--jobs: 0 is less than 1"),
        (["tiny", "seed=3"], "use --seeds"),
        (["tiny", "--seeds", "1", "train.steps=3"], "use --budget"),
        (["tiny", "ppo.clop=3"], "ppo.clip"),
        (["tiny", "--methods", "ppo-mt", "--tasks", "cb"], "no cell is left"),
        (["glue", "--preset", "tiny", "--model", "a", "b"], "glue takes one"),
        (["backbones", "--model", "a"], "give one --preset"),
        (["glue", "--model", "a"], "--model: give --preset with it"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        reproduce.main([*argv, "--output", str(tmp_path / "grid")])
    assert not (tmp_path / "grid").exists()


def test_names_may_be_parted_by_commas() -> None:
    args = reproduce.parse(["tiny", "--tasks", "sst2,mrpc", "cb", "--seeds", "0,1", "lora.r=4"])
    assert (args.tasks, args.seeds) == (["sst2", "mrpc", "cb"], ["0", "1"])


def test_overrides_may_stand_behind_a_list_of_names() -> None:
    args = reproduce.parse(["tiny", "--tasks", "cb", "copa", "ppo.clip=0.1", "--seeds", "0", "1"])
    assert (args.tasks, args.seeds, args.overrides) == (
        ["cb", "copa"],
        ["0", "1"],
        ["ppo.clip=0.1"],
    )

"""The command line of a cell: the program, the preset's config and what the grid sets itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from ppo_nlu.config import Config, load_config
from ppo_nlu.reproduce.grid import BUDGETS, FORM, Cell, Grid, family_of
from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.runtime import run_folder

FEWEST_FORM = 60  # steps of the form, however small the budget
MOST_SFT = 40  # sft-seconds: at most so many times the steps of sft-st


def batch_size(cell: Cell, cfg: Config) -> int:
    """The labelled rows that one training step draws."""
    family = family_of(cell)
    if family == "_sft":
        return cfg.sft.batch_size
    return cfg.encoder.batch_size if family == "_encoder" else cfg.rollout.batch_size


def sft_seconds_steps(sft: Mapping[str, Any], ppo: Mapping[str, Any]) -> tuple[int, str]:
    """The SFT steps that take the seconds PPO took, and a note where they were capped.

    steps = round(sft steps · (PPO's training seconds / SFT's training seconds)), from the
    summaries of the two finished cells, at most 40 times the steps of SFT.
    """
    steps, ratio = int(sft["train_steps"]), float(ppo["train_s"]) / float(sft["train_s"])
    if ratio > MOST_SFT:
        note = f"capped at {MOST_SFT} x the steps of sft-st; equal seconds would be {ratio:.0f} x"
        return MOST_SFT * steps, note
    return max(1, round(steps * ratio)), ""


def scaled(steps: int, grid: Grid, cell: Cell) -> int:
    """A preset's own number of steps, less where the budget is less than the preset's."""
    share = grid.budget / BUDGETS[cell.backbone.preset]
    return math.ceil(steps * min(1.0, share))


def steps_of(grid: Grid, cell: Cell) -> tuple[int, str]:
    """The training steps of a cell, and what is to be said about them."""
    if cell.method == "sft-seconds":
        sft, ppo = (grid.summary(name) for name in cell.needs)
        return sft_seconds_steps(sft, ppo)
    cfg = load_config(grid.config_of(cell), grid.overrides)
    if cell.method == FORM:
        return max(FEWEST_FORM, scaled(cfg.train.steps, grid, cell)), ""
    if cell.method == "encoder":
        preset = yaml.safe_load(grid.config_of(cell).read_text("utf-8"))
        if "steps" in preset.get("train", {}):
            steps = scaled(cfg.train.steps, grid, cell)
            return steps, "the preset's own number of steps, not the budget of labels"
    labels, size = grid.budget * len(cell.tasks), batch_size(cell, cfg)
    steps = math.ceil(labels / size)
    over = steps * size - labels
    return steps, f"{over} labels over the budget, to fill the last batch" if over else ""


def command_of(grid: Grid, cell: Cell) -> tuple[list[str], str]:
    """The command line of a cell, resuming its run where there is one, and a note."""
    folder = grid.cell_dir(cell.name)
    train = [sys.executable, "-m", "ppo_nlu.train"]
    evaluate = [sys.executable, "-m", "ppo_nlu.evaluate"]
    where = ["--output", str(folder)]
    task = [f"task={cell.tasks[0]}"]
    if cell.source:
        alone = ["tasks=[]"] if METHODS[cell.method].several else []
        trusted = [text for text in grid.overrides if "trust_remote_code" in text]
        run = str(grid.cell_dir(cell.source))
        return [*evaluate, run, *task, *alone, *trusted, *where], ""
    said = [f"seed={cell.seed}"]
    said += task if len(cell.tasks) == 1 else ["task=null", f"tasks=[{', '.join(cell.tasks)}]"]
    if cell.backbone.model and cell.method != "encoder" and not cell.start:
        said.append(f"model.name_or_path={cell.backbone.model}")
    if cell.start:
        said.append(f"model.name_or_path={grid.cell_dir(cell.start) / 'model'}")
    config = str(grid.config_of(cell))
    if cell.method == FORM:
        teach = [sys.executable, "-m", "ppo_nlu.teach_form", config]
        steps, note = steps_of(grid, cell)
        return [*teach, *said, f"train.steps={steps}", *grid.overrides, *where], note
    method = METHODS[cell.method]
    if not method.trains:
        said.append(f"prompt.shots={method.shots}")
        return [*evaluate, config, *said, *grid.overrides, *where], ""
    steps, note = steps_of(grid, cell)
    if run_folder.is_run_dir(folder):
        stored = [str(folder / "config.yaml"), *grid.overrides]
        return [*train, *stored, "--resume", str(folder)], note
    said += [f"train.steps={steps}", "eval.before=false", "eval.baselines=false"]
    return [*train, config, *said, *grid.overrides, *where], note

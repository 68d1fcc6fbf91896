"""The cells of a grid: which there are, and the folder that holds them.

A cell is one method on one task (or a mixture of tasks) with one seed. `commands` says how each
is run, `runner` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ppo_nlu.errors import UserError
from ppo_nlu.reproduce import results
from ppo_nlu.reproduce.methods import METHODS, in_running_order
from ppo_nlu.storage import files
from ppo_nlu.tasks import TASKS, benchmark_tasks

ASSETS = Path(__file__).parents[1] / "assets" / "reproduce"
FORMAT = 1

# The cell that comes first where the preset has a file for it. It teaches the base the form of the
# answers, without labels; the other cells start from the model that it makes.
FORM = "form"
BUDGETS = {"tiny": 672, "llama2-7b": 24000, "qwen2.5-7b": 24000, "mpt-7b": 24000}  # by preset


@dataclass(frozen=True)
class Table:
    """What a grid holds unless the command line says otherwise: all tasks of a benchmark, or those
    that are listed."""

    benchmark: str = ""
    listed: tuple[str, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    presets: tuple[str, ...] = ("tiny",)
    mixed: tuple[str, ...] | None = None  # tasks of the multi-task runs; None = all
    encoder: tuple[str, ...] | None = None  # tasks of the encoder; None = all

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks by name."""
        return self.listed or tuple(spec.name for spec in benchmark_tasks(self.benchmark))


GRIDS = {
    "glue": Table("glue"),
    "superglue": Table("superglue"),
    "backbones": Table(
        listed=("stsb", "copa"),
        methods=("zero-shot", "few-shot", "sft-st", "ppo-st", "sft-seconds"),
        presets=("llama2-7b", "qwen2.5-7b", "mpt-7b"),
    ),
    "tiny": Table(
        listed=(
            "sst2", "cola", "glue/rte", "mrpc", "stsb", "qnli", "mnli",
            "boolq", "cb", "copa", "wic",
        ),
        mixed=("sst2", "cola", "mrpc", "qnli", "glue/rte"),
        encoder=("sst2",),
    ),
}  # fmt: skip
OWN_KEYS = (
    "task", "tasks", "method", "seed", "train.steps", "prompt.shots", "eval.before",
    "model.name_or_path",
)  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A language model: its preset, and the model that takes the place of the preset's own."""

    preset: str
    model: str | None = None

    @property
    def name(self) -> str:
        """What it is called in names of cells and in tables."""
        return self.model.rstrip("/").rsplit("/", 1)[-1] if self.model else self.preset


@dataclass(frozen=True)
class Cell:
    """One run of the grid. `source` is the cell whose trained run is measured on another task,
    `start` the one whose model this one takes."""

    name: str
    method: str
    tasks: tuple[str, ...]
    seed: int
    backbone: Backbone
    needs: tuple[str, ...] = ()
    source: str = ""
    start: str = ""

    @property
    def evaluates(self) -> bool:
        """Whether it only measures a model: such a cell begins anew where it was stopped."""
        return bool(self.source) or (self.method != FORM and not METHODS[self.method].trains)

    @property
    def awaits(self) -> tuple[str, ...]:
        """The cells that must be finished before this one."""
        return (*self.needs, self.start) if self.start else self.needs


@dataclass(frozen=True)
class Grid:
    """Where the grid lives and what all its cells share."""

    folder: Path
    benchmark: str
    budget: int
    overrides: tuple[str, ...] = ()

    def cell_dir(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.folder / "cells" / name

    def config_of(self, cell: Cell) -> Path:
        """The preset's file for the cell's method, as the grid was started with it."""
        return self.folder / "configs" / f"{cell.backbone.preset}{family_of(cell)}.yaml"

    def finished(self, name: str) -> bool:
        """Whether the cell has left its summary, whole."""
        return bool(self.summary(name))

    def summary(self, name: str) -> dict[str, Any]:
        """The summary of a finished cell."""
        return results.read_summary(self.cell_dir(name) / "summary.json")

    def clear(self, cell: Cell) -> None:
        """Delete what a stopped evaluation left, since one never writes over results."""
        for pattern in ("predictions*.jsonl", "report.json", "summary.json"):
            for path in self.cell_dir(cell.name).glob(pattern):
                path.unlink()


# --- the plan -----------------------------------------------------------------------------------


def plan(
    table: Table,
    methods: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    backbones: Sequence[Backbone],
) -> list[Cell]:
    """All cells, seed after seed, so that a grid that was stopped has whole seeds."""
    cells: list[Cell] = []
    for seed in seeds:
        for method in in_running_order(methods):
            for backbone in backbones:
                prefix = f"{backbone.name}-" if len(backbones) > 1 else ""
                cells += _cells(table, method, tasks, seed, backbone, f"{prefix}s{seed}")
    return cells


def with_form(cells: Sequence[Cell], table: Table) -> list[Cell]:
    """The cells, behind one for each backbone that is taught the form of the answers first: where
    its preset has a file for that and the preset's own model is used. Encoders take no part."""
    language = [cell for cell in cells if not cell.source and cell.method != "encoder"]
    backbones = list(dict.fromkeys(cell.backbone for cell in cells))
    forms: dict[Backbone, Cell] = {}
    for backbone in backbones:
        asked = [task for cell in language if cell.backbone == backbone for task in cell.tasks]
        known = [task for task in [*table.tasks, *asked] if not TASKS[task].trained_with]
        learned = tuple(dict.fromkeys(known))
        there = (ASSETS / f"{backbone.preset}_{FORM}.yaml").is_file()
        if asked and there and backbone.model is None:
            name = f"{backbone.name}-{FORM}" if len(backbones) > 1 else FORM
            forms[backbone] = Cell(name, FORM, learned, 0, backbone)
    started = [
        replace(cell, start=forms[cell.backbone].name)
        if cell in language and cell.backbone in forms
        else cell
        for cell in cells
    ]
    return [*forms.values(), *started]


def family_of(cell: Cell) -> str:
    """The end of the name of the cell's config file, behind the preset's."""
    return f"_{FORM}" if cell.method == FORM else METHODS[cell.method].family


def _cells(
    table: Table, method: str, tasks: Sequence[str], seed: int, backbone: Backbone, prefix: str
) -> Iterator[Cell]:
    kind = METHODS[method]

    def name_of(names: Sequence[str], of: str = method) -> str:
        return f"{prefix}-{of}-{'+'.join(name.replace('/', '-') for name in names)}"

    if method == "encoder" and table.encoder is not None:
        tasks = [name for name in tasks if name in table.encoder]
    if not kind.trains:
        for task in tasks:
            yield Cell(name_of([task]), method, (task,), seed, backbone)
        return
    mixed = kind.several and table.mixed is not None
    learned = [name for name in tasks if not TASKS[name].trained_with]
    learned = [name for name in learned if not mixed or name in (table.mixed or ())]
    if kind.several:
        if len(learned) < 2:
            return
        whole = tuple(learned)
        yield Cell(name_of(whole), method, whole, seed, backbone)
    for task in () if kind.several else learned:
        needs = tuple(name_of([task], of) for of in kind.after)
        yield Cell(name_of([task]), method, (task,), seed, backbone, needs=needs)
    for task in tasks:
        home = TASKS[task].trained_with
        if home in learned:
            source = name_of(learned) if kind.several else name_of([home])
            name, needs = name_of([task]), (source,)
            yield Cell(name, method, (task,), seed, backbone, needs=needs, source=source)


# --- the folder -----------------------------------------------------------------------------------


def settle(grid: Grid, cells: Sequence[Cell], backbones: Sequence[Backbone], command: str) -> None:
    """Make the grid's folder, or check that it was started with the same settings; the plan grows
    by the new cells. The presets are copied, so that they stay what they were."""
    folder = grid.folder
    configs = {}
    for backbone in backbones:
        for path in sorted(ASSETS.glob(f"{backbone.preset}*.yaml")):
            if path.stem.partition("_")[0] == backbone.preset:
                configs[path.name] = path.read_text("utf-8")
    now = {
        "format": FORMAT,
        "benchmark": grid.benchmark,
        "models": [[b.name, b.preset, b.model] for b in backbones],
        "budget": grid.budget,
        "overrides": list(grid.overrides),
    }
    before = results.read_json(folder / "grid.json")
    if not before:
        if folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
            raise UserError(f"--output {folder}: holds files of other kinds; name a new folder")
        files.make_folder(folder / "configs")
    else:
        _require_same(folder, before, now)
        for name, text in configs.items():
            held = folder / "configs" / name
            if held.is_file() and yaml.safe_load(held.read_text("utf-8")) != yaml.safe_load(text):
                raise UserError(
                    f"--output {folder}: was started with another version of the preset {name}; "
                    "name a new folder"
                )
    for name, text in configs.items():
        files.atomic_write_text(folder / "configs" / name, text)
    planned = before.get("plan", {})
    planned |= {
        c.name: {
            "method": c.method,
            "tasks": list(c.tasks),
            "seed": c.seed,
            "model": c.backbone.name,
        }
        for c in cells
    }
    commands = before.get("commands", [])
    commands = [*(line for line in commands if line != command), command]
    grown = before | now | {"commands": commands, "plan": planned}
    files.atomic_write_json(folder / "grid.json", grown)


def _require_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise UserError(
                f"--output {folder}: was started with another {key} "
                f"({before.get(key)}, now {value}); give the same, or name a new folder"
            )

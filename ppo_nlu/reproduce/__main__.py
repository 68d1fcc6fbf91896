"""The paper's grids by one command: `python -m ppo_nlu.reproduce glue|superglue|backbones|tiny`.

Each cell of a grid (see `grid`) is a process of its own, `python -m ppo_nlu.train` or `python -m
ppo_nlu.evaluate`, whose run folder is kept under cells/. A finished cell is never run again, an
unfinished one is resumed, a failed one does not stop the others: the same command goes on where it
was stopped. At the end `ppo_nlu.report` draws the tables. Equal labels: a training cell sees
`--budget` labelled rows for each of its tasks. A first try on two tasks, of some minutes:
`tiny --tasks sst2 mrpc --seeds 0 --budget 64 eval.limit=20`.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppo_nlu.config import load_config
from ppo_nlu.errors import UserError
from ppo_nlu.reproduce import report, results
from ppo_nlu.reproduce.grid import (
    ASSETS,
    BUDGETS,
    GRIDS,
    OWN_KEYS,
    Backbone,
    Grid,
    plan,
    settle,
    with_form,
)
from ppo_nlu.reproduce.methods import METHODS, in_running_order
from ppo_nlu.reproduce.runner import Runner, cores, locked
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.storage import files
from ppo_nlu.tasks import get_task


def parse(argv: list[str] | None) -> Any:
    """The arguments; what looks like key=value in a list of names is an override."""
    parser = arguments.Parser("python -m ppo_nlu.reproduce", description=__doc__)
    parser.add_argument("benchmark", choices=list(GRIDS))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every cell")
    parser.add_argument("--model", nargs="+", default=[], help="in place of the preset's own")
    parser.add_argument("--preset", nargs="+", default=[], metavar="NAME", help=", ".join(BUDGETS))
    methods = ", ".join(in_running_order(METHODS))
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help=methods)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="N", help="default: 0 1 2")
    parser.add_argument("--budget", type=int, metavar="LABELS", help="labelled rows of each task")
    parser.add_argument("--jobs", type=int, help="cells side by side; default: the CPU cores")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/reproduce-NAME")
    parser.add_argument(
        "--report-only", action="store_true", help="write the report of what is there"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the cells and stop")
    args = parser.parse_intermixed_args(argv)
    for name in ("model", "preset", "methods", "tasks", "seeds"):
        given = getattr(args, name)
        args.overrides += [text for text in given if "=" in text]
        names = [part for text in given if "=" not in text for part in text.split(",") if part]
        setattr(args, name, names)
    return args


def backbones_of(args: Any) -> list[Backbone]:
    """The models of a grid: one, or several for `backbones`."""
    presets = args.preset or list(GRIDS[args.benchmark].presets)
    for name in presets:
        if name not in BUDGETS:
            raise UserError(f"--preset: unknown preset {name!r}; choose from {', '.join(BUDGETS)}")
    if args.model and len(presets) > 1:
        raise UserError("--model: give one --preset with it, whose settings the models take")
    if args.model and not args.preset and args.benchmark in ("glue", "superglue"):
        raise UserError("--model: give --preset with it, whose settings the model takes")
    found = [Backbone(presets[0], model) for model in args.model] or [Backbone(p) for p in presets]
    if len(found) > 1 and args.benchmark != "backbones":
        raise UserError(f"--preset, --model: {args.benchmark} takes one; see `backbones`")
    return found


def check_overrides(overrides: Sequence[str]) -> None:
    """What the grid itself sets cannot be overridden."""
    instead = {"seed": "--seeds", "train.steps": "--budget", "model.name_or_path": "--model"}
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in OWN_KEYS:
            hint = instead.get(key, "--tasks" if key.startswith("task") else "--methods")
            raise UserError(f"{text}: the grid sets {key} itself; use {hint}")


def whole(texts: Sequence[str]) -> list[int]:
    """The seeds as numbers."""
    try:
        seeds = [int(text) for text in texts]
    except ValueError:
        raise UserError(f"--seeds: {' '.join(texts)} are not whole numbers") from None
    if seeds and min(seeds) < 0:
        raise UserError(f"--seeds: {min(seeds)} is below 0; give numbers from 0")
    return seeds


def main(argv: list[str] | None = None) -> int:
    """The program; returns the exit code."""
    args = parse(argv)
    table = GRIDS[args.benchmark]
    folder = args.output or Path("runs") / f"reproduce-{args.benchmark}"
    arguments.require_place("--output", folder)
    if args.report_only:
        return report.write(folder, folder)
    backbones = backbones_of(args)
    methods = args.methods or list(table.methods)
    for name in methods:
        if name not in METHODS:
            known = ", ".join(in_running_order(METHODS))
            raise UserError(f"--methods: unknown method {name!r}; choose from {known}")
    tasks = [get_task(name).name for name in args.tasks] or list(table.tasks)
    seeds = whole(args.seeds) or [0, 1, 2]
    check_overrides(args.overrides)
    budget = args.budget if args.budget is not None else BUDGETS[backbones[0].preset]
    cuda = torch.cuda.is_available()
    jobs = args.jobs if args.jobs is not None else 1 if cuda else cores()
    for flag, value in (("--budget", budget), ("--jobs", jobs)):
        if value < 1:
            raise UserError(f"{flag}: {value} is less than 1")
    grid = Grid(folder, args.benchmark, budget, tuple(args.overrides))
    cells = with_form(plan(table, methods, tasks, seeds, backbones), table)
    if not cells:
        raise UserError("--methods, --tasks: no cell is left; a mixture needs two tasks or more")
    if args.dry_run:
        print("\n".join(cell.name for cell in cells))
        return 0
    for path in {ASSETS / grid.config_of(cell).name for cell in cells}:
        load_config(path, grid.overrides)  # a mistake in an override ends the grid before it starts
    command = shlex.join(["python", "-m", "ppo_nlu.reproduce", *(argv or sys.argv[1:])])
    with locked(files.make_folder(folder), keep=False):  # of two grids one makes the folder its own
        settle(grid, cells, backbones, command)
    print(f"{len(cells)} cells, {jobs} side by side, in {folder}", flush=True)
    runner = Runner(grid, cells, jobs)
    code = runner.run()
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        results.write_rows(results.load(folder), folder)
        print(f"stopped, finished cells are kept; go on with\n  {command}")
        return code
    report.write(folder, folder)
    if runner.failed_now:
        print(f"{runner.failed_now} cells failed: see {folder / 'failures.json'}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(cli.run(main))

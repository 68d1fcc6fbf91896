"""Checkpoints of a run: saving it, and going on from the newest that can be read."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_nlu.config import Config, diff, load_config
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import checkpoint, optimizer_state, profiling, runlog
from ppo_nlu.storage import files, sealed
from ppo_nlu.training import provenance
from ppo_nlu.training.run import Run


def save(run: Run) -> None:
    """Everything that a resumed run needs to go on to the last bit."""
    with profiling.phase("io"):
        files.sync_file(run.folder / runlog.METRICS)  # never behind its checkpoint
        files.sync_folder(run.folder)
        tensors, state = optimizer_state.flatten_optimizer(run.method.optimizer)
        checkpoint.save(
            run.folder,
            run.step,
            run.method.weights() | {"optimizer": tensors},
            {
                "step": run.step,
                "learner": run.method.state(),  # the name that earlier checkpoints have
                "bad_in_a_row": run.bad_in_a_row,
                "totals": run.totals | {"wall_s": time.perf_counter() - run.started},
                "made_of": run.made_of,
                "pending": run.pending,
                "optimizer": state,
            },
        )
        run.saved = run.step
        checkpoint.prune(run.folder, run.cfg.train.keep_checkpoints)


def check_same(cfg: Config, folder: Path) -> None:
    """A UserError where the run was started with another config; a key that may differ, and does,
    is reported."""
    stored = folder / "config.yaml"
    before = load_config(stored)
    changed = diff(cfg, before, provenance.MAY_CHANGE)
    if changed:
        raise UserError(
            f"--resume {folder}: the run was started with another config (differs in "
            f"{', '.join(changed[:5])}); resume with {shlex.quote(str(stored))}, or start a new "
            "run with --output"
        )
    if told := diff(cfg, before):
        print(f"resumed with another {', '.join(told)}; the run folder keeps its config.yaml")


def restore(run: Run) -> None:
    """Go on from the newest checkpoint that can be read, or from the start where there is none.

    A damaged one is reported and renamed. Where all are damaged, nothing is changed.
    """
    checkpoint.require_readable(run.folder)
    lines = len(runlog.read_metrics(run.folder))
    checkpoint.clean(run.folder)
    damaged: dict[Path, sealed.Damaged] = {}
    told: list[str] = []
    for path in checkpoint.candidates(run.folder):
        try:
            told = _take_back(run, path)
            break
        except sealed.Damaged as error:
            damaged[path] = error
    else:
        if damaged:
            raise UserError(
                f"--resume {run.folder}: none of its {len(damaged)} checkpoint(s) can be read "
                f"({next(iter(damaged.values()))}); copy them again, or start a new run with "
                "--output"
            )
        if lines:
            told = [
                f"{run.folder}: no checkpoint is there; {lines} line(s) of metrics are dropped, "
                "the run begins at the start"
            ]
    for path, damage in damaged.items():
        aside = checkpoint.set_aside(path)
        told.append(f"{damage}; it is kept as {aside.name}" if aside else str(damage))
    for line in told + _checked_best(run.folder):
        print(f"warning: {line}", file=sys.stderr)


def _take_back(run: Run, path: Path) -> list[str]:
    """Put what a checkpoint holds into the run, and return what to tell of it; `Damaged` where it
    does not fit."""
    tensors, state = checkpoint.load(path)
    try:
        _require_kinds(run, state)
        told = provenance.compare(run.folder, state["made_of"], run.made_of)
        run.method.restore(tensors, str(path))
        run.method.set_state(state["learner"])
        optimizer_state.restore_optimizer(
            run.method.optimizer, tensors["optimizer"], state["optimizer"]
        )
        run.pending, run.bad_in_a_row = state["pending"], int(state["bad_in_a_row"])
        totals = {name: value + 0 for name, value in state["totals"].items()}
        wall = totals.pop("wall_s")
        run.totals, run.started = totals, run.started - wall
        run.step = run.saved = checkpoint.step_of(path)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise sealed.Damaged(
            f"{path}: does not hold what a checkpoint of this run holds ({error!r})"
        ) from error
    return told


def _require_kinds(run: Run, state: Mapping[str, Any]) -> None:
    """KeyError or TypeError where an entry of the state is not of the kind that `save` writes."""
    kinds = {"made_of": dict, "pending": dict | None, "totals": dict, "bad_in_a_row": int}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state[key], kind)]:
        raise TypeError(f"{wrong[0]} is {state[wrong[0]]!r:.40}")
    totals = state["totals"]
    for name in {*run.totals, "wall_s", *totals}:
        if type(totals[name]) not in (int, float) or not 0 <= totals[name] < math.inf:
            raise TypeError(f"{name} is {totals[name]!r:.40}")


def _checked_best(folder: Path) -> list[str]:
    """What to tell of a damaged `best`, which is renamed; a later evaluation writes another."""
    best = checkpoint.best(folder)
    if best is None:
        return []
    try:
        checkpoint.load(best)
    except sealed.Damaged as error:
        checkpoint.set_aside(best)
        return [f"{error}; the best is now looked for among the coming steps"]
    return []

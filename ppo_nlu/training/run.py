"""A run that trains, and how it begins: rows are read, the model loaded, the folder made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_nlu import data
from ppo_nlu.answering import answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.answering.stored_config import resume_command
from ppo_nlu.config import Config, dump
from ppo_nlu.config.idle_keys import idle_keys, reads
from ppo_nlu.data import mixture
from ppo_nlu.errors import UserError
from ppo_nlu.methods.base import Method
from ppo_nlu.methods.registry import METHODS
from ppo_nlu.runtime import cli, run_folder, streams
from ppo_nlu.tasks import REWARD_KINDS, Example, TaskSpec, rewards
from ppo_nlu.tasks.custom import specs_of
from ppo_nlu.training import provenance

PLANNED_BY = 16  # rows of the first step from which the memory plan judges the prompts


@dataclass
class Run:
    """Everything that lives while a model is trained; rows by the name of their task."""

    cfg: Config
    specs: dict[str, TaskSpec]
    folder: Path
    method: Method
    learned_from: dict[str, data.Dataset]
    held: dict[str, data.Dataset]  # to evaluate on
    made_of: dict[str, Any]  # fingerprints; see `provenance`
    started: float = field(default_factory=time.perf_counter)  # of the program
    step: int = 0
    saved: int = 0  # the step of the newest checkpoint
    pending: dict[str, Any] | None = None  # metrics of a step whose evaluation a stop cut short
    bad_in_a_row: int = 0
    totals: dict[str, float] = field(
        default_factory=lambda: {"samples": 0, "train_s": 0.0, "truncated": 0, "bad_steps": 0}
    )

    @property
    def train_rows(self) -> dict[str, list[Example]]:
        """The rows to train on."""
        return rows_of(self.learned_from)

    @property
    def source(self) -> str:
        """Where these were found: official files, bundled ones, the user's own."""
        return "+".join(dict.fromkeys(found.source for found in self.learned_from.values()))


def rows_of(found: Mapping[str, data.Dataset]) -> dict[str, list[Example]]:
    """The rows of each task, without what is said of them."""
    return {name: rows.examples for name, rows in found.items()}


def start(cfg: Config, folder: Path | None, output: Path | None, work: ExitStack) -> Run:
    """Read the data, load the model, make the run folder (or take that of a resumed run); `work`
    keeps the lock of a new one."""
    specs = specs_of(cfg)
    learned_from, held = read_rows(cfg, specs)
    own = _own_rewards(cfg, specs)
    for reward in own:
        rewards.load(reward)
    method = load_method(cfg, specs)
    train_rows, held_rows = rows_of(learned_from), rows_of(held)
    tell_cut(method, train_rows)
    plan_memory(method, mixture.batch(train_rows, cfg.mixture, PLANNED_BY, 0, cfg.seed))
    made_of = provenance.of_run(cfg, train_rows, held_rows, method.model.device, own)
    if folder is None:
        lock = run_folder.claim(output or run_folder.new_run_dir(), dump(cfg))
        folder = work.enter_context(lock).folder
        work.enter_context(cli.works_in(folder, resume_command(folder, cfg)))
    print(f"run folder: {folder}", flush=True)
    return Run(
        cfg=cfg,
        specs=specs,
        folder=folder,
        method=method,
        learned_from=learned_from,
        held=held,
        made_of=made_of,
    )


def read_rows(
    cfg: Config, specs: Mapping[str, TaskSpec]
) -> tuple[dict[str, data.Dataset], dict[str, data.Dataset]]:
    """Each task's rows to train on, and those to evaluate on."""
    seen = reads(cfg, "data.exclude_pretraining_labels") and data.saw_labels(cfg.model.name_or_path)
    learned_from, held = {}, {}
    for name, spec in specs.items():
        learned_from[name] = data.train_examples(spec, cfg.data, seen)
        held[name] = answer.held_out(spec, cfg)
        if any(row.label is None for row in held[name].examples):
            raise UserError(f"eval.split: {cfg.eval.split} has no labels to measure by; use dev")
        print(
            f"data: {learned_from[name].note}; "
            f"{len(learned_from[name].examples):,} to train on, "
            f"{len(held[name].examples):,} to evaluate"
        )
    return learned_from, held


def _own_rewards(cfg: Config, specs: Mapping[str, TaskSpec]) -> list[str]:
    """The rewards of the user's own that the method learns from."""
    used = [spec.reward for spec in specs.values()] if reads(cfg, "reward") else []
    return [reward for reward in used if reward not in REWARD_KINDS]


def load_method(cfg: Config, specs: Mapping[str, TaskSpec]) -> Method:
    """The method with its model, which can answer every task."""
    method = METHODS[cfg.method](cfg, specs)
    answerer = answerer_of(method.model, cfg, method.shots)
    for spec in specs.values():
        answerer.require_fit(spec)
    place = f"{cfg.model.name_or_path} on {method.model.device}"
    print(f"model: {', '.join(filter(None, (place, method.path())))}")
    return method


def tell_cut(method: Method, rows: Mapping[str, list[Example]]) -> None:
    """Say about how many rows to train on are too long to be read whole."""
    for name, found in rows.items():
        if count := data.about_too_long(found, method.cuts):
            streams.tell(
                f"warning: {name}: about {count:,} of {len(found):,} rows to train on are longer "
                f"than {method.limit()}; the end of their longest text is cut"
            )


def plan_memory(method: Method, rows: list[Example]) -> None:
    """Say what the run will need, judged by these rows; on a GPU the method keeps to the plan."""
    for line in method.plan_memory(rows):
        print(line)


def tell_idle(cfg: Config, said: Mapping[str, object]) -> None:
    """Say which of the user's keys this run does not read."""
    seen = data.saw_labels(cfg.model.name_or_path)
    for key, why in idle_keys(cfg, said, seen):
        streams.tell(f"note: {key} has no effect {why}")

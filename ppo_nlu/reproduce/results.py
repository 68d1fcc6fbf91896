"""What the finished cells of a grid say: scores by method, task and seed, read and as rows.

Means and their spread are in `comparisons`; how all is shown is in `report`.
"""

from __future__ import annotations

import csv
import io
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.reproduce.methods import METHODS
from ppo_nlu.storage import files, sealed
from ppo_nlu.tasks import TASKS

DECODES = {"sample": "sampled", "greedy": "greedy", "score": "scored"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """What one cell says of one task."""

    cell: str
    method: str
    model: str
    task: str
    seed: int
    entry: Json  # the task's part of summary.json
    summary: Json
    started: Json  # where and with what the cell ran

    def report(self, decode: str) -> Json | None:
        """The report under one way of decoding; None where there is none."""
        found = self.entry.get("reports", {}).get(decode)
        return found if isinstance(found, dict) else None

    def value(self, decode: str) -> float | None:
        """The task's one number, the mean of its metrics, in percent."""
        found = self.report(decode)
        return None if found is None else 100 * float(found["score"])

    def metric(self, decode: str, name: str) -> float | None:
        """One metric in percent."""
        value = (self.report(decode) or {}).get("metrics", {}).get(name)
        return None if value is None else 100 * float(value)

    @property
    def note(self) -> str:
        """The note on the data, without folders of this machine."""
        taught = f"trained on {self.entry.get('train_note')}" if self.partly_taught else None
        parts = (self.entry.get("note"), taught, self.started.get("note"))
        return short_paths("; ".join(str(part) for part in parts if part))

    @property
    def partly_taught(self) -> bool:
        """Whether it was trained on a part of the official training set."""
        return bool(self.entry.get("train_partial"))

    @property
    def partial(self) -> bool:
        """Whether it was measured or trained on a part of an official set."""
        return bool(self.entry.get("partial")) or self.partly_taught


@dataclass(frozen=True)
class Results:
    """All of a grid's folder."""

    folder: Path
    grid: Json
    scores: list[Score]
    summaries: dict[str, tuple[Json, Json]]  # cell: (its plan, its summary)
    failures: Json
    missing: list[str]  # planned, neither finished nor failed
    started: Json

    def pick(
        self, method: str | None = None, task: str | None = None, model: str | None = None
    ) -> list[Score]:
        """The scores of a method, task and model, in the order of seeds."""
        found = [
            row
            for row in self.scores
            if method in (None, row.method)
            and task in (None, row.task)
            and model in (None, row.model)
        ]
        return sorted(found, key=lambda row: row.seed)

    def methods(self) -> list[str]:
        """The methods that have a score, in the order of the tables."""
        return [name for name in METHODS if any(row.method == name for row in self.scores)]

    def tasks(self) -> list[str]:
        """The tasks that have a score, in the order of the task table."""
        names = {row.task for row in self.scores}
        return [name for name in TASKS if name in names] + sorted(names - set(TASKS))

    def asked(self) -> set[str]:
        """The tasks that the grid was asked for; what only prepares it may take others."""
        plan = self.grid.get("plan", {}).values()
        return {task for cell in plan if cell["method"] in METHODS for task in cell["tasks"]}

    def preparations(self) -> list[tuple[Json, Json]]:
        """Cell and summary of what came before all methods: the teaching of a base's form."""
        return [pair for pair in self.summaries.values() if pair[0]["method"] not in METHODS]

    def models(self) -> list[str]:
        """The language models, in their order."""
        return list(dict.fromkeys(row.model for row in self.scores if row.method != "encoder"))


def load(folder: Path) -> Results:
    """Everything in the folder of a grid; a UserError where it is none."""
    grid = read_json(folder / "grid.json")
    if not grid:
        raise UserError(f"{folder}: no grid.json; name the folder that ppo_nlu.reproduce wrote")
    started, failures = read_table(folder / "cells.json"), read_table(folder / "failures.json")
    plan = grid.get("plan", {})
    keys = {"method", "model", "tasks", "seed"}
    if not isinstance(plan, dict) or not all(
        isinstance(cell, dict) and keys <= cell.keys() for cell in plan.values()
    ):
        raise UserError(f"{folder}/grid.json: its plan is damaged; start the grid in a new folder")
    scores, summaries = [], {}
    for name, cell in plan.items():
        summary = read_summary(folder / "cells" / name / "summary.json")
        if not summary:
            continue
        summaries[name] = (cell, summary)
        if cell["method"] not in METHODS:  # what only prepares the others
            continue
        for task, entry in summary.get("tasks", {}).items():
            scores.append(
                Score(
                    cell=name,
                    method=cell["method"],
                    model=cell["model"],
                    task=task,
                    seed=cell["seed"],
                    entry=entry,
                    summary=summary,
                    started=started.get(name, {}),
                )
            )
    failures = {k: v for k, v in failures.items() if k not in summaries}
    missing = [name for name in plan if name not in summaries and name not in failures]
    return Results(
        folder=folder,
        grid=grid,
        scores=scores,
        summaries=summaries,
        failures=failures,
        missing=missing,
        started=started,
    )


def read_json(path: Path) -> Json:
    """The object in a JSON file; empty where it is missing or torn."""
    try:
        return sealed.read_object(path)
    except (OSError, ValueError):
        return {}


def read_table(path: Path) -> dict[str, Json]:
    """The objects in an object of a JSON file, by their names; what is no object is left out."""
    return {name: row for name, row in read_json(path).items() if isinstance(row, dict)}


def read_summary(path: Path) -> Json:
    """A summary.json; empty where it is missing or damaged, as if its run had not finished."""
    found = read_json(path)
    tasks = found.get("tasks", {})
    whole = isinstance(tasks, dict) and all(isinstance(entry, dict) for entry in tasks.values())
    return found if whole else {}


def short_paths(text: str) -> str:
    """Long absolute paths cut to their last two parts."""
    return re.sub(r"(?<!\S)/(?:[^\s;,()/]+/)+([^\s;,()/]+/[^\s;,()/]+)", r".../\1", text)


# --- rows ---------------------------------------------------------------------------------------


def rows(results: Results) -> list[dict[str, Any]]:
    """One flat row for each (cell, task): what was measured, where, and of what."""
    found = []
    for score in results.scores:
        said, summary = score.started, score.summary
        reports = {name: score.report(name) for name in DECODES}
        values = {
            name: {} if report is None else report["metrics"] for name, report in reports.items()
        }
        found.append(
            {
                "commit": said.get("commit", ""),
                "torch": said.get("torch", ""),
                "transformers": said.get("transformers", ""),
                "device": said.get("device", ""),
                "threads": said.get("threads", ""),
                "jobs": said.get("jobs", ""),
                "method": score.method,
                "model": score.model if score.method != "encoder" else summary.get("model", ""),
                "task": score.task,
                "seed": score.seed,
                "rows": score.entry.get("rows", ""),
                **{
                    name: "" if report is None else f"{report['score']:.4f}"
                    for name, report in reports.items()
                },
                "unparsed": _number(_unparsed(score)),
                "metrics": "; ".join(
                    f"{DECODES[decode]} {name} {value:.4f}"
                    for decode, table in values.items()
                    for name, value in table.items()
                ),
                "train_labels": summary.get("train_labels", 0),
                "train_steps": summary.get("train_steps", ""),
                "train_s": _number(summary.get("train_s"), 1),
                "wall_s": _number(summary.get("wall_s"), 1),
                "partial": "yes" if score.partial else "no",
                "note": score.note,
            }
        )
    return found


def _unparsed(score: Score) -> float | None:
    report = score.report("sample") or score.report("greedy") or score.report("score")
    return None if report is None else float(report.get("unparsed", 0.0))


def _number(value: Any, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else ""


def write_rows(results: Results, output: Path) -> None:
    """Write rows.csv whole."""
    table = rows(results)
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    files.make_folder(output)
    files.atomic_write_text(output / "rows.csv", text.getvalue())


def unparsed_rates(results: Results) -> dict[str, dict[str, float]]:
    """{method: {task: mean rate of sampled answers that name none, in percent}}."""
    table: dict[str, dict[str, float]] = {}
    for method in results.methods():
        for task in results.tasks():
            found = [_unparsed(row) for row in results.pick(method, task)]
            known = [rate for rate in found if rate is not None]
            if known:
                table.setdefault(method, {})[task] = 100 * statistics.fmean(known)
    return table

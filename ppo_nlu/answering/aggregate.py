"""From answers to figures: the report of a task, its headline, and the summary of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ppo_nlu import data
from ppo_nlu.answering.answer import DECODES, Answer
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TaskSpec, metrics


def report(
    spec: TaskSpec, answers: Sequence[Answer], resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The task's metrics, histogram and unparsed rate; with `resamples` the interval of the mean
    of the metrics."""
    if missing := [row.example.id for row in answers if row.example.label is None]:
        raise UserError(f"eval.split: row {missing[0]} has no label; use --split dev")
    return metrics.report(
        spec,
        [row.example for row in answers],
        [row.prediction for row in answers],
        [row.probabilities for row in answers],
        resamples,
        seed,
    )


def headline(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The task's score under each decoding, and the rate of sampled answers that hold none."""
    sampled = reports.get("sample") or next(iter(reports.values()))
    row = {name: reports[name]["score"] if name in reports else None for name in DECODES}
    return row | {"unparsed": sampled["unparsed"]}


def _main(reports: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the greedy answers, or else the first."""
    return reports.get("greedy") or next(iter(reports.values()))


def mean_headline(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean over tasks; None where a task lacks the number."""
    means: dict[str, float | None] = {}
    for name in (*DECODES, "unparsed"):
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if len(known) == len(values) else None
    return means


@dataclass
class Measured:
    """One task's rows, and the answers to them by way of decoding; `before`: before training;
    `base`: those of the base below the adapter that training began from."""

    spec: TaskSpec
    rows: data.Dataset
    after: dict[str, list[Answer]]
    before: dict[str, list[Answer]] | None = None
    resamples: int = 0
    seed: int = 0
    base: dict[str, list[Answer]] | None = None

    @cached_property
    def reports(self) -> dict[str, dict[str, Any]]:
        """The report of each way of decoding, with its interval."""
        return {
            decode: report(self.spec, rows, self.resamples, self.seed)
            for decode, rows in self.after.items()
        }

    def entry(self) -> dict[str, Any]:
        """The task's part of a summary.json."""
        measured = {
            "base": self._reports_of(self.base),
            "before": self._reports_of(self.before),
            "after": self.reports,
        }
        main = _main(self.reports)
        return {
            "title": self.spec.title,
            "data": self.rows.source,
            "note": self.rows.note,
            "partial": self.rows.partial,
            "rows": len(self.rows.examples),
            **{when: found and headline(found) for when, found in measured.items()},
            "macro_f1": {
                when: found and _main(found).get("macro_f1") for when, found in measured.items()
            },
            "per_class": main.get("per_class"),
            "reports": self.reports,
        }

    def _reports_of(
        self, found: Mapping[str, Sequence[Answer]] | None
    ) -> dict[str, dict[str, Any]] | None:
        if not found:
            return None
        return {decode: report(self.spec, rows) for decode, rows in found.items()}


def summarise(cfg: Config, measured: Sequence[Measured]) -> dict[str, Any]:
    """What a summary.json says of the evaluation; over several tasks `before` and `after` are
    means of the tasks' scores."""
    entries = {one.spec.name: one.entry() for one in measured}
    base = [entry["base"] for entry in entries.values() if entry["base"]]
    before = [entry["before"] for entry in entries.values() if entry["before"]]
    summary: dict[str, Any] = {
        "task": "+".join(entries),
        "method": cfg.method,
        "model": cfg.model.name_or_path,
        "data": "+".join(dict.fromkeys(one.rows.source for one in measured)),
        "seed": cfg.seed,
        "eval_split": cfg.eval.split,
        "eval_rows": sum(entry["rows"] for entry in entries.values()),
        "base": mean_headline(base) if base else None,
        "before": mean_headline(before) if before else None,
        "after": mean_headline([entry["after"] for entry in entries.values()]),
        "tasks": entries,
    }
    if len(entries) == 1:
        summary["reports"] = next(iter(entries.values()))["reports"]
    scored = [next(reversed(one.after.values())) for one in measured]
    summary["truncated_eval_prompts"] = sum(row.cut for rows in scored for row in rows)
    summary["dropped_eval_shots"] = sum(row.dropped for rows in scored for row in rows)
    return summary

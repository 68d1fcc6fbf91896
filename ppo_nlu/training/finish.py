"""The end of a run: base and tuned model are measured, and what was gained is written."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from ppo_nlu.answering import aggregate, answer, baselines, predictions, warn
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.config.idle_keys import reads
from ppo_nlu.runtime import profiling
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.runtime.summary import peak_memory_mb
from ppo_nlu.storage import files
from ppo_nlu.tasks import rewards
from ppo_nlu.training.run import Run
from ppo_nlu.training.tables import show, start_name

Answers = dict[str, dict[str, list[Answer]]]  # by task, then by way of decoding


def finish(run: Run, stop: StopRequest) -> bool:
    """Write the adapter, measure the model before and after training, draw the curves, print the
    table; False where a stop came before the evaluation was over."""
    with profiling.phase("io"):
        run.method.save(run.folder)
    after = measure(run, "tuned", stop)
    cfg = run.cfg
    before = measure_in(run.method.start() if cfg.eval.before else None, run, start_name(run), stop)
    asked = cfg.init_from and cfg.eval.base
    base = measure_in(run.method.base() if asked else None, run, "base", stop)
    if stop:
        return False
    with profiling.phase("io"):
        write_answers(run, after)
    summary = summarise(run, before, after, base)
    files.atomic_write_json(run.folder / "summary.json", summary)  # baselines may take long
    compare(run, summary)
    summary["wall_s"] = time.perf_counter() - run.started
    files.atomic_write_json(run.folder / "summary.json", summary)
    show(run, summary)
    return True


def measure_in(
    context: AbstractContextManager[Any] | None, run: Run, what: str, stop: StopRequest
) -> Answers:
    """The answers inside of a context that makes the model another one; none without it."""
    if context is None or stop:
        return {}
    with context:
        return measure(run, what, stop)


def measure(run: Run, what: str, stop: StopRequest) -> Answers:
    """The model's answers to each task's rows; fewer where a stop came."""
    answerer, found = answerer_of(run.method.model, run.cfg, run.method.shots), {}
    with profiling.phase("evaluation"):
        for name, spec in run.specs.items():
            title = f"{what}: {spec.title}" if run.cfg.log.progress else None
            rows = run.held[name].examples
            found[name] = answer.ask(answerer, spec, rows, title=title, stop=lambda: bool(stop))
    return found


def write_answers(run: Run, found: Answers) -> None:
    """The predictions.jsonl: greedy answers, with the probabilities of scored ones."""
    rows = [row for answers in found.values() for row in answer.joined(answers)]
    predictions.write_predictions(run.folder / "predictions.jsonl", rows, named=len(found) > 1)


def summarise(run: Run, before: Answers, after: Answers, base: Answers) -> dict[str, Any]:
    """What the summary.json says."""
    cfg, totals = run.cfg, run.totals
    measured = [
        aggregate.Measured(
            spec=spec,
            rows=run.held[name],
            after=after[name],
            before=before.get(name),
            resamples=cfg.eval.bootstrap,
            seed=cfg.seed,
            base=base.get(name),
        )
        for name, spec in run.specs.items()
    ]
    summary = aggregate.summarise(cfg, measured) | {
        "data": run.source,
        "reward_before": mean_reward(run, before) if before and reads(cfg, "reward") else None,
        "train_samples": int(totals["samples"]),
        "train_labels": int(totals["samples"]) // run.method.samples,
        "train_steps": run.step,
        "first_step_s": totals.get("first_step_s"),
        "train_s": totals["train_s"],
        "samples_per_s": totals["samples"] / max(totals["train_s"], 1e-9),
        "truncated_prompts": int(totals["truncated"]),
        "bad_steps": int(totals["bad_steps"]),
        "peak_memory_mb": peak_memory_mb(run.method.model.device),
    }
    for name, rows in run.learned_from.items():
        summary["tasks"][name] |= {"train_note": rows.note, "train_partial": rows.partial}
    return summary


def compare(run: Run, summary: dict[str, Any]) -> None:
    """Put baselines and warnings beside the figures of each task in the summary, whose peak of
    memory was taken before."""
    for name, entry in summary["tasks"].items():
        entry["baselines"] = {}
        if run.cfg.eval.baselines:
            train, held = run.train_rows[name], run.held[name].examples
            entry["baselines"] = baselines.measure(run.specs[name], train, held)
        entry["warnings"] = warn.of_task(entry, by_reward=reads(run.cfg, "reward"))


def mean_reward(run: Run, found: Answers) -> float:
    """What these sampled answers would earn, KL left out: where the curve starts."""
    earned = [
        rewards.reward(
            run.specs[name], row.example, row.prediction, row.response, run.cfg.reward.scale
        )
        for name, answers in found.items()
        for row in answers["sample"]
    ]
    return sum(earned) / len(earned)

"""The end of a run: base and tuned model are measured, and what was gained is written and shown."""

from __future__ import annotations

import time
from typing import Any

from ppo_nlu.answering import aggregate, answer, predictions
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.config.idle_keys import reads
from ppo_nlu.runtime import profiling
from ppo_nlu.runtime.curves import draw_curves
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.runtime.summary import peak_memory_mb, results_table
from ppo_nlu.storage import files
from ppo_nlu.tasks import rewards
from ppo_nlu.training.run import Run

Answers = dict[str, dict[str, list[Answer]]]  # by task, then by way of decoding


def finish(run: Run, stop: StopRequest) -> bool:
    """Write the adapter, evaluate base and tuned model, draw the curves, print the table; False
    where a stop came before the evaluation was over."""
    with profiling.phase("io"):
        run.method.save(run.folder)
    after = measure(run, "tuned", stop)
    untrained = run.method.base() if run.cfg.eval.before and not stop else None
    before: Answers = {}
    if untrained is not None:
        with untrained:
            before = measure(run, "base", stop)
    if stop:
        return False
    with profiling.phase("io"):
        write_answers(run, after)
    summary = summarise(run, before, after)
    files.atomic_write_json(run.folder / "summary.json", summary)
    show(run, summary)
    return True


def measure(run: Run, what: str, stop: StopRequest) -> Answers:
    """The model's answers to each task's rows; fewer where a stop came."""
    answerer, found = answerer_of(run.method.model, run.cfg), {}
    with profiling.phase("evaluation"):
        for name, spec in run.specs.items():
            title = f"{what}: {spec.title}" if run.cfg.log.progress else None
            rows = run.held[name].examples
            found[name] = answer.ask(answerer, spec, rows, None, title, lambda: bool(stop))
    return found


def write_answers(run: Run, found: Answers) -> None:
    """The predictions.jsonl: greedy answers, with the probabilities of scored ones."""
    rows = [row for answers in found.values() for row in answer.joined(answers)]
    predictions.write_predictions(run.folder / "predictions.jsonl", rows, named=len(found) > 1)


def summarise(run: Run, before: Answers, after: Answers) -> dict[str, Any]:
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
        "wall_s": time.perf_counter() - run.started,
        "peak_memory_mb": peak_memory_mb(run.method.model.device),
    }
    for name, rows in run.learned_from.items():
        summary["tasks"][name] |= {"train_note": rows.note, "train_partial": rows.partial}
    return summary


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


def show(run: Run, summary: dict[str, Any]) -> None:
    """Print the tables of what was gained, and where everything is; draw the curves."""
    titles = []
    for name, entry in summary["tasks"].items():
        title = entry["title"]
        titles.append(f"bundled data, not {title}" if run.source == "bundled" else title)
        figures = " and ".join(run.specs[name].metrics)
        print(
            f"\n{titles[-1]}, {run.cfg.eval.split}: {figures} in percent, "
            f"{entry['rows']:,} rows, seed {run.cfg.seed}"
        )
        print(results_table(entry["before"], entry["after"]))
    if len(titles) > 1:
        print("\nMean over the tasks")
        print(results_table(summary["before"], summary["after"]))
    print(
        f"{summary['train_samples']:,} {run.method.unit} in {summary['train_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} a second), {summary['wall_s']:.0f} s in all, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    )
    if cut := cut_prompts(summary):
        print(cut)
    print(f"run folder: {run.folder}")
    if run.cfg.log.plot:
        draw(run, summary, f"{run.method.title} on {', '.join(titles)}, seed {run.cfg.seed}")


def cut_prompts(summary: dict[str, Any]) -> str:
    """A line on prompts that were cut; empty where none was."""
    trained, measured = summary["truncated_prompts"], summary["truncated_eval_prompts"]
    said = (
        f"prompts cut to fit: {trained:,} of {summary['train_labels']:,} in training, "
        f"{measured:,} of {summary['eval_rows']:,} in the evaluation"
    )
    return said if trained or measured else ""


def draw(run: Run, summary: dict[str, Any], title: str) -> None:
    """The curves.png, and a line that says where it is."""
    start: dict[str, float | None] = {"reward": summary["reward_before"]}
    (first, *others) = run.specs.values()
    if summary["before"] and not others and len(first.metrics) == 1:
        start[first.metrics[0]] = summary["before"]["greedy"]
    drawn = draw_curves(run.folder, title, before=start)
    hint = "not drawn, since matplotlib is missing: pip install -e '.[plot]'"
    print(f"{'reward curve' if reads(run.cfg, 'reward') else 'curves'}: {drawn or hint}")

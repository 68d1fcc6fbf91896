"""The end of a run: base and tuned model are measured, and what was gained is written and shown."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from ppo_nlu.answering import aggregate, answer, baselines, predictions, warn
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.config.idle_keys import reads
from ppo_nlu.errors import quoted
from ppo_nlu.runtime import profiling, streams
from ppo_nlu.runtime.curves import draw_curves
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.runtime.summary import class_table, peak_memory_mb, results_table
from ppo_nlu.storage import files
from ppo_nlu.tasks import TaskSpec, rewards
from ppo_nlu.tasks.custom import CustomSpec
from ppo_nlu.training.run import Run

TITLES = {"constant": "constant", "tfidf": "TF-IDF"}  # of the baselines
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


def start_name(run: Run) -> str:
    """What the model before training is called in tables."""
    return "start" if run.cfg.init_from else "base"


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
        show_task(run, run.specs[name], entry)
    if len(titles) > 1:
        print("\nMean over the tasks")
        print(results_table({name: summary[when] for when, name in models(run)}))
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
    for entry in summary["tasks"].values():
        for line in entry["warnings"]:
            streams.tell(f"warning: {line}")


def models(run: Run) -> list[tuple[str, str]]:
    """The models of a table: where a summary has their figures, and their names."""
    first = [("base", "base")] if run.cfg.init_from else []
    return [*first, ("before", start_name(run)), ("after", "tuned")]


def show_task(run: Run, spec: TaskSpec, entry: dict[str, Any]) -> None:
    """Print the tables of one task. Baselines give one answer to each row, so they stand in the
    greedy column."""
    macro_f1 = spec.kind == "choice" and (len(spec.words) > 2 or isinstance(spec, CustomSpec))
    rows = {
        name: entry[when] and entry[when] | {"macro_f1": entry["macro_f1"][when]}
        for when, name in models(run)
    }
    beside = {
        TITLES[name]: {"greedy": figures["score"], "macro_f1": figures["macro_f1"]}
        for name, figures in entry["baselines"].items()
        if "score" in figures
    }
    print(results_table(rows | beside, macro_f1))
    for name, figures in entry["baselines"].items():
        print(f"{TITLES[name]}: {said_of(figures, entry)}")
    if entry["per_class"]:
        print(class_table(entry["per_class"]))


def said_of(figures: dict[str, Any], entry: dict[str, Any]) -> str:
    """What a baseline is, or why it was not measured."""
    if "error" in figures:
        return f"not measured, since {figures['error']}"
    if "mean_error" in figures:
        tuned = entry["reports"]["greedy"]["mean_error"]
        return (
            f"always {figures['answer']}, the mean of the training rows; mean error "
            f"{figures['mean_error']:.2f}, of the tuned greedy answers {tuned:.2f}"
        )
    if "answer" in figures:
        return f"always {quoted(figures['answer'])}, the largest class of the training rows"
    return (
        f"logistic regression on words and pairs of words, {figures['train_rows']:,} training "
        f"rows, {figures['seconds']:.1f} s"
    )


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

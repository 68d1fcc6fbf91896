"""What a run prints at its end: tables, baselines, classes, curves and warnings."""

from __future__ import annotations

from typing import Any

from ppo_nlu.config.idle_keys import reads
from ppo_nlu.errors import quoted
from ppo_nlu.runtime import streams
from ppo_nlu.runtime.curves import draw_curves
from ppo_nlu.runtime.summary import class_table, results_table
from ppo_nlu.tasks import TaskSpec
from ppo_nlu.tasks.custom import CustomSpec
from ppo_nlu.training.run import Run

TITLES = {"constant": "constant", "tfidf": "TF-IDF"}  # of the baselines


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


def start_name(run: Run) -> str:
    """What the model before training is called in tables."""
    return "start" if run.cfg.init_from else "base"

"""The report of a grid: `python -m ppo_nlu.report DIR [--output DIR]`.

Writes report.html (one file that needs no other), report.md with its figures in report_files/, and
rows.csv. The numbers come from `results` and `comparisons`; here they become words and tables.
Published numbers stand in groups of rows of their own and are never mixed with ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ppo_nlu.reproduce import comparisons, plots, published
from ppo_nlu.reproduce import results as measured
from ppo_nlu.reproduce.document import (
    Figure,
    Folded,
    Group,
    Heading,
    Items,
    Part,
    Table,
    Text,
    to_html,
    to_markdown,
)
from ppo_nlu.reproduce.methods import method_title
from ppo_nlu.reproduce.question import QUESTIONS, question
from ppo_nlu.reproduce.results import DECODES, Results
from ppo_nlu.reproduce.tables import (
    DASH,
    backbone_table,
    benchmark_table,
    counted,
    number,
    other_table,
    title_of,
)
from ppo_nlu.runtime import arguments
from ppo_nlu.storage import files

# --- cost, curves, notes --------------------------------------------------------------------------


def cost_part(results: Results) -> Iterator[Part]:
    """Seconds of each method, and PPO over SFT."""
    found = comparisons.costs(results)
    if not found:
        return
    yield Heading("What it costs")
    rows = [
        [method_title(c.method), str(c.runs), f"{c.labels:,.0f}", f"{c.steps:,.0f}",
         f"{c.per_step:.3f}", f"{1000 * c.per_label:.1f}", f"{c.seconds:,.0f}", f"{c.wall:,.0f}"]
        for c in found
    ]  # fmt: skip
    head = ("method", "runs", "labels a run", "steps a run", "seconds a step",
            "milliseconds a label", "training seconds a run", "wall seconds a run")  # fmt: skip
    yield Table(head, [Group("", rows)])
    ratios = [
        (f"{method_title(a)} / {method_title(b)}", comparisons.cost_ratio(results, a, b), a, b)
        for a, b, _ in QUESTIONS
    ]
    body = [
        [name, "equal seconds, by design" if b == "sft-seconds" else "equal labels",
         f"{ratio[0]:.2f}", str(ratio[1]),
         DASH if b == "sft-seconds" else f"{published.COST_RATIO:.2f}"]
        for name, ratio, _, b in ratios
        if ratio
    ]  # fmt: skip
    if body:
        titles = ("training time", "at", "ratio, measured here", "pairs of runs",
                "ratio, published (arXiv 2410.11020)")  # fmt: skip
        yield Table(titles, [Group("", body)], 2)
    jobs = sorted({str(row["jobs"]) for row in results.started.values() if row.get("jobs")})
    if jobs:
        yield Text(
            f"Training seconds are without loading and evaluation, taken while {' or '.join(jobs)} "
            "cells ran side by side on the machine."
        )


def curves(figures: Mapping[str, Figure]) -> Iterator[Part]:
    """The figures, apart from that of the question."""
    for title, names in (
        ("Reward curves", ("reward_ppo_mt", "reward_ppo_st")),
        ("What the models answer", ("confusion", "labels")),
    ):
        if found := [figures[name] for name in names if name in figures]:
            yield Heading(title)
            yield from found


def notes(results: Results) -> Iterator[Part]:
    """Everything that limits what the numbers say."""
    yield Heading("What to know about these numbers")
    partial = [
        f"**{title_of(task)}**: "
        f"{'; '.join(dict.fromkeys(text for row in rows if (text := row.note)))}"
        for task in results.tasks()
        if (rows := [row for row in results.pick(task=task) if row.partial])
    ]
    yield Heading("Tasks measured or trained on partial data", 3)
    yield Items(partial) if partial else Text("None: every task had its whole official files.")
    capped = [f"{name}: {row['note']}" for name, row in results.started.items() if row.get("note")]
    if capped:
        yield Heading("Cells that could not be as long as they should", 3)
        yield Items(capped)
    yield Heading("Cells that failed or are missing", 3)
    lost = [f"{name}: {row.get('error', '')}" for name, row in results.failures.items()]
    lost += [f"{name}: not run yet" for name in results.missing]
    yield Items(lost) if lost else Text("None.")
    yield from unparsed_part(results)


def unparsed_part(results: Results) -> Iterator[Part]:
    """How many sampled answers name no label."""
    rates = measured.unparsed_rates(results)
    tasks = results.tasks()
    rows = [
        [method_title(method), *(number(row.get(task)) for task in tasks)]
        for method, row in rates.items()
        if method != "encoder"
    ]
    if rows:
        yield Heading("Answers that name no label", 3)
        yield Text("Percent of the sampled answers; they count as wrong.")
        yield Table(("method", *map(title_of, tasks)), [Group("", rows)])


def intervals(results: Results) -> Iterator[Part]:
    """Every cell with the bootstrap interval over its rows."""
    rows = []
    for task in results.tasks():
        for method in results.methods():
            for row in results.pick(method, task):
                cells = []
                for decode in DECODES:
                    report, value = row.report(decode), row.value(decode)
                    edges = (report or {}).get("interval")
                    inner = f" [{100 * edges[0]:.1f}, {100 * edges[1]:.1f}]" if edges else ""
                    cells.append(number(value) + inner)
                labels = row.summary.get("train_labels")
                seconds = row.summary.get("train_s")
                model = [row.model] if len(results.models()) > 1 else []
                rows.append(
                    [title_of(task), method_title(method), *model, str(row.seed), *cells,
                     str(row.entry.get("rows", DASH)), f"{labels:,}" if labels else DASH,
                     f"{seconds:,.0f}" if seconds else DASH]
                )  # fmt: skip
    head = ["task", "method", *(["model"] if len(results.models()) > 1 else []), "seed",
            *(f"{title} [95 %]" for title in DECODES.values()), "rows", "labels",
            "seconds"]  # fmt: skip
    yield Heading("Every cell, with its own interval")
    yield Text(
        "The task's score (the mean of its metrics) and its 95 % bootstrap interval over the "
        "evaluation rows: how sure one cell is of itself. The spread over seeds is in the tables "
        "above."
    )
    yield Folded(f"All {len(rows)} rows", (Table(head, [Group("", rows)], 2),))


def about(results: Results) -> Iterator[Part]:
    """The head: what was run."""
    grid = results.grid
    cells = len(results.grid.get("plan", {}))
    seeds = sorted({row.seed for row in results.scores})
    limits = sorted({int(row.entry.get("rows", 0)) for row in results.scores})
    used = [row for row in results.scores if row.method != "encoder"]
    names = {row.model: row.summary.get("model", "") for row in used}
    models = ", ".join(f"`{name}` ({model})" for name, model in names.items()) or DASH
    yield Text(
        f"**{counted(len(results.tasks()), 'task')}, {counted(len(results.methods()), 'method')}, "
        f"{counted(len(seeds), 'seed')}** ({', '.join(map(str, seeds)) or DASH}): "
        f"{len(results.summaries)} of {counted(cells, 'cell')} finished, "
        f"{len(results.failures)} failed. Model: {models}. Labels a task and run: "
        f"{grid.get('budget', 0):,}. "
        f"Evaluation rows a task: {limits[0]:,} to {limits[-1]:,}."
        if limits
        else "No cell has finished yet."
    )
    for _, summary in results.preparations():
        before, after = summary["unparsed_before"].values(), summary["unparsed_after"].values()
        yield Text(
            "The base did not know the form of these tasks' answers. Before all else it was taught "
            f"the form on {summary['train_samples']:,} prompts, without a label "
            "(`ppo_nlu.teach_form`): on the mean over tasks "
            f"{100 * sum(before) / len(before):.0f} % of its sampled answers named no allowed word "
            f"before, {100 * sum(after) / len(after):.0f} % after. The model so made is the "
            "untuned one of all rows below, and zero-shot is its score; the shots in its "
            "few-shot prompts are new to it."
        )
    spent = sum(float(row.get("seconds") or 0) for row in results.started.values())
    elapsed = float(grid.get("elapsed_s") or 0)
    yield Text(
        f"Wall time {_hours(elapsed)}; the cells took {_hours(spent)} together. The command:"
    )
    yield Items([f"`{command}`" for command in grid.get("commands", [])])
    where = {
        f"{row.get('device')}, torch {row.get('torch')}, transformers {row.get('transformers')}"
        + (f", commit {row['commit']}" if row.get("commit") else "")
        for row in results.started.values()
    }
    if where:
        yield Text(f"Run on: {'; '.join(sorted(where))}.")


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def words() -> Iterator[Part]:
    """The methods in a line each."""
    yield Folded(
        "The methods and decodings in a line each",
        (
            Items(
                [
                    "**zero-shot**, **few-shot (5)**: the untuned model with the task's prompt, "
                    "without and with five shots (labelled rows shown in the prompt).",
                    "**SFT-ST**: supervised fine-tuning (LoRA) on one task. **SFT-ST, equal "
                    "seconds**: the same with as many steps as fit into the training time of PPO "
                    "on that task and seed.",
                    "**PPO-ST**: PPO (LoRA and a value head) on one task, from the untuned "
                    "model, with the parsed answer as reward.",
                    "**SFT-MT**, **PPO-MT**: one model for several tasks, with their labels "
                    "together.",
                    "**encoder**: an encoder with a classification head, fine-tuned; sampled is "
                    "one draw from the probabilities of its classes.",
                    "**sampled**: one answer at T=1, as in the paper. **greedy**: the most "
                    "likely token each time. **scored**: the label with the highest probability "
                    "of the whole answer, no text is generated.",
                ]
            ),
        ),
    )


def document(results: Results, figures: Mapping[str, Figure], drawn: bool) -> list[Part]:
    """The whole report."""
    parts: list[Part] = [*about(results), *words()]
    if not drawn:
        parts.append(
            Text("There are no figures, since matplotlib is missing: pip install matplotlib.")
        )
    parts += question(results, figures)
    for benchmark in published.TABLES:
        parts += benchmark_table(results, benchmark)
    parts += [
        *backbone_table(results),
        *other_table(results),
        *cost_part(results),
        *curves(figures),
    ]
    return [*parts, *notes(results), *intervals(results)]


# --- the program --------------------------------------------------------------------------------


def write(folder: Path, output: Path) -> int:
    """Write the report of a grid's folder to `output`; returns the exit code."""
    found = measured.load(folder)
    drawn = plots.available()
    figures = plots.draw_all(found) if drawn else {}
    parts = document(found, figures, drawn)
    title = f"ppo_nlu: the {found.grid.get('benchmark', '')} grid"
    files.make_folder(output)
    for name, figure in figures.items():
        files.make_folder(output / "report_files")
        files.atomic_write_bytes(output / "report_files" / f"{name}.png", figure.png)
    files.atomic_write_text(output / "report.html", to_html(title, parts))
    files.atomic_write_text(output / "report.md", to_markdown(title, parts))
    measured.write_rows(found, output)
    print(f"report: {output / 'report.html'} (and report.md, rows.csv)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = arguments.Parser("python -m ppo_nlu.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what ppo_nlu.reproduce wrote")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: DIR itself")
    args = parser.parse_args(argv)
    return write(args.folder, arguments.require_place("--output", args.output or args.folder))

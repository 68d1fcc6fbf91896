"""Numbers as text, and the paper's tables 1 to 3: ours, and the published ones below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ppo_nlu.reproduce import comparisons, published
from ppo_nlu.reproduce.comparisons import Spread, spread
from ppo_nlu.reproduce.document import Group, Heading, Part, Table, Text
from ppo_nlu.reproduce.methods import METHODS, method_title
from ppo_nlu.reproduce.results import DECODES, Results
from ppo_nlu.tasks import TASKS, benchmark_tasks

DASH = "–"
OURS = "measured here (evaluation rows; mean ± standard deviation over seeds)"


# --- numbers as text ------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """One decimal; a dash for None."""
    return DASH if value is None else f"{value:.1f}"


def signed(value: float) -> str:
    """One decimal with its sign; -0.0 is +0.0."""
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")


def with_sd(found: Spread | None) -> str:
    """mean ± sd; without the sd for one seed."""
    if found is None:
        return DASH
    return number(found.mean) + (f" ± {found.sd:.1f}" if found.sd is not None else "")


def between(interval: Sequence[float]) -> str:
    """An interval of points."""
    return f"{signed(interval[0])} to {signed(interval[1])}"


def counted(count: int, thing: str) -> str:
    """`3 seeds`, `1 seed`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def title_of(task: str) -> str:
    """A task's printed name; the two RTEs are told apart."""
    spec = TASKS.get(task)
    if spec is None:
        return task
    benchmark = {"glue": "GLUE", "superglue": "SuperGLUE"}.get(spec.benchmark, spec.benchmark)
    return f"{spec.title} ({benchmark})" if "/" in task else spec.title


# --- the paper's tables ---------------------------------------------------------------------------

NUMBERS = {"glue": 1, "superglue": 2}
NAMES = {"glue": "GLUE", "superglue": "SuperGLUE"}
METRIC_NAMES = {
    "accuracy": "acc", "f1": "F1", "mcc": "MCC", "spearman": "Spearman", "pearson": "Pearson",
    "macro_f1": "F1", "f1a": "F1a", "em": "EM", "record_f1": "F1", "record_em": "EM",
    "gender_parity": "parity",
}  # fmt: skip


def column_title(task: str) -> str:
    """A task and the metrics the paper shows for it."""
    shown = "/".join(METRIC_NAMES.get(name, name) for name in TASKS[task].shown)
    return f"{TASKS[task].title} ({shown})"


def paper_cell(
    results: Results, method: str, task: str, decode: str, model: str | None = None
) -> str:
    """Our numbers of the paper's metrics for a task, mean ± sd over seeds."""
    rows = results.pick(method, task, model)
    found = [spread([row.metric(decode, name) for row in rows]) for name in TASKS[task].shown]
    return DASH if None in found else " / ".join(with_sd(each) for each in found)


def benchmark_table(results: Results, benchmark: str) -> Iterator[Part]:
    """Table 1 (GLUE) or 2 (SuperGLUE), ours and the published one below it; its columns are the
    tasks that the grid was asked for, and the averages that they make."""
    columns = [spec.name for spec in benchmark_tasks(benchmark) if spec.name in results.asked()]
    if len(results.models()) > 1 or not any(results.pick(task=task) for task in columns):
        return
    yield Heading(f"Table {NUMBERS[benchmark]}: {NAMES[benchmark]}")
    found = {
        (method, decode): [paper_cell(results, method, task, decode) for task in columns]
        for method in results.methods()
        for decode in DECODES
    }
    ours = {row: cells for row, cells in found.items() if set(cells) != {DASH}}
    means = _averages(results, benchmark, list(ours))
    rows = [
        [method_title(method), DECODES[decode], _seeds(results, method, columns), *cells,
         *(column[place] for column in means.values())]
        for place, ((method, decode), cells) in enumerate(ours.items())
    ]  # fmt: skip
    whole = means.keys() & {PAPER_AVERAGE}
    theirs = [
        [method_title(method), "sampled" if method in METHODS else DASH, DASH,
         *(_published_cell(row.get(task)) for task in columns),
         *(_published_cell(row.get("average")) if name in whole else DASH for name in means)]
        for method, row in published.TABLES[benchmark].items()
    ]  # fmt: skip
    head = ("method", "decoding", "seeds", *map(column_title, columns), *means)
    groups = [Group(OURS, rows), Group(published.SOURCE, theirs, foreign=True)]
    yield Table(head, groups, 2)
    yield Text(_about_averages(benchmark) if len(means) > 1 else ABOUT_MEAN)


PAPER_AVERAGE, OFFICIAL_AVERAGE = "average: paper", "average: official"
MEAN = "mean of the tasks present (how many)"
REFERENCE = (
    "Ours is another model on other rows (dev, not test) with other numbers of labels: the "
    "published rows are a reference, not a rival. The BERT rows are those that the paper cites."
)
ABOUT_MEAN = (
    "The columns have the metrics of the paper, of the tasks that the grid was asked for. The mean "
    f"can be compared between our rows with the same tasks. {REFERENCE}"
)


def _about_averages(benchmark: str) -> str:
    without = "WNLI and AX" if benchmark == "glue" else "AX-b and AX-g"
    return (
        f"The columns have the metrics of the paper. `{PAPER_AVERAGE}` is the plain mean of its "
        f"columns (without {without}), `{OFFICIAL_AVERAGE}` the leaderboard's; each needs every "
        "task of it, and a dash means that one is missing. Then the mean of the tasks present "
        "stands in their place: it can be compared between our rows with the same tasks, and not "
        f"with an average of the paper. {REFERENCE}"
    )


def _published_cell(values: Sequence[float] | None) -> str:
    return DASH if values is None else " / ".join(number(value) for value in values)


def _seeds(results: Results, method: str, tasks: Sequence[str]) -> str:
    counts = {len(rows) for task in tasks if (rows := results.pick(method, task))}
    return str(max(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"


def _averages(
    results: Results, benchmark: str, rows: Sequence[tuple[str, str]]
) -> dict[str, list[str]]:
    """The columns of averages by their title, a cell for each (method, decoding); without those of
    the whole benchmark where the grid was not asked for it and no row has one."""
    found = {
        title: [
            with_sd(comparisons.averages(results, benchmark, method, decode, style))
            for method, decode in rows
        ]
        for title, style in ((PAPER_AVERAGE, "paper"), (OFFICIAL_AVERAGE, "official"))
    }
    tasks = [spec.name for spec in benchmark_tasks(benchmark)]
    asked = results.asked().issuperset(tasks)
    columns = {title: cells for title, cells in found.items() if asked or set(cells) != {DASH}}
    present = [comparisons.mean_of_present(results, *row, tasks) for row in rows]
    columns[MEAN] = [f"{with_sd(one[0])} ({one[1]})" if one else DASH for one in present]
    return columns


def other_table(results: Results) -> Iterator[Part]:
    """Tasks of neither benchmark, by their own metrics' mean."""
    known = {spec.name for benchmark in published.TABLES for spec in benchmark_tasks(benchmark)}
    others = [task for task in results.tasks() if task not in known]
    if not others:
        return
    yield Heading("Other tasks")
    rows = [
        [method_title(method), DECODES[decode],
         *(with_sd(spread([row.value(decode) for row in results.pick(method, task)]))
           for task in others)]
        for method in results.methods()
        for decode in DECODES
    ]  # fmt: skip
    yield Table(("method", "decoding", *map(title_of, others)), [Group(OURS, rows)], 2)


BACKBONE = ("stsb", "copa")  # the tasks of the paper's table 3


def backbone_table(results: Results) -> Iterator[Part]:
    """Table 3: STS-B and COPA by language model."""
    tasks = [task for task in BACKBONE if task in results.asked()]
    rows = []
    for model in results.models():
        for method in results.methods():
            for decode in DECODES:
                cells = [paper_cell(results, method, task, decode, model) for task in tasks]
                if method != "encoder" and any(cell != DASH for cell in cells):
                    rows.append([model, method_title(method), DECODES[decode], *cells])
    if not rows:
        return
    theirs = [
        [
            model,
            method_title(method),
            "sampled" if method in METHODS else DASH,
            *(number(row[model][place]) for place, task in enumerate(BACKBONE) if task in tasks),
        ]
        for model in published.BACKBONE_COLUMNS
        for method, row in published.BACKBONES.items()
        if model in row
    ]
    yield Heading("Table 3: language models")
    source = published.SOURCE.replace(", Llama-2-7B", "")
    yield Table(
        ("model", "method", "decoding", *map(column_title, tasks)),
        [Group(OURS, rows), Group(source, theirs, foreign=True)],
        3,
    )

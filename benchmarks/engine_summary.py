"""What the rows of `engines.py` say: ours beside theirs, and each bar met or not.

Nothing here imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.engine_cells import Row

# CPU seconds of theirs over those of ours, at least; the 30M Llama, equal answer tokens.
SPEED = {
    ("sst2", "ppo"): 10.0,
    ("sst2", "grpo"): 15.0,
    ("glue/rte", "ppo"): 5.0,
    ("glue/rte", "grpo"): 10.0,
}
MEMORY = 0.5  # of theirs, at most; B 64
FIRST_STEP = 2.0  # seconds
MATCH = (
    "part", "method", "model", "task", "B", "G", "tokens", "stop", "length", "shared", "N", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """`met` is None where nothing was measured."""

    what: str
    measured: str
    bar: str
    met: bool | None


def of_run(rows: Sequence[Row], run: str | None) -> list[Row]:
    """The rows of a run, by default of the one that wrote the last row."""
    name = run or (rows[-1]["run"] if rows else "")
    return [row for row in rows if row["run"] == name]


def median(rows: Iterable[Row], column: str) -> float | None:
    """The median of a column over rounds; None where it was not measured."""
    found = [float(row[column]) for row in rows if row.get(column)]
    return statistics.median(found) if found else None


def ratio(above: float | None, below: float | None) -> float | None:
    """The quotient; None where one of the two is missing or the lower one is zero."""
    return above / below if above is not None and below else None


def pairs(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, list[Row]]]:
    """Setting -> engine -> rows of all rounds, without our variants."""
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row["variant"] == "full":
            setting = tuple(row[name] for name in MATCH)
            found.setdefault(setting, {}).setdefault(row["engine"], []).append(row)
    return found


def quotient(both: dict[str, list[Row]], column: str) -> float | None:
    """Theirs over ours."""
    return ratio(*(median(both.get(engine, []), column) for engine in ("trl", "ours")))


# ---- bars


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar, in the order of the tables."""
    found = pairs(rows)
    result = [*speed_bars(found), *memory_bars(found)]
    result += [reward_bar(rows), cost_bar(rows), startup_bar(rows)]
    return result


def _measured(
    found: dict[tuple[str, ...], dict[str, list[Row]]], method: str, task: str, answers: str
) -> dict[str, list[Row]]:
    for setting, both in found.items():
        given = dict(zip(MATCH, setting, strict=True))
        wanted = {"part": "bars", "method": method, "task": task, "B": answers}
        if wanted.items() <= given.items():
            return both
    return {}


def speed_bars(found: dict[tuple[str, ...], dict[str, list[Row]]]) -> Iterator[Bar]:
    for (task, method), least in SPEED.items():
        for answers in ("16", "64"):
            both = _measured(found, method, task, answers)
            times = quotient(both, "cpu_s_per_1000")
            what = f"{task}, {method.upper()}, B {answers}: CPU s of TRL over ours"
            yield Bar(what, _times(times), f"≥ {least:g}x", times and times >= least)


def memory_bars(found: dict[tuple[str, ...], dict[str, list[Row]]]) -> Iterator[Bar]:
    for task, method in SPEED:
        both = _measured(found, method, task, "64")
        times = quotient(both, "peak_mb_above_import")
        part = None if times is None else 1 / times
        what = f"{task}, {method.upper()}, B 64: peak memory of ours over TRL's"
        measured = "not measured" if part is None else f"{part:.2f}"
        yield Bar(what, measured, f"≤ {MEMORY:g}", None if part is None else part <= MEMORY)


def reward_bar(rows: Sequence[Row]) -> Bar:
    """Our mean over seeds is not below theirs by more than the spread of theirs over seeds."""
    last = {
        engine: [
            float(row["reward_last"])
            for row in rows
            if row["part"] == "reward" and row["engine"] == engine and row["reward_last"]
        ]
        for engine in ("ours", "trl")
    }
    what = "reward after equal samples, mean of the seeds"
    bar = "≥ TRL's mean − its spread"
    if not all(last.values()):
        return Bar(what, "not measured", bar, None)
    ours, theirs = (statistics.mean(last[engine]) for engine in ("ours", "trl"))
    spread = statistics.stdev(last["trl"]) if len(last["trl"]) > 1 else 0.0
    counts = "/".join(str(len(values)) for values in last.values())
    text = f"{ours:.3f} against {theirs:.3f} ± {spread:.3f} ({counts} seeds)"
    return Bar(what, text, bar, ours >= theirs - spread)


def cost_bar(rows: Sequence[Row]) -> Bar:
    """CPU of PPO over SFT, and how much of it the passes over tokens account for."""
    texts = []
    for model in dict.fromkeys(row["model"] for row in rows if row["part"] == "cost"):
        of = {
            m: [r for r in rows if r["part"] == "cost" and r["model"] == model and r["method"] == m]
            for m in ("ppo", "sft")
        }
        measured = ratio(*(median(of[m], "cpu_s_per_1000") for m in ("ppo", "sft")))
        passes = ratio(*(median(of[m], "token_passes") for m in ("ppo", "sft")))
        if measured is not None:
            counted = "" if passes is None else f" (token passes {passes:.1f}x)"
            texts.append(f"{model} {measured:.1f}x{counted}")
    text = "; ".join(texts) or "not measured"
    return Bar("PPO over SFT on as many examples, CPU s", text, "reported", None)


def startup_bar(rows: Sequence[Row]) -> Bar:
    taken = median([row for row in rows if row["part"] == "startup"], "first_step_s")
    measured = "not measured" if taken is None else f"{taken:.2f} s"
    met = None if taken is None else taken <= FIRST_STEP
    return Bar("first optimizer step, bundled model", measured, f"≤ {FIRST_STEP:g} s", met)


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}x"


# ---- tables


def report(rows: Sequence[Row], run: str | None = None) -> str:
    """Markdown: the tables of a run, then the bars."""
    rows = of_run(rows, run)
    if not rows:
        return "no rows of this run"
    parts = [f"run {rows[-1]['run']}: {len(rows)} rows, {rows[-1]['machine']}"]
    parts += [text for text in (side_by_side(rows), ablation(rows), scaling(rows)) if text]
    lines = [("bar", "measured", "asked", "")]
    word = {True: "met", False: "not met", None: ""}
    lines += [(bar.what, bar.measured, bar.bar, word[bar.met]) for bar in bars(rows)]
    return "\n\n".join([*parts, table(lines)])


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first line the heads."""
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def side_by_side(rows: Sequence[Row]) -> str:
    """Ours and TRL's at every setting that both ran (per 1,000 answers)."""
    lines = [(
        "part", "method", "model", "task", "B", "stop", "seed", "ours CPU s", "TRL CPU s",
        "CPU ratio", "ours s", "TRL s", "ours MB", "TRL MB", "memory", "ours reward", "TRL reward",
    )]  # fmt: skip
    for setting, both in pairs(rows).items():
        if set(both) < {"ours", "trl"}:
            continue
        given = dict(zip(MATCH, setting, strict=True))
        figures = [
            _number(median(both[engine], column), digits)
            for column, digits in (("cpu_s_per_1000", 1), ("wall_s_per_1000", 1),
                                   ("peak_mb_above_import", 0), ("reward_last", 3))
            for engine in ("ours", "trl")
        ]  # fmt: skip
        part = ratio(
            median(both["ours"], "peak_mb_above_import"),
            median(both["trl"], "peak_mb_above_import"),
        )
        shown = [given[n] for n in ("part", "method", "model", "task", "B", "stop", "seed")]
        lines.append((
            *shown, *figures[:2], _times(quotient(both, "cpu_s_per_1000")), *figures[2:6],
            _number(part, 2), *figures[6:],
        ))  # fmt: skip
    return table(lines) if len(lines) > 1 else ""


def ablation(rows: Sequence[Row]) -> str:
    """What each switched-off thing costs: CPU seconds and memory over those of all of ours."""
    names = ("model", "task", "method", "B", "G")
    found: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row["part"] == "ablation":
            setting = tuple(row[name] for name in names)
            found.setdefault(setting, {}).setdefault(row["variant"], []).append(row)
    lines: list[Sequence[str]] = [(*names, "variant", "CPU s", "x full", "MB", "x full")]
    for setting, variants in found.items():
        for name, own in variants.items():
            figures = []
            for column, digits in (("cpu_s_per_1000", 1), ("peak_mb_above_import", 0)):
                value = median(own, column)
                over = ratio(value, median(variants.get("full", []), column))
                figures += [_number(value, digits), _number(over, 2)]
            lines.append((*setting, name, *figures))
    return table(lines) if len(lines) > 1 else ""


def scaling(rows: Sequence[Row]) -> str:
    """Ours along prompt length, shared part, batch and group."""
    names = ("method", "length", "shared", "B", "G")
    lines: list[Sequence[str]] = [(*names, "CPU s per 1,000", "answers/s", "MB")]
    for row in rows:
        if row["part"] == "scaling":
            figures = (row["cpu_s_per_1000"], row["answers_per_s"], row["peak_mb_above_import"])
            lines.append((*(row[name] for name in names), *figures))
    return table(lines) if len(lines) > 1 else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

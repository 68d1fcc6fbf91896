"""What one run changed: the reward of each step, and the accuracy before and after it.

    python benchmarks/before_after.py [RUN_DIR]

With the folder of a finished run of one task the rows of benchmarks/results/before_after.csv are
written anew; the picture beside it is drawn from those rows. A row is `part,name,value,low,high`:
the part is `reward` (the name is the step), `base` or `tuned` (the name is the decoding; low and
high are the 95 % bootstrap interval over the rows of the evaluation split), or `fact`.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "before_after.csv"
PICTURE = ROWS.with_suffix(".svg")
DECODINGS = {"sample": "sampled", "greedy": "greedy", "score": "scored"}
BASE, TUNED, INK = "#b8c0cc", "#1f6feb", "#24292f"
Row = tuple[str, str, str, str, str]


def main(argv: list[str]) -> int:
    """Read the run where one is given, and draw."""
    if argv:
        rows = rows_of(Path(argv[0]))
        with ROWS.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("part", "name", "value", "low", "high"), *rows])
    with ROWS.open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    draw(table, PICTURE)
    print(PICTURE)
    return 0


def rows_of(folder: Path) -> list[Row]:
    """The rows of a finished run."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    rows: list[Row] = [
        ("reward", str(step["step"]), f"{step['reward/mean']:.4f}", "", "") for step in steps
    ]
    for part, scores in (("base", summary["before"]), ("tuned", summary["after"])):
        for decoding in DECODINGS:
            low, high = interval(scores[decoding], summary["eval_rows"])
            rows.append((part, decoding, f"{scores[decoding]:.4f}", f"{low:.4f}", f"{high:.4f}"))
    facts = {
        "model": Path(summary["model"]).name,
        "task": summary["tasks"][summary["task"]]["title"],
        "split": summary["eval_split"],
        "rows": summary["eval_rows"],
        "seed": summary["seed"],
        "answers": int(summary["train_samples"]),
        "train_s": round(summary["train_s"]),
        "median_step_s": round(float(np.median([step["time/step_s"] for step in steps])), 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    return [*rows, *(("fact", name, str(value), "", "") for name, value in facts.items())]


def interval(accuracy: float, count: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval: of rows drawn with replacement a binomial number is right."""
    drawn = np.random.default_rng(0).binomial(count, accuracy, resamples) / count
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def draw(table: list[dict[str, str]], path: Path) -> None:
    """Left the reward of each step, right the bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"font.size": 10, "svg.hashsalt": "before_after", "text.color": INK}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.3), layout="constrained", width_ratios=[1, 1.15]
    )
    _reward(left, [row for row in table if row["part"] == "reward"])
    _bars(right, table)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def _reward(axis: Any, rows: list[dict[str, str]]) -> None:
    steps = [int(row["name"]) for row in rows]
    axis.axhline(0, color=BASE, linewidth=0.8)
    axis.plot(steps, [float(row["value"]) for row in rows], color=TUNED, marker="o", markersize=4)
    axis.set_ylim(-1.05, 1.05)
    axis.set_xticks([step for step in steps if step == 1 or step % 5 == 0])
    axis.set_xlabel("step")
    axis.set_title("mean reward of a step's answers", fontsize=11)


def _bars(axis: Any, table: list[dict[str, str]]) -> None:
    found = {(row["part"], row["name"]): row for row in table}
    places = np.arange(len(DECODINGS))
    for offset, part, color in ((-0.19, "base", BASE), (0.19, "tuned", TUNED)):
        rows = [found[part, decoding] for decoding in DECODINGS]
        value, low, high = (
            np.array([100 * float(row[name]) for row in rows]) for name in ("value", "low", "high")
        )
        bars = {"color": color, "label": part, "error_kw": {"elinewidth": 1, "ecolor": INK}}
        axis.bar(places + offset, value, 0.36, yerr=[value - low, high - value], **bars)
        for place, height, top in zip(places + offset, value, high, strict=True):
            axis.text(place, top + 2, f"{height:.1f}", ha="center", fontsize=9)
    axis.set_xticks(places, DECODINGS.values())
    axis.set_ylim(0, 118)
    axis.set_yticks(range(0, 101, 25))
    facts = {row["name"]: row["value"] for row in table if row["part"] == "fact"}
    what = f"{facts['task']}, {facts['split']}: accuracy in percent of {facts['rows']} rows"
    axis.set_title(what, fontsize=11)
    axis.legend(frameon=False, ncols=2, loc="upper left")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

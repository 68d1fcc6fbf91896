"""What PPO gains on SST-2: several seeds of the shipped config, one row each, and their spread.

    python benchmarks/sst2.py --data FOLDER [--seeds 0 1 2] [--output runs/sst2] [key=value ...]

Each seed is a process of its own, `python -m ppo_nlu.train configs/sst2.yaml`, so wall time and
peak memory are those of a user. `--data bundled` trains on the stand-in sentences. A seed whose run
folder is finished is read, not run again. Rows are appended to benchmarks/results/sst2.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "sst2.csv"
CELLS = [(w, k) for w in ("before", "after") for k in ("sample", "greedy", "score", "unparsed")]
FIGURES = ("train_samples", "samples_per_s", "train_s", "wall_s", "peak_memory_mb")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with glue/SST-2, or: bundled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default=str(ROOT / "configs" / "sst2.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/sst2"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    kind = "bundled" if args.data == "bundled" else "real"
    rows = []
    for seed in args.seeds:
        folder = args.output / f"{kind}-seed{seed}"
        if not (folder / "summary.json").exists():
            train(args.config, args.data, seed, folder, args.overrides)
            summary = json.loads((folder / "summary.json").read_text())
            append(row_of(summary, args.overrides))
        rows.append(json.loads((folder / "summary.json").read_text()))
    show(rows)
    return 0


def train(config: str, data: str, seed: int, folder: Path, overrides: list[str]) -> None:
    """One run; `bundled` is forced by an empty cache and an address where nobody answers."""
    command = [sys.executable, "-m", "ppo_nlu.train", config, f"seed={seed}", *overrides]
    environment = {k: v for k, v in os.environ.items() if k != "PPO_NLU_DATA"}
    with tempfile.TemporaryDirectory() as cache:
        if data == "bundled":
            command += [f"data.cache={cache}", "data.url=http://127.0.0.1:9"]
        else:
            command += [f"data.path={data}"]
        subprocess.run([*command, "--output", str(folder)], check=True, env=environment)


def row_of(summary: dict, overrides: list[str]) -> dict[str, object]:
    """A summary as one flat row of the table, with where and of what it was measured."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    scores = {f"{w}_{k}": f"{summary[w][k]:.4f}" for w, k in CELLS}
    figures = {name: f"{summary[name]:.1f}" for name in FIGURES}
    return {
        "commit": commit,
        "data": "bundled" if summary["data"] == "bundled" else "real",
        "seed": summary["seed"],
        **scores,
        **figures,
        "overrides": " ".join(overrides),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def append(row: dict[str, object]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        table = csv.DictWriter(file, list(row))
        if new:
            table.writeheader()
        table.writerow(row)


def show(rows: list[dict]) -> None:
    """A Markdown table: each seed, then mean and standard deviation over seeds."""
    print(f"\n| seed | {' | '.join(f'{w} {k}' for w, k in CELLS)} | answers/s | wall s | MB |")
    print("|---" * (len(CELLS) + 4) + "|")
    for row in rows:
        cells = " | ".join(f"{100 * row[w][k]:.1f}" for w, k in CELLS)
        tail = f"{row['samples_per_s']:.1f} | {row['wall_s']:.0f} | {row['peak_memory_mb']:.0f}"
        print(f"| {row['seed']} | {cells} | {tail} |")
    if len(rows) > 1:
        columns = [[100 * row[w][k] for row in rows] for w, k in CELLS]
        cells = " | ".join(f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns)
        print(f"| mean ± sd | {cells} | | | |")


if __name__ == "__main__":
    sys.exit(main())

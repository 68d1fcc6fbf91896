"""Our engine beside TRL's PPO 1.12.0 and GRPO 1.16.0: the same work, interleaved, in one run.

    python benchmarks/engines.py PART... --data FOLDER --tokenizer FOLDER [--venvs FOLDER]
    python benchmarks/engines.py summary

FOLDER of --data holds glue/, that of --tokenizer the Llama-2 tokenizer. Parts: bars (the 30M Llama
with random weights, equal answer tokens), natural, bundled, memory, startup, cost (PPO over SFT),
reward, ablation, scaling, or all. Each cell is a process of its own with one thread; its time is
that of 2N steps minus that of N. Rows are appended to a csv. What this run has measured is not
measured again, so the same command goes on with a run that was stopped (--run NAME names it;
default: the commit). The environments of TRL are made once, with pip. `summary` prints the tables,
and for each bar whether it is met. The cells are in engine_cells.py, the settings of both
sides in engine_ours.py and engine_trl.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not benchmarks/: see kernels.py

from benchmarks import engine_cells, engine_setup, engine_summary
from benchmarks.engine_cells import PARTS, Cell

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "engines.csv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ppo_nlu" / "engines"
_lock = threading.Lock()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.data = args.data and str(Path(args.data).resolve())  # the cells run in another folder
    if "summary" in args.parts:
        print(engine_summary.report(engine_cells.read(args.csv), args.run))
        return 0
    run = args.run or commit()
    cells = chosen(args)
    left = engine_cells.remaining(cells, engine_cells.read(args.csv), run)
    print(f"run {run}: {len(left)} of {len(cells)} cells to measure", flush=True)
    if args.list:
        for cell in left:
            print("  " + name_of(cell))
        return 0
    engine_cells.ready(args.csv)
    began = time.monotonic()
    failed: list[Cell] = []

    def one(cell: Cell) -> None:
        if args.budget and time.monotonic() - began > 60 * args.budget:
            return
        try:
            measure(cell, args, run)
        except subprocess.CalledProcessError as error:
            failed.append(cell)
            print(f"{name_of(cell)}: failed ({error.returncode}), see {error.cmd}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, left))
    print(f"{time.monotonic() - began:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all", "summary"], metavar="PART")
    parser.add_argument("--data", help="folder that holds glue/; default: $PPO_NLU_DATA")
    parser.add_argument("--tokenizer", type=Path, help="folder of the Llama-2 tokenizer")
    parser.add_argument("--venvs", type=Path, default=CACHE / "venvs", metavar="FOLDER")
    parser.add_argument("--models", type=Path, default=CACHE / "models", metavar="FOLDER")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--run", help="name of the run; default: the commit (summary: the last)")
    parser.add_argument("--engines", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--methods", nargs="+", choices=["ppo", "grpo", "sft"])
    parser.add_argument("--tasks", nargs="+", choices=["sst2", "glue/rte", "synthetic"])
    parser.add_argument("--answers", type=int, nargs="+", help="only cells of these B")
    parser.add_argument("--variants", nargs="+", choices=list(engine_cells.VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of part reward")
    parser.add_argument("--rounds", type=int, default=1, help="measure everything so often")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no cell after it")
    parser.add_argument("--profile", action="store_true", help="ours: seconds of each phase too")
    parser.add_argument("--tiny", action="store_true", help="two steps of a few answers: a trial")
    parser.add_argument("--list", action="store_true", help="name the cells, measure nothing")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[Cell]:
    """The cells of the named parts that pass the filters, round by round."""
    parts = PARTS if "all" in args.parts else args.parts
    cells = [cell for part in parts for cell in engine_cells.of_part(part, args.seeds)]
    cells = [
        cell
        for cell in cells
        if cell.engine in args.engines
        and (not args.methods or cell.method in args.methods)
        and (not args.tasks or cell.task in args.tasks)
        and (not args.answers or cell.answers in args.answers)
        and (not args.variants or cell.variant in args.variants)
    ]
    if args.tiny:
        cells = [engine_cells.tiny(cell) for cell in cells]
    return [replace(cell, round=cell.round + i) for i in range(args.rounds) for cell in cells]


def name_of(cell: Cell) -> str:
    """The cell in one line."""
    what = f"{cell.part}: {cell.engine} {cell.method} {cell.version}".rstrip()
    where = f"{cell.model} {cell.task} B {cell.answers} G {cell.group} {cell.stop}"
    if cell.task == "synthetic":
        where += f" {cell.length} tokens, {cell.shared} % shared"
    return f"{what}, {where}, {cell.variant}, N {cell.steps}, seed {cell.seed}"


def measure(cell: Cell, args: argparse.Namespace, run: str) -> None:
    """One cell in a process of its own, and its row."""
    startup = cell.part == "startup"
    with _lock:  # environments, models and prompts are made once
        python = Path(sys.executable)
        if cell.engine == "trl":
            python = engine_setup.python_of(cell.version, args.venvs)
        model = engine_setup.model_folder(cell.model, args.models, args.tokenizer)
        steps = 2 * cell.steps
        rows = [] if startup else engine_setup.prompts(cell, model, args.data, steps)
    threads = 0 if startup else args.threads
    with tempfile.TemporaryDirectory(prefix="engines-") as work:
        job = asdict(cell) | {
            "kind": "startup" if startup else cell.method,
            "model_folder": str(model),
            "data": args.data,
            "device": "cpu",
            "dtype": "float32",
            "threads": threads,
            "profile": args.profile and cell.engine == "ours",
            "out": str(Path(work) / "result.json"),
        }
        result, seconds = run_job(job, rows, python, Path(work), name_of(cell))
    row = row_of(cell, result, run, args) | {"cell_s": f"{seconds:.0f}"}
    with _lock:
        engine_cells.append(args.csv, row)
        figure = f"first step {row['first_step_s']} s" if startup else (
            f"{row['cpu_s_per_1000']} CPU s and {row['wall_s_per_1000']} s per 1,000 answers, "
            f"peak {row['peak_mb_above_import']} MB"
        )  # fmt: skip
        print(f"{name_of(cell)}: {figure} ({seconds:.0f} s)", flush=True)


def run_job(
    job: dict[str, Any],
    rows: list[dict[str, Any]],
    python: Path,
    work: Path,
    name: str,
    inherit: bool = False,
) -> tuple[dict[str, Any], float]:
    """The result of a job and the seconds it took; what a failed one said is printed.

    With `inherit` the process finds what $PYTHONPATH names, too.
    """
    order, log = work / "job.json", work / "log.txt"
    engine_setup.write_job(order, job, rows)
    program = str(ROOT / "benchmarks" / "engine_workers.py")
    began = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [str(python), program, str(order)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=work,
            env=engine_setup.environment(job["threads"], inherit),
        )
    if done.returncode:
        said = log.read_text(errors="replace")[-3000:]
        print(f"{name}:\n{said}", file=sys.stderr, flush=True)
        raise subprocess.CalledProcessError(done.returncode, "what it said above")
    return json.loads(Path(job["out"]).read_text()), time.monotonic() - began


def row_of(cell: Cell, result: dict[str, Any], run: str, args: argparse.Namespace) -> dict:
    """A measured cell as a row of the csv."""
    from benchmarks import timing

    optional = {
        "answer_tokens": ".2f",
        "prompt_tokens": ".1f",
        "first_step_s": ".2f",
        "trained_weights": "",
        "token_passes": "",
    }
    found = {
        n: format(result[n], f) for n, f in optional.items() if result.get(n) not in (None, "")
    }
    if cell.part != "startup":
        found |= engine_cells.figures(cell, result)
    if result.get("phases"):
        found["phases"] = " ".join(f"{n} {s:.2f}" for n, s in result["phases"].items())
    if cell.method == "ppo":
        found["epochs"] = "4"
    return dict(zip(engine_cells.KEY, cell.key(), strict=True)) | {
        "run": run,
        "version": result.get("version", ""),
        **found,
        "threads": args.threads if cell.part != "startup" else "all",
        "jobs": args.jobs,
        "machine": timing.device_name("cpu"),
        "cores": os.cpu_count(),
        "torch": result["torch"],
        "transformers": result["transformers"],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The commit that is measured."""
    from benchmarks import timing

    return timing.commit()


if __name__ == "__main__":
    sys.exit(main())

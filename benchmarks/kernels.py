"""Time each kernel beside every rival that is installed, and beside what the hardware allows.

    python benchmarks/kernels.py [--kernel NAME ...] [--shapes 512x896x32000 ...]
        [--against NAME ...] [--modes forward forward+backward] [--dtype fp32]
        [--repeats N] [--csv FILE] [--plot FILE.png] [--write-table]

Each row: one kernel, one provider, one mode, one shape. Times are medians with 20th and 80th
percentile, inputs rotated, the cache emptied on CUDA, providers interleaved. `limit` is the bare
matrix products at this shape, or a copy of as many bytes; "% of limit" is its time over theirs.
On the CPU the torch forms run. Rows are appended to the --csv file; --rows FILE prints and draws
rows measured before. See cases.py for shapes and formulas, rivals.py for who takes part.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

if __name__ == "__main__":
    # Not benchmarks/: there this file would pass for Hugging Face's package named `kernels`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import cases, rivals, timing
from benchmarks.cases import Case, Inputs
from benchmarks.timing import Timing

COLUMNS = (
    "kernel", "provider", "mode", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "cpu_ms",
    "peak_mib", "tflops", "tbs", "percent_of_limit", "error", "error_kind", "repeats", "commit",
    "device", "threads", "torch", "triton", "rival", "date",
)  # fmt: skip
ALWAYS = ("ours", "limit")
SMALL_INPUTS = 64 << 20  # bytes; on the CPU such inputs are rotated too
Row = dict[str, str]


@dataclass(frozen=True)
class Settings:
    """How to measure, for all cases of a run."""

    device: str
    repeats: int
    seconds_each: float
    against: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.rows:
        rows = read_rows(args.rows)
        for group in by_case(rows):
            show(group)
    else:
        rows = run(args)
    if args.plot and rows:
        from benchmarks import plots

        plots.draw(list(by_case(rows)), args.plot)
        print(f"drawn: {args.plot}")
    return 0 if rows else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="+", choices=cases.KERNELS, default=list(cases.KERNELS))
    parser.add_argument("--shapes", nargs="+", metavar="[KERNEL:]SHAPE", help="see cases.py")
    parser.add_argument("--against", nargs="+", choices=rivals.names(), metavar="NAME",
                        help=f"of: {', '.join(rivals.names())}")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=cases.MODES, default=cases.MODES[:2])
    parser.add_argument("--dtype", choices=list(cases.DTYPES), help="CUDA: bf16, CPU: fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, help="rounds; CUDA: 30, CPU: 7")
    parser.add_argument("--seconds-each", type=float, default=60.0, metavar="S",
                        help="fewer rounds for a provider too slow for all in S")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="S", help="start no case after S seconds")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows here")
    parser.add_argument(
        "--resume", action="store_true", help="leave out cases that the --csv file has already"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="show this file, do not measure")
    parser.add_argument(
        "--write-table", action="store_true", help="CUDA: time the LoRA variants, write their table"
    )
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    args.repeats = args.repeats or (30 if args.device == "cuda" else 7)
    if args.write_table and args.device != "cuda":
        parser.error("--write-table needs a GPU: the table chooses among Triton kernels")
    try:
        args.cases = list(chosen_cases(args))
    except ValueError as problem:
        parser.error(str(problem))
    if args.resume and args.csv:
        old = measured_before(args.csv, args.device)
        args.cases = [c for c in args.cases if not any(is_of(row, c) for row in old)]
    return args


def chosen_cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases that the options name, in the order of the shapes; by default all shapes.

    A given shape goes to each chosen kernel that it fits, or to the one before its colon.
    """
    defaults = cases.CUDA_SHAPES if args.device == "cuda" else cases.CPU_SHAPES
    for text in args.shapes or [f"{k}:{s}" for k in args.kernel for s in defaults[k]]:
        name, _, shape = text.rpartition(":")
        sizes = cases.parse_sizes(shape)
        fitting = [k for k in args.kernel if name in ("", k) and cases.fits(k, sizes)]
        if not fitting:
            raise ValueError(f"the shape {text} fits none of: {', '.join(args.kernel)}")
        for kernel in fitting:
            dtype = "fp32" if kernel in ("gae", "ppo_loss") else args.dtype
            for mode in (m for m in args.modes if m in cases.modes_of(kernel)):
                yield Case(kernel, sizes, dtype, mode)


def measured_before(path: Path, device: str) -> list[Row]:
    """The rows of a file, if there is one, of this commit on this device."""
    here = timing.commit(), timing.device_name(device)
    rows = read_rows(path) if path.exists() else []
    return [row for row in rows if (row["commit"], row["device"]) == here]


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all cases, printing and storing each as soon as it is done."""
    settings = Settings(args.device, args.repeats, args.seconds_each, tuple(args.against or ()))
    print(f"device: {timing.device_name(args.device)}, torch {torch.__version__}", flush=True)
    if args.device == "cpu":
        print("left out: our Triton kernels, which need CUDA; the torch forms are timed here")
    absent = {p.name: why for p in rivals.PROVIDERS if (why := p.missing(args.device))}
    if absent:
        print("left out:", "; ".join(f"{name} ({why})" for name, why in absent.items()))
    if args.write_table:
        from benchmarks import lora_variants

        lora_variants.write(args.repeats)
    rows: list[Row] = []
    started = time.perf_counter()
    for done, case in enumerate(args.cases):
        if args.budget and time.perf_counter() - started > args.budget:
            rest = ", ".join(c.label for c in args.cases[done:])
            print(f"left out: the budget of {args.budget:.0f} s is used up before {rest}")
            break
        rows += (measured := measure(case, settings))
        if args.csv:
            append(args.csv, measured)
        show(measured)
    return rows


# ---- one case


def measure(case: Case, settings: Settings) -> list[Row]:
    """The rows of one case: set up, warm up, look at accuracy and memory, then time together."""
    torch._dynamo.reset()
    sets = input_sets(case, settings.device)
    calls: dict[str, list[timing.Call]] = {}
    facts: dict[str, tuple[float, float | None, str]] = {}
    for p in providers_of(case, sets[0], settings):
        try:
            made = [p.make(inputs) for inputs in sets]
            wrong = warm_up(made, sets[0], p.name)
            facts[p.name] = timing.peak_mib(made[0], settings.device), wrong, rival_version(p)
            calls[p.name] = made
        except Exception as problem:  # a rival that fails is named, and the others go on
            print(f"left out of {case.label}: {p.name}: {one_line(problem)}", flush=True)
            if settings.device == "cuda":
                torch.cuda.synchronize()  # an error that outlasts the call ends the run here
                torch.cuda.empty_cache()
    timings = timing.time_interleaved(
        calls, settings.device, settings.repeats, settings.seconds_each
    )
    limit = timings["limit"].p50 if "limit" in timings else None
    return [
        row_of(case, name, taken, facts[name], limit, settings.device)
        for name, taken in timings.items()
    ]


def input_sets(case: Case, device: str) -> list[Inputs]:
    first = cases.prepare(case, device)
    more = 2 if device == "cuda" else int(cases.input_bytes(first) < SMALL_INPUTS)
    return [first, *(cases.prepare(case, device, seed) for seed in range(1, 1 + more))]


def providers_of(case: Case, inputs: Inputs, settings: Settings) -> Iterator[rivals.Provider]:
    for p in rivals.PROVIDERS:
        wanted = not settings.against or p.name in (*ALWAYS, *settings.against)
        if wanted and p.applies(inputs) and p.missing(settings.device) is None:
            yield p


def warm_up(calls: Sequence[timing.Call], inputs: Inputs, name: str) -> float | None:
    """Call all, some more on CUDA, and return the error of the first set's result."""
    wrong = None
    for turn in range(2 if inputs.device == "cuda" else 1):
        for i, call in enumerate(calls):
            result = call()
            if turn == i == 0 and name != "limit":
                wrong = cases.error(inputs, result)  # type: ignore[arg-type]
            del result
    return wrong


def one_line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:160]}"


def rival_version(p: rivals.Provider) -> str:
    return f"{p.package} {timing.version(p.package)}" if p.package else ""


def row_of(
    case: Case,
    name: str,
    taken: Timing,
    facts: tuple[float, float | None, str],
    limit: float | None,
    device: str,
) -> Row:
    """One measurement as a flat row of text."""
    done = cases.work(bare(case) if name == "limit" else case)
    peak, wrong, rival = facts
    return {
        "kernel": case.kernel, "provider": name, "mode": case.mode,
        "shape": json.dumps(case.shape), "dtype": case.dtype,
        "p20_ms": f"{taken.p20:.4f}", "p50_ms": f"{taken.p50:.4f}", "p80_ms": f"{taken.p80:.4f}",
        "cpu_ms": f"{taken.cpu:.4f}", "peak_mib": f"{peak:.2f}",
        "tflops": f"{done.flops / taken.p50 / 1e9:.4g}",
        "tbs": f"{done.bytes / taken.p50 / 1e9:.4g}",
        "percent_of_limit": "" if limit is None else f"{100 * limit / taken.p50:.1f}",
        "error": "" if wrong is None else f"{wrong:.2e}",
        "error_kind": "" if wrong is None else cases.error_kind(case),
        "repeats": str(taken.repeats), "commit": timing.commit(),
        "device": timing.device_name(device), "threads": str(torch.get_num_threads()),
        "torch": torch.__version__, "triton": timing.version("triton") or "", "rival": rival,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def bare(case: Case) -> Case:
    """The same without the low-rank products, which the limit leaves out."""
    return replace(case, sizes=(*case.sizes[:3], 0)) if "lora" in case.kernel else case


# ---- rows


def append(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_case(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows of the same kernel, shape, dtype, mode and device; of a provider the last one."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "shape", "dtype", "mode", "device"))
        groups.setdefault(key, {})[row["provider"]] = row
    yield from (list(group.values()) for group in groups.values())


def is_of(row: Row, case: Case) -> bool:
    named = row["kernel"], row["dtype"], row["mode"]
    return named == (case.kernel, case.dtype, case.mode) and json.loads(row["shape"]) == case.shape


def show(rows: Sequence[Row]) -> None:
    """A Markdown table of one case, fastest first, with each time over ours."""
    if not rows:
        return
    own = next((float(r["p50_ms"]) for r in rows if r["provider"] == "ours"), None)
    first = rows[0]
    print(f"\n{first['kernel']} {first['mode']} {first['shape']} {first['dtype']}")
    print(
        "| provider | ms (p20–p80) | × ours | CPU ms | peak MiB | TFLOP/s | TB/s "
        "| % of limit | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: float(r["p50_ms"])):
        ratio = "" if own is None else f"{float(r['p50_ms']) / own:.2f}"
        spread = f"{figure(r['p50_ms'])} ({figure(r['p20_ms'])}–{figure(r['p80_ms'])})"
        cells = (r["provider"], spread, ratio, figure(r["cpu_ms"]), r["peak_mib"], r["tflops"],
                 r["tbs"], r["percent_of_limit"], r["error"])  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    if kinds := {r["error_kind"] for r in rows} - {""}:
        print(f"error: {kinds.pop()}, against float64", flush=True)


def figure(text: str) -> str:
    return f"{float(text):.4g}"


if __name__ == "__main__":
    sys.exit(main())

"""What only a GPU can tell: the open checks, correctness on small shapes, and the goals.

    python benchmarks/gpu_checks.py --output DIR            the open checks, checks.csv
    python benchmarks/gpu_checks.py --small [--device cpu]  small odd shapes against float64
    python benchmarks/gpu_checks.py --goals --output DIR    G1 to G9, goals.md
    python benchmarks/gpu_checks.py --summary --output DIR  one page of what lies in DIR

`--small` is also what compute-sanitizer is run on, and what stands in for the tests where pytest is
missing. The goals use the rows of DIR/kernels.csv and measure what is not there. It is one file
because it is one program for rare hours on a GPU, whose sections share shapes and timing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see kernels.py

from benchmarks import cases, kernels, rivals, timing
from benchmarks.cases import Case
from ppo_nlu.tree import decode_graph

QWEN, LLAMA = (3584, 152064), (4096, 32000)  # H, V
LORA_SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # K, O
SECTION_SECONDS = {"path b": 40.0}  # the others: 20; each tile shape is compiled there


@dataclass(frozen=True)
class Check:
    """One measured fact."""

    name: str
    value: float
    unit: str
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--goals", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("."), metavar="DIR")
    parser.add_argument("--budget", type=float, default=90.0, metavar="S")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    args = parser.parse_args(argv)
    if args.summary:
        return summarize(args.output)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: these checks need a GPU")
        return 2
    if args.small:
        return small(args.device)
    if args.goals:
        from benchmarks import goals

        return goals.write(args.output, args.budget)
    return checks(args.output, args.sections, args.budget)


# ---- correctness on small shapes


SMALL_SHAPES = {
    "linear_logprobs": ["5x33x127", "130x64x5003"],
    "token_logprobs": ["1x1", "5x129", "3x5000"],
    "lora_linear": ["5x33x47x4", "130x64x80x16"],
    "lora_linear_grouped": ["130x64x80+16+16x16"],
    "gae": ["3x17", "2x1030"],
    "ppo_loss": ["3x7", "40x16"],
}


def small(device: str) -> int:
    """Each kernel at odd shapes in fp32 and bf16, forward and backward; 1 if one is too far off."""
    wrong = 0
    for case in small_cases():
        inputs = cases.prepare(case, device)
        ours = next(p for p in rivals.PROVIDERS if p.name == "ours" and case.kernel in p.kernels)
        try:
            found = cases.error(inputs, ours.make(inputs)())  # type: ignore[arg-type]
        except Exception as problem:
            found, note = float("inf"), kernels.one_line(problem)
        else:
            note = cases.error_kind(case)
        bar = error_bar(case)
        right = found <= bar
        wrong += not right
        print(f"{'ok' if right else 'WRONG'} {case.label}: {found:.1e} (bar {bar:.0e}) {note}")
    print(f"{wrong} wrong")
    return int(wrong > 0)


def small_cases() -> Iterator[Case]:
    for kernel, shapes in SMALL_SHAPES.items():
        dtypes = ("fp32",) if kernel in ("gae", "ppo_loss") else ("fp32", "bf16")
        for text in shapes:
            for dtype in dtypes:
                for mode in cases.modes_of(kernel):
                    yield Case(kernel, cases.parse_sizes(text), dtype, mode)


def error_bar(case: Case) -> float:
    """The accuracy bars: log-probs absolute, all else relative.

    A group's dx is rounded once more for each further member, hence its wider bar in bf16.
    """
    absolute = cases.error_kind(case).startswith("max abs")
    if case.dtype == "fp32":
        return 2e-5 if absolute else 1e-5
    if case.kernel == "lora_linear_grouped" and case.mode != "forward":
        return 6e-3
    return 1e-4 if absolute else 4e-3


# ---- the open checks


def checks(folder: Path, sections: Sequence[str], budget: float) -> int:
    """Run the sections in turn, each in its time; write checks.csv as they go."""
    folder.mkdir(parents=True, exist_ok=True)
    started, failed = time.perf_counter(), 0
    print(f"device: {timing.device_name('cuda')}, torch {torch.__version__}")
    with (folder / "checks.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["section", "check", "value", "unit", "note", "device", "commit"])
        where = timing.device_name("cuda"), timing.commit()
        for name in sections:
            left = budget - (time.perf_counter() - started)
            if left <= 0:
                print(f"left out: {name}, the budget of {budget:.0f} s is used up")
                continue
            try:
                limit = min(left, SECTION_SECONDS.get(name, 20.0))
                for check in within(SECTIONS[name](), limit, name):
                    print(
                        f"{name}: {check.name}: {check.value:.4g} {check.unit} {check.note}",
                        flush=True,
                    )
                    figures = check.name, f"{check.value:.6g}", check.unit, check.note
                    table.writerow([name, *figures, *where])
            except Exception as problem:
                failed += 1
                print(f"failed: {name}: {kernels.one_line(problem)}", flush=True)
            file.flush()
            torch.cuda.empty_cache()
    return int(failed > 0)


def within(found: Iterator[Check], seconds: float, name: str) -> Iterator[Check]:
    """The checks of a section until its time is over."""
    started = time.perf_counter()
    for check in found:
        yield check
        if time.perf_counter() - started > seconds:
            print(f"left out: the rest of {name}, its {seconds:.0f} s are over")
            return


def milliseconds(calls: dict[str, timing.Call], repeats: int = 15) -> dict[str, float]:
    """Medians of calls that are warmed up here and timed together."""
    for call in calls.values():
        for _ in range(2):
            call()
    timed = timing.time_interleaved({n: [c] for n, c in calls.items()}, "cuda", repeats, 2.0)
    return {name: t.p50 for name, t in timed.items()}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def limits() -> Iterator[Check]:
    """The two ceilings: a large product and a large copy, reads and writes counted."""
    a, b = random(8192, 8192), random(8192, 8192)
    ms = milliseconds({"mm": lambda: torch.mm(a, b)})["mm"]
    yield Check("mm 8192x8192x8192 bf16", 2 * 8192**3 / ms / 1e9, "TFLOP/s")
    source = torch.randint(256, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = milliseconds({"copy": lambda: target.copy_(source)})["copy"]
    yield Check("copy of 2 GiB", 2 * source.nbytes / ms / 1e9, "TB/s", "read and written")


def library_products() -> Iterator[Check]:
    """Check 1: fp32-out Z = h Wᵀ and D W by the library, by the rows of a chunk."""
    width, vocab = QWEN
    weight, wide = random(vocab, width), {"out_dtype": torch.float32}
    for rows in (256, 512, 1024):
        hidden = random(rows, width)
        z = torch.empty(rows, vocab, device="cuda")
        d = random(rows, vocab)
        calls: dict[str, timing.Call] = {
            "bf16 out": partial(torch.mm, hidden, weight.t()),
            "D W": partial(torch.mm, d, weight),
            "fp32 out": partial(torch.mm, hidden, weight.t(), **wide),
            "fp32 into a buffer": partial(torch.mm, hidden, weight.t(), **wide, out=z),
        }
        for name, ms in milliseconds(_callable(calls)).items():
            rate = 2 * rows * width * vocab / ms / 1e9
            yield Check(f"{name}, M={rows} N={vocab} K={width}", rate, "TFLOP/s", f"{ms:.3f} ms")


def _callable(calls: dict[str, timing.Call]) -> dict[str, timing.Call]:
    """Those that this version of torch can do."""
    able = {}
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, TypeError) as problem:
            print(f"left out: {name}: {kernels.one_line(problem)}")
        else:
            able[name] = call
    return able


def row_kernel() -> Iterator[Check]:
    """Check 2: the row kernel on fp32 and bf16 logits."""
    from ppo_nlu.kernels import token_logprobs as kernel

    rows, vocab = 8192, 151936
    targets, ones = torch.randint(vocab, (rows,), device="cuda"), torch.ones(rows, device="cuda")
    out = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        logits = random(rows, vocab, dtype=dtype)
        stats = kernel.empty_stats(rows, torch.float32, logits.device)
        kernel.launch_forward(logits, targets, 1.0, stats)
        calls: dict[str, timing.Call] = {
            "forward": partial(kernel.launch_forward, logits, targets, 1.0, stats),
            "backward": partial(
                kernel.launch_backward,
                logits,
                targets,
                temperature=1.0,
                stats=stats,
                grad_logprobs=ones,
                grad_entropy=None,
                out=out,
            ),
        }
        for name, ms in milliseconds(calls).items():
            moved = logits.nbytes + (out.nbytes if name == "backward" else 0)
            kind = f"{name} {rows}x{vocab} {str(dtype)[6:]}"
            yield Check(kind, moved / ms / 1e9, "TB/s", f"{ms:.3f} ms")


def triton_product() -> Iterator[Check]:
    """Check 3: our Triton product, with and without the low-rank term, over the library's time."""
    from ppo_nlu.kernels.lora_gemm import gemm

    for features, outputs in LORA_SHAPES:
        weight, b = random(outputs, features), random(outputs, 16)
        for rows in (8192, 2048):
            x, low = random(rows, features), random(rows, 16)
            dy, a = random(rows, outputs), random(16, features)
            calls: dict[str, timing.Call] = {
                "cuBLAS NT": partial(torch.mm, x, weight.t()),
                "ours NT": partial(gemm, x, weight, None, x[:, :0], weight[:, :0]),
                "ours NT r=16": partial(gemm, x, weight, None, low, b),
                "cuBLAS NN": partial(torch.mm, dy, weight),
                "ours NN r=16": partial(gemm, dy, weight.t(), None, low, a.t()),
            }
            times = milliseconds(calls)
            for name, ms in times.items():
                bare = times["cuBLAS NN" if "NN" in name else "cuBLAS NT"]
                rate = 2 * rows * features * outputs / ms / 1e9
                note = f"{rate:.0f} TFLOP/s, {ms:.4f} ms"
                yield Check(f"{name} {rows}x{features}x{outputs}", bare / ms, "of cuBLAS", note)


def alignment() -> Iterator[Check]:
    """Check 4: one product over K + 8, 16, 64 and 128 columns, beside K alone."""
    for features, outputs in LORA_SHAPES:
        calls: dict[str, timing.Call] = {}
        for extra in (0, 8, 16, 64, 128):
            x, w = random(8192, features + extra), random(outputs, features + extra)
            calls[f"K+{extra}"] = partial(torch.mm, x, w.t())
        times = milliseconds(calls)
        for name, ms in times.items():
            label = f"{name} 8192x{features}x{outputs}"
            yield Check(label, ms / times["K+0"], "x of K", f"{ms:.4f} ms")


def path_b() -> Iterator[Check]:
    """Check 5: the fused online softmax by tile shape, flattened or not."""
    from ppo_nlu.kernels import online_logprobs as kernel

    default = kernel.tiles
    width, vocab = QWEN
    weight = random(vocab, width)
    try:
        for rows in (8192, 1024, 256):
            hidden, targets = random(rows, width), torch.randint(vocab, (rows,), device="cuda")
            for shape in dict.fromkeys(_tile_choices(kernel, default(rows, 2))):
                kernel.tiles = lambda *_, s=shape: s
                call = partial(kernel.launch_online, hidden, weight, None, targets, 1.0)
                for ms in milliseconds(_callable({"online": call}), repeats=10).values():
                    own = ", the default" if shape == default(rows, 2) else ""
                    yield Check(
                        f"T={rows} {'x'.join(str(int(n)) for n in shape)}",
                        2 * rows * width * vocab / ms / 1e9,
                        "TFLOP/s",
                        f"{ms:.3f} ms; rows x vocab x width x warps x stages x flatten{own}",
                    )
    finally:
        kernel.tiles = default


def paths() -> Iterator[Check]:
    """Log-probs without a gradient: chunks of logits against the fused kernel."""
    from ppo_nlu.kernels.linear_logprobs import linear_logprobs

    width, vocab = QWEN
    weight = random(vocab, width)
    for rows in (8192, 1024, 256, 16):
        hidden, targets = random(rows, width), torch.randint(vocab, (rows,), device="cuda")
        calls: dict[str, timing.Call] = {
            name: partial(linear_logprobs, hidden, weight, targets, path=name)
            for name in ("chunks", "online")
        }
        for name, ms in milliseconds(calls, repeats=10).items():
            rate = 2 * rows * width * vocab / ms / 1e9
            yield Check(f"{name} T={rows}, no gradient", rate, "TFLOP/s", f"{ms:.3f} ms")


def _tile_choices(kernel: Any, own: Any) -> list[Any]:
    sizes = [(128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3)]
    return [own, *(kernel.Tiles(*s, flatten) for s in sizes for flatten in (False, True))]


def decode() -> Iterator[Check]:
    """LoRA layers at decode sizes inside a CUDA graph: the same bits, and time over the GEMM's."""
    launched = {}
    for features, outputs in LORA_SHAPES:
        for rows in (1, 16, 64):
            case = Case("lora_linear", (rows, features, outputs, 16), "bf16", "forward")
            # Eight sets: together larger than the L2 cache, so that W comes from memory.
            sets = [cases.prepare(case, "cuda", seed) for seed in range(8)]
            calls = [rivals.our_lora_linear(s) for s in sets]
            eager = [call()[0] for call in calls]
            graph, results = timing.captured(calls)
            replayed = [result[0] for result in results]
            for out in replayed:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            same = all(map(torch.equal, replayed, eager))
            label = f"{rows}x{features}x{outputs}"
            yield Check(f"{label} replay equals eager", float(same), "of 1")
            ours = timing.graph_ms(calls)
            bare = timing.graph_ms([_bare(s) for s in sets])
            yield Check(f"{label} in a graph", ours / bare, "x of the GEMM",
                        f"{1e3 * ours:.1f} us against {1e3 * bare:.1f}")  # fmt: skip
            launched[label] = calls[0]
    for label, call in launched.items():
        yield Check(f"{label} launches", float(timing.launches(call)), "kernels")


def _bare(inputs: cases.Inputs) -> Callable[[], torch.Tensor]:
    x, weight = inputs["x"].detach(), inputs["weights"][0]
    return lambda: torch.mm(x, weight.t())


def failed_capture() -> Iterator[Check]:
    """A recording that fails on purpose (an answer is waited for, memory runs out) must leave the
    allocator and the next recording as they were."""
    recordings = decode_graph.CudaRecordings(torch.device("cuda"))
    x = torch.ones(1024, device="cuda")

    def waits() -> torch.Tensor:
        return x * float((x * 2).sum().item())

    def too_much() -> torch.Tensor:
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    for name, call in (("a wait for the device", waits), ("no memory", too_much)):
        try:
            recordings().record(call)
            raised = "nothing"
        except RuntimeError as error:  # out of memory is one of these
            raised = type(error).__name__
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            torch.empty(1 << 24, device="cuda").fill_(1.0)
        torch.cuda.synchronize()
        grown = torch.cuda.memory_allocated() - before
        yield Check(f"memory held after {name}", float(grown), "B", f"raised {raised}")
        graph = recordings()
        out = graph.record(lambda: x * 3)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        yield Check(f"a recording after {name}", float(bool((out == 3).all())), "of 1")
        del graph, out  # as a rollout's is before the next is made
        graph = recordings()
        out = graph.record(lambda: x * 5)
        graph.replay()
        torch.cuda.synchronize()
        yield Check(f"and one after that is gone, {name}", float(bool((out == 5).all())), "of 1")


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "limits": limits,
    "library products": library_products,
    "row kernel": row_kernel,
    "triton product": triton_product,
    "alignment": alignment,
    "path b": path_b,
    "paths": paths,
    "decode": decode,
    "failed capture": failed_capture,
}


# ---- one page


def summarize(folder: Path) -> int:
    """summary.md: stages, goals, checks and the tables of all rows that lie in the folder."""
    parts = ["# Kernels on a GPU"]
    for title, name in (("Stages", "stages.csv"), ("Checks", "checks.csv")):
        path = folder / name
        if path.exists():
            parts.append(f"## {title}\n\n{_markdown(path)}")
    if (folder / "goals.md").exists():
        parts.insert(2 if len(parts) > 1 else 1, (folder / "goals.md").read_text())
    if (folder / "kernels.csv").exists():
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            for group in kernels.by_case(kernels.read_rows(folder / "kernels.csv")):
                kernels.show(group)
        parts.append(f"## Times\n{text.getvalue()}")
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written: {folder / 'summary.md'}")
    return 0


def _markdown(path: Path) -> str:
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    sys.exit(main())

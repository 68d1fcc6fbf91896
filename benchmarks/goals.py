"""The goals G1 to G9 of the kernels on an H100: measured value, bar, met or not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cases, kernels, rivals, timing
from benchmarks.cases import Case
from benchmarks.kernels import Row, Settings

BOTH = "forward+backward"
QWEN, QWEN_FEW, LLAMA_FEW = "8192x3584x152064", "256x3584x152064", "256x4096x32000"
SQUARE = "8192x4096x4096x16"


@dataclass(frozen=True)
class Goal:
    """`met` is None where there was nothing to compare with."""

    name: str
    what: str
    measured: str
    bar: str
    met: bool | None


class Rows:
    """Measured rows of this commit and GPU; what is missing is measured when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = kernels.measured_before(path, "cuda")

    def of(self, kernel: str, shape: str, mode: str) -> dict[str, Row]:
        """Provider -> row of a case."""
        dtype = "fp32" if kernel in ("gae", "ppo_loss") else "bf16"
        case = Case(kernel, cases.parse_sizes(shape), dtype, mode)
        found = self._find(case)
        if "ours" not in found:
            against = ("compile", "naive", "addmm", "peft", "peft-fp32-adapters", "python-loop")
            taken = kernels.measure(case, Settings("cuda", 15, 2.0, against))
            kernels.append(self.path, taken)
            self.rows += taken
            found = self._find(case)
        return found

    def _find(self, case: Case) -> dict[str, Row]:
        wanted = [r for r in kernels.by_case(self.rows) if kernels.is_of(r[0], case)]
        return {row["provider"]: row for group in wanted for row in group}


def write(folder: Path, budget: float) -> int:
    """goals.md; goals not reached within the budget, or that fail, are named there too."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, started = Rows(folder / "kernels.csv"), time.perf_counter()
    found: list[Goal] = []
    for name, measure in GOALS.items():
        if time.perf_counter() - started > budget:
            found.append(Goal(name, "left out, the budget is used up", "", "", None))
            continue
        try:
            for goal in measure(rows):
                found.append(goal)
        except Exception as problem:
            found.append(Goal(name, kernels.one_line(problem), "", "", None))
    device = timing.device_name("cuda")
    text = f"{markdown(found)}\nMeasured on: {device}. The bars were set for an H100.\n"
    (folder / "goals.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def markdown(goals: list[Goal]) -> str:
    lines = ["## Goals", "", "| goal | what | measured | bar | met |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "NO", None: "–"}
    lines += [f"| {g.name} | {g.what} | {g.measured} | {g.bar} | {words[g.met]} |" for g in goals]
    return "\n".join(lines) + "\n"


def ms(rows: dict[str, Row], provider: str) -> float | None:
    return float(rows[provider]["p50_ms"]) if provider in rows else None


def within(
    name: str, what: str, value: float | None, bar: float, unit: str = "×", most: bool = True
) -> Goal:
    """A goal that is met by at most (or at least) the bar."""
    sign = "≤" if most else "≥"
    met = None if value is None else (value <= bar if most else value >= bar)
    shown = "not measured" if value is None else f"{value:.3g} {unit}"
    return Goal(name, what, shown, f"{sign} {bar:g} {unit}", met)


def over(rows: dict[str, Row], ours: str, other: str) -> float | None:
    """The time of one provider over another's."""
    a, b = ms(rows, ours), ms(rows, other)
    return None if a is None or b is None else a / b


def beats(name: str, rows: dict[str, Row], bars: dict[str, float]) -> Iterator[Goal]:
    """The rivals' times over ours, for those that were measured."""
    for provider, bar in bars.items():
        ratio = over(rows, provider, "ours")
        if ratio is not None:
            yield within(name, f"{provider} over ours", ratio, bar, most=False)


def forward_goal(rows: Rows) -> Iterator[Goal]:
    found = rows.of("linear_logprobs", QWEN, "forward")
    yield within("G1", f"forward {QWEN}, over compile", over(found, "ours", "compile"), 1.10)
    peak = float(found["ours"]["peak_mib"]) * 2**20 / 1e6
    yield within("G1", "its peak (path A; path B: 16 MB)", peak, 320, "MB")
    yield Goal("G1", "over the bare product", f"{over(found, 'ours', 'limit'):.3g} ×", "", None)


def backward_goal(rows: Rows) -> Iterator[Goal]:
    found = rows.of("linear_logprobs", QWEN, BOTH)
    what = f"forward and backward {QWEN}, over compile"
    yield within("G2", what, over(found, "ours", "compile"), 1.06)
    yield within("G2", "its peak", float(found["ours"]["peak_mib"]) * 2**20 / 1e6, 400, "MB")
    bars = {"liger-flsce": 1.5, "linear_cross_entropy": 1.3, "liger-ppo": 5.0}
    yield from beats("G2", found, bars)


def entropy_goal(rows: Rows) -> Iterator[Goal]:
    plain = ms(rows.of("linear_logprobs", QWEN, BOTH), "ours")
    found = rows.of("linear_logprobs", QWEN, f"{BOTH}+entropy")
    taken = ms(found, "ours")
    ratio = taken / plain if taken and plain else None
    yield within("G3", "with the entropy's gradient, over G2's time", ratio, 1.55)
    yield from beats("G3", found, {"liger-flsce": 1.0})


def few_tokens_goal(rows: Rows) -> Iterator[Goal]:
    """The stream of W at the rate of a copy, whose reads and writes count alike."""
    rate = copy_rate()
    for shape in (QWEN_FEW, LLAMA_FEW):
        found = rows.of("linear_logprobs", shape, "forward")
        _, width, vocab = cases.parse_sizes(shape)
        stream = 2 * width * vocab / rate / 1e9  # type: ignore[operator]
        taken = ms(found, "ours")
        what = f"forward {shape}, over the stream of W ({stream:.3f} ms)"
        yield within("G4", what, None if taken is None else taken / stream, 1.2)
        what = f"forward {shape}, over the bare product"
        yield within("G4", what, over(found, "ours", "limit"), 1.2)


def copy_rate() -> float:
    """TB/s of a copy of 1 GiB, reads and writes counted."""
    import torch

    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    taken = timing.time_interleaved({"copy": [lambda: target.copy_(source)]}, "cuda", 15)
    return 2 * source.nbytes / taken["copy"].p50 / 1e9


def row_kernel_goal(rows: Rows) -> Iterator[Goal]:
    found = rows.of("token_logprobs", "8192x151936", "forward")["ours"]
    yield within(
        "G5", "logits to log-prob and entropy, 8192x151936 bf16", float(found["p50_ms"]), 0.89, "ms"
    )
    yield within("G5", "its rate", float(found["tbs"]), 2.8, "TB/s", most=False)


def accuracy_goal(rows: Rows) -> Iterator[Goal]:
    found = rows.of("linear_logprobs", QWEN, "forward")
    wrong = float(found["ours"]["error"])
    yield within("G6", "max error of log-prob, logits to ±20", wrong, 1e-4, "")
    for name in ("naive", "liger-ppo", "trl", "linear_cross_entropy", "cce"):
        if name in found:
            yield Goal("G6", f"the same of {name}", found[name]["error"], "", None)


def lora_goal(rows: Rows) -> Iterator[Goal]:
    both, forward = rows.of("lora_linear", SQUARE, BOTH), rows.of("lora_linear", SQUARE, "forward")
    yield within("G7", f"LoRA {SQUARE} forward and backward, over two products",
                 over(both, "ours", "limit"), 1.15)  # fmt: skip
    yield within("G7", "forward, over one product", over(forward, "ours", "limit"), 1.10)
    bars = {"peft": 1.30, "peft-fp32-adapters": 2.0, "addmm": 1.10, "compile": 1.15, "naive": 1.27}
    yield from beats("G7", both, bars)


def decode_goal(rows: Rows) -> Iterator[Goal]:
    for text in ("16x4096x4096x16", "64x4096x11008x16"):
        case = Case("lora_linear", cases.parse_sizes(text), "bf16", "forward")
        sets = [cases.prepare(case, "cuda", seed) for seed in range(8)]
        calls = [rivals.our_lora_linear(s) for s in sets]
        bare = [rivals.bare_products(s) for s in sets]
        ratio = timing.graph_ms(calls) / timing.graph_ms(bare)
        yield within("G8", f"LoRA {text} in a CUDA graph, over the product", ratio, 1.10)
        yield within("G8", f"its launches at {text}", timing.launches(calls[0]), 2, "kernels")


def launch_bound_goal(rows: Rows) -> Iterator[Goal]:
    """Time inside a graph of twenty calls, so that the gaps between launches do not count."""
    for kernel, shape, mode, bar in (
        ("ppo_loss", "512x16", BOTH, 20.0),
        ("gae", "512x1024", "forward", 15.0),
    ):
        case = Case(kernel, cases.parse_sizes(shape), "fp32", mode)
        inputs = cases.prepare(case, "cuda")
        make = rivals.our_gae if kernel == "gae" else rivals.our_ppo_loss
        taken = timing.graph_ms([make(inputs)] * 20)
        yield within("G9", f"{kernel} {shape} {mode}, in a graph", 1e3 * taken, bar, "us")
        if kernel == "gae":
            loop = ms(rows.of("gae", shape, "forward"), "python-loop")
            ratio = None if loop is None else loop / taken
            yield within("G9", "the Python loop's time over it", ratio, 1000, most=False)


GOALS: dict[str, Callable[[Rows], Iterator[Goal]]] = {
    "G1": forward_goal,
    "G2": backward_goal,
    "G3": entropy_goal,
    "G4": few_tokens_goal,
    "G5": row_kernel_goal,
    "G6": accuracy_goal,
    "G7": lora_goal,
    "G8": decode_goal,
    "G9": launch_bound_goal,
}

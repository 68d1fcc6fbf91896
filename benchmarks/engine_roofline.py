"""A training step at real size beside its roofline, and beside TRL where it is installed.

    python benchmarks/engine_roofline.py [--shapes llama2-7b qwen2.5-0.5b qwen2.5-7b]
        [--device cuda] [--prompts 16] [--length 130] [--shared 70] [--tokens 16] [--csv FILE]

Random weights in bf16, made on the device. The roofline of a step is the sum over its passes of
the longer of two times: its FLOPs at the measured rate of a large matrix product, and its bytes
(weights, keys and values, optimizer) at the measured rate of a large copy. TRL takes part where
this interpreter can import it, its PPO where the release still has it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not benchmarks/: see kernels.py

from benchmarks import engine_cells, engine_setup, engines
from benchmarks.engine_cells import Cell

RANK = 16
SHAPES = ("llama2-7b", "qwen2.5-0.5b", "qwen2.5-7b")
COLUMNS = (
    "shape", "engine", "version", "method", "device", "dtype", "B", "G", "length", "shared",
    "tokens", "N", "step_s", "answers_per_s", "roofline_s", "times_roofline", "step_tflop",
    "percent_of_gemm", "gemm_tflops", "copy_tbs", "peak_gb", "torch", "transformers", "commit",
    "date",
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """A forward, or a forward with its backward, that a step makes `times` times."""

    name: str
    times: int
    flops: float
    bytes: float

    def seconds(self, gemm: float, copy: float) -> float:
        """The least seconds that it takes at `gemm` FLOP/s and `copy` bytes/s."""
        return self.times * max(self.flops / gemm, self.bytes / copy)


@dataclass(frozen=True)
class Size:
    """Weights and widths of a model that the counts need."""

    blocks: int  # weights of all blocks
    head: int
    lora: int  # trained weights
    attention: int  # layers x heads x head size
    cache: int  # numbers that a token leaves: layers x 2 x KV heads x head size

    @staticmethod
    def of(shape: Mapping[str, Any]) -> Size:
        """From a row of engine_setup.SHAPES; LoRA on all linears of the blocks."""
        width, inner = shape["hidden_size"], shape["intermediate_size"]
        layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
        keys = width // heads * shape["num_key_value_heads"]
        linears = [(width, width)] * 2 + [(width, keys)] * 2 + [(width, inner)] * 3
        return Size(
            layers * sum(a * b for a, b in linears),
            width * shape["vocab_size"],
            layers * RANK * sum(a + b for a, b in linears),
            layers * width,
            layers * 2 * keys,
        )


def passes(
    size: Size, cell: Cell, epochs: int = 4, number: int = 2, recompute: bool = True
) -> list[Pass]:
    """What a step of PPO or GRPO must run when each distinct token is run once.

    FLOPs: 2 for each weight and token forward (blocks) or answer position (head), 4 for each pair
    of a token with one it attends to and each of `attention`; backward as much again for frozen
    weights, twice as much for LoRA and attention. Bytes: the weights once a pass and direction,
    keys and values read in decoding, and of AdamW seven fp32 numbers a trained weight.
    `recompute`: old log-probs by a pass of their own, as low precision needs. `number` is the
    bytes of a weight.
    """
    prompts, answer = cell.prompts, cell.tokens
    shared = cell.length * cell.shared // 100
    own, rows = cell.length - shared, cell.prompts * cell.group
    tokens = shared + prompts * own
    pairs = _triangle(0, shared) + prompts * _triangle(shared, own)
    # The last token of an answer is predicted, not run.
    whole = tokens + rows * (answer - 1)
    whole_pairs = pairs + rows * _triangle(cell.length, answer - 1)
    weights = number * (size.blocks + size.head)

    def forward(count: float, positions: float, seen: float, lora: bool = True) -> float:
        inner = size.blocks + size.lora * lora
        return 2 * (count * inner + positions * size.head) + 4 * seen * size.attention

    def both(count: float, positions: float, seen: float) -> float:
        frozen = 2 * (count * size.blocks + positions * size.head)
        trained = 4 * count * size.lora + 8 * seen * size.attention
        return forward(count, positions, seen) + frozen + trained

    kept = shared + prompts * own + rows * answer / 2  # tokens whose keys and values are read
    found = [
        Pass("prefill", 1, forward(tokens, prompts, pairs), weights),
        Pass("decode", answer - 1, forward(rows, rows, rows * (cell.length + answer / 2)),
             weights + number * size.cache * kept),
    ]  # fmt: skip
    if recompute:
        found.append(Pass("score", 1, forward(whole, rows * answer, whole_pairs), weights))
    found.append(Pass("reference", 1, forward(whole, rows * answer, whole_pairs, False), weights))
    found.append(
        Pass("update", epochs, both(whole, rows * answer, whole_pairs),
             2 * weights + 7 * 4 * size.lora)
    )  # fmt: skip
    return found


def _triangle(before: int, length: int) -> int:
    """Pairs of `length` tokens in a row with all up to themselves, behind `before` others."""
    return length * before + length * (length + 1) // 2


# ---- the machine


def rates(device: str, dtype: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a large copy."""
    import torch

    kind = getattr(torch, dtype)
    side, count = (8192, 2**29) if device == "cuda" else (768, 2**24)
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    gemm = 2 * side**3 / best(lambda: a @ b, device)
    source = torch.empty(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = 2 * 2 * count / best(lambda: target.copy_(source), device)
    return gemm, copy


def best(call: Any, device: str, repeats: int = 8) -> float:
    """The shortest seconds of a call."""
    import torch

    found = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[2:])


# ---- the program


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    gemm, copy = rates(args.device, args.dtype)
    print(
        f"{args.dtype} product {gemm / 1e12:.1f} TFLOP/s, copy {copy / 1e12:.2f} TB/s", flush=True
    )
    status = 0
    for cell in cells(args):
        if args.budget and time.monotonic() - began > args.budget:
            print(f"{cell.model}, {cell.engine} {cell.method}: left out, no time")
            continue
        try:
            row = measure(cell, args, gemm, copy)
        except subprocess.CalledProcessError:
            status = 1 if cell.engine == "ours" else status
            continue
        append(args.csv, row)
        print(
            f"{cell.model}, {cell.engine} {cell.method} {row['version']} {row['step_s']} s a step,"
            f" {row['times_roofline']}x the roofline of {row['roofline_s']} s, "
            f"{row['percent_of_gemm']} % of the product's rate, {row['peak_gb']} GB",
            flush=True,
        )
    print("\n".join(verdict(read(args.csv))))
    return status


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(engine_setup.SHAPES), default=SHAPES)
    parser.add_argument("--methods", nargs="+", choices=["ppo", "grpo"], default=["ppo", "grpo"])
    parser.add_argument("--engines", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=16, help="of PPO; GRPO: 8 answers to each")
    parser.add_argument("--length", type=int, default=130, help="tokens of a prompt")
    parser.add_argument("--shared", type=int, default=70, help="percent of it that is the same")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--steps", type=int, default=2, help="N: 2N minus N steps are timed")
    parser.add_argument("--budget", type=float, metavar="S", help="start nothing after S seconds")
    parser.add_argument("--csv", type=Path, default=Path("engines_gpu.csv"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of our config")
    args = parser.parse_intermixed_args(argv)
    if not 0 <= args.shared < 100 or args.length < 8:
        parser.error("--shared is a percentage below 100, --length at least 8 tokens")
    return args


def cells(args: argparse.Namespace) -> list[Cell]:
    """Ours, then TRL where it is installed, shape by shape; PPO first."""
    found = []
    for method in args.methods:
        group = engine_cells.GROUP if method == "grpo" else 1
        for shape in args.shapes:
            for engine in args.engines:
                if engine == "ours" or rival(method):
                    cell = Cell(
                        part="gpu",
                        engine=engine,
                        method=method,
                        model=shape,
                        task="synthetic",
                        prompts=args.prompts,
                        group=group,
                        tokens=args.tokens,
                        steps=args.steps,
                        length=args.length,
                        shared=args.shared,
                        options=tuple(args.overrides),
                    )
                    found.append(cell)
    return found


def rival(method: str) -> bool:
    """Whether TRL with this method can be imported here."""
    name = "trl.experimental.ppo" if method == "ppo" else "trl"
    try:
        return importlib.util.find_spec(name) is not None and _has("peft") and _has("datasets")
    except ImportError:
        return False


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def measure(cell: Cell, args: argparse.Namespace, gemm: float, copy: float) -> dict[str, Any]:
    """One cell in a process of its own, as a row."""
    with tempfile.TemporaryDirectory(prefix="engines-") as work:
        job = asdict(cell) | {
            "kind": cell.method,
            "shape": cell.model,
            "device": args.device,
            "dtype": args.dtype,
            "threads": 0,
            "profile": False,
            "out": str(Path(work) / "result.json"),
        }
        rows = engine_setup.synthetic(cell, 2 * cell.steps)
        name = f"{cell.model}, {cell.engine} {cell.method}"
        result, _ = engines.run_job(job, rows, Path(sys.executable), Path(work), name, True)
    step = engine_cells.between(result["clocks"], cell.steps, 1) / cell.steps
    counted = passes(
        Size.of(engine_setup.SHAPES[cell.model]),
        cell,
        4 if cell.method == "ppo" else 1,
        2 if args.dtype == "bfloat16" else 4,
        args.dtype != "float32",
    )
    limit = sum(p.seconds(gemm, copy) for p in counted)
    flops = sum(p.times * p.flops for p in counted)
    return {
        "shape": cell.model, "engine": cell.engine, "version": result.get("version", ""),
        "method": cell.method, "device": device_name(args.device), "dtype": args.dtype,
        "B": cell.answers, "G": cell.group, "length": cell.length, "shared": cell.shared,
        "tokens": cell.tokens, "N": cell.steps, "step_s": f"{step:.4f}",
        "answers_per_s": f"{cell.answers / step:.2f}", "roofline_s": f"{limit:.4f}",
        "times_roofline": f"{step / limit:.2f}", "step_tflop": f"{flops / 1e12:.3f}",
        "percent_of_gemm": f"{100 * flops / step / gemm:.1f}",
        "gemm_tflops": f"{gemm / 1e12:.2f}", "copy_tbs": f"{copy / 1e12:.3f}",
        "peak_gb": f"{(result['peak_mb'] - result['import_mb']) / 1024:.2f}",
        "torch": result["torch"], "transformers": result["transformers"],
        "commit": engines.commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def device_name(device: str) -> str:
    from benchmarks import timing

    return timing.device_name(device)


def append(path: Path, row: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if new:
            table.writeheader()
        table.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def verdict(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The two bars of a GPU from the newest rows: within 2x of the roofline, 5x TRL's PPO."""
    last = {(r["shape"], r["engine"]): r for r in rows if r["method"] == "ppo"}
    found = []
    for shape in dict.fromkeys(shape for shape, _ in last):
        ours, theirs = last.get((shape, "ours")), last.get((shape, "trl"))
        if ours:
            times = float(ours["times_roofline"])
            found.append(f"{shape}: {times:.2f}x the roofline, asked ≤ 2x: {_word(times <= 2)}")
        if ours and theirs:
            times = float(theirs["step_s"]) / float(ours["step_s"])
            found.append(f"{shape}: {times:.1f}x TRL's PPO, asked ≥ 5x: {_word(times >= 5)}")
    return found


def _word(met: bool) -> str:
    return "met" if met else "not met"


if __name__ == "__main__":
    sys.exit(main())

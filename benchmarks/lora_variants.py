"""Time the forms of a LoRA layer on a GPU and write kernels/lora_table.json, which chooses one.

A form gets a row only where it is faster than the safe one by more than the spread of both (its
80th percentile under the other's 20th) and as exact. `extended` is timed on a plain weight, which
it copies in every call, since that is what the table is asked for; on a weight that has room for B
it is timed for information.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks import cases, rivals, timing
from benchmarks.cases import SCALING, Case, Inputs
from benchmarks.timing import Timing

WORST = 4e-3  # relative Frobenius; one rounding to bf16 is 2e-3
ROOMY = "extended, own buffer"


def write(repeats: int = 20, shapes: Iterable[str] | None = None, dtype: str = "bf16") -> None:
    """Measure the shapes and put the winners into the table, each as soon as it is known."""
    from ppo_nlu.kernels import lora_linear as kernel

    for text in shapes or cases.CUDA_SHAPES["lora_linear"]:
        sizes = cases.parse_sizes(text)
        forward = _times(Case("lora_linear", sizes, dtype, "forward"), repeats)
        backward = _times(Case("lora_linear", sizes, dtype, "forward+backward"), repeats)
        t, k, o, rank = sizes
        safe = "decode" if "decode" in forward else "cublas"
        chosen = faster(forward, safe), faster(backward, "cublas")
        print(f"{text}: forward {_told(forward)} → {chosen[0]};", end=" ")
        print(f"with backward {_told(backward)} → {chosen[1]}", flush=True)
        key = kernel.table_key(timing.device_name("cuda"), cases.DTYPES[dtype], k, o, rank, t)
        times = forward | {f"dx {name}": taken for name, taken in backward.items()}
        kernel.write_table([_row(key, chosen, times)])


def faster(times: dict[str, Timing], safe: str) -> str:
    """The fastest form of the table that beats the safe one beyond the spread, or the safe one."""
    bar = times[safe].p20
    better = {n: t.p50 for n, t in times.items() if t.p80 < bar and n not in (safe, ROOMY)}
    return min(better, key=lambda name: better[name]) if better else safe


def _times(case: Case, repeats: int) -> dict[str, Timing]:
    """The forms that are right at this shape, timed together over three sets of inputs."""
    sets = [cases.prepare(case, "cuda", seed) for seed in range(3)]
    calls = {}
    for name, made in _forms(case, sets):
        try:
            wrong = cases.error(sets[0], made[0]())  # type: ignore[arg-type]
            for call in made:
                call()
        except Exception as problem:
            print(f"left out of {case.label}: {name}: {type(problem).__name__}: {problem}")
            torch.cuda.synchronize()
            continue
        if wrong > WORST:
            print(f"left out of {case.label}: {name}: error {wrong:.1e}")
            continue
        calls[name] = made
    return timing.time_interleaved(calls, "cuda", repeats, seconds_each=2.0)


def _forms(case: Case, sets: list[Inputs]) -> Iterator[tuple[str, list[timing.Call]]]:
    """Forward: each variant; with backward: each way to form dx after the library's forward."""
    from ppo_nlu.kernels import lora_linear as kernel
    from ppo_nlu.kernels import lora_table

    if case.mode != "forward":
        for name in kernel.BACKWARDS:
            yield name, [_call(s, variant="cublas", backward=name) for s in sets]
        return
    few = lora_table.decodes(cases.DTYPES[case.dtype], case.shape["r"], case.shape["T"])
    for name in kernel.VARIANTS:
        if name != "decode" or few:
            yield name, [_call(s, variant=name) for s in sets]
    for s in sets:
        s.tensors["roomy"] = kernel.extended_weight(s["weights"][0], case.shape["r"])
    yield ROOMY, [_call(s, "roomy", variant="extended") for s in sets]


def _call(inputs: Inputs, weight: str = "weights", **form: str) -> timing.Call:
    from ppo_nlu.kernels import lora_linear as kernel

    w = inputs["weights"][0] if weight == "weights" else inputs[weight]
    args = inputs["x"], w, None, inputs["lora_as"][0], inputs["lora_bs"][0], SCALING
    return rivals.differentiated(inputs, lambda: (kernel.lora_linear(*args, **form),))


def _told(times: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {t.p50:.4f} ms" for name, t in times.items())


def _row(key: tuple[Any, ...], chosen: tuple[str, str], times: dict[str, Timing]) -> dict[str, Any]:
    names = ("device", "dtype", "k", "o", "rank", "rows")
    return dict(zip(names, key, strict=True)) | {
        "variant": chosen[0],
        "backward": chosen[1],
        "ms": {name: round(t.p50, 4) for name, t in times.items()},
        "commit": timing.commit(),
        "torch": torch.__version__,
        "triton": timing.version("triton"),
        "date": datetime.date.today().isoformat(),
    }

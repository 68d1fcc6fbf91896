"""What every shipped launch compiles to for A100 and H100, with no GPU: limits, spills, MMA.

The launches themselves come from the kernel modules, `ppo_nlu.kernels.compile_report` records them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for Linux only"),
]
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ppo_nlu.kernels import compile_report  # noqa: E402

LAUNCHES = compile_report.shipped()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda x: f"{x.label}-{x.kernel.__name__}")
def test_every_shipped_launch_fits_and_uses_the_tensor_cores(launch, arch: int) -> None:
    read = compile_report.read_out(launch, arch)
    assert not read.faults()
    multiplies = "tl.dot" in launch.kernel.src or "_dot(" in launch.kernel.src
    low_precision = any(kind in ("*bf16", "*fp16") for kind in launch.signature.values())
    if multiplies and low_precision:
        assert read.hgmma + read.hmma > 0, "no tensor-core instruction"


def test_every_kernel_of_every_module_is_among_the_shipped() -> None:
    import importlib

    from triton.runtime.jit import JITFunction

    launched = {id(launch.kernel) for launch in LAUNCHES}
    modules = [importlib.import_module(f"ppo_nlu.kernels.{n}") for n in compile_report.MODULES]
    kernels = {id(k): k for m in modules for k in vars(m).values() if isinstance(k, JITFunction)}
    storing = [k for k in kernels.values() if "tl.store(" in k.src]  # the others only help
    assert not [k.__name__ for k in storing if id(k) not in launched]


def test_the_quick_form_has_one_launch_a_kernel() -> None:
    quick = compile_report.one_each(LAUNCHES)
    kernels = [launch.kernel for launch in quick]
    assert len(set(kernels)) == len(kernels) and set(kernels) == {x.kernel for x in LAUNCHES}
    firsts = {launch.kernel: launch for launch in reversed(LAUNCHES)}
    assert all(launch is firsts[launch.kernel] for launch in quick)


def test_the_report_of_one_kernel_for_one_chip(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        compile_report, "read_out", lambda launch, arch: read.append((launch, arch)) or EMPTY
    )
    assert compile_report.main(["--only", "gae", "--quick"]) == 0
    assert [(launch.kernel.__name__, arch) for launch, arch in read] == [("_gae", 90)]
    read.clear()
    assert compile_report.main(["--only", "gae", "--arch", "80"]) == 0
    assert [arch for _, arch in read] == [80] * sum("gae" in x.label for x in LAUNCHES)
    with pytest.raises(SystemExit):
        compile_report.main(["--only", "gea"])
    assert "--only: no label or kernel holds 'gea'; try token_logprobs" in capsys.readouterr().err


EMPTY = compile_report.Readout("", "", 90, 4, 3, 32, 0, 0, 0, 0)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def smallest() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel with sizes of 1, which Triton turns into constants, and with odd ones."""
    from ppo_nlu.kernels import gae, lora_gemm, online_logprobs, ppo_loss
    from ppo_nlu.kernels import linear_logprobs as chunks
    from ppo_nlu.kernels import token_logprobs as rows

    def logits(n: int, vocab: int, dtype: torch.dtype) -> None:
        z, targets = torch.empty(n, vocab, dtype=dtype), torch.empty(n, dtype=torch.long)
        stats = rows.empty_stats(n, rows.accumulator(dtype)[0], z.device)
        rows.launch_forward(z, targets, 1.0, stats)
        g = torch.empty_like(stats[0])
        for upstream in ((g, None), (None, g), (g, g)):
            rows.launch_backward(z, targets, 1.0, stats, *upstream, torch.empty_like(z))
        two = torch.empty(2, n, vocab, dtype=dtype)
        chunks.launch_directions(z, targets, 1.0, 1.0, stats, two.view(2 * n, vocab), True)
        chunks.launch_combine(two, torch.empty(1).expand(n), g)

    def lora(t: int, k: int, o: int, r: int, dtype: torch.dtype, p: float) -> None:
        x, dy = torch.empty(t, k, dtype=dtype), torch.empty(t, o, dtype=dtype)
        weight, bias = torch.empty(o, k, dtype=dtype), torch.empty(o, dtype=dtype)
        a, b = torch.empty(r, k), torch.empty(o, r)
        low = lora_gemm.shrink(x, a, 2.0, p, 1)
        lora_gemm.gemm(x, weight, bias, low, b)
        low_grad = torch.empty_like(low)
        lora_gemm.low_grads(dy, low, b, 2.0, low_grad, F32)
        lora_gemm.low_grads(dy, low, b, 2.0, low_grad, None)
        lora_gemm.a_grad(x, low_grad, F32, p, 1)
        dx = lora_gemm.gemm(dy, weight.t(), None, low_grad, a.t(), p=p, seed=1)
        lora_gemm.expand(dx, low_grad, a.t(), 0.1, 1)
        lora_gemm.gemm(dy, weight.t(), None, low_grad[:, :0], a[:0].t(), add_to=dx)
        if t <= 64:
            lora_gemm.decode(x, weight, bias, a, b, 2.0, p, 1, low)

    def online(n: int, h: int, v: int, dtype: torch.dtype) -> None:
        hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
        targets = torch.empty(n, dtype=torch.long)
        online_logprobs.launch_online(hidden, weight, weight.new_empty(v), targets, 1.0)

    def loss(b: int, r: int, denominator: object) -> None:
        names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
        tensors = {name: torch.empty(b, r) for name in names}
        mask = torch.empty(b, r, dtype=torch.bool)
        ppo_loss.launch(tensors, mask, (0.2, 0.2), 3.0, 0.2, 0.5, 0.01, denominator)

    def advantages(b: int, r: int) -> None:
        mask = torch.empty(b, r, dtype=torch.bool)
        gae.gae(torch.empty(b, r), torch.empty(b, r), mask, 0.99, 0.95)

    for dtype in (BF16, F32, F64):
        for shape in ((1, 1), (1, 5), (3, 1), (1, 152064)):
            yield f"logits {shape} {dtype}", partial(logits, *shape, dtype)
        for shape in ((1, 1, 1, 1), (1, 33, 1, 1), (1, 64, 64, 16), (5, 1, 7, 4), (130, 33, 47, 1)):
            for p in (0.0, 0.1):
                yield f"lora {shape} {dtype} {p}", partial(lora, *shape, dtype, p)
    for dtype in (BF16, F32, torch.float16):
        for shape in ((1, 1, 1), (1, 16, 33), (1, 3584, 152064), (2, 33, 50)):
            yield f"online {shape} {dtype}", partial(online, *shape, dtype)
    for shape in ((1, 1), (1, 16), (3, 1)):
        yield f"gae {shape}", partial(advantages, *shape)
        for denominator in (None, 1, 2.0, torch.tensor(5)):
            yield f"loss {shape} {denominator}", partial(loss, *shape, denominator)


def test_sizes_of_one_parse_too() -> None:
    """An argument of 1 reaches a kernel as a plain number; the interpreter never does that."""
    seen = set()
    for label, thunk in smallest():
        for launch in compile_report.record(label, thunk):
            if launch.key not in seen:
                seen.add(launch.key)
                compile_report.parse_launch(launch, 90)
    assert len(seen) > 200


def test_recording_runs_nothing_and_knows_what_triton_specialises() -> None:
    from ppo_nlu.kernels import gae

    rewards = torch.full((3, 5), torch.nan)
    mask = torch.ones(3, 5, dtype=torch.bool)
    (launch,) = compile_report.record("x", lambda: gae.gae(rewards, rewards, mask, 0.9, 0.8))
    assert launch.grid == (3,) and launch.warps == 4
    assert launch.signature["rewards"] == "*fp32" and launch.signature["mask"] == "*u8"
    assert launch.signature["gamma"] == "fp32"
    assert launch.signature["reward_row"] == "i32" and launch.constants["reward_column"] == 1
    names = launch.kernel.arg_names
    assert names.index("rewards") in launch.divisible
    assert names.index("reward_row") not in launch.divisible, "5 is not divisible by 16"


def test_the_limits_are_those_that_a_launch_would_meet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = compile_report.Readout("a", "k", 80, 8, 3, 256, 166913, 2, 0, 0)
    assert len(read.faults()) == 2
    assert len(compile_report.Readout("a", "k", 90, 16, 3, 255, 1, 0, 0, 0).faults()) == 1
    assert not compile_report.Readout("a", "k", 90, 8, 3, 255, 166913, 0, 0, 0).faults()
    monkeypatch.setattr(compile_report, "MODULES", ("gae",))
    path = tmp_path / "x.csv"
    assert compile_report.main(["--arch", "90", "--csv", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0].startswith("triton,label,kernel,arch") and len(lines) == 3
    assert "sm_90" in capsys.readouterr().out

"""The Triton kernels against float64 formulas; on a machine without CUDA in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so there this file runs itself once more
in a process of its own. What the kernels compile to is checked without a GPU in either case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_nlu import losses, ops

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
LOW = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # the interpreter's casts to bf16 truncate


def plain(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.double() / temperature, dim=-1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0)
    return log_p.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-12))


def leaf(t: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return t.detach().to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if INTERPRETED or DEVICE == "cuda":
        monkeypatch.setenv("PPO_NLU_BACKEND", "triton")


class KernelCases:
    """Collected as a test class where kernels can run in this process."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("vocab", [1, 127, 129, 1000, 5000])
    def test_token_logprobs(self, vocab: int, dtype: torch.dtype) -> None:
        logits = leaf(3 * torch.randn(3, vocab, device=DEVICE), dtype)
        exact = leaf(logits)
        targets = torch.tensor([0, vocab - 1, vocab // 2], device=DEVICE)
        for temperature in (0.1, 1.0, 10.0):
            ours = ops.token_logprobs(logits, targets, temperature)
            theirs = plain(exact, targets, temperature)
            assert ours[0].dtype == ours[1].dtype == torch.float32
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
            for g, g_entropy in ((1.0, 0.0), (0.0, 1.0), (0.5, -2.0)):
                (a,), (b,) = (
                    torch.autograd.grad(
                        (g * out[0] + g_entropy * out[1]).sum(), source, retain_graph=True
                    )
                    for out, source in ((ours, logits), (theirs, exact))
                )
                assert a.dtype == dtype
                assert (a - b).abs().max() <= LOW.get(dtype, 1e-5) * b.abs().max() + 1e-6

    @pytest.mark.parametrize("level", [-1e3, 1e4])
    def test_the_level_of_the_logits_does_not_matter(self, level: float) -> None:
        logits = level + torch.randn(2, 300, device=DEVICE).round(decimals=1)
        targets = torch.tensor([0, 299], device=DEVICE)
        ours, theirs = ops.token_logprobs(logits, targets), plain(logits, targets, 1.0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-3 if level > 1e3 else 2e-4, rtol=0)

    def test_forbidden_tokens(self) -> None:
        """A whole block at -inf, -inf at one target, all but the target at -inf."""
        logits = torch.randn(3, 9000, device=DEVICE)
        logits[0, :8192] = logits[1, 4096:8192] = -torch.inf
        logits[2, 1:] = -torch.inf
        logits = leaf(logits, torch.float32)
        targets = torch.tensor([8500, 5000, 0], device=DEVICE)
        ours, theirs = ops.token_logprobs(logits, targets), plain(logits, targets, 1.0)
        assert ours[0][1] == -torch.inf and ours[0][2] == 0.0
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(ours[0].sum() + ours[1].sum(), logits)
        assert grad.isfinite().all()

    def test_a_peaked_policy_keeps_its_digits(self) -> None:
        logits = leaf(torch.zeros(1, 100, device=DEVICE).index_fill_(
            1, torch.tensor([3], device=DEVICE), 18.0), torch.float32)  # fmt: skip
        exact = leaf(logits)
        targets = torch.tensor([3], device=DEVICE)
        ours, theirs = ops.token_logprobs(logits, targets)[0], plain(exact, targets, 1.0)[0]
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0.0)
        ours.sum().backward(), theirs.sum().backward()
        p = torch.softmax(exact.detach(), 1)
        assert abs(logits.grad[0, 3].item() / (p.sum() - p[0, 3]).item() - 1) < 1e-5

    @pytest.mark.parametrize("rows", [0, 1])
    def test_no_rows_and_one_row(self, rows: int) -> None:
        hidden = leaf(torch.randn(rows, 8, device=DEVICE), torch.float32)
        weight = torch.randn(33, 8, device=DEVICE)
        targets = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        lora_a, lora_b = leaf(weight[:2], torch.float32), leaf(weight[:, :2], torch.float32)
        y = ops.lora_linear(hidden, weight, None, lora_a, lora_b, 1.0)
        assert y.shape == (rows, 33)
        for out in (
            ops.token_logprobs(y, targets),
            ops.linear_logprobs(hidden, weight, targets),
        ):
            assert out[0].shape == out[1].shape == (rows,)
            (out[0].sum() + out[1].sum()).backward(retain_graph=True)
        assert hidden.grad.shape == hidden.shape and lora_b.grad.shape == lora_b.shape

    def test_any_layout(self) -> None:
        targets = torch.tensor([1, 20, 7, 0], device=DEVICE)
        weight = torch.randn(33, 16, device=DEVICE)
        lora_a, lora_b = torch.randn(4, 16, device=DEVICE), torch.randn(33, 4, device=DEVICE)
        for hidden in (
            torch.randn(16, 4, device=DEVICE).T,
            torch.randn(8, 33, device=DEVICE)[::2, 1::2],
            torch.randn(1, 16, device=DEVICE).expand(4, 16),
        ):
            exact = hidden.double() @ weight.double().T
            y = ops.lora_linear(hidden, weight, None, lora_a, lora_b, 1.0)
            low = (hidden.double() @ lora_a.double().T) @ lora_b.double().T
            assert relative(y, exact + low) < 1e-5
            ours = ops.linear_logprobs(hidden, weight, targets)
            expected = plain(exact, targets, 1.0)[0]
            torch.testing.assert_close(ours[0].double(), expected, atol=1e-5, rtol=1e-5)
        for logits in (
            torch.randn(33, 4, device=DEVICE).T,
            torch.randn(1, 33, device=DEVICE).expand(4, 33),
        ):
            ours = ops.token_logprobs(leaf_view := logits.clone().requires_grad_(), targets)
            expected = plain(logits, targets, 1.0)[0]
            torch.testing.assert_close(ours[0].double(), expected, atol=1e-5, rtol=1e-5)
            ours[0].sum().backward()  # the upstream gradient has stride 0
            assert leaf_view.grad.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("trainable", [False, True])
    def test_linear_logprobs(self, trainable: bool, dtype: torch.dtype) -> None:
        hidden = leaf(torch.randn(70, 40, device=DEVICE), dtype)
        weight = (torch.randn(129, 40, device=DEVICE) / 4).to(dtype).requires_grad_(trainable)
        bias = torch.randn(129, device=DEVICE, dtype=dtype).requires_grad_(trainable)
        targets = torch.randint(0, 129, (70,), device=DEVICE)
        exact = leaf(hidden), leaf(weight), leaf(bias)
        ours = ops.linear_logprobs(hidden, weight, targets, bias, 0.8)
        theirs = plain(exact[0] @ exact[1].T + exact[2], targets, 0.8)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)
        inputs = (hidden, weight, bias) if trainable else (hidden,)
        for g, g_entropy in ((1.0, 0.0), (0.5, -2.0)):
            grads = (
                torch.autograd.grad(
                    (g * out[0] + g_entropy * out[1]).sum(), source, retain_graph=True
                )
                for out, source in ((ours, inputs), (theirs, exact[: len(inputs)]))
            )
            for a, b in zip(*grads, strict=True):
                assert a.dtype == dtype and relative(a, b) < LOW.get(dtype, 1e-5)

    @pytest.mark.parametrize("rank", [1, 12, 16, 48])
    def test_lora_linear_at_any_rank(self, rank: int) -> None:
        x, weight = torch.randn(2, 9, 70, device=DEVICE), torch.randn(150, 70, device=DEVICE)
        lora_a, lora_b = torch.randn(rank, 70, device=DEVICE), torch.randn(150, rank, device=DEVICE)
        exact = x.double() @ weight.double().T
        exact += 0.5 * (x.double() @ lora_a.double().T) @ lora_b.double().T
        assert relative(ops.lora_linear(x, weight, None, lora_a, lora_b, 0.5), exact) < 1e-5

    @pytest.mark.parametrize("rows", [18, 300])
    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_lora_linear_with_gradients(self, dtype: torch.dtype, p: float, rows: int) -> None:
        from ppo_nlu.kernels.lora_linear import dropped

        x = leaf(torch.randn(rows, 70, device=DEVICE), dtype)
        weight = (torch.randn(150, 70, device=DEVICE) / 8).to(dtype)
        bias = torch.randn(150, device=DEVICE, dtype=dtype)
        lora_a = leaf(torch.randn(12, 70, device=DEVICE) / 8, torch.float32)
        lora_b = leaf(torch.randn(150, 12, device=DEVICE), torch.float32)
        upstream = torch.randn(rows, 150, device=DEVICE).to(dtype)
        keep = dropped(torch.ones(rows, 70, device=DEVICE), p, 77).double() / (1 - p)
        assert abs(float(keep.mean()) - 1.0) < 0.1
        exact = leaf(x), leaf(lora_a), leaf(lora_b)
        y = ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.5, p, seed=77)
        expected = exact[0] @ weight.double().T + bias.double()
        expected = expected + 1.5 * ((exact[0] * keep) @ exact[1].T) @ exact[2].T
        bar = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-5)
        assert y.dtype == dtype and relative(y, expected) < bar
        ours = torch.autograd.grad(y, (x, lora_a, lora_b), upstream)
        theirs = torch.autograd.grad(expected, exact, upstream.double())
        for a, b, source in zip(ours, theirs, (x, lora_a, lora_b), strict=True):
            assert a.dtype == source.dtype and relative(a, b) < bar

    @pytest.mark.parametrize("length", [1, 7, 1500])
    @pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
    def test_gae(self, lam: float, length: int) -> None:
        rewards, values = torch.randn(2, 3, length, dtype=torch.float64)
        lengths = torch.tensor([length, (length + 1) // 2, 0])
        mask = torch.arange(length) < lengths[:, None]
        expected = losses.gae(rewards, values, mask, 0.99, lam)
        rewards, values = (t.float().masked_fill(~mask, torch.nan) for t in (rewards, values))
        ours = ops.gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE), 0.99, lam)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double().cpu(), b.double(), atol=3e-5, rtol=1e-5)

    def test_gae_without_rows_and_with_strides(self) -> None:
        empty = torch.zeros(0, 4, device=DEVICE)
        assert ops.gae(empty, empty, empty.bool())[0].shape == (0, 4)
        rewards, values = torch.randn(5, 3).T, torch.randn(3, 10)[:, ::2]
        mask = torch.ones(1, 1, dtype=torch.bool).expand(3, 5)
        ours = ops.gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE))
        for a, b in zip(ours, losses.gae(rewards, values, mask), strict=True):
            torch.testing.assert_close(a.cpu(), b)

    def test_each_operation_launches_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ppo_nlu.kernels import gae, lora_linear, token_logprobs

        launched = set()
        for module, name in (
            (gae, "_gae"), (lora_linear, "_shrink"), (lora_linear, "_fused"),
            (token_logprobs, "_forward"), (token_logprobs, "_backward"),
        ):  # fmt: skip

            class Spy:
                def __init__(self, kernel: object, name: str) -> None:
                    self.kernel, self.name = kernel, name

                def __getitem__(self, grid: object):
                    launched.add(self.name)
                    return self.kernel[grid]

            monkeypatch.setattr(module, name, Spy(getattr(module, name), name))
        x = torch.randn(2, 4, device=DEVICE, requires_grad=True)
        weight = torch.randn(5, 4, device=DEVICE)
        targets = torch.tensor([0, 4], device=DEVICE)
        ops.lora_linear(x, weight, None, weight[:1], weight[:, :1], 1.0)
        assert launched == {"_shrink", "_fused"}
        launched.clear()
        ops.linear_logprobs(x, weight, targets)[0].sum().backward()
        assert launched == {"_forward", "_backward"}
        launched.clear()
        ops.token_logprobs(x @ weight.T, targets)[0].sum().backward()
        assert launched == {"_forward", "_backward"}
        launched.clear()
        ops.gae(x, x, torch.ones_like(x, dtype=torch.bool))
        assert launched == {"_gae"}

    def test_a_target_out_of_range_is_an_error(self) -> None:
        logits = torch.randn(2, 9, device=DEVICE)
        for target in (-1, 9):
            with pytest.raises(IndexError, match="out of range"):
                ops.token_logprobs(logits, torch.tensor([0, target], device=DEVICE))


if INTERPRETED or DEVICE == "cuda":
    TestKernels = KernelCases
else:

    def test_the_kernels_in_the_interpreter() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "TestKernels",
             str(Path(__file__))],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert " passed" in done.stdout


# ---- what the kernels compile to, with no GPU


SHARED_LIMIT = {80: 166912, 90: 232448}
SCALARS = {"scale": "fp32", "p": "fp32", "factor": "fp32", "gamma": "fp32", "decay": "fp32"}
POINTERS = {"targets": "*i64", "mask": "*u8"}
FLOATS = (
    "logprobs entropy tops log_totals grad_logprobs grad_entropy rewards values advantages returns"
).split()
TENSORS = "logits x weight bias low lora_a lora_b y out grad".split()


def compiled(kernel, constants: dict, arch: int, warps: int, stages: int, element: str):
    """Compile as a launch would: 16-byte aligned pointers, contiguous last dimension."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in (*POINTERS, *FLOATS, *TENSORS):
            kind = "*fp32" if name in FLOATS else f"*{element}"
            signature[name] = POINTERS.get(name, kind)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = SCALARS.get(name, "i32")
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target, options = GPUTarget("cuda", arch, 32), {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=target, options=options)


def shipped():
    """(id, kernel module, kernel name, constants, warps, stages, element)."""
    for both in (True, False):
        flags = {"BLOCK": 4096, "WITH_LOGPROBS": True, "WITH_ENTROPY": both}
        yield f"logits-backward-{both}", "token_logprobs", "_backward", flags, 8, 3, "bf16"
    yield "logits-forward", "token_logprobs", "_forward", {"BLOCK": 4096}, 8, 3, "bf16"
    yield "gae", "gae", "_gae", {"BLOCK": 1024}, 4, 3, "fp32"
    for element in ("bf16", "fp32"):
        for dropout in (False, True):
            shape = {"BLOCK_T": 32, "BLOCK_K": 64, "BLOCK_R": 16, "DROPOUT": dropout}
            yield f"shrink-{element}-{dropout}", "lora_linear", "_shrink", shape, 4, 3, element
        for rows in (16, 128, 4096):
            yield f"lora-{element}-{rows}", "lora_linear", "_fused", {"rows": rows}, 0, 0, element


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", list(shipped()), ids=lambda case: case[0])
def test_compiles_within_the_limits(
    case: tuple, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    import triton.language as tl

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, module, name, constants, warps, stages, element = case
    module = importlib.import_module(f"ppo_nlu.kernels.{module}")
    kernel, constants = getattr(module, name), dict(constants)
    if name == "_fused":
        shape = module.tiles(constants.pop("rows"), 16, {"bf16": 2, "fp32": 4}[element])
        *blocks, warps, stages = shape
        names = ("BLOCK_T", "BLOCK_O", "BLOCK_K", "BLOCK_R")
        constants |= dict(zip(names, blocks, strict=True)) | {"BIAS": True, "GROUP": 8}
    constants |= {"DTYPE": tl.float32, "ACC": tl.float32, "UPCAST": False}
    unit = {"column_stride", "x_column", "weight_column", "reward_column", "value_column"}
    constants |= dict.fromkeys(unit, 1)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    built = compiled(kernel, constants, arch, warps, stages, element)
    assert built.metadata.shared <= SHARED_LIMIT[arch]
    assert len(built.asm["cubin"]) > 0
    if name == "_fused" and element == "bf16":
        wide = arch == 90 and constants["BLOCK_T"] >= 64
        assert ("wgmma" if wide else "mma.sync") in built.asm["ptx"]

"""The LoRA layer's kernels against float64 formulas; without CUDA in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so on a machine without a GPU this file
runs itself once more in a process of its own. The dropout mask is checked against a Philox of our
own in integers. The grouped torch form and the table are tested in this process.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE, INTERPRETED, RUNS_KERNELS, run_interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from ppo_nlu import ops
from ppo_nlu.ops import torch_lora

pytest.importorskip("triton")
from ppo_nlu.kernels import lora_gemm, lora_table
from ppo_nlu.kernels import lora_linear as kernel

VARIANTS = ("fused", "cublas", "extended", "decode")
FORMS = [(v, b) for v in VARIANTS for b in ("fused", "cublas")]
# Relative Frobenius errors; the interpreter's casts to bf16 truncate, which is twice as coarse and
# always in one direction.
BARS = {
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2 if INTERPRETED else 4e-3,
}
SEED = 2**31 + 77
LAUNCHED = ("_shrink", "_gemm", "_expand", "_reduce", "_sum", "_decode")
FREE = tuple(
    "empty new_empty view _unsafe_view as_strided slice _reshape_alias t. "
    "detach expand alias".split()
)


# ---- what is right


def kept(rows: int, columns: int, p: float, seed: int = SEED) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011), counter row · ⌈columns/4⌉ + column // 4, as floats."""
    low, width = 2**32 - 1, -(-columns // 4)
    counter = [row * width + quad for row in range(rows) for quad in range(width)]
    bits = []
    for count in counter:
        c, k = [count & low, count >> 32, 0, 0], [seed & low, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
            k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
        bits += c
    mask = torch.tensor(bits, dtype=torch.int64).view(rows, 4 * width) >= round(p * 2**32)
    return mask[:, :columns].double().to(DEVICE)


def relative(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-12))


def leaf(t: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return t.detach().to(dtype).requires_grad_()


class Layer:
    """Inputs of one layer and what y and its gradients are in float64."""

    def __init__(
        self, rows: int, features: int = 40, outputs: int = 50, rank: int = 4,
        dtype: torch.dtype = torch.float32, adapter: torch.dtype = torch.float32,
        bias: bool = True,
    ) -> None:  # fmt: skip
        self.x = leaf(torch.randn(rows, features, device=DEVICE), dtype)
        self.weight = (torch.randn(outputs, features, device=DEVICE) / features**0.5).to(dtype)
        self.bias = torch.randn(outputs, device=DEVICE).to(dtype) if bias else None
        self.lora_a = leaf(torch.randn(rank, features, device=DEVICE) / features**0.5, adapter)
        self.lora_b = leaf(torch.randn(outputs, rank, device=DEVICE) / rank**0.5, adapter)
        self.dy = torch.randn(rows, outputs, device=DEVICE).to(dtype)
        self.scaling = 1.5

    @property
    def args(self) -> tuple:
        return self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.x, self.lora_a, self.lora_b

    def exact(self, p: float = 0.0) -> tuple[Tensor, ...]:
        """y, dx, dA, dB."""
        x, a, b = (leaf(t) for t in self.trained)
        rows = x.reshape(-1, x.shape[-1])
        keep = kept(*rows.shape, p) / (1 - p) if p else 1.0
        y = F.linear(rows, self.weight.double()) + self.scaling * (rows * keep) @ a.T @ b.T
        y = y if self.bias is None else y + self.bias.double()
        y = y.view(*x.shape[:-1], y.shape[1])
        return y, *torch.autograd.grad(y, (x, a, b), self.dy.double())

    def ours(self, p: float = 0.0, form=kernel.lora_linear, **forced: str) -> tuple[Tensor, ...]:
        y = form(*self.args, p, SEED, **forced)
        return y, *torch.autograd.grad(y, self.trained, self.dy)


def agree(layer: Layer, p: float, bar: float, variant: str, backward: str) -> None:
    ours = layer.ours(p, variant=variant, backward=backward)
    for a, b, like in zip(ours, layer.exact(p), (layer.dy, *layer.trained), strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape
        assert relative(a, b) < bar


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if INTERPRETED or DEVICE == "cuda":
        monkeypatch.setenv("PPO_NLU_BACKEND", "triton")


class KernelCases:
    """Collected as a test class where kernels can run in this process."""

    # ---- values

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", list(BARS), ids=str)
    def test_the_formula_and_its_gradients(self, form, p: float, dtype: torch.dtype) -> None:
        layer = Layer(18 if form[0] == "decode" else 70, 72, 88, 12, dtype)
        agree(layer, p, BARS[dtype], *form)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("rank", [1, 4, 8, 12, 16, 48, 64, 128])
    def test_any_rank(self, rank: int, form) -> None:
        agree(Layer(5, 36, 24, rank, bias=False), 0.0, 1e-5, *form)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 127, 129])
    def test_any_number_of_rows(self, rows: int, form) -> None:
        if form[0] != "decode" or rows <= 64:
            agree(Layer(rows, 33, 47), 0.2, 1e-5, *form)

    def test_many_rows_in_several_tiles(self) -> None:
        """Row groups, partial sums over rows and over columns, every kernel with a split."""
        for rank in (4, 40):
            layer = Layer(330, 270, 10, rank)
            for form in (("fused", "fused"), ("extended", "cublas")):
                agree(layer, 0.0, 1e-5, *form)

    @pytest.mark.parametrize("backward", ["fused", "cublas"])
    @pytest.mark.parametrize("variant", ["fused", "cublas", "extended", "decode"])
    def test_no_worse_than_the_unfused_form(self, variant: str, backward: str) -> None:
        layer = Layer(60, 72, 88, 12, torch.float16 if INTERPRETED else torch.bfloat16)
        exact = layer.exact()
        unfused = layer.ours(form=torch_lora.lora_linear)
        theirs = [relative(a, b) for a, b in zip(unfused, exact, strict=True)]
        ours = layer.ours(variant=variant, backward=backward)
        for a, b, theirs_error in zip(ours, exact, theirs, strict=True):
            assert relative(a, b) <= 1.05 * theirs_error

    @pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_adapters_in_another_dtype(self, variant: str, adapter: torch.dtype) -> None:
        layer = Layer(6, dtype=torch.float16, adapter=adapter)
        agree(layer, 0.0, max(BARS[torch.float16], BARS[adapter]), variant, "fused")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_any_layout(self, form) -> None:
        features, outputs = 24, 20
        for x in (
            torch.randn(features, 6).T,
            torch.randn(12, 2 * features + 1)[::2, 1::2],
            torch.randn(1, features).expand(6, features),
            torch.randn(6 * features + 1)[1:].view(6, features),
            torch.randn(3, 2, features).transpose(0, 1),
        ):
            layer = Layer(6, features, outputs)
            layer.x = x.to(DEVICE).detach().requires_grad_()
            layer.dy = torch.randn(*x.shape[:-1], outputs, device=DEVICE)
            layer.weight = layer.weight.T.contiguous().T  # as Conv1D stores it
            layer.lora_a = leaf(layer.lora_a, torch.float32).T.contiguous().T.detach()
            layer.lora_a.requires_grad_()
            agree(layer, 0.3, 1e-5, *form)
            layer.dy = torch.ones(1, 1, device=DEVICE).expand(layer.dy.shape)  # as .sum() sends it
            agree(layer, 0.3, 1e-5, *form)

    @pytest.mark.parametrize("variant", ["fused", "decode"])
    def test_row_offsets_of_64_bits(self, variant: str) -> None:
        """Strides of 31 bits, and a last row that lies 2³¹ elements away from the first."""
        features, far = 16, 2**30 + 16
        memory = torch.empty(2 * far + features, dtype=torch.float16, device=DEVICE)  # untouched
        rows = memory.as_strided((3, features), (far, 1))
        rows.copy_(torch.randn(3, features))
        layer = Layer(3, features, 16, dtype=torch.float16)
        layer.x = rows.detach().requires_grad_()
        agree(layer, 0.0, 1e-3, variant, "fused")
        layer = Layer(3, features, 3, dtype=torch.float16, bias=False)
        layer.weight = rows.detach()
        agree(layer, 0.0, 1e-3, variant, "fused")
        layer = Layer(3, features, features, dtype=torch.float16)
        layer.dy = rows.detach()
        agree(layer, 0.0, 1e-3, variant, "fused")

    def test_a_fresh_adapter_changes_no_bit(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            layer = Layer(9, dtype=dtype)
            layer.lora_b = torch.zeros_like(layer.lora_b).requires_grad_()
            y = layer.ours(variant="cublas")[0]
            assert torch.equal(y, F.linear(layer.x, layer.weight, layer.bias))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_scaling_of_zero(self, variant: str) -> None:
        layer = Layer(9)
        layer.scaling = 0.0
        y, _, grad_a, grad_b = layer.ours(variant=variant)
        torch.testing.assert_close(y, F.linear(layer.x, layer.weight, layer.bias))
        assert not grad_a.any() and not grad_b.any()

    # ---- dropout

    @pytest.mark.parametrize("features", [64, 70])
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_every_form_draws_the_same_mask(self, form, features: int) -> None:
        """With W = 0 and A = B = 1 the mask is y in the forward, and dx and dA in the backward."""
        rows = 50 if form[0] == "decode" else 70
        eye = torch.eye(features, device=DEVICE)
        x, a, b = (leaf(t, torch.float32) for t in (torch.ones_like(eye[:1]), eye, eye))
        x = leaf(x.expand(rows, features), torch.float32)
        keep, dy = kept(rows, features, 0.3), torch.ones(rows, features, device=DEVICE)
        weight = torch.zeros_like(eye)
        y = kernel.lora_linear(
            x, weight, None, a, b, 0.7, 0.3, SEED, variant=form[0], backward=form[1]
        )
        grads = torch.autograd.grad(y, (x, a, b), dy)
        torch.testing.assert_close(y.double(), keep)
        torch.testing.assert_close(grads[0].double(), keep)
        torch.testing.assert_close(grads[1].double(), keep.sum(0).expand(features, features))
        torch.testing.assert_close(grads[2].double(), keep.sum(0).expand(features, features))

    def test_the_mask_does_not_depend_on_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Layer(70, 72)
        before = layer.ours(0.3, variant="fused", backward="fused")
        monkeypatch.setattr(lora_gemm, "tiles", lambda *_: (16, 32, 16, 16, 4, 2))
        monkeypatch.setattr(lora_gemm, "_shrink_tiles", lambda *_: (16, 16, 16, 4, 2))
        monkeypatch.setattr(lora_gemm, "_reduce_tiles", lambda *_: (16, 16, 16, 4, 2))
        for a, b in zip(before, layer.ours(0.3, variant="fused", backward="fused"), strict=True):
            assert relative(a, b) < 1e-5

    def test_the_mask_keeps_as_many_as_it_should(self) -> None:
        eye = torch.eye(64, device=DEVICE)
        x = torch.ones(300, 64, device=DEVICE)
        for p in (0.1, 0.5):
            first, other = (
                lora_gemm.shrink(x, eye, 1.0, p, seed).view(-1, 4) for seed in (SEED, SEED + 1)
            )
            wrong = 5 * (p * (1 - p) / len(first)) ** 0.5
            for mask in (*first.T, *other.T, first.view(-1, 2)[:, 0]):
                assert abs(float(mask.mean()) - (1 - p)) < wrong
            together = float((first == other).double().mean())
            assert abs(together - (1 - 2 * p * (1 - p))) < wrong
        assert float(lora_gemm.shrink(x, eye, 1.0, 1e-12, SEED).min()) == 1.0

    def test_checkpointing_with_dropout(self) -> None:
        layer = Layer(9)

        def run(rows: Tensor) -> Tensor:
            return ops.lora_linear(rows, *layer.args[1:], 0.5).square()

        grads = []
        for wrap in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=False)):
            torch.manual_seed(5)
            grads.append(torch.autograd.grad(wrap(run, layer.x).sum(), layer.trained))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

    # ---- autograd

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_two_runs_are_equal_to_the_bit(self, form) -> None:
        layer = Layer(64 if form[0] == "decode" else 140, 72, 88, 4)
        once = layer.ours(0.3, variant=form[0], backward=form[1])
        again = layer.ours(0.3, variant=form[0], backward=form[1])
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_backward_twice_and_no_double_backward(self, variant: str) -> None:
        layer = Layer(5)
        y = kernel.lora_linear(*layer.args, variant=variant)
        first, second = (
            torch.autograd.grad(y, layer.trained, layer.dy, retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (grad,) = torch.autograd.grad(y.square().sum(), layer.x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_only_what_is_trained_gets_a_gradient(self, variant: str) -> None:
        layer = Layer(5)
        exact = layer.exact()
        layer.weight.requires_grad_(), layer.bias.requires_grad_()
        kernel.lora_linear(*layer.args, variant=variant).backward(layer.dy)
        assert layer.weight.grad is None
        torch.testing.assert_close(layer.bias.grad, layer.dy.sum(0))
        layer.bias.requires_grad_(False), layer.lora_a.requires_grad_(False)
        layer.lora_b.grad = None
        y = kernel.lora_linear(layer.x.detach(), *layer.args[1:], variant=variant)
        y.backward(layer.dy)
        assert relative(layer.lora_b.grad, exact[3]) < 1e-5
        layer.lora_b.requires_grad_(False)
        y = kernel.lora_linear(*layer.args, variant=variant)
        assert relative(torch.autograd.grad(y, layer.x, layer.dy)[0], exact[1]) < 1e-5
        assert not kernel.lora_linear(layer.x.detach(), *layer.args[1:]).requires_grad
        with torch.no_grad():
            assert relative(kernel.lora_linear(*layer.args, variant=variant), exact[0]) < 1e-5

    def test_autocast(self) -> None:
        layer = Layer(40, 32, 32)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = ops.lora_linear(*layer.args)
        grads = torch.autograd.grad(y, layer.trained, torch.ones_like(y))
        assert y.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
        layer.dy = torch.ones_like(layer.dy)
        for a, b in zip((y, *grads), layer.exact(), strict=True):
            assert relative(a, b) < 3 * BARS[torch.bfloat16]

    # ---- groups

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("scalings", [(1.5, 1.5, 1.5), (1.5, 0.5, 3.0)])
    def test_a_group_is_its_members(self, form, scalings: tuple[float, ...]) -> None:
        layers = [
            Layer(21, 40, o, r, bias=i != 1)
            for i, (o, r) in enumerate(((50, 4), (16, 1), (16, 20)))
        ]
        x = layers[0].x
        columns = list(zip(*(layer.args[1:] for layer in layers), strict=True))
        columns[-1] = scalings
        for p, used in ((0.0, (0, 1, 2)), (0.3, (1, 2))):
            ys = kernel.lora_linear_grouped(x, *columns, p, SEED, variant=form[0], backward=form[1])
            trained = [t for i in used for t in (layers[i].lora_a, layers[i].lora_b)]
            ours = torch.autograd.grad(
                [ys[i] for i in used], (x, *trained), [layers[i].dy for i in used]
            )
            exact_x, exact = 0.0, []
            for i in used:
                layers[i].x, layers[i].scaling = x, scalings[i]
                y, grad_x, *others = layers[i].exact(p)
                assert relative(ys[i], y) < 1e-5
                exact_x, exact = exact_x + grad_x, exact + others
            for a, b in zip(ours, (exact_x, *exact), strict=True):
                assert relative(a, b) < 1e-5

    def test_one_pass_over_x_for_a_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layers = [Layer(80, 40, 24) for _ in range(3)]
        columns = list(zip(*(layer.args[1:] for layer in layers), strict=True))
        launched, _ = counted(monkeypatch)
        x = layers[0].x.detach()
        ys = kernel.lora_linear_grouped(x, *columns, variant="fused")
        assert launched == ["_shrink", "_gemm", "_gemm", "_gemm"]
        launched.clear()
        torch.autograd.grad(ys, [t for y in layers for t in y.trained[1:]], [y.dy for y in layers])
        assert "_gemm" not in launched  # x needs no gradient here
        assert launched.count("_reduce") == 3 + 1  # dS and dB of each member; dA of all

    # ---- launches

    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("p", [0.0, 0.1])
    def test_a_few_rows_take_one_launch(
        self, trained: bool, p: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = Layer(64, 40, 100, dtype=torch.float16)
        launched, operations = counted(monkeypatch)
        x = layer.x.detach().view(8, 8, 40).requires_grad_(trained)
        with torch.set_grad_enabled(trained), operations:
            kernel.lora_linear(x, *layer.args[1:], p, SEED)  # chosen, not forced
        assert launched == ["_decode"]
        assert operations.computing == []

    def test_what_comes_out_may_be_worked_on_in_place(self) -> None:
        layer = Layer(8, 40, 100, dtype=torch.float16)
        x = layer.x.detach().requires_grad_()
        y = kernel.lora_linear(x, *layer.args[1:], 0.0, SEED)
        y.add_(1.0).sum().backward()
        assert x.grad is not None

    def test_launches_of_the_other_forms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = Layer(80, dtype=torch.float16)
        launched, operations = counted(monkeypatch)
        roomy = kernel.extended_weight(layer.weight, 4)
        for variant, expected in (
            ("fused", (["_shrink", "_gemm"], [])),
            ("cublas", (["_shrink"], ["addmm", "_to_copy", "addmm_"])),
            ("extended", (["_shrink"], ["zero_", "copy_", "addmm"])),
        ):
            weight = roomy if variant == "extended" else layer.weight
            with torch.no_grad(), operations:
                kernel.lora_linear(layer.x, weight, *layer.args[2:], variant=variant)
            assert (launched, operations.computing) == expected, variant
            launched.clear(), operations.computing.clear()
        y = kernel.lora_linear(*layer.args, variant="fused")
        launched.clear()
        torch.autograd.grad(y, layer.trained, layer.dy)
        assert [n for n in launched if n != "_sum"] == ["_reduce", "_reduce", "_gemm"]

    # ---- the extended weight

    def test_a_weight_with_room_is_used_in_place(self) -> None:
        layer = Layer(9, 40, 50, 12)
        plain = layer.weight
        layer.weight = torch.nn.Parameter(kernel.extended_weight(plain, 12), requires_grad=False)
        assert torch.equal(layer.weight, plain) and layer.weight.stride() == (56, 1)
        memory = layer.weight.untyped_storage().data_ptr()
        assert kernel._extension(layer.weight, 56).data_ptr() == memory
        for other in (plain, copy.deepcopy(layer.weight), layer.weight[:, :32]):
            made = kernel._extension(other, 56)
            assert made.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        # Another adapter overwrites the room between a forward and its backward.
        y = kernel.lora_linear(*layer.args, variant="extended")
        zeros = torch.zeros_like(layer.lora_b)
        base = kernel.lora_linear(*layer.args[:4], zeros, 1.0, variant="extended")
        assert relative(base, F.linear(layer.x, plain, layer.bias)) < 1e-6
        grads = torch.autograd.grad(y, layer.trained, layer.dy)
        for a, b in zip((y, *grads), layer.exact(), strict=True):
            assert relative(a, b) < 1e-5
        assert torch.equal(layer.weight, plain)

    def test_a_smaller_rank_and_part_of_a_weight_with_room(self) -> None:
        for rows in (slice(None), slice(10, 50)):
            layer = Layer(9, 40, 50, 3)
            layer.weight = kernel.extended_weight(layer.weight, 16)[rows]
            layer.lora_b = leaf(layer.lora_b[rows], torch.float32)
            layer.bias, layer.dy = layer.bias[rows], layer.dy[:, rows]
            agree(layer, 0.0, 1e-5, "extended", "cublas")
            assert kernel._extension(layer.weight, 48).data_ptr() == layer.weight.data_ptr()

    # ---- properties

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(
        sizes=st.tuples(*(st.integers(1, n) for n in (90, 60, 60, 40))),
        form=st.sampled_from(FORMS),
        dtype=st.sampled_from(list(BARS)),
        adapter=st.sampled_from([torch.float32, None]),
        p=st.sampled_from([0.0, 0.25]),
        bias=st.booleans(),
    )
    def test_random_shapes(self, sizes, form, dtype, adapter, p: float, bias: bool) -> None:
        rows, features, outputs, rank = sizes
        rows = min(rows, 64) if form[0] == "decode" else rows
        layer = Layer(rows, features, outputs, rank, dtype, adapter or dtype, bias)
        layer.lora_a.data.add_(0.5)  # sums far from zero, so that a relative bar makes sense
        layer.x.data.abs_()
        agree(layer, p, 2 * BARS[dtype], *form)


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Operations]:
    """The Triton kernels launched from here on, and a mode that notes the torch operations."""
    launched: list[str] = []

    class Spy:
        def __init__(self, name: str) -> None:
            self.kernel, self.name = getattr(lora_gemm, name), name

        def __getitem__(self, grid: object):
            launched.append(self.name)
            return self.launch(self.kernel[grid])

        @staticmethod
        def launch(run):
            def uncounted(*args, **kwargs):
                with _disable_current_modes():  # the interpreter copies tensors by torch
                    run(*args, **kwargs)

            return uncounted

    for name in LAUNCHED:
        monkeypatch.setattr(lora_gemm, name, Spy(name))
    return launched, Operations()


class Operations(TorchDispatchMode):
    """Notes the names of operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.computing: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.computing.append(name.split(".")[0])
        return func(*args, **(kwargs or {}))


if RUNS_KERNELS:
    Test_lora_linear = KernelCases
else:

    @pytest.mark.slow
    def test_lora_linear_in_the_interpreter() -> None:
        run_interpreted(__file__, "Test_lora_linear")


# ---- the torch form of a group


def group(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple:
    outputs, ranks = (7, 5, 6)[:count], (3, 1, 4)[:count]
    weights = [torch.randn(o, 6, dtype=dtype) for o in outputs]
    biases = [torch.randn(o, dtype=dtype).requires_grad_() for o in outputs]
    biases[-1] = None
    lora_as = [leaf(torch.randn(r, 6), dtype) for r in ranks]
    lora_bs = [leaf(torch.randn(o, r), dtype) for o, r in zip(outputs, ranks, strict=True)]
    return weights, biases, lora_as, lora_bs, [1.5, 0.5, 2.0][:count]


@pytest.mark.skipif(INTERPRETED, reason="no kernel in it")
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)])
def test_the_torch_group_is_its_members(used: tuple[int, ...], p: float) -> None:
    x = leaf(torch.randn(2, 5, 6))
    columns = group()
    members = list(zip(*columns, strict=True))
    trained = [t for i in used for t in members[i][1:4] if t is not None]
    ys = torch_lora.lora_linear_grouped(x, *columns, p, 3)
    alone = [torch_lora.lora_linear(x, *member, p, 3) for member in members]
    for a, b in zip(ys, alone, strict=True):
        torch.testing.assert_close(a, b)
    dys = [torch.randn_like(ys[i]) for i in used]
    ours, theirs = (
        torch.autograd.grad([out[i] for i in used], (x, *trained), dys) for out in (ys, alone)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(INTERPRETED, reason="no kernel in it")
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_the_torch_group(p: float) -> None:
    weights, biases, lora_as, lora_bs, scalings = group(2)

    def run(x, bias, *adapters):
        return torch_lora.lora_linear_grouped(
            x, weights, [bias, None], adapters[:2], adapters[2:], scalings, p, 3
        )

    x = leaf(torch.randn(4, 6))
    torch.autograd.gradcheck(run, (x, biases[0], *lora_as, *lora_bs))
    with torch.no_grad():
        assert not run(x, biases[0], *lora_as, *lora_bs)[0].requires_grad
    (grad,) = torch.autograd.grad(
        run(x, biases[0], *lora_as, *lora_bs)[0].square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(INTERPRETED, reason="no kernel in it")
def test_a_torch_group_with_a_weight_that_is_trained_gives_it_no_gradient() -> None:
    columns = group(2)
    columns[0][0].requires_grad_()
    ys = torch_lora.lora_linear_grouped(torch.randn(4, 6).double(), *columns)
    sum(y.sum() for y in ys).backward()
    assert columns[0][0].grad is None and columns[2][0].grad is not None


# ---- the table and the tiles


def test_the_committed_table_is_in_order() -> None:
    content = json.loads(lora_table.TABLE.read_text(encoding="utf-8"))
    assert content["about"] and len(lora_table.load_table()) == len(content["rows"])
    for row in content["rows"]:
        assert row["variant"] in VARIANTS and row["backward"] in lora_table.BACKWARDS
        few = row["rows"] <= lora_table.DECODE_ROWS and row["rank"] <= lora_table.DECODE_RANK
        assert few or row["variant"] != "decode"


def test_a_measured_shape_takes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    table.write_text('{"about": "", "rows": []}')
    key = kernel.table_key("a chip", torch.bfloat16, 96, 80, 12, 1000)
    assert key == ("a chip", "bfloat16", 96, 80, 16, 1024)
    names = ("device", "dtype", "k", "o", "rank", "rows")
    row = dict(zip(names, key, strict=True)) | {"backward": "fused"}
    kernel.write_table([row | {"variant": "cublas"}], table)
    kernel.write_table([row | {"variant": "extended", "ms": 1.0}], table)
    assert kernel.load_table(table) == {key: ("extended", "fused")}
    with pytest.raises(ValueError, match="unknown"):
        kernel.write_table([row | {"variant": "fast"}], table)
    monkeypatch.setattr(lora_table, "load_table", lambda: kernel.load_table(table))
    shape = ("a chip", torch.bfloat16, 96, 80, 16)
    assert kernel.choose_variant(*shape, 513) == ("extended", "fused")
    assert kernel.choose_variant(*shape, 512) == ("cublas", "cublas")
    assert kernel.choose_variant(*shape, 64) == ("decode", "cublas")
    assert kernel.choose_variant("a chip", torch.bfloat16, 96, 80, 129, 64)[0] == "cublas"


@pytest.mark.skipif(INTERPRETED, reason="launches cannot be recorded in the interpreter")
def test_the_shipped_launches_cover_the_tiles() -> None:
    from ppo_nlu.kernels import compile_report

    found: dict[str, set] = {"_gemm": set(), "_decode": set(), "_shrink": set(), "_reduce": set()}
    for label, thunk in lora_gemm.shipped():
        for launch in compile_report.record(label, thunk):
            c, name = launch.constants, launch.kernel.__name__
            if name in found:
                middle = (c["BLOCK_O"],) if "BLOCK_O" in c else ()
                blocks = (c["BLOCK_T"], *middle, c["BLOCK_K"], c["BLOCK_R"])
                found[name].add((c.get("DROPOUT"), *blocks, launch.warps, launch.stages))
    for size in (2, 4):
        for rank in (1, 16, 32, 64, 128):
            for drop in (False, True):
                assert (drop, *lora_gemm._shrink_tiles(rank, size, drop)) in found["_shrink"]
                assert (drop, *lora_gemm._reduce_tiles(rank, size)) in found["_reduce"]
                for rows in (1, 128, 129, 2048, 8192):
                    for outputs in (896, 4096, 11008):
                        for chip in ((8, 0), (9, 0)):
                            blocks = lora_gemm.tiles(rows, outputs, rank, size, chip, drop)
                            assert (drop, *blocks) in found["_gemm"], blocks
                            blocks = lora_gemm.decode_tiles(
                                min(rows, 64), outputs, rank, size, chip, drop
                            )
                            left_out = size == 4 and rank == 128
                            assert left_out or (drop, *blocks) in found["_decode"], blocks

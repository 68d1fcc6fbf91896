"""y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ with W frozen, for one layer or several that share x.

With f = s/(1 − p) and S = f · (x ∘ mask) Aᵀ, rounded to the dtype of x:

    y = x Wᵀ + b + S Bᵀ            dS = f · dy B        dB = dyᵀ S
    dx = dy W + mask ∘ (dS A)      dA = dSᵀ (x ∘ mask)

Four forms, which differ in how the large product and the low-rank term are joined:

    fused      the Triton product adds S Bᵀ in its epilogue
    cublas     the library's product, then addmm_ with S; the safe form above 64 rows
    extended   [x | S] [W | B]ᵀ as one product of the library
    decode     up to 64 rows: one launch, S accumulated beside the product; the safe form there

dx is "fused" or "cublas" likewise. dS and dB come from one pass over dy, dA from one over x. Kept
for the backward are x and S; the mask is drawn again from its seed. No gradient of W is formed.
Imports torch and triton only. `lora_table` says which form runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import lora_gemm
from .lora_table import BACKWARDS, VARIANTS, choose_variant, load_table, table_key, write_table

__all__ = [
    "BACKWARDS", "VARIANTS", "choose_variant", "extended_weight", "load_table", "lora_linear",
    "lora_linear_grouped", "shipped", "table_key", "write_table",
]  # fmt: skip

shipped = lora_gemm.shipped
_MARK = "_ppo_nlu_columns"  # on the storage of an extended weight: (K, columns in all)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    variant: str | None = None,
    backward: str | None = None,
) -> Tensor:
    """y (..., O) of x (..., K), weight (O, K) frozen, lora_a (r, K) and lora_b (O, r).

    `variant` and `backward` force a form; by default the table of measurements decides.
    """
    members = [weight], [bias], [lora_a], [lora_b], [scaling]
    return lora_linear_grouped(x, *members, dropout_p, seed, variant=variant, backward=backward)[0]


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    variant: str | None = None,
    backward: str | None = None,
) -> tuple[Tensor, ...]:
    """y_i (..., O_i) of layers that share x (..., K), which is dropped once.

    Args: weights (O_i, K), biases (O_i,) or None, lora_as (r_i, K), lora_bs (O_i, r_i).
    """
    chosen = _choose(x, weights, lora_as)
    variant = variant or chosen[0]
    backward = backward or ("fused" if variant == "fused" else chosen[1])
    assert variant in VARIANTS and backward in BACKWARDS, (variant, backward)
    factors = tuple(s / (1.0 - dropout_p) for s in scalings)
    plan = _Plan(factors, dropout_p, seed & (2**63 - 1), variant, backward)
    trained = (x, *biases, *lora_as, *lora_bs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return _LoraLinear.apply(plan, x, *weights, *biases, *lora_as, *lora_bs)
    group = _Group(tuple(weights), tuple(biases), tuple(lora_as), tuple(lora_bs))
    ys = _forward(x.reshape(-1, x.shape[-1]), group, plan, keep=False)[0]
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def extended_weight(weight: Tensor, rank: int) -> Tensor:
    """A copy of W (O, K) whose rows have room for `rank` columns of B behind them.

    The result is a view (O, K), to be used in the place of `weight` (as a parameter's data, say):
    the extended form knows it by its storage, and otherwise copies the whole of W in each call.
    The room is overwritten by every call, so calls that share it belong on one stream.
    """
    outputs, features = weight.shape
    columns = _padded(features, rank)
    buffer = weight.new_zeros(outputs, columns)
    buffer[:, :features] = weight.detach()
    setattr(buffer.untyped_storage(), _MARK, (features, columns))
    return buffer[:, :features]


# ---- the plan of a call


@dataclass(frozen=True)
class _Plan:
    factors: tuple[float, ...]  # s / (1 − p) of each member
    p: float
    seed: int
    variant: str
    backward: str


@dataclass(frozen=True)
class _Group:
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]

    @property
    def columns(self) -> list[slice]:
        """Where each member's S lies in the S of the group."""
        return _columns(self.lora_as)


def _columns(lora_as: Sequence[Tensor]) -> list[slice]:
    ends = [sum(a.shape[0] for a in lora_as[: i + 1]) for i in range(len(lora_as))]
    return [slice(end - a.shape[0], end) for a, end in zip(lora_as, ends, strict=True)]


def _choose(x: Tensor, weights: Sequence[Tensor], lora_as: Sequence[Tensor]) -> tuple[str, str]:
    """By the largest member; a group that `decode` cannot take whole is not decoded."""
    outputs = max(w.shape[0] for w in weights)
    rank = max(a.shape[0] for a in lora_as)
    features = x.shape[-1]
    rows = x.numel() // features if features else 0
    return choose_variant(_device_name(x.device), x.dtype, features, outputs, rank, rows)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _padded(features: int, rank: int) -> int:
    """Columns of [W | B | 0]: a multiple of eight, so that rows of 16 bits are 16-byte aligned."""
    return -(-(features + rank) // 8) * 8


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


# ---- forward


def _forward(
    rows: Tensor, group: _Group, plan: _Plan, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Each y (T, O_i), the x to keep (T, K) and S (T, Σ r_i), the last if `keep`."""
    if plan.variant == "decode":
        return _decode(rows, group, plan, keep)
    if plan.variant == "extended":
        return _extended(rows, group, plan)
    low = _shrunk(rows, group, plan, rows.new_empty(rows.shape[0], group.columns[-1].stop))
    members = zip(group.weights, group.biases, group.lora_bs, group.columns, strict=True)
    if plan.variant == "fused":
        ys = [lora_gemm.gemm(rows, w, bias, low[:, at], b) for w, bias, b, at in members]
    else:
        ys = [
            F.linear(rows, w, bias).addmm_(low[:, at], b.to(rows.dtype).t())
            for w, bias, b, at in members
        ]
    return ys, rows, low


def _shrunk(
    rows: Tensor, group: _Group, plan: _Plan, out: Tensor, copy: Tensor | None = None
) -> Tensor:
    """S of the whole group in `out` (T, width >= Σ r_i), with zeros beyond; x is read once."""
    if len(set(plan.factors)) == 1:
        lora_a = _stacked(group.lora_as)
        return lora_gemm.shrink(
            rows, lora_a, plan.factors[0], plan.p, plan.seed, out=out, copy=copy
        )
    for i, (lora_a, at) in enumerate(zip(group.lora_as, group.columns, strict=True)):
        last = i == len(plan.factors) - 1
        part = out[:, at.start :] if last else out[:, at]
        lora_gemm.shrink(
            rows, lora_a, plan.factors[i], plan.p, plan.seed, out=part, copy=copy if last else None
        )
    return out


def _decode(
    rows: Tensor, group: _Group, plan: _Plan, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    low = rows.new_empty(rows.shape[0], group.columns[-1].stop) if keep else None
    members = zip(
        group.weights, group.biases, group.lora_as, group.lora_bs, plan.factors, group.columns,
        strict=True,
    )  # fmt: skip
    ys = [
        lora_gemm.decode(
            rows, w, bias, a, b, factor, plan.p, plan.seed, None if low is None else low[:, at]
        )
        for w, bias, a, b, factor, at in members
    ]
    return ys, rows, low


def _extended(
    rows: Tensor, group: _Group, plan: _Plan
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    features, rank = rows.shape[1], group.columns[-1].stop
    columns = _padded(features, rank)
    wide = rows.new_empty(rows.shape[0], columns)  # [x | S | 0]
    _shrunk(rows, group, plan, wide[:, features:], wide[:, :features])
    ys = []
    for w, bias, b, at in zip(
        group.weights, group.biases, group.lora_bs, group.columns, strict=True
    ):
        extended = _extension(w, columns)
        if b.shape[1] != columns - features:
            extended[:, features:].zero_()
        extended[:, features:][:, at].copy_(b.detach())
        ys.append(F.linear(wide, extended, bias))
    return ys, wide[:, :features], wide[:, features : features + rank]


def _extension(weight: Tensor, columns: int) -> Tensor:
    """A buffer (O, columns) that starts with W: its own, made by `extended_weight`, or a copy."""
    outputs, features = weight.shape
    mark = getattr(weight.untyped_storage(), _MARK, (0, 0))
    offset = weight.storage_offset()
    fits = mark[0] == features and mark[1] >= columns
    if fits and weight.stride() == (mark[1], 1) and offset % mark[1] == 0:
        # On .data, so that autograd sees no new version: writing B changes no column of W.
        return weight.data.as_strided((outputs, columns), (mark[1], 1), offset)
    buffer = weight.new_empty(outputs, columns)
    buffer[:, :features].copy_(weight.detach())
    return buffer


# ---- backward


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, x, *members):  # type: ignore[override]
        group = _Group(*_quarters(members))
        rows = x.reshape(-1, x.shape[-1])
        ys, kept, low = _forward(rows, group, plan, keep=True)
        kept = x if kept is rows else kept
        ctx.save_for_backward(kept, low, *group.weights, *group.lora_as, *group.lora_bs)
        ctx.plan, ctx.x_shape = plan, x.shape
        ctx.set_materialize_grads(False)
        # No views: the caller may change each y in place.
        return tuple(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        saved = ctx.saved_tensors
        device = saved[0].device.type
        if not torch.is_autocast_enabled(device):  # entering a region costs 20 µs
            return _gradients(ctx, saved, grads)
        with torch.autocast(device, enabled=False):  # the forward's dtypes hold
            return _gradients(ctx, saved, grads)


def _gradients(ctx, tensors, grads):
    """What autograd expects of a backward: one gradient, or None, for each input."""
    x, low, *saved = tensors
    size = len(saved) // 3
    weights, lora_as, lora_bs = saved[:size], saved[size : 2 * size], saved[2 * size :]
    needs = ctx.needs_input_grad
    needs_x, (_, needs_bias, needs_a, needs_b) = needs[1], _quarters(needs[2:])
    live = [i for i, grad in enumerate(grads) if grad is not None]
    if not live:
        return (None,) * len(needs)
    columns = _columns(lora_as)
    out_a, out_b, out_bias = ([None] * size for _ in range(3))
    dys = [grads[i].reshape(-1, grads[i].shape[-1]) for i in live]
    stacked = _stacked([lora_as[i] for i in live])
    low_grad = None
    if needs_x or any(needs_a):
        low_grad = dys[0].new_empty(dys[0].shape[0], stacked.shape[0])
    places = _columns([lora_as[i] for i in live])
    for i, dy, place in zip(live, dys, places, strict=True):
        out_b[i] = lora_gemm.low_grads(
            dy,
            low[:, columns[i]],
            lora_bs[i],
            ctx.plan.factors[i],
            None if low_grad is None else low_grad[:, place],
            lora_bs[i].dtype if needs_b[i] else None,
        )
        out_bias[i] = dy.sum(0) if needs_bias[i] else None
    if any(needs_a[i] for i in live):
        rows = x.reshape(-1, x.shape[-1])
        grad_a = lora_gemm.a_grad(rows, low_grad, stacked.dtype, ctx.plan.p, ctx.plan.seed)
        for i, place in zip(live, places, strict=True):
            out_a[i] = grad_a[place].to(lora_as[i].dtype) if needs_a[i] else None
    grad_x = None
    if needs_x:
        grad_x = _x_grad(dys, [weights[i] for i in live], low_grad, stacked, ctx.plan)
        grad_x = grad_x.view(ctx.x_shape)
    return None, grad_x, *[None] * size, *out_bias, *out_a, *out_b


def _x_grad(
    dys: list[Tensor], weights: list[Tensor], low_grad: Tensor, lora_a: Tensor, plan: _Plan
) -> Tensor:
    """dx (T, K) = Σ dy_i W_i + mask ∘ (dS A), with dS (T, Σ r) and A (Σ r, K) of all members."""
    if plan.backward == "fused":
        out = None
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            last = i == len(dys) - 1
            low, a, p = (low_grad, lora_a, plan.p) if last else (low_grad[:, :0], lora_a[:0], 0.0)
            out = lora_gemm.gemm(dy, weight.t(), None, low, a.t(), p=p, seed=plan.seed, add_to=out)
        return out
    out = dys[0] @ weights[0]
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        out.addmm_(dy, weight)
    if plan.p > 0:
        lora_gemm.expand(out, low_grad, lora_a.t(), plan.p, plan.seed)
        return out
    return out.addmm_(low_grad, lora_a.to(out.dtype))


def _quarters(values):
    size = len(values) // 4
    return tuple(tuple(values[i * size : (i + 1) * size]) for i in range(4))

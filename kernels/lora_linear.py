"""y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ: a shrink kernel for S = s · drop(x) Aᵀ, then one fused GEMM.

The GEMM adds S Bᵀ and the bias to its accumulator before y is written, so y touches memory once.
Dropout draws from counter-based Philox at element row · K + column: the mask is never stored and
does not depend on tile shapes. Backward: dS = s dy B, dB = dyᵀ S, dA = dSᵀ drop(x) and
dx = dy W + drop'(dS A), with the large products left to the library. No dW is ever formed.

Imports torch and triton only. Deterministic: no atomics, no split sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter cannot multiply bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _kept(seed, row, column, width, p):
    offset = row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.rand(seed, offset) >= p


@triton.jit(do_not_specialize=["seed"])
def _shrink(
    x,
    lora_a,
    low,
    rows,
    features,
    rank,
    x_row,
    x_column,
    factor,
    p,
    seed,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    x_rows = x + t.to(tl.int64)[:, None] * x_row
    acc = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (t[:, None] < rows) & (k[None, :] < features)
        tile = tl.load(x_rows + k[None, :] * x_column, mask=inside, other=0.0)
        if DROPOUT:
            tile = tl.where(_kept(seed, t, k, features, p), tile, 0.0).to(x.dtype.element_ty)
        a_inside = (k[:, None] < features) & (r[None, :] < rank)
        a = tl.load(lora_a + r[None, :] * features + k[:, None], mask=a_inside, other=0.0)
        acc = _dot(tile, a, acc, UPCAST)
    out = low + t.to(tl.int64)[:, None] * rank + r[None, :]
    acc = (acc * factor).to(low.dtype.element_ty)
    tl.store(out, acc, mask=(t[:, None] < rows) & (r[None, :] < rank))


@triton.jit
def _fused(
    x,
    weight,
    bias,
    low,
    lora_b,
    y,
    rows,
    outputs,
    features,
    rank,
    x_row,
    x_column,
    weight_row,
    weight_column,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Programs in groups of GROUP row tiles, so that neighbours share columns of the weight in L2.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_T)
    per_group = GROUP * tl.cdiv(outputs, BLOCK_O)
    first = (program // per_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    t = (first + (program % per_group) % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = ((program % per_group) // height) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    x_rows = x + t.to(tl.int64)[:, None] * x_row
    w_rows = weight + o.to(tl.int64)[None, :] * weight_row
    acc = tl.zeros((BLOCK_T, BLOCK_O), ACC)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (t[:, None] < rows) & (k[None, :] < features)
        w_inside = (o[None, :] < outputs) & (k[:, None] < features)
        tile = tl.load(x_rows + k[None, :] * x_column, mask=x_inside, other=0.0)
        w = tl.load(w_rows + k[:, None] * weight_column, mask=w_inside, other=0.0)
        acc = _dot(tile, w, acc, UPCAST)
    s_inside = (t[:, None] < rows) & (r[None, :] < rank)
    b_inside = (o[None, :] < outputs) & (r[:, None] < rank)
    s = tl.load(low + t.to(tl.int64)[:, None] * rank + r[None, :], mask=s_inside, other=0.0)
    b = tl.load(lora_b + o[None, :] * rank + r[:, None], mask=b_inside, other=0.0)
    acc = _dot(s, b, acc, UPCAST)
    if BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(ACC)[None, :]
    out = y + t.to(tl.int64)[:, None] * outputs + o[None, :]
    inside = (t[:, None] < rows) & (o[None, :] < outputs)
    tl.store(out, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def _drop(
    x, out, rows, features, x_row, x_column, p, seed, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (t[:, None] < rows) & (k[None, :] < features)
        source = x + t.to(tl.int64)[:, None] * x_row + k[None, :] * x_column
        keep = inside & _kept(seed, t, k, features, p)
        tile = tl.load(source, mask=keep, other=0.0)
        tl.store(out + t.to(tl.int64)[:, None] * features + k[None, :], tile, mask=inside)


def tiles(rows: int, rank: int, bytes_each: int) -> tuple[int, int, int, int, int, int]:
    """BLOCK_T, BLOCK_O, BLOCK_K, BLOCK_R, warps and stages of the fused GEMM."""
    block_r = max(16, triton.next_power_of_2(rank))
    if bytes_each == 8:
        return 32, 32, 16, block_r, 4, 2
    if rows <= 32:
        return 16, 64, 64, block_r, 4, 3
    if rows <= 256:
        return 64, 128, 32, block_r, 4, 3
    return 128, 128, 32, block_r, 8, 3


def _settings(x: Tensor) -> dict[str, object]:
    return {
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "UPCAST": x.device.type == "cpu" and x.dtype == torch.bfloat16,
    }


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x (T, K) with the elements of `seed` cleared, not rescaled."""
    if p == 0.0:
        return x
    out = x.new_empty(x.shape)
    if x.numel():
        _drop[(triton.cdiv(x.shape[0], 16),)](
            x, out, *x.shape, *x.stride(), p, seed, BLOCK_T=16, BLOCK_K=128, num_warps=4
        )
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """y (T, O) and S (T, r) for x (T, K), all in the dtype of x."""
    (rows, features), outputs, rank = x.shape, weight.shape[0], lora_a.shape[0]
    low, y = x.new_empty(rows, rank), x.new_empty(rows, outputs)
    if y.numel() == 0:
        return y, low
    lora_a, lora_b = lora_a.to(x.dtype).contiguous(), lora_b.to(x.dtype).contiguous()
    block_t, block_o, block_k, block_r, warps, stages = tiles(rows, rank, x.element_size())
    _shrink[(triton.cdiv(rows, 32),)](
        x,
        lora_a,
        low,
        rows,
        features,
        rank,
        *x.stride(),
        scaling / (1.0 - p),
        p,
        seed,
        DROPOUT=p > 0,
        BLOCK_T=32,
        BLOCK_K=64,
        BLOCK_R=block_r,
        num_warps=4,
        **_settings(x),
    )
    _fused[(triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_o),)](
        x,
        weight,
        x if bias is None else bias.contiguous(),
        low,
        lora_b,
        y,
        rows,
        outputs,
        features,
        rank,
        *x.stride(),
        *weight.stride(),
        BIAS=bias is not None,
        BLOCK_T=block_t,
        BLOCK_O=block_o,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
        **_settings(x),
    )
    return y, low


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, p, seed):  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1])
        y, low = forward(rows, weight, bias, lora_a, lora_b, scaling, p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.factor, ctx.p, ctx.seed = scaling / (1.0 - p), p, seed
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_low = (grad @ lora_b.to(grad.dtype)).mul_(ctx.factor)  # (T, r)
        if needs_a:
            rows = dropped(x.reshape(-1, x.shape[-1]), ctx.p, ctx.seed)
            grad_a = (grad_low.t() @ rows).to(lora_a.dtype)
        if needs_x:
            grad_x = grad @ weight
            if ctx.p == 0.0:
                grad_x.addmm_(grad_low, lora_a.to(grad.dtype))
            else:
                grad_x += dropped(grad_low @ lora_a.to(grad.dtype), ctx.p, ctx.seed)
            grad_x = grad_x.view(x.shape)
        grad_b = (grad.t() @ low).to(lora_b.dtype) if needs_b else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """y (..., O) of x (..., K), weight (O, K) frozen, lora_a (r, K) and lora_b (O, r)."""
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)

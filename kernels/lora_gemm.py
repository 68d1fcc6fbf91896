"""The Triton kernels of a LoRA linear layer and the functions that launch them.

    shrink      S = f · drop(x) Aᵀ, x read once; it can copy x beside S on the way
    gemm        y = x Wᵀ + b + S Bᵀ, the low-rank term added in the epilogue. With W and A read
                through their strides it is also dx = dy W + mask ∘ (dS A)
    low_grads   dS = f · dy B and dB = dyᵀ S from one pass over dy
    a_grad      dA = dSᵀ drop(x)
    expand      dx += mask ∘ (dS A), for a dx that the library has multiplied
    decode      y for at most 64 rows in one launch, S accumulated in the same loop

Sums over many programs are fp32 partial sums, added in a fixed order by `_sum`: no atomics. Dropout
draws four elements from one Philox call with counter row · ⌈K/4⌉ + column // 4, so that the mask
depends on the seed and the element alone, not on the kernel or its tiles. It is never stored.

Imports torch and triton only. Row offsets are 64-bit; tokens lie on the first axis of the grid.
It is one file because the kernels share `_dot`, `_load` and the dropout mask of `_kept`, and each
has to agree with its launch and with the tiles that are shipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lora_table import DECODE_RANK, DECODE_ROWS

PROGRAMS = 264  # what a split aims at: two programs on each multiprocessor of an H100
_ONE_PASS_RANK = 32  # above, the partial sums of dS and dB outweigh a second pass over dy
_ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3))  # chips with 160 KiB of shared memory a program or more


# ---- kernels


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter cannot multiply bf16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _kept(seed, threshold, t, start, width, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mask (BLOCK_T, BLOCK_K) of rows t and the columns from `start`, a multiple of four."""
    quad = start // 4 + tl.arange(0, BLOCK_K // 4)
    counter = t.to(tl.int64)[:, None] * tl.cdiv(width, 4) + quad[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    a = (a >> 1).to(tl.int32) >= threshold
    b = (b >> 1).to(tl.int32) >= threshold
    c = (c >> 1).to(tl.int32) >= threshold
    d = (d >> 1).to(tl.int32) >= threshold
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK_T, BLOCK_K))


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _shrink(
    x, lora_a, low, copy, rows, features, rank, width, per_split, x_row, x_column, a_row, a_column,
    low_row, copy_row, factor, threshold, seed,
    DROPOUT: tl.constexpr, COPY: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = tl.program_id(1)
    rank_tiles = tl.cdiv(width, BLOCK_R)  # neighbours share a tile of x in L2
    t = (program // rank_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = (program % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    long = t.to(tl.int64)
    first = split * per_split
    last = tl.minimum(features, first + per_split)
    at = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    x_at = x + long[:, None] * x_row + at[None, :] * x_column
    a_at = lora_a + r[None, :] * a_row + at[:, None] * a_column
    acc = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = t[:, None] < rows
        a_inside = r[None, :] < rank
        if not EVEN_K:
            inside = inside & (k[None, :] < features)
            a_inside = a_inside & (k[:, None] < features)
        tile = tl.load(x_at, mask=inside, other=0.0)
        if COPY:
            once = inside & (t[:, None] < tl.where(program % rank_tiles == 0, rows, 0))
            tl.store(copy + long[:, None] * copy_row + k[None, :], tile, mask=once)
        if DROPOUT:
            keep = _kept(seed, threshold, t, start, features, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0).to(x.dtype.element_ty)
        a = tl.load(a_at, mask=a_inside, other=0.0).to(x.dtype.element_ty)
        acc = _dot(tile, a, acc, UPCAST)
        x_at += BLOCK_K * x_column
        a_at += BLOCK_K * a_column
    out = low + (split.to(tl.int64) * rows + long[:, None]) * low_row + r[None, :]
    inside = (t[:, None] < rows) & (r[None, :] < width)
    tl.store(out, (acc * factor).to(low.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank(
    acc, low, lora_b, t, o, rows, outputs, rank, low_row, b_row, b_column,
    dtype: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + S Bᵀ for rows t and columns o."""
    s_rows = low + t.to(tl.int64)[:, None] * low_row
    b_rows = lora_b + o.to(tl.int64)[None, :] * b_row
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        s_inside = (t[:, None] < rows) & (r[None, :] < rank)
        b_inside = (o[None, :] < outputs) & (r[:, None] < rank)
        s = tl.load(s_rows + r[None, :], mask=s_inside, other=0.0)
        b = tl.load(b_rows + r[:, None].to(tl.int64) * b_column, mask=b_inside, other=0.0)
        acc = _dot(s, b.to(dtype), acc, UPCAST)
    return acc


@triton.jit(do_not_specialize=["seed", "threshold"])
def _gemm(
    x, weight, bias, low, lora_b, out, rows, outputs, features, rank, x_row, x_column, weight_row,
    weight_column, low_row, b_row, b_column, threshold, seed,
    BIAS: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, EVEN_O:
    tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R:
    tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Programs in groups of GROUP row tiles, so that neighbours share columns of the weight in L2.
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BLOCK_T)
    per_group = GROUP * tl.cdiv(outputs, BLOCK_O)
    first = (program // per_group) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    t = (first + (program % per_group) % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_o = ((program % per_group) // height) * BLOCK_O
    o = first_o + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K)
    long = t.to(tl.int64)
    # Rows past the end repeat row 0, which needs no mask; what they give is never stored.
    x_at = x + tl.where(t < rows, long, 0)[:, None] * x_row + k[None, :] * x_column
    w_at = weight + o.to(tl.int64)[None, :] * weight_row + k[:, None].to(tl.int64) * weight_column
    acc = tl.zeros((BLOCK_T, BLOCK_O), ACC)
    for start in range(0, features, BLOCK_K):
        x_inside = k[None, :] < features - start
        w_inside = k[:, None] < features - start
        if EVEN_K:
            w_inside = o[None, :] < outputs
        elif not EVEN_O:
            w_inside = w_inside & (o[None, :] < outputs)
        tile = _load(x_at, x_inside, not EVEN_K)
        w = _load(w_at, w_inside, not (EVEN_K and EVEN_O))
        acc = _dot(tile, w, acc, UPCAST)
        x_at += BLOCK_K * x_column
        w_at += BLOCK_K * weight_column
    dtype: tl.constexpr = out.dtype.element_ty
    if DROPOUT:  # here x is dy and the columns are those of the layer's input
        side = _low_rank(
            tl.zeros((BLOCK_T, BLOCK_O), ACC), low, lora_b, t, o, rows, outputs, rank,
            low_row, b_row, b_column, dtype, BLOCK_R, UPCAST,
        )  # fmt: skip
        keep = _kept(seed, threshold, t, first_o, outputs, BLOCK_T, BLOCK_O)
        acc += tl.where(keep, side, 0.0)
    else:
        acc = _low_rank(
            acc, low, lora_b, t, o, rows, outputs, rank,
            low_row, b_row, b_column, dtype, BLOCK_R, UPCAST,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(ACC)[None, :]
    out_at = out + long[:, None] * outputs + o[None, :]
    inside = (t[:, None] < rows) & (o[None, :] < outputs)
    if ADD:
        acc += tl.load(out_at, mask=inside, other=0.0).to(ACC)
    tl.store(out_at, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _expand(
    low, lora_b, out, rows, outputs, rank, low_row, b_row, b_column, threshold, seed,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, UPCAST:
    tl.constexpr,
):  # fmt: skip
    o_tiles = tl.cdiv(outputs, BLOCK_O)
    t = (tl.program_id(0) // o_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_o = (tl.program_id(0) % o_tiles) * BLOCK_O
    o = first_o + tl.arange(0, BLOCK_O)
    dtype: tl.constexpr = out.dtype.element_ty
    side = _low_rank(
        tl.zeros((BLOCK_T, BLOCK_O), ACC), low, lora_b, t, o, rows, outputs, rank,
        low_row, b_row, b_column, dtype, BLOCK_R, UPCAST,
    )  # fmt: skip
    keep = _kept(seed, threshold, t, first_o, outputs, BLOCK_T, BLOCK_O)
    inside = (t[:, None] < rows) & (o[None, :] < outputs)
    out_at = out + t.to(tl.int64)[:, None] * outputs + o[None, :]
    acc = tl.load(out_at, mask=inside, other=0.0).to(ACC) + tl.where(keep, side, 0.0)
    tl.store(out_at, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _reduce(
    x, low, lora_b, low_parts, parts, rows, features, rank, per_split, x_row, x_column, low_row,
    part_row, part_column, threshold, seed,
    WITH_LOW: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of drop(x)ᵀ S (K, r) over a range of rows, and x B (T, r) over BLOCK_K columns.

    For dB and dS x is dy; for dA it is x, S is dS and the result is stored transposed.
    """
    program = tl.program_id(0)
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    tiles = rank_tiles * tl.cdiv(features, BLOCK_K)
    split = program // tiles
    k_tile = (program % tiles) // rank_tiles
    r = (program % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    if WITH_LOW:
        b_inside = (k[:, None] < features) & (r[None, :] < rank)
        b_at = lora_b + k.to(tl.int64)[:, None] * rank + r[None, :]
        b = tl.load(b_at, mask=b_inside, other=0.0).to(dtype)
    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    first = split * per_split
    for start in range(first, tl.minimum(rows, first + per_split), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        long = t.to(tl.int64)[:, None]
        inside = (t[:, None] < rows) & (k[None, :] < features)
        s_inside = (t[:, None] < rows) & (r[None, :] < rank)
        at = x + long * x_row + k.to(tl.int64)[None, :] * x_column
        tile = tl.load(at, mask=inside, other=0.0)
        if DROPOUT:
            keep = _kept(seed, threshold, t, k_tile * BLOCK_K, features, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0).to(dtype)
        if WITH_LOW:
            part = _dot(tile, b, tl.zeros((BLOCK_T, BLOCK_R), ACC), UPCAST)
            low_at = low_parts + (k_tile.to(tl.int64) * rows + long) * rank + r[None, :]
            tl.store(low_at, part, mask=s_inside)
        s = tl.load(low + long * low_row + r[None, :], mask=s_inside, other=0.0)
        acc = _dot(tl.trans(tile), s, acc, UPCAST)
    at = parts + split.to(tl.int64) * features * rank
    at += k.to(tl.int64)[:, None] * part_row + r.to(tl.int64)[None, :] * part_column
    inside = (k[:, None] < features) & (r[None, :] < rank)
    tl.store(at, acc.to(parts.dtype.element_ty), mask=inside)


@triton.jit
def _sum(parts, out, count, size, columns, out_row, factor, BLOCK: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    acc = tl.zeros((BLOCK,), ACC)
    for _ in range(0, count):
        acc += tl.load(parts + i, mask=inside, other=0.0)
        parts += size
    out_at = out + (i // columns) * out_row + i % columns
    tl.store(out_at, (acc * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _decode(
    x, weight, bias, lora_a, lora_b, low, y, rows, outputs, features, rank, x_row, x_column,
    weight_row, weight_column, low_row, factor, threshold, seed,
    BIAS: tl.constexpr, KEEP_LOW: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_tiles = tl.cdiv(outputs, BLOCK_O)
    o_tile = tl.program_id(0) % o_tiles
    t = (tl.program_id(0) // o_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    x_at = x + t.to(tl.int64)[:, None] * x_row + k[None, :].to(tl.int64) * x_column
    w_at = weight + o.to(tl.int64)[None, :] * weight_row + k[:, None].to(tl.int64) * weight_column
    a_at = lora_a + r[None, :] * features + k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_O), ACC)
    s = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(0, features, BLOCK_K):
        x_inside = t[:, None] < rows
        w_inside = o[None, :] < outputs
        a_inside = r[None, :] < rank
        if not EVEN_K:
            x_inside = x_inside & (k[None, :] < features - start)
            w_inside = w_inside & (k[:, None] < features - start)
            a_inside = a_inside & (k[:, None] < features - start)
        tile = tl.load(x_at, mask=x_inside, other=0.0)
        w = tl.load(w_at, mask=w_inside, other=0.0)
        acc = _dot(tile, w, acc, UPCAST)
        if DROPOUT:
            keep = _kept(seed, threshold, t, start, features, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0).to(dtype)
        a = tl.load(a_at, mask=a_inside, other=0.0).to(dtype)
        s = _dot(tile, a, s, UPCAST)
        x_at += BLOCK_K * x_column
        w_at += BLOCK_K * weight_column
        a_at += BLOCK_K
    rounded = (s * factor).to(dtype)
    s_inside = (t[:, None] < rows) & (r[None, :] < rank)
    if KEEP_LOW:  # every tile of outputs has the same S: the first one stores it
        at = low + t.to(tl.int64)[:, None] * low_row + r[None, :]
        mine = t[:, None] < tl.where(o_tile == 0, rows, 0)
        tl.store(at, rounded, mask=s_inside & mine)
    b_inside = (o[None, :] < outputs) & (r[:, None] < rank)
    b_at = lora_b + o.to(tl.int64)[None, :] * rank + r[:, None]
    b = tl.load(b_at, mask=b_inside, other=0.0).to(dtype)
    acc = _dot(rounded, b, acc, UPCAST)
    if BIAS:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(ACC)[None, :]
    y_at = y + t.to(tl.int64)[:, None] * outputs + o[None, :]
    inside = (t[:, None] < rows) & (o[None, :] < outputs)
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=inside)


# ---- launches

INTERPRETED = not isinstance(_gemm, triton.runtime.JITFunction)


def shrink(
    x: Tensor,
    lora_a: Tensor,
    factor: float,
    p: float = 0.0,
    seed: int = 0,
    *,
    out: Tensor | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """S = factor · (x ∘ mask) Aᵀ (T, r) in the dtype of x, for x (T, K) and A (r, K).

    `out` (T, width >= r) receives S, and zeros in columns beyond r; `copy` (T, K) receives x.
    """
    (rows, features), rank = x.shape, lora_a.shape[0]
    out = x.new_empty(rows, rank) if out is None else out
    if rows == 0:
        return out
    width = out.shape[1]
    block_t, block_k, block_r, warps, stages = _shrink_tiles(width, x.element_size(), p > 0)
    tiles = triton.cdiv(rows, block_t) * triton.cdiv(width, block_r)
    per_split, splits = _split(features, block_k, tiles, max(4 * block_k, 8 * rank))
    target = out if splits == 1 else _partials(x, splits, rows, width)
    _shrink[(tiles, splits)](
        x, lora_a, target, x if copy is None else copy, rows, features, rank, width, per_split,
        *x.stride(), *lora_a.stride(), out.stride(0) if splits == 1 else width, 0 if copy is None
        else copy.stride(0), float(factor) if splits == 1 else 1.0, _threshold(p), seed,
        DROPOUT=p > 0, COPY=copy is not None, EVEN_K=features % block_k == 0, BLOCK_T=block_t,
        BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps, num_stages=stages, **_settings(x),
    )  # fmt: skip
    if splits > 1:
        _add_up(target, out, factor)
    return out


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor,
    lora_b: Tensor,
    *,
    p: float = 0.0,
    seed: int = 0,
    add_to: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + mask ∘ (S Bᵀ) (T, O) for x (T, K), W (O, K), S (T, r), B (O, r), r = 0 allowed.

    The mask, only there if p > 0, belongs to the result's elements. `add_to` is added in place.
    """
    (rows, features), outputs, rank = x.shape, weight.shape[0], low.shape[1]
    out = x.new_empty(rows, outputs) if add_to is None else add_to
    if out.numel() == 0:
        return out
    block_t, block_o, block_k, block_r, warps, stages = tiles(
        rows, outputs, rank, x.element_size(), _capability(x.device), p > 0, _aligned(x, weight)
    )
    _gemm[(triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_o),)](
        x, weight, x if bias is None else bias.contiguous(), low, lora_b, out, rows, outputs,
        features, rank, *x.stride(), *weight.stride(), low.stride(0), *lora_b.stride(),
        _threshold(p), seed,
        BIAS=bias is not None, ADD=add_to is not None, DROPOUT=p > 0, EVEN_K=features % block_k ==
        0, EVEN_O=outputs % block_o == 0, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_K=block_k,
        BLOCK_R=block_r, GROUP=8, num_warps=warps, num_stages=stages, **_settings(x),
    )  # fmt: skip
    return out


def expand(out: Tensor, low: Tensor, lora_b: Tensor, p: float, seed: int) -> None:
    """out (T, O) += mask ∘ (S Bᵀ), in place."""
    (rows, outputs), rank = out.shape, low.shape[1]
    if out.numel() == 0:
        return
    block_t, block_o = (32, 32) if out.element_size() == 8 else (64, 64)
    _expand[(triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_o),)](
        low, lora_b, out, rows, outputs, rank, low.stride(0), *lora_b.stride(), _threshold(p),
        seed,
        BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_R=_rank_tile(rank, 64 if out.element_size() == 2
        else 16), num_warps=4, **_settings(out),
    )  # fmt: skip


def low_grads(
    dy: Tensor,
    low: Tensor,
    lora_b: Tensor,
    factor: float,
    out: Tensor | None,
    b_dtype: torch.dtype | None,
) -> Tensor | None:
    """out = dS = factor · dy B (T, r), and dB = dyᵀ S (O, r) in `b_dtype` is returned.

    For dy (T, O), S (T, r), B (O, r); either is left out where its destination is None.
    """
    rank = lora_b.shape[1]
    if out is not None and (rank > _ONE_PASS_RANK or b_dtype is None):
        shrink(dy, lora_b.t(), factor, out=out)
        out = None
    if b_dtype is None:
        return None
    return _reduced(dy, low, b_dtype, transposed=False, lora_b=lora_b, factor=factor, low_grad=out)


def a_grad(x: Tensor, low_grad: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """dA = dSᵀ (x ∘ mask) (r, K) in `dtype`, for x (T, K) and dS (T, r)."""
    return _reduced(x, low_grad, dtype, transposed=True, p=p, seed=seed)


def _reduced(
    x: Tensor,
    low: Tensor,
    dtype: torch.dtype,
    *,
    transposed: bool,
    p: float = 0.0,
    seed: int = 0,
    lora_b: Tensor | None = None,
    factor: float = 1.0,
    low_grad: Tensor | None = None,
) -> Tensor:
    """(x ∘ mask)ᵀ S (K, r), or its transpose; with `low_grad` also that = factor · x B."""
    (rows, features), rank = x.shape, low.shape[1]
    shape = (rank, features) if transposed else (features, rank)
    if rows == 0:
        return x.new_zeros(shape, dtype=dtype)
    block_t, block_k, block_r, warps, stages = _reduce_tiles(
        rank, x.element_size(), _capability(x.device)
    )
    k_tiles = triton.cdiv(features, block_k)
    tiles = k_tiles * triton.cdiv(rank, block_r)
    per_split, splits = _split(rows, block_t, tiles, max(block_t, 8 * rank))
    out = x.new_empty(shape, dtype=dtype)
    parts = out if splits == 1 else _partials(x, splits, *shape)
    low_parts = x if low_grad is None else _partials(x, k_tiles, rows, rank)
    _reduce[(tiles * splits,)](
        x, low, x if lora_b is None else lora_b.contiguous(), low_parts, parts, rows, features,
        rank, per_split, *x.stride(), low.stride(0), 1 if transposed else rank, features if
        transposed else 1, _threshold(p), seed,
        WITH_LOW=low_grad is not None, DROPOUT=p > 0, BLOCK_T=block_t, BLOCK_K=block_k,
        BLOCK_R=block_r, num_warps=warps, num_stages=stages, **_settings(x),
    )  # fmt: skip
    if low_grad is not None:
        _add_up(low_parts, low_grad, factor)
    if splits > 1:
        _add_up(parts, out, 1.0)
    return out


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    factor: float,
    p: float,
    seed: int,
    low: Tensor | None,
) -> Tensor:
    """y = x Wᵀ + b + S Bᵀ (T, O) for at most 64 rows; S goes to `low` (T, r) if that is given."""
    (rows, features), outputs, rank = x.shape, weight.shape[0], lora_a.shape[0]
    assert rows <= DECODE_ROWS and rank <= DECODE_RANK, (rows, rank)
    y = x.new_empty(rows, outputs)
    if y.numel() == 0:
        return y
    block_t, block_o, block_k, block_r, warps, stages = decode_tiles(
        rows, outputs, rank, x.element_size(), _capability(x.device), p > 0
    )
    _decode[(triton.cdiv(rows, block_t) * triton.cdiv(outputs, block_o),)](
        x, weight, x if bias is None else bias.contiguous(), lora_a.contiguous(),
        lora_b.contiguous(), x if low is None else low, y, rows, outputs, features, rank,
        *x.stride(), *weight.stride(), 0 if low is None else low.stride(0), float(factor),
        _threshold(p), seed,
        BIAS=bias is not None, KEEP_LOW=low is not None, DROPOUT=p > 0, EVEN_K=features % block_k
        == 0, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_K=block_k, BLOCK_R=block_r, num_warps=warps,
        num_stages=stages, **_settings(x),
    )  # fmt: skip
    return y


def _add_up(parts: Tensor, out: Tensor, factor: float) -> None:
    """out (rows, columns) = factor · Σ of parts (count, rows, columns), in the order of parts."""
    count, rows, columns = parts.shape
    settings = {"ACC": _settings(parts)["ACC"], "BLOCK": 512, "num_warps": 4}
    grid = (triton.cdiv(rows * columns, 512),)
    _sum[grid](parts, out, count, rows * columns, columns, out.stride(0), float(factor), **settings)


# ---- tiles


def tiles(
    rows: int,
    outputs: int,
    rank: int,
    bytes_each: int,
    capability: tuple[int, int] = (9, 0),
    dropout: bool = False,
    aligned: bool = True,
) -> tuple[int, int, int, int, int, int]:
    """BLOCK_T, BLOCK_O, BLOCK_K, BLOCK_R, warps and stages of the main product.

    `aligned` says that rows of x and W start on 16 bytes: else they are read one by one, through
    registers.
    """
    block_r = _rank_tile(rank, 64)
    if bytes_each == 8:
        return 32, 32, 16, min(32, block_r), 4, 2
    if bytes_each == 4:
        return 64, 64, 32, 16, 4, 3
    if not aligned:
        return 64, 64, 32, min(32, block_r), 4, 3
    roomy = capability in _ROOMY
    if rows <= 128:
        return 64, 128, 64, block_r, 4, 4 if roomy else 3
    if not roomy:
        return 128, 128, 32, block_r, 8, 4
    # A second accumulator for the masked term leaves no registers for the wide tile, and a small
    # product has too few wide tiles to fill the chip.
    wide = triton.cdiv(rows, 128) * triton.cdiv(outputs, 256) >= PROGRAMS // 2
    return (128, 256 if wide and not dropout else 128, 64, block_r, 8, 3)


def decode_tiles(
    rows: int,
    outputs: int,
    rank: int,
    bytes_each: int,
    capability: tuple[int, int] = (9, 0),
    dropout: bool = False,
) -> tuple[int, int, int, int, int, int]:
    """The same for `decode`: narrow tiles of the outputs, so that all of the chip streams W."""
    block_t, block_r = max(16, triton.next_power_of_2(rows)), _rank_tile(rank, DECODE_RANK)
    if bytes_each == 8:
        return 16, 32, 16, block_r, 4, 2
    if bytes_each == 4:  # without tensor cores: a small tile, or the registers do not last
        return 16, 32, 16, block_r, 8, 2
    if dropout:
        return block_t, 32, 32, block_r, 4, 4
    block_o = 64 if outputs >= 32 * PROGRAMS and block_r <= 64 else 32
    deep = block_r <= 32 and capability in _ROOMY
    return block_t, block_o, 128 if deep else 64, block_r, 4, 4 if deep else 3


def _shrink_tiles(width: int, bytes_each: int, dropout: bool) -> tuple[int, int, int, int, int]:
    block_r = _rank_tile(width, 128 if bytes_each == 2 else 32)
    if bytes_each > 2:
        return 32, 32, block_r, 4, 3 if bytes_each == 4 else 2
    if block_r <= 32:
        return 32, 64 if dropout else 128, block_r, 4, 4
    if block_r == 64:
        return 32, 64, block_r, 8, 3
    return (32, 32, block_r, 8, 4) if dropout else (32, 64, block_r, 4, 3)


def _reduce_tiles(
    rank: int, bytes_each: int, capability: tuple[int, int] = (9, 0)
) -> tuple[int, int, int, int, int]:
    if bytes_each > 2:
        return 32, 64, 16, 4, 2
    block_r = _rank_tile(rank, 128)
    return 64, 256 if block_r <= 32 and capability in _ROOMY else 128, block_r, 8, 3


def _rank_tile(rank: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(rank)))


def _split(length: int, block: int, tiles: int, least: int) -> tuple[int, int]:
    """How long a piece is (a multiple of `block`) and how many there are, for PROGRAMS in all."""
    wanted = max(1, min(PROGRAMS // tiles, length // max(1, least)))
    per_split = triton.cdiv(triton.cdiv(length, wanted), block) * block
    return per_split, triton.cdiv(length, per_split)


def _partials(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(shape, dtype=dtype)


def _threshold(p: float) -> int:
    """An element is kept if the upper 31 of its random bits are not below this."""
    return min(2**31 - 1, round(p * 2**31))


def _settings(x: Tensor) -> dict[str, object]:
    return {
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
    }


def _aligned(*matrices: Tensor) -> bool:
    return all(max(m.stride()) % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


# ---- what is shipped


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every tile shape that bf16 and fp32 layers can take: (label, launches without a GPU)."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for rank in (16, 32, 64, 128):
            for p in (0.0, 0.1):
                label = f"{name}, r={rank}{', dropout' if p else ''}"
                for rows in (2048, 8192) if rank == 16 else (8192,):
                    yield f"T={rows}, {label}", _step(rows, 4096, 4096, rank, dtype, p)
                if dtype == torch.bfloat16:
                    yield f"T=128, {label}", _step(128, 896, 4864, rank, dtype, p)
                    yield f"T=512, {label}", _step(512, 896, 4864, rank, dtype, p)
                if dtype == torch.float32 and rank == 128:
                    continue  # `choose_variant` does not decode these
                for outputs in (4096, 11008):
                    yield f"decode, O={outputs}, {label}", _token(outputs, rank, dtype, p)
    yield "odd sizes, bf16, r=12", _step(1000, 1001, 1003, 12, torch.bfloat16, 0.0)


def _step(
    rows: int, features: int, outputs: int, rank: int, dtype: torch.dtype, p: float
) -> Callable[[], None]:
    def thunk() -> None:
        x, dy = torch.empty(rows, features, dtype=dtype), torch.empty(rows, outputs, dtype=dtype)
        weight = torch.empty(outputs, features, dtype=dtype)
        bias = torch.empty(outputs, dtype=dtype)
        lora_a, lora_b = torch.empty(rank, features), torch.empty(outputs, rank)
        low = shrink(x, lora_a, 2.0, p, 1)
        padded = x.new_empty(rows, features + -(-rank // 8) * 8)
        columns = padded[:, :features], padded[:, features:]
        shrink(x, lora_a, 2.0, p, 1, copy=columns[0], out=columns[1])
        gemm(x, weight, bias, low, lora_b)
        low_grad = torch.empty_like(low)
        low_grads(dy, low, lora_b, 2.0, low_grad, torch.float32)
        a_grad(x, low_grad, torch.float32, p, 1)
        dx = gemm(dy, weight.t(), None, low_grad, lora_a.t(), p=p, seed=1)
        if p:
            expand(dx, low_grad, lora_a.t(), p, 1)
        else:
            gemm(dy, weight.t(), None, low_grad, lora_a.t(), add_to=dx)

    return thunk


def _token(outputs: int, rank: int, dtype: torch.dtype, p: float) -> Callable[[], None]:
    def thunk() -> None:
        weight, bias = torch.empty(outputs, 4096, dtype=dtype), torch.empty(outputs, dtype=dtype)
        lora_a, lora_b = torch.empty(rank, 4096), torch.empty(outputs, rank)
        for rows in (1, 32, 64):
            x = torch.empty(rows, 4096, dtype=dtype)
            low = torch.empty(rows, rank, dtype=dtype) if p else None
            decode(x, weight, bias, lora_a, lora_b, 2.0, p, 1, low)

    return thunk

"""Log-probability and entropy from hidden states in one fused kernel: no logit touches memory.

A program takes BLOCK_T rows and one split of the vocabulary, BLOCK_V entries at a time: z = h Wᵀ is
accumulated in fp32 registers and folded into the running maximum m, Σ 2^x and Σ x 2^x over v ≠ y
(x = (z − m) log₂e / τ) and the target's z. Each split leaves these four numbers a row; a small
kernel merges them in the order of the splits. Entries past V are -inf before the maximum is taken,
and the maximum starts at -inf.

Forward only: a gradient comes from `linear_logprobs`, which recomputes chunks from the statistics.
Imports torch and triton only. Deterministic: no atomics, no locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .token_logprobs import (
    _LOG2E,
    empty_stats,
    finish,
    finite_or_zero,
    floored,
    nan_or_larger,
)


@triton.jit
def _partial(
    hidden,
    weight,
    bias,
    targets,
    partials,
    rows,
    vocab,
    width,
    tiles_each,
    splits,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # The splits of a row tile are neighbours: what runs at one time shares few rows, which stay in
    # L2 beside the tiles of W, and every tile of W is shared by several row tiles.
    program = tl.program_id(0)
    split = program % splits
    t = (program // splits) * BLOCK_T + tl.arange(0, BLOCK_T)
    scale = scale * _LOG2E
    # Rows past the end repeat the last one, and so do columns below: no mask in the inner loop.
    t_row = tl.minimum(t, rows - 1)
    target = tl.load(targets + t_row)
    h_rows = hidden + t_row.to(tl.int64)[:, None] * hidden_row
    k = tl.arange(0, BLOCK_K)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    at_target = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(vocab, BLOCK_V))
    for tile in tl.range(first, last, flatten=FLATTEN):
        v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        v_row = tl.minimum(v, vocab - 1)
        w_rows = weight + v_row.to(tl.int64)[None, :] * weight_row
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for start in range(0, width, BLOCK_K):
            if EVEN:
                h = tl.load(h_rows + (start + k)[None, :] * hidden_column)
                w = tl.load(w_rows + (start + k)[:, None] * weight_column)
            else:
                inside = start + k < width
                h_at = h_rows + (start + k)[None, :] * hidden_column
                h = tl.load(h_at, mask=inside[None, :], other=0.0)
                w_at = w_rows + (start + k)[:, None] * weight_column
                w = tl.load(w_at, mask=inside[:, None], other=0.0)
            if UPCAST:  # the interpreter cannot multiply bf16
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")
        if BIAS:
            z += tl.load(bias + v_row).to(tl.float32)[None, :]
        z = tl.where((v < vocab)[None, :], z, float("-inf"))
        own = v[None, :] == target[:, None]
        here = (target >= tile * BLOCK_V) & (target < tile * BLOCK_V + BLOCK_V)
        found = tl.where(here, tl.sum(tl.where(own, z, 0.0), 1), float("-inf"))
        at_target = nan_or_larger(at_target, found)
        new_top = tl.maximum(top, tl.max(z, 1))
        finite = finite_or_zero(new_top)
        shift = floored((top - finite) * scale)
        factor = tl.exp2(shift)
        x = floored((z - finite[:, None]) * scale)
        e = tl.where(own, 0.0, tl.exp2(x))
        weighted = (weighted + shift * others) * factor + tl.sum(x * e, 1)
        others = others * factor + tl.sum(e, 1)
        top = new_top
    count = tl.zeros((), tl.int64) + rows  # a plain number where it is 1
    out = partials + split * 4 * count + t
    valid = t < rows
    tl.store(out, top, mask=valid)
    tl.store(out + count, others, mask=valid)
    tl.store(out + 2 * count, weighted, mask=valid)
    tl.store(out + 3 * count, at_target, mask=valid)


@triton.jit
def _merge(
    partials,
    targets,
    logprobs,
    entropy,
    tops,
    log_totals,
    rows,
    vocab,
    splits,
    scale,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < rows
    scale = scale * _LOG2E
    count = tl.zeros((), tl.int64) + rows  # a plain number where it is 1
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    at_target = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(splits):
        part = partials + split * 4 * count + t
        part_top = tl.load(part, mask=inside, other=0.0)
        part_others = tl.load(part + count, mask=inside, other=0.0)
        part_weighted = tl.load(part + 2 * count, mask=inside, other=0.0)
        at_target = nan_or_larger(at_target, tl.load(part + 3 * count, mask=inside, other=0.0))
        new_top = tl.maximum(top, part_top)
        finite = finite_or_zero(new_top)
        shift = floored((top - finite) * scale)
        part_shift = floored((part_top - finite) * scale)
        factor = tl.exp2(shift)
        part_factor = tl.exp2(part_shift)
        weighted = (weighted + shift * others) * factor
        weighted += (part_weighted + part_shift * part_others) * part_factor
        others = others * factor + part_others * part_factor
        top = new_top
    target = tl.load(targets + t, mask=inside, other=0)
    at_target = tl.where((target >= 0) & (target < vocab), at_target, float("nan"))
    log_p, ent, log_total = finish(top, others, weighted, at_target, scale)
    tl.store(logprobs + t, log_p, mask=inside)
    tl.store(entropy + t, ent, mask=inside)
    tl.store(tops + t, top, mask=inside)
    tl.store(log_totals + t, log_total, mask=inside)


_INTERPRETED = not isinstance(_merge, triton.JITFunction)


class Tiles(NamedTuple):
    """Shape of a program, and how it is compiled."""

    rows: int
    vocab: int
    width: int
    warps: int
    stages: int
    flatten: bool = False


def tiles(rows: int, bytes_each: int) -> Tiles:
    """Tiles by rows and element size; the sizes are from compile read-outs, not yet from timings.

    Few rows: what counts is the stream of W, so narrow tiles and deep pipelines. Many rows:
    128 x 128; 128 x 256 would ask less of L2, but spills registers on sm_80 (and, a little, sm_90).
    """
    if bytes_each == 4:  # no tensor cores for full fp32 precision: the accumulator must be small
        return Tiles(16, 64, 16, 4, 2) if rows <= 16 else Tiles(64, 64, 16, 4, 2)
    if rows <= 16:
        return Tiles(16, 128, 64, 4, 4)
    if rows <= 64:
        return Tiles(64, 128, 64, 4, 4)
    return Tiles(128, 128, 64, 8, 4)


def split_count(row_tiles: int, vocab_tiles: int, processors: int) -> int:
    """Into how many splits the vocabulary is cut: the count that keeps all processors busy.

    The time is (waves of programs) x (vocabulary tiles a program takes). With few row tiles up to
    one split a processor; with many at most 16, so that a tile of W is shared by several row tiles
    that run at one time, and at least 8, so that those rows fit in L2. Ties go to the fewest.
    """
    most = min(vocab_tiles, max(16, processors // row_tiles))
    least = min(most, 8)

    def cost(splits: int) -> int:
        return -(-row_tiles * splits // processors) * -(-vocab_tiles // splits)

    return min(range(least, most + 1), key=lambda splits: (cost(splits), splits))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def suits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel takes these dtypes: one dtype, and not float64."""
    return hidden.dtype == weight.dtype != torch.float64 and hidden.shape[1] > 0


def aligned(*tensors: Tensor) -> bool:
    """Whether rows start on multiples of 16 entries; otherwise the loads are narrow, and spill."""
    return all(t.stride(1) == 1 and t.stride(0) % 16 == 0 == t.shape[1] % 16 for t in tensors)


def launch_online(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> list[Tensor]:
    """logprobs, entropy, m and log₂ Σ 2^x of every row, each (N,) fp32."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    stats = empty_stats(rows, torch.float32, hidden.device)
    if not rows:
        return stats
    shape = tiles(rows, hidden.element_size())
    row_tiles, vocab_tiles = -(-rows // shape.rows), -(-vocab // shape.vocab)
    splits = split_count(row_tiles, vocab_tiles, _processors(hidden.device))
    partials = torch.empty(splits, 4, rows, dtype=torch.float32, device=hidden.device)
    targets = targets.contiguous()
    _partial[(row_tiles * splits,)](
        hidden,
        weight,
        stats[0] if bias is None else bias.contiguous(),
        targets,
        partials,
        rows,
        vocab,
        width,
        -(-vocab_tiles // splits),
        splits,
        *hidden.stride(),
        *weight.stride(),
        1.0 / temperature,
        BIAS=bias is not None,
        EVEN=width % shape.width == 0,
        BLOCK_T=shape.rows,
        BLOCK_V=shape.vocab,
        BLOCK_K=shape.width,
        FLATTEN=shape.flatten,
        UPCAST=_INTERPRETED and hidden.element_size() == 2,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    _merge[(-(-rows // 128),)](
        partials, targets, *stats, rows, vocab, splits, 1.0 / temperature, BLOCK=128, num_warps=4
    )
    return stats


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """One launch of each configuration, on tensors without contents."""
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (8192, 64, 16):
            for width, vocab in ((3584, 152064), (912, 50257)):
                name = f"online-{str(dtype)[6:]}-{rows}-{width}"
                yield name, lambda d=dtype, r=rows, w=width, v=vocab: _example(d, r, w, v)


def _example(dtype: torch.dtype, rows: int, width: int, vocab: int) -> None:
    hidden, weight = (torch.empty(n, width, dtype=dtype) for n in (rows, vocab))
    launch_online(hidden, weight, None, torch.empty(rows, dtype=torch.long), 1.0)

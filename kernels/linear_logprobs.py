"""Log-probability and entropy from hidden states, with one of two algorithms.

"chunks": a few rows at a time, Z = h Wᵀ in fp32 by the library's GEMM into one buffer that every
chunk uses again. One Triton program a row takes log π and the entropy from Z and, if a gradient is
needed and the head is frozen, writes D = 1[v=y] − p (and Q = −p (log p + entropy) with
`entropy_grad`) in a second pass. U = D W/τ (and E = Q W/τ, in the same GEMM) are kept:
∂log π/∂h = U and ∂entropy/∂h = E do not depend on the upstream gradient, so the backward is
g U + g_ent E in one launch. D W is not W_y − Σ p W: with a low-precision p that difference cancels
where p_y is near 1.

"online": the fused kernel of `online_logprobs`, which never writes a logit.

All other gradients (a trainable head, LoRA on the head, the entropy's without `entropy_grad`) come
from recomputed chunks, accumulated in fp32. With LoRA the logits are h Wᵀ + s (h Aᵀ) Bᵀ.

Imports torch and triton only. Deterministic: no atomics. It is one file because forward and
recomputed backward share the chunks, the head and the row kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .online_logprobs import aligned, launch_online, suits
from .token_logprobs import (
    _LN2,
    _LOG2E,
    accumulator,
    block_and_warps,
    empty_stats,
    floored,
    launch_backward,
    launch_forward,
    may_overwrite,
    minus_expm1,
    row_statistics,
)

BUDGET = 160 << 20  # bytes of logits in a chunk: 256 rows at V = 152064, compute-bound from there
MAX_ROWS = 1024
_WIDEN = 1 << 22  # entries of a low-precision head widened at a time where the GEMM cannot do it


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    entropy_grad: bool = False,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of softmax((hidden Wᵀ + s hidden Aᵀ Bᵀ + bias)/τ).

    Args: hidden (N, H), weight (V, H), targets (N,), bias (V,) or None, lora_a (r, H) and
        lora_b (V, r) or None. entropy_grad: form ∂entropy/∂hidden in the forward. path: "chunks"
        or "online", by default `choose_path`'s choice.
    """
    head = Head(weight, bias, lora_a, lora_b, float(scaling), float(temperature))
    trained = (weight, bias, lora_a, lora_b)
    grad = torch.is_grad_enabled()
    recompute = grad and any(t is not None and t.requires_grad for t in trained)
    recompute = recompute or (grad and hidden.requires_grad and lora_a is not None)
    direct = grad and hidden.requires_grad and not recompute
    path = choose_path(head, hidden, direct, path)
    if direct and path == "chunks":
        return _Direct.apply(hidden, targets, entropy_grad, *head)
    if direct or recompute:
        return _Recomputed.apply(hidden, targets, path, *head)
    stats = _statistics(hidden, head, targets, path)
    return stats[0], stats[1]


class Head(NamedTuple):
    """What turns hidden states into logits: (h Wᵀ + s (h Aᵀ) Bᵀ + bias)/τ."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    temperature: float


def choose_path(head: Head, hidden: Tensor, direct: bool, path: str | None = None) -> str:
    """Chunks where U is needed (`direct`), else the fused kernel.

    Where U is formed, chunks cost two GEMMs at the library's speed, and the fused forward with its
    recomputing backward three; that holds for few rows too, where one chunk reads W twice and the
    other way three times. Without U a chunk's logits would be written and read for nothing, and
    they are the only memory that counts. LoRA on the head, float64 and a weight of another dtype
    than the hidden states are for chunks alone, and so, unless asked for, are rows of H that do not
    start on multiples of 16 entries (the fused kernel would spill registers). A caller short of
    memory asks for "online".
    From arithmetic (bytes and FLOPs): not yet measured on a GPU.
    """
    if path not in (None, "chunks", "online"):
        raise ValueError(f"path is {path!r}, expected 'chunks' or 'online'")
    if head.lora_a is not None or not suits(hidden, head.weight):
        return "chunks"
    return path or ("online" if not direct and aligned(hidden, head.weight) else "chunks")


# ---- the row kernels


@triton.jit
def _directions(
    logits,
    targets,
    logprobs,
    entropy,
    tops,
    log_totals,
    d,
    q,
    row_stride,
    d_stride,
    vocab,
    scale,
    gain,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    # d may be the logits themselves, where every entry is one thread's (`may_overwrite`). What all
    # threads read, the target's logit, is read in the first pass; the barrier ends that.
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    scale = scale * _LOG2E
    log_p, ent, top, log_total = row_statistics(base, 1, target, vocab, scale, BLOCK, DTYPE)
    tl.store(logprobs + row, log_p)
    tl.store(entropy + row, ent)
    tl.store(tops + row, top)
    tl.store(log_totals + row, log_total)
    one_minus_p = minus_expm1(log_p)
    tl.debug_barrier()
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        z = tl.load(base + column, mask=inside, other=float("-inf"))
        x = floored((z.to(DTYPE) - top) * scale - log_total)
        p = tl.exp2(x)
        out = gain * tl.where(column == target, one_minus_p, -p)
        tl.store(d + row * d_stride + column, out.to(d.dtype.element_ty), mask=inside)
        if WITH_ENTROPY:
            out = -gain * p * (x * _LN2 + ent)
            tl.store(q + row * d_stride + column, out.to(q.dtype.element_ty), mask=inside)


@triton.jit
def _combine(
    direct,
    grad_logprobs,
    grad_entropy,
    grad,
    width,
    second,
    logprobs_stride,
    entropy_stride,
    WITH_LOGPROBS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        at = direct + row * width + column
        out = tl.zeros((BLOCK,), DTYPE)
        if WITH_LOGPROBS:
            g = tl.load(grad_logprobs + row * logprobs_stride).to(DTYPE)
            out += g * tl.load(at, mask=inside, other=0.0).to(DTYPE)
        if WITH_ENTROPY:
            g = tl.load(grad_entropy + row * entropy_stride).to(DTYPE)
            out += g * tl.load(at + second, mask=inside, other=0.0).to(DTYPE)
        tl.store(grad + row * width + column, out.to(grad.dtype.element_ty), mask=inside)


def launch_directions(
    z: Tensor,
    targets: Tensor,
    temperature: float,
    gain: float,
    stats: Sequence[Tensor],
    d: Tensor,
    with_entropy: bool,
) -> None:
    """Fill stats, and d (C or 2C, V) with gain · D and, behind it, gain · Q."""
    rows, vocab = z.shape
    block, warps = block_and_warps(vocab)
    _directions[(rows,)](
        z,
        targets.contiguous(),
        *stats,
        d,
        d[rows:] if with_entropy else d,
        z.stride(0),
        d.stride(0),
        vocab,
        1.0 / temperature,
        gain,
        WITH_ENTROPY=with_entropy,
        BLOCK=block,
        DTYPE=accumulator(z.dtype)[1],
        num_warps=warps,
    )


def launch_combine(
    directions: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """g U + g_ent E (N, H) of directions (1 or 2, N, H), an absent gradient being zero."""
    _, rows, width = directions.shape
    grad = torch.empty(rows, width, dtype=directions.dtype, device=directions.device)
    if rows and width:
        g, g_entropy = (directions if u is None else u for u in (grad_logprobs, grad_entropy))
        block = min(triton.next_power_of_2(max(width, 16)), 2048)
        _combine[(rows,)](
            directions,
            g,
            g_entropy,
            grad,
            width,
            directions.stride(0),
            g.stride(0),
            g_entropy.stride(0),
            WITH_LOGPROBS=grad_logprobs is not None,
            WITH_ENTROPY=grad_entropy is not None,
            BLOCK=block,
            DTYPE=accumulator(directions.dtype)[1],
            num_warps=4,
        )
    return grad


# ---- chunks of logits


def chunk_rows(rows: int, vocab: int, bytes_each: int) -> int:
    """Rows of a chunk: what BUDGET holds, at most MAX_ROWS, all chunks of about the same height."""
    most = max(1, min(BUDGET // (max(vocab, 1) * bytes_each), MAX_ROWS))
    if most >= 128:  # whole tiles of the GEMM
        most -= most % 128
    count = max(1, -(-rows // most))
    return max(1, -(-rows // count))


class _Chunks:
    """Chunks of rows, their logits in one buffer. A row starts on a multiple of 8 elements, also
    where V is odd: the GEMM's vector stores, and its loads of D, need that."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head = hidden, head
        self.dtype = accumulator(hidden.dtype)[0]
        rows, self.vocab = hidden.shape[0], head.weight.shape[0]
        self.step = chunk_rows(rows, self.vocab, self.dtype.itemsize)
        self.slices = [slice(i, min(i + self.step, rows)) for i in range(0, rows, self.step)]
        self.buffer = self.room(self.dtype) if rows else None

    def room(self, dtype: torch.dtype, times: int = 1) -> Tensor:
        stride = -(-self.vocab // 8) * 8
        shape = times * self.step, stride
        return torch.empty(shape, dtype=dtype, device=self.hidden.device)[:, : self.vocab]

    def logits(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(C, V) before the temperature, never rounded to the inputs' precision on the way; and
        S = s h Aᵀ (C, r)."""
        assert self.buffer is not None
        hidden, head = self.hidden[rows], self.head
        z = self.buffer[: hidden.shape[0]]
        multiply(hidden, head.weight.t(), z)
        low = None
        if head.lora_a is not None and head.lora_b is not None:
            low = (hidden.to(self.dtype) @ head.lora_a.to(self.dtype).t()).mul_(head.scaling)
            z.addmm_(low, head.lora_b.to(self.dtype).t())
        return (z if head.bias is None else z.add_(head.bias.to(self.dtype))), low


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, accumulated and stored in out's dtype (fp32 or float64)."""
    if a.dtype == b.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype == b.dtype and _torch() >= (2, 8):
        if not add:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif _torch() >= (2, 10):  # before, the summand had to have the dtype of the factors
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        a = a.to(out.dtype)
        if b.stride(1) == 1 and b.shape[0] > b.shape[1]:  # a tall head, D W: whole rows of it
            step = max(1, _WIDEN // max(b.shape[1], 1))
            for start in range(0, b.shape[0], step):
                part = slice(start, start + step)
                multiply(a[:, part], b[part].to(out.dtype), out, add or start > 0)
            return
        step = max(1, _WIDEN // max(b.shape[0], 1))
        for start in range(0, b.shape[1], step):
            part = slice(start, start + step)
            multiply(a, b[:, part].to(out.dtype), out[:, part], add)


def _torch() -> tuple[int, ...]:
    """The version of torch: mm takes `out_dtype` from 2.8 on."""
    return tuple(int(n) for n in torch.__version__.split(".")[:2])


def _statistics(hidden: Tensor, head: Head, targets: Tensor, path: str) -> list[Tensor]:
    """logprobs, entropy, m and log₂ Σ 2^x of every row, each (N,)."""
    if path == "online":
        return launch_online(hidden, head.weight, head.bias, targets, head.temperature)
    chunks = _Chunks(hidden, head)
    stats = empty_stats(hidden.shape[0], chunks.dtype, hidden.device)
    for rows in chunks.slices:
        z, _ = chunks.logits(rows)
        launch_forward(z, targets[rows], head.temperature, [s[rows] for s in stats])
    return stats


def _with_directions(
    hidden: Tensor, head: Head, targets: Tensor, entropy_grad: bool
) -> tuple[list[Tensor], Tensor]:
    """The statistics, and U (and E) as one tensor (1 or 2, N, H)."""
    chunks, count = _Chunks(hidden, head), 2 if entropy_grad else 1
    stats = empty_stats(hidden.shape[0], chunks.dtype, hidden.device)
    out = torch.empty(count, *hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if not chunks.slices:
        return stats, out
    low = _gemm_dtype(hidden, head.weight)
    # Small p would be subnormal in fp16; D and Q stay below 4, so times 2^12 does not overflow.
    gain = 4096.0 if low == torch.float16 else 1.0
    alone = low == chunks.dtype and not entropy_grad and may_overwrite(chunks.vocab)
    room = chunks.buffer if alone else chunks.room(low, count)
    pulled = hidden.new_empty(count * chunks.step, hidden.shape[1], dtype=chunks.dtype)
    for rows in chunks.slices:
        z, _ = chunks.logits(rows)
        n, parts = len(z), [s[rows] for s in stats]
        d, u = room[: count * n], pulled[: count * n]
        launch_directions(z, targets[rows], head.temperature, gain, parts, d, entropy_grad)
        multiply(d, head.weight, u)
        torch.mul(u.view(count, n, -1), 1.0 / (head.temperature * gain), out=out[:, rows])
    return stats, out


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """D takes the weight's dtype, unless the hidden states are of another: then the wide one."""
    return weight.dtype if hidden.dtype == weight.dtype else accumulator(hidden.dtype)[0]


def _recompute(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> None:
    """Add into the fp32 buffers for hidden, weight, bias, lora_a and lora_b, chunk by chunk."""
    grad_hidden, grad_weight, grad_bias, grad_a, grad_b = grads
    chunks = _Chunks(hidden, head)
    dtype = _gemm_dtype(hidden, head.weight)
    if dtype == torch.float16 or head.lora_a is not None:
        dtype = chunks.dtype  # g p underflows in fp16; and dB, dS are formed in fp32
    alone = dtype == chunks.dtype and may_overwrite(chunks.vocab)
    room = chunks.buffer if alone or not chunks.slices else chunks.room(dtype)
    for rows in chunks.slices:
        z, low = chunks.logits(rows)
        part, own = hidden[rows], [s[rows] for s in stats]
        up = [None if u is None else u[rows] for u in upstream]
        dz = launch_backward(z, targets[rows], head.temperature, own, *up, room[: len(z)])
        if grad_hidden is not None:
            multiply(dz, head.weight, grad_hidden[rows], add=True)
        if grad_weight is not None:
            multiply(dz.t(), part, grad_weight, add=True)
        if grad_bias is not None:
            grad_bias += dz.sum(0, dtype=grad_bias.dtype)
        if low is not None:
            _low_rank(dz, low, part, head, None if grad_hidden is None else grad_hidden[rows],
                      grad_a, grad_b)  # fmt: skip


def _low_rank(
    dz: Tensor,
    low: Tensor,
    hidden: Tensor,
    head: Head,
    grad_hidden: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """dS = s dz B; dh += dS A, dA += dSᵀ h, dB += dzᵀ S, all in the accumulator dtype."""
    assert head.lora_a is not None and head.lora_b is not None
    grad_low = (dz @ head.lora_b.to(dz.dtype)).mul_(head.scaling)
    if grad_hidden is not None:
        grad_hidden.addmm_(grad_low, head.lora_a.to(dz.dtype))
    if grad_a is not None:
        grad_a.addmm_(grad_low.t(), hidden.to(dz.dtype))
    if grad_b is not None:
        grad_b.addmm_(dz.t(), low)


# ---- autograd


class _Direct(torch.autograd.Function):
    """Frozen head: the backward is g U + g_ent E."""

    @staticmethod
    def forward(ctx, hidden, targets, entropy_grad, *head):  # type: ignore[override]
        stats, directions = _with_directions(hidden, Head(*head), targets, entropy_grad)
        again = () if entropy_grad else (hidden, targets, *head[:2], *stats)
        ctx.save_for_backward(directions, *again)
        ctx.temperature = head[-1]
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        directions, *again = ctx.saved_tensors
        if not again or grad_entropy is None:
            return launch_combine(directions, grad_logprobs, grad_entropy), *(None,) * 8
        hidden, targets, weight, bias, *stats = again
        grad = torch.zeros(hidden.shape, dtype=stats[0].dtype, device=hidden.device)
        head = Head(weight, bias, None, None, 1.0, ctx.temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = (grad, None, None, None, None)
            _recompute(hidden, head, targets, stats, (None, grad_entropy), grads)
            if grad_logprobs is not None:
                grad.addcmul_(directions[0].to(grad.dtype), grad_logprobs[:, None].to(grad.dtype))
        return grad.to(hidden.dtype), *(None,) * 8


class _Recomputed(torch.autograd.Function):
    """Everything else: the chunks are formed again in the backward."""

    @staticmethod
    def forward(ctx, hidden, targets, path, *head):  # type: ignore[override]
        stats = _statistics(hidden, Head(*head), targets, path)
        ctx.save_for_backward(hidden, targets, *head[:4], *stats)
        ctx.factors = head[4:]
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):  # type: ignore[override]
        hidden, targets, *rest = ctx.saved_tensors
        tensors, stats = rest[:4], rest[4:]
        sources = (hidden, *tensors)
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:7])
        grads = [
            torch.zeros(t.shape, dtype=stats[0].dtype, device=t.device) if wanted else None
            for t, wanted in zip(sources, needed, strict=True)
        ]
        if any(u is not None for u in upstream):
            with torch.autocast(hidden.device.type, enabled=False):
                head = Head(*tensors, *ctx.factors)
                _recompute(hidden, head, targets, stats, upstream, grads)
        cast = [None if g is None else g.to(t.dtype) for g, t in zip(grads, sources, strict=True)]
        return cast[0], None, None, *cast[1:], None, None


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """One launch of each configuration, on tensors without contents."""
    for dtype in (torch.bfloat16, torch.float32):
        for entropy in (False, True):
            name = f"{str(dtype)[6:]}{'-entropy' if entropy else ''}"
            yield f"directions-{name}", lambda d=dtype, e=entropy: _directions_example(d, e)
            yield f"combine-{name}", lambda d=dtype, e=entropy: _combine_example(d, e)
    for entropy in (False, True):
        name = f"chunk-backward{'-entropy' if entropy else ''}"
        yield name, lambda e=entropy: _backward_example(e)


def _directions_example(dtype: torch.dtype, entropy: bool, vocab: int = 152064) -> None:
    z = torch.empty(256, vocab)
    d = torch.empty(512, vocab, dtype=dtype)
    stats = empty_stats(256, torch.float32, z.device)
    launch_directions(z, torch.empty(256, dtype=torch.long), 1.0, 1.0, stats, d, entropy)


def _combine_example(dtype: torch.dtype, entropy: bool) -> None:
    directions, g = torch.empty(2, 8192, 3584, dtype=dtype), torch.empty(8192)
    launch_combine(directions, g, g if entropy else None)


def _backward_example(entropy: bool, vocab: int = 152064) -> None:
    z, g = torch.empty(256, vocab), torch.empty(256)
    targets, stats = torch.empty(256, dtype=torch.long), empty_stats(256, g.dtype, g.device)
    out = torch.empty(256, vocab, dtype=torch.bfloat16)
    launch_backward(z, targets, 1.0, stats, g, g if entropy else None, out)

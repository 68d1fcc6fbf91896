"""Log-probabilities in plain torch: the reference form of `ppo_nlu.ops`, and the one for the CPU.

Logits are formed a block at a time (rows by vocabulary entries) and forgotten; of each row only the
running softmax statistics stay. With a frozen head U = ∂log π/∂h is formed in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TINY = 1 << 14  # so few logits are taken whole: a second block would cost more than it saves
_FLOOR = -1e5  # exp(-1e5) is exactly 0 and 0 · -1e5 is 0, where 0 · -inf would be NaN


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of softmax((hidden Wᵀ + bias)/τ).

    Args: hidden (N, H), weight (V, H), targets (N,), bias (V,) or None.
    """
    args = (hidden, weight, bias, targets, temperature)
    if _wants_grad(weight, bias):
        return _LinearLogprobsTrainable.apply(*args)
    if _wants_grad(hidden):
        return _LinearLogprobsFrozen.apply(*args)
    stats, _ = _linear_logprobs_forward(*args)
    return stats[0], stats[1]


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of logits (N, V) over the temperature."""
    if _wants_grad(logits):
        return _TokenLogprobs.apply(logits, targets, temperature)
    stats = _token_logprobs_forward(logits, targets, temperature)
    return stats[0], stats[1]


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- blocks of logits, and what is kept of a row while they pass


class _Softmax:
    """The running maximum, Σ exp, Σ exp · z and the target's logit of a chunk of rows.

    Online softmax: after each block m' = max(m, max z), and what was summed relative to m is scaled
    by exp(m − m'). With z measured from m, entropy = log Σ exp(z) − Σ z exp(z) / Σ exp(z). The sum
    over v ≠ y is kept apart: near p_y = 1, log p_y = −log1p(Σ exp(z_v − z_y)) loses no digit.
    """

    def __init__(self, targets: Tensor, dtype: torch.dtype) -> None:
        self.targets = targets
        self.top = torch.full(targets.shape, -torch.inf, dtype=dtype, device=targets.device)
        self.total = torch.zeros_like(self.top)
        self.others = torch.zeros_like(self.top)
        self.weighted = torch.zeros_like(self.top)
        self.at_target = torch.zeros_like(self.top)

    def update(self, z: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Take in the logits of entries start, start + 1, …; z is overwritten.

        Returns: exp(z − m') with the target's entry cleared, and exp(m − m') for earlier sums.
        """
        top = torch.maximum(self.top, z.amax(1))
        finite = top.masked_fill(top == -torch.inf, 0.0)
        column, inside = _columns(self.targets, start, z.shape[1])
        self.at_target = torch.where(inside, z.gather(1, column)[:, 0], self.at_target)
        shift = (self.top - finite).clamp_(min=_FLOOR)
        scale = shift.exp()
        z.sub_(finite[:, None]).clamp_(min=_FLOOR)
        exp = z.exp()
        self.weighted = (self.weighted + shift * self.total) * scale + z.mul_(exp).sum(1)
        entry = exp.gather(1, column)[:, 0]
        exp.scatter_(1, column, entry.masked_fill(inside, 0.0)[:, None])
        others = exp.sum(1)
        self.others = self.others * scale + others
        self.total = self.total * scale + (others + entry.masked_fill_(~inside, 0.0))
        self.top = top
        return exp, scale

    def result(self) -> Tensor:
        """log π(target), entropy, m and log Σ exp(z − m), stacked (4, C).

        The last two stay apart: their sum would lose digits of the second where m is large.
        """
        log_total = self.total.log()
        below = self.at_target - self.top
        own = below.exp()
        logprobs = torch.where(own > 0.5, -(self.others / own).log1p(), below - log_total)
        entropy = log_total - self.weighted / self.total
        return torch.stack((logprobs, entropy, self.top, log_total))


def _columns(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a block (C, 1), clamped into it, and whether it lies there (C,)."""
    column = targets - start
    inside = (column >= 0) & (column < width)
    return column.clamp_(0, width - 1)[:, None], inside


def _dlogits(
    z: Tensor,
    start: int,
    targets: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """g (1[v=y] − p_v) − g_ent p_v (log p_v + entropy) for a block of logits z, overwritten.

    The target's 1 − p is formed as −expm1(log p): the difference would cancel where p is near 1.
    """
    logprobs, entropy, top, log_total = stats
    z.sub_(top[:, None]).sub_(log_total[:, None]).clamp_(min=_FLOOR)
    p = z.exp()
    if grad_entropy is not None:
        z.add_(entropy[:, None]).mul_(p).mul_(-grad_entropy[:, None])
    if grad_logprobs is None:
        return z
    column, inside = _columns(targets, start, z.shape[1])
    entry = torch.where(inside, torch.expm1(logprobs), p.gather(1, column)[:, 0])
    p.scatter_(1, column, entry[:, None]).mul_(-grad_logprobs[:, None])
    return p if grad_entropy is None else p.add_(z)


def _used(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """None for a gradient that is absent, or all zero where looking costs no synchronisation."""
    if grad is None or (grad.device.type == "cpu" and not grad.any()):
        return None
    return grad.to(dtype)


def _rows(grad: Tensor | None, part: slice) -> Tensor | None:
    return None if grad is None else grad[part]


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(step, 1)))


# ---- linear_logprobs


def _block_shape(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Rows and vocabulary entries of one block of logits: never both whole, unless it is tiny.

    On the CPU a GEMM of 128 rows is as fast per row as a larger one, fewer rows are kept together
    (streaming the head twice would cost more), and a block stays in the cache for its few passes.
    """
    most_rows, most_columns = (512, 16384) if device.type == "cuda" else (128, 4096)
    if rows * vocab <= _TINY:
        return rows, vocab
    return min(rows, most_rows), min((vocab + 1) // 2, most_columns)


def _block(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, entries: slice, temperature: float
) -> tuple[Tensor, Tensor]:
    """The block's logits over τ, and its part of the head widened to the accumulator dtype."""
    part = weight[entries].to(hidden.dtype)
    z = hidden @ part.t()
    if bias is not None:
        z.add_(bias[entries].to(z.dtype))
    return (z if temperature == 1.0 else z.div_(temperature)), part


def _linear_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    with_direction: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The statistics of each row (4, N) and, on request, U = ∂logprobs/∂hidden (N, H)."""
    dtype = _accumulator(hidden.dtype)
    stats = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
    direction = hidden.new_empty(hidden.shape) if with_direction else None
    most_rows, most_columns = _block_shape(hidden.shape[0], weight.shape[0], hidden.device)
    for rows in _slices(hidden.shape[0], most_rows):
        chunk, state = hidden[rows].to(dtype), _Softmax(targets[rows], dtype)
        pulled: Tensor | None = None  # Σ exp(z_v) W_v over v ≠ y
        for entries in _slices(weight.shape[0], most_columns):
            z, part = _block(chunk, weight, bias, entries, temperature)
            exp, scale = state.update(z, entries.start)
            if with_direction:
                pulled = (
                    exp @ part if pulled is None else pulled.mul_(scale[:, None]).addmm_(exp, part)
                )
        stats[:, rows] = state.result()
        if direction is not None and pulled is not None:
            # (1 − p_y) W_y − Σ p_v W_v over v ≠ y: nothing cancels where p_y is near 1.
            own = weight[targets[rows]].to(dtype).mul_(torch.expm1(stats[0, rows])[:, None])
            pulled.div_(state.total[:, None]).add_(own).mul_(-1.0 / temperature)
            direction[rows] = pulled
    return stats, direction


def _linear_logprobs_backward(
    inputs: Sequence[Tensor],
    temperature: float,
    stats: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    grads: Sequence[Tensor | None],
) -> None:
    """Recompute each block and add into the buffers given for hidden, weight and bias."""
    hidden, weight, bias, targets = inputs
    grad_hidden, grad_weight, grad_bias = grads
    most_rows, most_columns = _block_shape(hidden.shape[0], weight.shape[0], hidden.device)
    for rows in _slices(hidden.shape[0], most_rows):
        chunk = hidden[rows].to(stats.dtype)
        own = targets[rows], stats[:, rows], _rows(upstream[0], rows), _rows(upstream[1], rows)
        for entries in _slices(weight.shape[0], most_columns):
            z, part = _block(chunk, weight, bias, entries, temperature)
            dz = _dlogits(z, entries.start, *own).mul_(1.0 / temperature)
            if grad_hidden is not None:
                grad_hidden[rows].addmm_(dz, part)
            if grad_weight is not None:
                grad_weight[entries].addmm_(dz.t(), chunk)
            if grad_bias is not None:
                grad_bias[entries] += dz.sum(0)


class _LinearLogprobsFrozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):  # type: ignore[override]
        stats, direction = _linear_logprobs_forward(
            hidden, weight, bias, targets, temperature, with_direction=True
        )
        ctx.save_for_backward(hidden, weight, bias, targets, stats, direction)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        *inputs, stats, direction = ctx.saved_tensors
        dtype, hidden = stats.dtype, inputs[0]
        grad_entropy = _used(grad_entropy, dtype)
        if grad_logprobs is None:
            grad = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        else:
            grad = direction * grad_logprobs[:, None].to(dtype)
        if grad_entropy is not None:
            _linear_logprobs_backward(
                inputs, ctx.temperature, stats, (None, grad_entropy), (grad, None, None)
            )
        return grad.to(hidden.dtype), None, None, None, None


class _LinearLogprobsTrainable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):  # type: ignore[override]
        stats, _ = _linear_logprobs_forward(hidden, weight, bias, targets, temperature)
        ctx.save_for_backward(hidden, weight, bias, targets, stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        *inputs, stats = ctx.saved_tensors
        dtype = stats.dtype
        grads = [
            torch.zeros(t.shape, dtype=dtype, device=t.device) if needed else None
            for t, needed in zip(inputs[:3], ctx.needs_input_grad, strict=False)
        ]
        upstream = _used(grad_logprobs, dtype), _used(grad_entropy, dtype)
        if any(g is not None for g in upstream):
            _linear_logprobs_backward(inputs, ctx.temperature, stats, upstream, grads)
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=False))
        return *cast, None, None


# ---- token_logprobs


def _token_logprobs_forward(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The statistics of each row (4, N), through fp32 copies of a few rows at a time."""
    dtype = _accumulator(logits.dtype)
    stats = torch.empty(4, logits.shape[0], dtype=dtype, device=logits.device)
    for rows in _slices(*_token_rows(logits)):
        state = _Softmax(targets[rows], dtype)
        state.update(logits[rows].to(dtype, copy=True).div_(temperature), 0)
        stats[:, rows] = state.result()
    return stats


def _token_rows(logits: Tensor) -> tuple[int, int]:
    """The number of rows, and how many to take at a time so that their copy stays in the cache."""
    entries = 1 << (24 if logits.is_cuda else 19)
    return logits.shape[0], max(1, entries // max(logits.shape[1], 1))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature):  # type: ignore[override]
        stats = _token_logprobs_forward(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, stats)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return stats[0].clone(), stats[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        logits, targets, stats = ctx.saved_tensors
        dtype = stats.dtype
        upstream = _used(grad_logprobs, dtype), _used(grad_entropy, dtype)
        if all(g is None for g in upstream):
            return torch.zeros_like(logits), None, None
        grad = logits.new_empty(logits.shape)
        for rows in _slices(*_token_rows(logits)):
            z = logits[rows].to(dtype, copy=True).div_(ctx.temperature)
            own = targets[rows], stats[:, rows], _rows(upstream[0], rows), _rows(upstream[1], rows)
            grad[rows] = _dlogits(z, 0, *own).mul_(1.0 / ctx.temperature)
        return grad, None, None

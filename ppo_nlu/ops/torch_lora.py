"""LoRA linear layers in plain torch: the reference form of `ppo_nlu.ops`, and the one for the CPU.

y_i = x W_iᵀ + b_i + S_i B_iᵀ with S_i = s_i/(1 − p) · (x ∘ mask) A_iᵀ, for one layer or several
that share x: S is one product with the stacked A, and dx is summed in one buffer. W is frozen: no
gradient as large as W is ever formed. Only x and S are kept for the backward; the dropout mask is
drawn again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    members = [weight], [bias], [lora_a], [lora_b], [scaling]
    return lora_linear_grouped(x, *members, dropout_p, seed)[0]


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """y_i (..., O_i) of layers that share x (..., K) and one dropout mask.

    Args: weights (O_i, K), biases (O_i,) or None, lora_as (r_i, K), lora_bs (O_i, r_i).
    """
    factors = tuple(s / (1.0 - dropout_p) for s in scalings)
    members = (*weights, *biases, *lora_as, *lora_bs)
    trained = (x, *members[len(weights) :])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return _LoraLinear.apply(factors, dropout_p, seed, x, *members)
    return _forward(x, members, factors, dropout_p, seed)[0]


def _dropped(rows: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """rows · mask and the 0/1 mask of `seed`; the factor 1/(1 − p) is left to the caller."""
    if p == 0:
        return rows, None
    generator = torch.Generator(rows.device).manual_seed(seed)
    mask = torch.empty_like(rows, memory_format=torch.contiguous_format)
    mask.bernoulli_(1.0 - p, generator=generator)
    return rows * mask, mask


def _stacked(lora_as: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (lora_as[0] if len(lora_as) == 1 else torch.cat(list(lora_as))).to(dtype)


def _parts(group: Tensor, lora_as: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """A tensor of the group, Σ r_i long, as one view of length r_i for each member."""
    return (group,) if len(lora_as) == 1 else group.split([a.shape[0] for a in lora_as], dim)


def _forward(
    x: Tensor, members: Sequence[Any], factors: Sequence[float], p: float, seed: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each y (..., O_i) and S (T, Σ r_i). `members`: all weights, then biases, A and B."""
    weights, biases, lora_as, lora_bs = _pieces(members, 4)
    rows = x.reshape(-1, x.shape[-1])
    low = _dropped(rows, p, seed)[0] @ _stacked(lora_as, x.dtype).t()
    ys = []
    layers = zip(weights, biases, lora_bs, factors, _parts(low, lora_as, 1), strict=True)
    for weight, bias, lora_b, factor, part in layers:
        part.mul_(factor)
        y = F.linear(rows, weight, bias).addmm_(part, lora_b.to(x.dtype).t())
        # No view: a block may work in place on what it gets (Falcon's does).
        ys.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]]))
    return tuple(ys), low


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factors, p, seed, x, *members):  # type: ignore[override]
        weights, _, lora_as, lora_bs = _pieces(members, 4)
        ys, low = _forward(x, members, factors, p, seed)
        ctx.save_for_backward(x, low, *weights, *lora_as, *lora_bs)
        ctx.factors, ctx.p, ctx.seed = factors, p, seed
        ctx.set_materialize_grads(False)
        return ys

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
    weights, lora_as, lora_bs = _pieces(saved, 3)
    needs_x = ctx.needs_input_grad[3]
    _, needs_bias, needs_a, needs_b = _pieces(ctx.needs_input_grad[4:], 4)
    live = [i for i, grad in enumerate(grads) if grad is not None]
    if not live:
        return (None,) * len(ctx.needs_input_grad)
    size, lows = len(weights), _parts(low, lora_as, 1)
    dys = {i: grads[i].reshape(-1, grads[i].shape[-1]) for i in live}
    out_a: list[Tensor | None] = [None] * size
    out_b, out_bias = list(out_a), list(out_a)
    for i, dy in dys.items():
        out_b[i] = (dy.t() @ lows[i]).to(lora_bs[i].dtype) if needs_b[i] else None
        out_bias[i] = dy.sum(0) if needs_bias[i] else None
    grad_x = None
    if needs_x or any(needs_a):
        low_grads = [(dy @ lora_bs[i].to(dy.dtype)).mul_(ctx.factors[i]) for i, dy in dys.items()]
        low_grad = low_grads[0] if len(live) == 1 else torch.cat(low_grads, 1)  # (T, Σ r_i)
        dropped, mask = _dropped(x.reshape(-1, x.shape[-1]), ctx.p, ctx.seed)
    if any(needs_a):
        grad_as = low_grad.t() @ dropped
        for i, grad_a in zip(live, _parts(grad_as, [lora_as[i] for i in live], 0), strict=True):
            out_a[i] = grad_a.to(lora_as[i].dtype) if needs_a[i] else None
    if needs_x:
        grad_x = _x_grad([(dy, weights[i]) for i, dy in dys.items()])
        lora_a = _stacked([lora_as[i] for i in live], grad_x.dtype)
        if mask is None:
            grad_x.addmm_(low_grad, lora_a)
        else:
            grad_x.addcmul_(low_grad @ lora_a, mask)
        grad_x = grad_x.view(x.shape)
    return None, None, None, grad_x, *[None] * size, *out_bias, *out_a, *out_b


def _x_grad(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ dy_i W_i (T, K), in one buffer."""
    (dy, weight), *rest = pairs
    out = dy @ weight
    for dy, weight in rest:
        out.addmm_(dy, weight)
    return out


def _pieces(values, count):
    """A sequence cut into `count` of equal length."""
    size = len(values) // count
    return tuple(values[i * size : (i + 1) * size] for i in range(count))

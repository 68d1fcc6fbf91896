"""LoRA linear layers in plain torch: the reference form of `ppo_nlu.ops`, and the one for the CPU.

y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ with W frozen: no gradient as large as W is ever formed. Kept for
the backward are x and S = s · drop(x) Aᵀ; the dropout mask is drawn again from its seed.
"""

from __future__ import annotations

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
    args = (x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed)
    trained = (x, bias, lora_a, lora_b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return _LoraLinear.apply(*args)
    return _lora_forward(*args)[0]


def _dropped(rows: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """rows · mask and the 0/1 mask of `seed`; the factor 1/(1 − p) is left to the caller."""
    if p == 0:
        return rows, None
    generator = torch.Generator(rows.device).manual_seed(seed)
    mask = torch.empty_like(rows, memory_format=torch.contiguous_format)
    mask.bernoulli_(1.0 - p, generator=generator)
    return rows * mask, mask


def _lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    low = _dropped(rows, p, seed)[0] @ lora_a.to(x.dtype).t()
    low.mul_(scaling / (1.0 - p))
    y = F.linear(rows, weight, bias).addmm_(low, lora_b.to(x.dtype).t())
    return y.view(*x.shape[:-1], weight.shape[0]), low


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, p, seed):  # type: ignore[override]
        y, low = _lora_forward(x, weight, bias, lora_a, lora_b, scaling, p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, low)
        ctx.factor, ctx.p, ctx.seed = scaling / (1.0 - p), p, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, lora_a, lora_b, low = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = None
        if needs_x or needs_a:
            grad_low = (grad @ lora_b.to(grad.dtype)).mul_(ctx.factor)  # (T, r)
            dropped, mask = _dropped(x.reshape(-1, x.shape[-1]), ctx.p, ctx.seed)
        if needs_a:
            grad_a = (grad_low.t() @ dropped).to(lora_a.dtype)
        if needs_x:
            grad_x = grad @ weight
            if mask is None:
                grad_x.addmm_(grad_low, lora_a.to(grad.dtype))
            else:
                grad_x.addcmul_(grad_low @ lora_a.to(grad.dtype), mask)
            grad_x = grad_x.view(x.shape)
        grad_b = (grad.t() @ low).to(lora_b.dtype) if needs_b else None
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x, None, grad_bias, grad_a, grad_b, None, None, None

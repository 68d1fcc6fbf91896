"""Root mean square norms (arXiv 1910.07467) with a frozen weight and a backward of their own.

    r = (mean x² + ε)^(-½),  y = w ∘ x r,  dx = r (w ∘ dy) − x r³ ⟨w ∘ dy, x⟩ / H

The backward that autograd makes for the library's modules takes nine passes over the tokens, this
one three. `attach` replaces a module where ours gives the same, and changes nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def attach(model: nn.Module) -> int:
    """Replace every fp32 norm of this kind whose weight is frozen, in place; returns how many."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm")
        and not isinstance(module, FrozenRMSNorm)
        and _same(module)
    }
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FrozenRMSNorm(module))
    return len(found)


class FrozenRMSNorm(nn.Module):
    """y (..., H) of x (..., H), with the weight (H,) and ε of another norm."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight: Tensor = norm.weight  # type: ignore[assignment]
        self.variance_epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.weight.requires_grad:  # as the library does it
            wide = x.float()
            r = (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
            return self.weight * (wide * r).to(x.dtype)
        return _Norm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]


def _same(module: nn.Module) -> bool:
    """Whether ours gives what the module gives. Gemma's, for example, adds 1 to the weight."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or eps is None or weight.requires_grad or weight.dtype != torch.float32:
        return False
    x = torch.linspace(-2, 3, weight.numel(), device=weight.device).roll(1)[None]
    try:
        with torch.no_grad():
            given, ours = module(x), FrozenRMSNorm(module)(x)
    except Exception:  # it is called in another way
        return False
    return bool(torch.allclose(given, ours, rtol=1e-5, atol=1e-6))


def normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (..., H) and r (..., 1), which the backward needs."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight), r


def gradient(scaled: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """dx, in the memory of `scaled`, which is w ∘ dy."""
    along = torch.linalg.vecdot(scaled, x)[..., None]
    along.mul_(r**3).div_(-x.shape[-1])
    return scaled.mul_(r).addcmul_(x, along)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        return gradient(grads[0] * weight, x, r), None, None

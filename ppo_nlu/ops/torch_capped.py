"""Log-probabilities of logits with a soft cap (Gemma 2, arXiv 2408.00118), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_nlu.ops.torch_logprobs import WIDENED, linear_logits
from ppo_nlu.ops.torch_softmax import accumulator, slices, used

_CAPPED = 1 << 23  # logits in memory at a time


def capped_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy, (N,) each, of softmax(c tanh((hidden Wᵀ + bias)/c)/τ), c being
    `softcap`; W is frozen. The entropy has a gradient only with `entropy_grad`."""
    args = (hidden, weight, targets, bias, temperature, softcap, entropy_grad)
    return _CappedLogprobs.apply(*args)  # type: ignore[no-untyped-call]


class _CappedLogprobs(torch.autograd.Function):
    """A few rows at a time. With z = c tanh(x/c), dz/dx = 1 − (z/c)², and for a row
    U = Σᵥ (1[v=y] − pᵥ) dzᵥ/dxᵥ Wᵥ/τ and E = −Σᵥ pᵥ (log pᵥ + entropy) dzᵥ/dxᵥ Wᵥ/τ."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, softcap, entropy_grad):  # type: ignore[override]
        dtype = accumulator(hidden.dtype)
        count = (2 if entropy_grad else 1) if ctx.needs_input_grad[0] else 0
        directions = torch.zeros(count, *hidden.shape, dtype=dtype, device=hidden.device)
        found = torch.empty(2, len(hidden), dtype=dtype, device=hidden.device)
        for rows in slices(len(hidden), _CAPPED // max(weight.shape[0], 1)):
            z = linear_logits(hidden[rows], weight, bias).div_(softcap).tanh_()
            slope = (1 - z * z).div_(temperature)
            logp = z.mul_(softcap / temperature).log_softmax(-1)
            p, own = logp.exp(), targets[rows, None]
            entropy = -(p * logp).sum(-1)
            found[:, rows] = torch.stack((logp.gather(1, own)[:, 0], entropy))
            if count:
                chosen = (-p).scatter_add_(1, own, torch.ones_like(p[:, :1]))
                _multiply(chosen.mul_(slope), weight, directions[0, rows])
            if count == 2:
                spread = (logp + entropy[:, None]).mul_(p).neg_()
                _multiply(spread.mul_(slope), weight, directions[1, rows])
        ctx.save_for_backward(directions)
        ctx.dtype = hidden.dtype
        ctx.set_materialize_grads(False)
        return found[0].clone(), found[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        (directions,) = ctx.saved_tensors
        grad = torch.zeros_like(directions[0])
        grads = used(grad_logprobs, grad.dtype), used(grad_entropy, grad.dtype)
        if grads[1] is not None and len(directions) < 2:
            raise ValueError("with a softcap the entropy's gradient needs entropy_grad=True")
        for direction, g in zip(directions, grads, strict=False):
            if g is not None:
                grad.addcmul_(direction, g[:, None])
        return grad.to(ctx.dtype), *(None,) * 6


def _multiply(terms: Tensor, weight: Tensor, out: Tensor) -> None:
    """Add terms (C, V) times W (V, H) to out (C, H); a block of W is widened at a time."""
    step = weight.shape[0]
    if weight.dtype != out.dtype:
        step = WIDENED // max(weight.shape[1], 1)
    for entries in slices(weight.shape[0], step):
        out.addmm_(terms[:, entries], weight[entries].to(out.dtype))

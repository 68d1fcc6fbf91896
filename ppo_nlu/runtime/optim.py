"""The optimizer, its learning rate as a pure function of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_nlu.errors import UserError

if TYPE_CHECKING:
    from ppo_nlu.config import OptimConfig


def build_optimizer(
    cfg: OptimConfig,
    lora_params: Iterable[torch.nn.Parameter],
    value_params: Iterable[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the LoRA weights at `lr` and the value head at `value_lr` (or `lr`).

    Adafactor is the paper's: no first moment (`beta1` and `beta2` are AdamW's), no relative step,
    no parameter scale and no warm-up of its own, so the learning rate is the config's.
    """
    value_lr = cfg.lr if cfg.value_lr is None else cfg.value_lr
    groups: list[dict[str, Any]] = []
    for params, lr in ((list(lora_params), cfg.lr), (list(value_params), value_lr)):
        if params:
            groups.append({"params": params, "lr": lr, "base_lr": lr})
    assert groups, "nothing to train"
    if cfg.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=True,  # one pass over all small tensors, on a CPU too
        )
    if cfg.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            groups,
            lr=cfg.lr,
            weight_decay=cfg.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    raise UserError(f"optim.name: {cfg.name!r} is not known; choose adafactor or adamw")


def learning_rate(cfg: OptimConfig, step: int, total_steps: int) -> float:
    """The factor on the learning rate at `step` (0 is the first) of `total_steps`.

    With W = round(warmup * total_steps): (step + 1) / W while step < W; then, for `cosine`,
    m + (1 - m)(1 + cos(pi p)) / 2 with m = min_lr_ratio and p running from 0 at step W to 1 at
    the last step; for `linear`, m + (1 - m)(1 - p); for `constant`, 1.
    """
    warmup_steps = round(cfg.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    if cfg.schedule == "linear":
        return cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * (1.0 - progress)
    cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
    return cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * cosine


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times the one it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def clip_gradients(params: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`; 0 only measures.

    Returns the norm before clipping, fp32, on the device. Where it is not finite the gradients
    are left as they are, and the caller has to skip the step.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [_norm(grad).to(grads[0].device) for grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        factor = torch.where(total.isfinite(), (max_norm / total).clamp(max=1.0), 1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device, grad.dtype))
    return total


def _norm(grad: Tensor) -> Tensor:
    """The norm, in fp32 at least: in half precision the squares overflow."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad, dtype=wide).float()

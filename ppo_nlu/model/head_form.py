"""What a model does to the output of its LM head, such as a soft cap. It is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu.model.refusal import refused, unsupported
from ppo_nlu.model.shape import embedding_of


@dataclass(frozen=True)
class HeadForm:
    """The logits are cap · tanh(scale · (h Wᵀ + b) / cap), without the tanh where `cap` is None."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """The logits from what the head gives."""
        raw = raw if self.scale == 1 else raw * self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap


def head_of(model: Any) -> nn.Linear:
    """The LM head; a UserError where there is none, or where it is not linear."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise unsupported(model, "has no linear LM head")
    return head


@torch.no_grad()
def head_form(model: Any, decoder: Any) -> HeadForm:
    """What a model makes of its head's output, measured in fp32 on numbers put in its place.

    A model that does anything else, or runs its head on other states than the decoder's last, is
    refused with a UserError.
    """
    head = head_of(model)
    states: list[Tensor] = []
    raw = torch.empty(0)

    def replace(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        nonlocal raw
        states.append(args[0])
        raw = torch.linspace(-80, 80, out.numel(), device=out.device).view(out.shape)
        raw[..., 0], raw[..., 1] = 1e-2, 1e6  # the slope at 0, and where a cap ends
        return raw

    handle = head.register_forward_hook(replace)
    try:
        with refused(model, "cannot be run"):
            ids = _spread(decoder, 4)[None].to(head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            out = decoder(input_ids=ids, use_cache=False, return_dict=True)
            last = out.last_hidden_state.float()
    finally:
        handle.remove()
    if len(states) != 1 or logits.shape != raw.shape:
        raise unsupported(model, "has an LM head that is not run as one linear layer")
    slope, end = float(logits[..., 0].mean()) / 1e-2, float(logits[..., 1].mean())
    slope = 1.0 if abs(slope - 1) < 1e-5 else slope
    capped = not abs(end - slope * 1e6) <= 1e-3 * abs(slope) * 1e6
    form = HeadForm(slope, end if capped else None)
    near = 1e-4 if head.weight.dtype == torch.float32 else 1e-2
    fits = slope > 0 and end > 0 and torch.allclose(logits, form.apply(raw), 1e-4, 1e-4)
    given = states[0].float()
    factor = float((given * last).sum() / last.square().sum())  # MiniCPM's, between the two
    factor = 1.0 if abs(factor - 1) < near else factor
    fits = fits and (factor == 1 or head.bias is None)
    if not fits or not torch.allclose(given, factor * last, near, near):
        raise unsupported(model, "does more behind its last layer than an LM head, a scale or cap")
    return HeadForm(form.scale * factor, form.cap)


def _spread(decoder: Any, count: int) -> Tensor:
    """Token ids from all over the vocabulary."""
    size = len(embedding_of(decoder).weight)
    return torch.arange(1, count + 1) * max(size // (count + 2), 1) % size

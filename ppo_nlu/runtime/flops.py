"""How many FLOPs a pass of a model takes, and how many a machine does in a second.

FLOPs are counted from what was run and the weights it went through, not measured:

    forward   2 · tokens run · weights of the blocks, LoRA included
              2 · answer positions · weights of the LM head and the critic
              4 · pairs · layers · heads · head size (a pair: a token and one it attends to)
    backward  as much again for a frozen weight (the gradient of its input), twice that for a
              trained one and for attention

Tokens whose states nobody asks for do not go through the last block's queries, output projection
and MLP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

FORMULA = (
    "forward: 2 (tokens · block weights + answer positions · (head + critic weights)) "
    "+ 4 pairs · layers · heads · head size; backward: as much again for frozen weights, "
    "twice as much for LoRA, critic and attention"
)


@dataclass(frozen=True)
class Weights:
    """What a token goes through: numbers of weights, and layers · heads · head size.

    The `trimmed` weights are those of the last block that run only the predicting tokens.
    """

    blocks: int
    adapters: int
    head: int
    critic: int
    attention: int
    trimmed_blocks: int = 0
    trimmed_adapters: int = 0

    def forward(
        self,
        tokens: int,
        positions: int,
        pairs: int,
        lora: bool = True,
        predicting: int | None = None,
    ) -> float:
        """FLOPs of a forward pass."""
        frozen, adapters = self._inner(tokens, predicting)
        ends = positions * (self.head + self.critic)
        return 2.0 * (frozen + adapters * lora + ends + 2 * pairs * self.attention)

    def backward(
        self, tokens: int, positions: int, pairs: int, predicting: int | None = None
    ) -> float:
        """FLOPs of its backward pass."""
        frozen, adapters = self._inner(tokens, predicting)
        trained = adapters + positions * self.critic + 2 * pairs * self.attention
        return 2.0 * (frozen + positions * self.head) + 4.0 * trained

    def _inner(self, tokens: int, predicting: int | None) -> tuple[int, int]:
        """Tokens times weights, for the blocks and for their adapters."""
        left = tokens - (tokens if predicting is None else predicting)
        return (
            tokens * self.blocks - left * self.trimmed_blocks,
            tokens * self.adapters - left * self.trimmed_adapters,
        )


def weights_of(policy: Any) -> Weights:
    """The weights of a `Policy`: the matrices of its blocks (an embedding is a look-up)."""
    head, shape = policy.head.weight, policy.shape
    blocks, adapters = _matrices(policy.model, head)
    parts = [m for m in policy.model.modules() if getattr(m, "trimming", None)]
    trimmed = [_matrices(part, head) for part in parts]
    critic = sum(p.numel() for p in policy.value_head.parameters() if p.dim() == 2)
    return Weights(
        blocks=blocks,
        adapters=adapters,
        head=head.numel(),
        critic=critic,
        attention=shape.layers * shape.heads * shape.size,
        trimmed_blocks=sum(frozen for frozen, _ in trimmed),
        trimmed_adapters=sum(own for _, own in trimmed),
    )


def _matrices(whole: Any, head: Any) -> tuple[int, int]:
    """How many weights of a module tokens are multiplied by: frozen ones, and LoRA's."""
    blocks = adapters = 0
    for module in whole.modules():
        own = dict(module.named_parameters(recurse=False))
        adapters += sum(own[name].numel() for name in ("lora_a", "lora_b") if name in own)
        weight = own.get("weight")
        if weight is None or weight.dim() != 2 or weight is head:
            continue
        if "Embedding" not in repr(type(module)):
            blocks += weight.numel()
    return blocks, adapters


def gemm_rate(device: Any, dtype: Any) -> float:
    """FLOP/s of the fastest product of square matrices in half a second, in this dtype and with
    these threads: 1,024 wide on a CPU, 8,192 on a GPU. The run's random numbers are not touched."""
    import torch

    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    draw = torch.Generator("cuda" if device.type == "cuda" else "cpu").manual_seed(0)
    left = torch.randn(size, size, generator=draw, device=draw.device).to(device, dtype)
    out = torch.empty_like(left)
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.5:
        started = time.perf_counter()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(times)

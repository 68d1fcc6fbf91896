"""The critic: V(s) from the hidden states of the policy."""

from __future__ import annotations

from torch import Tensor, nn

VALUE_HEAD = "value_head.safetensors"  # beside the adapter


class ValueHead(nn.Module):
    """V(s) from the last hidden state, in fp32, zero at the start: an MLP, or a linear layer."""

    def __init__(self, hidden: int, kind: str = "mlp", width: int = 0):
        super().__init__()
        width = width or hidden
        self.body = nn.Sequential(nn.Linear(hidden, width), nn.GELU()) if kind == "mlp" else None
        self.out = nn.Linear(width if kind == "mlp" else hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, H) hidden states to (N,) values."""
        x = hidden.float()
        return self.out(x if self.body is None else self.body(x)).squeeze(-1)

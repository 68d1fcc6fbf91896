"""Keys and values while answers are decoded behind a packed tree: one token a row, no gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppo_nlu.ops import without_autocast
from ppo_nlu.tree import interface
from ppo_nlu.tree.attention import Layers, merge, partial_attention, rows_of
from ppo_nlu.tree.plan import Run, table


class TreeCache:
    """Keys and values while decoding: each prefix once, and a buffer for each row.

    A row's buffer holds the suffix of its prompt, right-padded, then its answer as it grows;
    nothing is copied from step to step. In the static form a step attends to the whole buffers,
    `bias` masks what is not there yet, and the next token's place is a tensor, `slot`. So every
    step runs the same kernels on the same memory, and can be recorded.
    """

    def __init__(
        self,
        layers: Layers,
        prefixes: Sequence[Layers],
        prefix_of: Sequence[int],
        suffixes: Sequence[Run],
        more: int,
        longest: int,
        static: bool = False,
    ):
        """
        Args:
            layers: for each layer the keys and values (N, heads, d) of all packed tokens.
            prefixes: for each layer the keys and values (n, heads, d) of every prefix.
            prefix_of: each row's prefix, -1 for none.
            suffixes: (start, length) of each row's suffix among the packed tokens.
            more: how many tokens may be decoded.
            longest: how many tokens the longest row may have in the end.
            static: take the static form.
        """
        self.longest, self.static = longest, static
        device = layers[0][0].device
        index, real = table(suffixes)
        index = index.to(device)
        self.width = index.shape[1]
        rows = len(suffixes)
        self.bias = torch.full((rows, 1, 1, self.width + more), -math.inf)
        self.bias[:, 0, 0, : self.width].masked_fill_(real, 0.0)
        if not static:
            self.bias[:, 0, 0, self.width :] = 0.0
        self.bias = self.bias.to(device)
        self.slot = torch.tensor([self.width], device=device)
        self.prefixes = prefixes
        self.rows_of_prefix = [
            [r for r, p in enumerate(prefix_of) if p == prefix]
            for prefix in range(len(prefixes[0]))
        ]
        self._set_members()
        self.own = [(self._buffer(k, index, more), self._buffer(v, index, more)) for k, v in layers]
        self.used = self.width

    @staticmethod
    def _buffer(x: Tensor, index: Tensor, more: int) -> Tensor:
        (rows, width), (_, heads, size) = index.shape, x.shape
        buffer = x.new_zeros(rows, heads, width + more, size)
        buffer[:, :, :width] = rows_of(x, index)
        return buffer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One new token a row: q (rows, heads, d), k and v (rows, key heads, d)."""
        with without_autocast(q):
            keys, values, bias = self._append(layer, k, v)
            groups = q.shape[1] // k.shape[1]
            asked = q[:, :, None]  # (rows, heads, 1, d)
            if groups > 1:  # heads that share keys are further queries
                asked = q.unflatten(1, (k.shape[1], groups))
            out, lse = partial_attention(asked, keys, values, False, bias, scale)
            out, lse = out.reshape(q.shape), lse.reshape(q.shape[:2])
            for members, prefix in zip(self.members, self.prefixes[layer], strict=True):
                if len(members) == len(q):
                    out = merge(out, lse, *_against(q, *prefix, scale))
                elif len(members):
                    more = _against(q[members], *prefix, scale)
                    out[members] = merge(out[members], lse[members], *more)
            return out

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the new token's k and v into the buffers. Returns what to attend to, and the bias."""
        keys, values = self.own[layer]
        if self.static:
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
            stop = keys.shape[2]
        else:
            keys[:, :, self.used], values[:, :, self.used] = k, v
            stop = self.used + 1
        return keys[:, :, :stop], values[:, :, :stop], self.bias[..., :stop]

    def step(self, decoder: nn.Module, token: Tensor, position_ids: Tensor | None) -> Tensor:
        """Run one token of each row at its position. Returns the hidden states (rows, H)."""
        assert position_ids is not None
        if self.static:
            self.bias.index_fill_(3, self.slot, 0.0)
        out = interface.forward(decoder, token, position_ids, self)
        if self.static:
            self.slot.add_(1)
        else:
            self.used += 1
        return out

    def keep(self, going: Sequence[int]) -> None:
        """Go on with these rows only."""
        assert not self.static
        index = torch.tensor(going, device=self.bias.device)
        self.own = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.own]
        self.bias = self.bias.index_select(0, index)
        new_row = {row: new for new, row in enumerate(going)}
        self.rows_of_prefix = [
            [new_row[r] for r in rows if r in new_row] for rows in self.rows_of_prefix
        ]
        self._set_members()

    def _set_members(self) -> None:
        device = self.bias.device
        self.members = [
            torch.tensor(rows, device=device, dtype=torch.long) for rows in self.rows_of_prefix
        ]


def _against(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q (n, heads, d) over one prefix's k and v (length, key heads, d)."""
    n, heads, size = q.shape
    groups = heads // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], groups)).permute(1, 0, 2, 3).flatten(1, 2)[None]
    out, lse = partial_attention(
        rows, k.transpose(0, 1)[None], v.transpose(0, 1)[None], False, None, scale
    )
    back = out[0].unflatten(1, (n, groups)).permute(1, 0, 2, 3).reshape(n, heads, size)
    return back, lse[0].unflatten(1, (n, groups)).permute(1, 0, 2).reshape(n, heads)

"""The plain path: left-padded rows, and keys and values as transformers keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


def forward(
    decoder: nn.Module,
    ids: Tensor,
    mask: Tensor,
    position_ids: Tensor | None,
    cache: DynamicCache | None,
    keep: bool = True,
):
    """One call of the decoder: `ids` and `position_ids` (rows, length) behind a `cache`, `mask`
    (rows, cached + length). `keep`: the output has keys and values."""
    extra: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    extra[cache_argument(decoder)] = cache
    return decoder(
        input_ids=ids,
        attention_mask=mask.long(),
        use_cache=keep,
        return_dict=True,
        **extra,
    )


def cache_argument(decoder: nn.Module) -> str:
    """The argument for keys and values of earlier tokens: its name depends on the version of
    transformers."""
    known = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def kept_cache(out: Any) -> Any:
    """The keys and values in a decoder's output, by either name."""
    return out.cache if hasattr(out, "cache") else out.past_key_values


class PlainCache:
    """Keys and values while decoding on the plain path, as transformers keeps them."""

    def __init__(self, cache: DynamicCache, mask: Tensor):
        self.cache, self.mask = cache, mask

    def step(self, decoder: nn.Module, token: Tensor, position_ids: Tensor | None) -> Tensor:
        """Run one token of each row, at its position where the model takes one. Returns the hidden
        states (rows, H)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        column = None if position_ids is None else position_ids[:, None]
        out = forward(decoder, token[:, None], self.mask, column, self.cache)
        self.cache = kept_cache(out)
        return out.last_hidden_state[:, -1]

    def keep(self, going: Sequence[int]) -> None:
        """Go on with these rows only."""
        rows = torch.tensor(going, device=self.mask.device)
        self.cache, self.mask = select(self.cache, rows), self.mask[rows]


def select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of these rows. Plain layers are copied, so that others can still use `cache`."""
    layers: list[Any] = cache.layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        cache.reorder_cache(rows)  # type: ignore[arg-type]  # layers with a window or a recurrent state hold more
        return cache
    taken = DynamicCache()
    for old in layers:
        layer: Any = DynamicLayer()
        layer.keys, layer.values = old.keys.index_select(0, rows), old.values.index_select(0, rows)
        layer.dtype, layer.device, layer.is_initialized = old.keys.dtype, old.keys.device, True
        taken.layers.append(layer)
    return taken

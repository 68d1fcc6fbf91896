"""How a decoder of transformers runs a pass of the tree: through its attention interface.

`switched_on` puts the pass into the model's config, which every attention module holds. There
`attention`, which transformers calls, finds it. So two models can run their passes independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "ppo_nlu_tree"
HELD_AS = "ppo_nlu_pass"  # the attribute of a config that holds the pass under way


class Pass(Protocol):
    """What a decoder runs: tokens of a packed tree, or one token a row behind a cache."""

    @property
    def longest(self) -> int:
        """The longest sequence, in tokens: every position is below this."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The attention (N, heads, d) of a layer's q (N, heads, d), whose new keys and values are k
        and v (N, key heads, d)."""


def forward(decoder: nn.Module, ids: Tensor, position_ids: Tensor, running: Pass) -> Tensor:
    """One forward of tokens (N,) at their positions; hidden states (N, H)."""
    with switched_on(decoder.config, running):
        out = decoder(
            input_ids=ids[None],
            attention_mask=None,
            position_ids=position_ids[None],
            use_cache=False,
            return_dict=True,
        )
    return out.last_hidden_state[0]


@contextmanager
def switched_on(config: Any, running: Pass) -> Iterator[None]:
    """Inside, the model of this config runs this pass, and attends by `attention`."""
    attends_by, before = config._attn_implementation, pass_of(config)
    config._attn_implementation = NAME
    setattr(config, HELD_AS, running)
    try:
        yield
    finally:
        config._attn_implementation = attends_by
        if before is None:
            delattr(config, HELD_AS)
        else:
            setattr(config, HELD_AS, before)


def pass_of(config: Any) -> Any:
    """The pass that the model of this config runs, None outside of `switched_on`."""
    return getattr(config, HELD_AS, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row, in the signature that transformers asks for.

    query (1, heads, N, d), key (1, key heads, N, d), value (1, key heads, N, up to d). Returns
    (1, N, heads, size of a value), and None in place of the weights.
    """
    running: Pass | None = pass_of(module.config)
    assert running is not None, "the prefix tree's attention is called outside of a pass"
    _refuse(running.longest, dropout, rest)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # they may have two dtypes; nothing below casts them
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    size = v.shape[-1]
    if size < q.shape[-1]:  # multi-head latent attention: its values are smaller
        v = nn.functional.pad(v, (0, q.shape[-1] - size))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return running.attend(layer, q, k, v, scale)[None, ..., :size], None


def _refuse(longest: int, dropout: float, asked: dict[str, Any]) -> None:
    """Raise where a module asks for more than plain attention."""
    window = asked.get("sliding_window")
    if dropout or asked.get("softcap") or asked.get("s_aux") is not None:
        raise NotImplementedError("the prefix tree runs only plain attention without dropout")
    if window and window < longest:
        raise NotImplementedError(f"the prefix tree runs only plain attention, no window {window}")


AttentionInterface.register(NAME, attention)

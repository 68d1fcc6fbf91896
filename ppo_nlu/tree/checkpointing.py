"""Checkpointing: a block keeps only its input, and is run again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppo_nlu.tree.attention import PackedPass
from ppo_nlu.tree.interface import pass_of, switched_on
from ppo_nlu.tree.trim import blocks


def checkpoint_blocks(decoder: nn.Module) -> None:
    """From now on each block of the decoder keeps only its input and is run again in the backward.

    transformers' own switch works in train mode only, which would turn dropout on.
    """
    for block in blocks(decoder):
        # `partial` holds the block, so that a deep copy of the block runs itself.
        block.forward = partial(_recomputed, block, decoder.config)


def _recomputed(block: nn.Module, config: Any, /, *args: Any, **named: Any) -> Any:
    plain: Callable[..., Any] = MethodType(type(block).forward, block)
    running = pass_of(config)
    if not torch.is_grad_enabled() or not isinstance(running, PackedPass):
        return plain(*args, **named)

    def again(*args: Any, **named: Any) -> Any:
        with switched_on(config, running):  # in the backward the pass is over
            return plain(*args, **named)

    return checkpoint(again, *args, use_reentrant=False, **named)

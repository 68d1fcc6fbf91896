"""The last block runs only the tokens that another one is predicted from.

Each layer needs the keys and values of every token. But of the last block's states only those of
the predicting tokens are read, so the rest of that block runs these alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ppo_nlu.tree.attention import PackedPass
from ppo_nlu.tree.interface import pass_of

# Modules of a block that work token by token, by the names that the families of models give them.
# Keys and values are not among them: every token's are attended to.
_TRIMMED = ("mlp", "q_proj", "o_proj", "dense", "attn.c_proj", "out_proj")


def blocks(decoder: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: its outermost list of modules."""
    return next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))


def trim(decoder: nn.Module) -> list[str]:
    """From now on these modules of the last block run only the predicting tokens of a packed tree:
    the queries, the projection behind the attention, and the MLP. Returns their names.

    The states of the other tokens come out wrong; nothing reads them.
    """
    block = blocks(decoder)[-1]
    names = [n for n, _ in block.named_modules() if n.endswith(_TRIMMED)]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    for module in map(block.get_submodule, outer):
        if trimming(module) is None:  # else another policy of the same model has done it
            module.trimming = _Trimming(decoder.config)  # type: ignore[assignment]
            module.register_forward_pre_hook(_pick)
            module.register_forward_hook(_put_back)
    return outer


@contextmanager
def whole(decoder: nn.Module) -> Iterator[None]:
    """Inside, the last block runs all tokens, as the other blocks do (for counting)."""
    found = [t for t in map(trimming, blocks(decoder)[-1].modules()) if t is not None]
    for each in found:
        each.off = True
    try:
        yield
    finally:
        for each in found:
            each.off = False


class _Trimming:
    """What a trimmed module knows of its model; `off`: it runs all tokens."""

    def __init__(self, config: Any) -> None:
        self.config, self.off = config, False

    @property
    def running(self) -> PackedPass | None:
        """The pass under way, where it says which tokens are predicting."""
        running = pass_of(self.config)
        if self.off or not isinstance(running, PackedPass) or running.plan.predicting is None:
            return None
        return running


def trimming(module: nn.Module) -> _Trimming | None:
    """The mark that `trim` has set on a module, if any."""
    return getattr(module, "trimming", None)


def _running(module: nn.Module) -> PackedPass | None:
    found = trimming(module)
    return None if found is None else found.running


def _pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    running = _running(module)
    if running is None:
        return None
    return (args[0].index_select(1, running.plan.predicting), *args[1:])


def _put_back(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
    running = _running(module)
    if running is None:
        return None
    if not isinstance(out, Tensor):
        raise NotImplementedError(f"{type(module).__name__} returns more than a tensor")
    plan = running.plan
    assert plan.predicting is not None
    return out.new_zeros(out.shape[0], plan.size, out.shape[2]).index_copy(1, plan.predicting, out)

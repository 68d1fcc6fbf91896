"""The passes of a decoder over a tree: over prompts, over answers behind them, over a prefix.

The decoder runs a packed tree in one forward, in which each token sees only its ancestors. Autograd
sums the gradients of the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ppo_nlu.tree import interface, plain
from ppo_nlu.tree.attention import Layers, PackedPass
from ppo_nlu.tree.cache import TreeCache
from ppo_nlu.tree.pack import Tree, build, pack_answers
from ppo_nlu.tree.packed_row import Cost
from ppo_nlu.tree.plain import PlainCache
from ppo_nlu.tree.prefixes import PrefixCache, Tokens, common_prefix


@dataclass
class PromptPass:
    """What a pass over prompts leaves: its tree, the states (P, H) at the prompts' ends, and keys
    and values where they were kept. Where the pass ran under autograd, its graph hangs on the
    tensors."""

    tree: Tree
    ends: Tensor
    layers: Layers | None = None  # keys and values of a packed tree
    cache: DynamicCache | None = None  # those of the plain path

    def decode_cache(
        self, rows: Sequence[int], more: int, static: bool = False
    ) -> TreeCache | PlainCache:
        """A cache to decode `more` tokens with: a row for each of these prompts, which may repeat.
        `static`: the static form of `TreeCache`; the plain path has none."""
        tree, branches = self.tree, self.tree.branches
        if self.layers is None:
            assert self.cache is not None and tree.attention_mask is not None
            index = torch.tensor(rows, device=tree.attention_mask.device)
            return PlainCache(plain.select(self.cache, index), tree.attention_mask[index])
        assert branches is not None
        source = self.layers if branches.cache is None else branches.cache.layers
        prefixes = [
            [(k[start : start + n], v[start : start + n]) for start, n in branches.prefixes]
            for k, v in source
        ]
        return TreeCache(
            layers=self.layers,
            prefixes=prefixes,
            prefix_of=[branches.prefix_of[r] for r in rows],
            suffixes=[branches.suffixes[r] for r in rows],
            more=more,
            longest=max(tree.lengths) + more,
            static=static,
        )


def run(
    decoder: nn.Module, tree: Tree, takes_positions: bool = True, keep: bool = False
) -> tuple[Tensor, PromptPass]:
    """Run a tree in one forward. Returns the flattened hidden states (tokens, H), and what the pass
    leaves; `keep`: with keys and values, which decoding needs.

    `decoder` is a Hugging Face decoder without its head; `takes_positions=False` for one that takes
    no `position_ids`.
    """
    if tree.plan is None:
        assert tree.attention_mask is not None
        position_ids = tree.position_ids if takes_positions else None
        out = plain.forward(decoder, tree.ids, tree.attention_mask, position_ids, None, keep)
        flat = out.last_hidden_state.flatten(0, 1)
        return flat, PromptPass(tree, flat.index_select(0, tree.ends), cache=plain.kept_cache(out))
    assert tree.branches is not None
    earlier = None if tree.branches.cache is None else tree.branches.cache.layers
    running = PackedPass(tree.plan, earlier, [] if keep else None)
    flat = interface.forward(decoder, tree.ids, tree.position_ids, running)
    # Checkpointed blocks hold on to the pass: keys and values left in it would never be freed.
    layers, running.kept = running.kept, None
    return flat, PromptPass(tree, flat.index_select(0, tree.ends), layers)


def run_answers(
    decoder: nn.Module, prompt_pass: PromptPass, answers: Sequence[Tokens], prompt_of: Sequence[int]
) -> tuple[Tensor, Tensor, Cost]:
    """Run answers behind prompts that a packed pass has run; gradients reach back into that pass.

    Returns the states (N, H) that predict the answers' tokens, row by row, the mask (B, R), and
    the cost without that of the prompts.
    """
    assert prompt_pass.layers is not None
    runs = pack_answers(prompt_pass.tree, answers, prompt_of)
    hidden = prompt_pass.ends
    device = hidden.device
    if runs.plan is not None:
        running = PackedPass(runs.plan.to(device), prompt_pass.layers)
        ids, position_ids = runs.ids.to(device), runs.position_ids.to(device)
        hidden = torch.cat([hidden, interface.forward(decoder, ids, position_ids, running)])
    predicted_from, mask = runs.predicted_from.to(device), runs.mask.to(device)
    return hidden.index_select(0, predicted_from[mask]), mask, runs.cost


@torch.no_grad()
def cache_prefix(
    decoder: nn.Module, prompts: Sequence[Tokens], most: int | None = None
) -> PrefixCache | None:
    """Run what all of these prompts begin with, up to `most` tokens; None where that is too few to
    be worth it."""
    tokens = common_prefix(prompts, most)
    if not tokens:
        return None
    tree = build([tokens]).to(next(decoder.parameters()).device)
    layers = run(decoder, tree, keep=True)[1].layers
    assert layers is not None
    return PrefixCache(tokens, layers)

"""Blocks that are run again in the backward."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from ppo_nlu.tree.attention import PackedPass
from ppo_nlu.tree.checkpointing import checkpoint_blocks
from ppo_nlu.tree.interface import switched_on
from ppo_nlu.tree.pack import build
from tests.tree.shapes import OTHER, SHAPES, pull, through

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(kind: str) -> None:
    shape = SHAPES["several answers a prompt"]
    found, kept = [], []
    for checkpointed in (False, True):
        decoder = tiny.causal_lm(kind).base_model
        if checkpointed:
            checkpoint_blocks(decoder)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.update({x.data_ptr(): x.numel()}), x)[1], lambda x: x
        ):
            hidden = through(decoder, build(*shape))
        kept.append(sum(sizes.values()))
        found.append([hidden, *pull(hidden, list(decoder.parameters()))])
    for plain, again in zip(*found, strict=True):
        tiny.close(plain, again, 1e-6)
    assert kept[1] < 0.6 * kept[0]


def test_the_backward_comes_while_another_pass_is_under_way() -> None:
    """A block is run again as a part of its own pass, whatever the model runs by then."""
    found = []
    for checkpointed in (False, True):
        decoder = tiny.causal_lm("llama").base_model
        if checkpointed:
            checkpoint_blocks(decoder)
        hidden = through(decoder, build(*SHAPES["several answers a prompt"]))
        other = build([OTHER, [40, 41]]).plan
        assert other is not None
        with switched_on(decoder.config, PackedPass(other)):
            found.append(pull(hidden, list(decoder.parameters())))
    for plain, again in zip(*found, strict=True):
        tiny.close(plain, again, 1e-6)


def test_a_copy_of_the_blocks_runs_itself() -> None:
    """As for the check at load, which copies the first blocks in fp32."""
    decoder = tiny.causal_lm("llama").base_model
    checkpoint_blocks(decoder)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    expected = through(tiny.causal_lm("llama").base_model, build(*SHAPES["shared prefix"]))
    assert float(expected.detach().abs().max()) > 0.1
    tiny.close(through(twin, build(*SHAPES["shared prefix"])), expected)

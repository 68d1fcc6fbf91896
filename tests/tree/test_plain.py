"""The plain path equals the forward of one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from ppo_nlu.tree.pack import build
from tests.tree.shapes import SHAPES, assert_equal_to_rows, through

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["mpt", "llama", "mistral"])
def test_plain_path_equals_one_row_at_a_time(kind: str, name: str) -> None:
    changes = {"sliding_window": 4} if kind == "mistral" else {}
    decoder = tiny.causal_lm(kind, **changes).base_model
    params = list(decoder.parameters())
    assert_equal_to_rows(decoder, params, SHAPES[name], packed=False, takes_positions=kind != "mpt")


@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing(name: str) -> None:
    decoder = tiny.causal_lm("llama").base_model
    tree = build(*SHAPES[name], packed=False)
    assert tree.attention_mask is not None
    with torch.no_grad():
        before = through(decoder, tree)
        tree = replace(tree, ids=torch.where(tree.attention_mask, tree.ids, 37))
        tiny.close(through(decoder, tree), before, 1e-6)

"""Which prefixes prompts share, and one that is kept for many passes."""

from __future__ import annotations

import pytest
import tiny
import torch

from ppo_nlu.tree import prefixes
from ppo_nlu.tree.pack import build
from ppo_nlu.tree.passes import cache_prefix
from ppo_nlu.tree.prefixes import common
from tests.tree.shapes import BASE, OTHER

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


def test_common() -> None:
    assert [common(BASE, x) for x in (OTHER, BASE[:3], [*BASE, 1], BASE)] == [0, 3, 8, 8]


def test_a_prefix_cache_that_does_not_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy("llama")
    found = cache_prefix(policy.decoder, [[*BASE, 20], [*BASE, 21]])
    assert found is not None
    for prompts in ([[*BASE, 20], OTHER], [[*BASE, 20], BASE], [[*BASE[:7], 2, 20]]):
        tree, plain = build(prompts, prefix_cache=found), build(prompts)
        assert torch.equal(tree.ids, plain.ids) and tree.branches.cache is None  # type: ignore[union-attr]
    assert build([[*BASE, 20]], packed=False, prefix_cache=found).plan is None
    assert cache_prefix(policy.decoder, [BASE, BASE]).tokens == BASE[:-1]  # type: ignore[union-attr]
    monkeypatch.setattr(prefixes, "PREFIX_COST", 16)
    assert cache_prefix(policy.decoder, [[*BASE, 20], [*BASE, 21]]) is None
    policy.tree = False
    assert policy.prefix_cache([[*BASE * 3, 20], [*BASE * 3, 21]]) is None

"""Decoding behind a tree: the static cache gives what the growing one gives."""

from __future__ import annotations

import pytest
import tiny
import torch

from ppo_nlu.tree import attention, prefixes
from ppo_nlu.tree.cache import TreeCache
from ppo_nlu.tree.pack import build
from ppo_nlu.tree.passes import run
from tests.model.test_generate import KINDS, policy_of, ragged

TREES = [kind for kind in KINDS if kind in tiny.TREE_KINDS]


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
@pytest.mark.parametrize("kind", TREES)
def test_the_static_cache(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step what the growing one gives, for rows behind a shared run and others."""
    if device != "cpu":
        monkeypatch.setattr(attention, "FUSED_ON", "none")
    monkeypatch.setattr(prefixes, "PREFIX_COST", 0)
    policy, prompts = policy_of(kind), ragged()
    prompt_of = [0, 0, 1, 2, 3, 4, 4]
    place = torch.tensor([len(prompts[p]) for p in prompt_of])
    with torch.no_grad():
        prompt_pass = run(policy.decoder, build(prompts), keep=True)[1]
        grown, static = (prompt_pass.decode_cache(prompt_of, 4, flag) for flag in (False, True))
        assert isinstance(static, TreeCache) and static.prefixes[0]
        before = [k.data_ptr() for k, _ in static.own]
        for step in range(4):
            token = torch.tensor([(7 * row + 3 * step) % 20 + 3 for row in range(len(prompt_of))])
            expected = grown.step(policy.decoder, token, place + step)
            tiny.close(static.step(policy.decoder, token, place + step), expected)
    assert [k.data_ptr() for k, _ in static.own] == before
    assert static.slot.tolist() == [static.width + 4]

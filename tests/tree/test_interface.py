"""How a model runs a pass: what it refuses, and what it leaves behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from ppo_nlu.tree.attention import PackedPass
from ppo_nlu.tree.interface import pass_of, switched_on
from ppo_nlu.tree.pack import Tree, build
from ppo_nlu.tree.passes import run
from tests.tree.shapes import BASE, OTHER, SHAPES, through

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


def test_a_window_is_refused_by_the_tree() -> None:
    """Its attention is not plain; `choose_path` takes the other path."""
    decoder = tiny.causal_lm("mistral", sliding_window=4).base_model
    with torch.no_grad(), pytest.raises(NotImplementedError, match="plain attention"):
        through(decoder, build(*SHAPES["two clusters"]))


def test_the_attention_of_a_model_is_its_own_again() -> None:
    model = tiny.causal_lm("llama")
    run(model.base_model, build(*SHAPES["shared prefix"]))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        run(model.base_model, build([[tiny.VOCAB]]))
    assert model.config._attn_implementation == "sdpa"


def packed(prompts: list[list[int]]) -> tuple[Tree, PackedPass]:
    tree = build(prompts)
    assert tree.plan is not None
    return tree, PackedPass(tree.plan)


def test_two_models_run_their_own_passes_at_the_same_time() -> None:
    """Both are under way: each model finds its own, whichever began last."""
    first, second = tiny.policy("llama"), tiny.policy("gpt2")
    prompts = [[[*BASE, 20, 21], [*BASE, 23]], [OTHER, [*OTHER, 31], [40, 41]]]
    pairs = list(zip((first, second), prompts, strict=True))
    expected = [torch.cat([tiny.alone(p.decoder, row, [0]) for row in rows]) for p, rows in pairs]
    trees = [packed(rows) for rows in prompts]
    with (
        torch.no_grad(),
        switched_on(first.decoder.config, trees[0][1]),
        switched_on(second.decoder.config, trees[1][1]),
    ):
        for policy, (tree, _), states in zip((first, second), trees, expected, strict=True):
            ids, places = tree.ids[None], tree.places[None]
            out = policy.decoder(input_ids=ids, position_ids=places, use_cache=False)
            tiny.close(out.last_hidden_state[0][tree.ends], states)
    assert pass_of(first.decoder.config) is pass_of(second.decoder.config) is None


def test_a_pass_inside_of_a_pass() -> None:
    """A model is asked again while it runs, and goes on with what it was at; an error inside leaves
    the outer pass as it was."""
    policy = tiny.policy("llama")
    expected = through(policy.decoder, build(*SHAPES["two clusters"]))
    inner: list[Tensor] = []

    def ask(module: nn.Module, args: object) -> None:
        handle.remove()
        with pytest.raises(IndexError):
            run(policy.decoder, build([[tiny.VOCAB]]))
        inner.append(run(policy.decoder, build([OTHER]))[1].ends[0])

    handle = policy.decoder.layers[1].register_forward_pre_hook(ask)
    tiny.close(through(policy.decoder, build(*SHAPES["two clusters"])), expected)
    tiny.close(inner[0], tiny.alone(policy.decoder, OTHER, [0])[0])


def test_a_pass_leaves_nothing_in_the_config() -> None:
    """The config is written to a run's files, and copied."""
    model = tiny.causal_lm("llama")
    before = dict(vars(model.config))
    run(model.base_model, build(*SHAPES["shared prefix"]))
    assert vars(model.config) == before

"""The last block runs only the tokens that another one is predicted from."""

from __future__ import annotations

import pytest
import tiny

from ppo_nlu.tree import trim
from ppo_nlu.tree.interface import pass_of
from ppo_nlu.tree.pack import build
from tests.tree.shapes import SHAPES, pull, through

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_the_last_block_runs_the_predicting_tokens_alone(kind: str) -> None:
    """Of 18 tokens 6 predict an answer's token; states and gradients agree."""
    prompts, answers, prompt_of = SHAPES["shared prefix"]
    model = tiny.causal_lm(kind)
    tree = build(prompts, answers, prompt_of)
    expected = through(model.base_model, tree)
    gradients = pull(expected, list(model.base_model.parameters()))
    names = trim.trim(model.base_model)
    assert any("mlp" in name for name in names) and len(names) >= 2
    sizes: list[int] = []
    block = trim.blocks(model.base_model)[-1]
    inner = next(m for m in block.mlp.modules() if not list(m.children()) and list(m.parameters()))
    inner.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    actual = through(model.base_model, build(prompts, answers, prompt_of))
    assert sizes == [6] and len(tree.ids) == 18
    tiny.close(actual, expected)
    for mine, theirs in zip(
        pull(actual, list(model.base_model.parameters())), gradients, strict=True
    ):
        tiny.close(mine, theirs)
    trim.trim(model.base_model)  # a second policy around the same model
    tiny.close(through(model.base_model, build(prompts, answers, prompt_of)), expected)
    assert pass_of(model.config) is None
    with trim.whole(model.base_model):
        through(model.base_model, build(prompts, answers, prompt_of))
    assert sizes == [6, 6, 18]


def test_a_model_that_runs_all_tokens_leaves_others_as_they_are() -> None:
    prompts, answers, prompt_of = SHAPES["shared prefix"]
    sizes: dict[str, list[int]] = {"llama": [], "qwen2": []}
    decoders = {kind: tiny.causal_lm(kind).base_model for kind in sizes}
    for kind, decoder in decoders.items():
        trim.trim(decoder)
        up = decoder.layers[-1].mlp.up_proj
        up.register_forward_pre_hook(lambda m, args, k=kind: sizes[k].append(args[0].shape[1]))
    with pytest.raises(RuntimeError), trim.whole(decoders["llama"]):
        for decoder in decoders.values():
            through(decoder, build(prompts, answers, prompt_of))
        raise RuntimeError("what happens inside")
    through(decoders["llama"], build(prompts, answers, prompt_of))
    assert sizes == {"llama": [18, 6], "qwen2": [6]}

"""A block that is written out equals the library's modules: states and every gradient."""

from __future__ import annotations

import pickle

import pytest
import test_prefix_tree
import tiny
import torch
from test_prefix_tree import SHAPES, assert_equal_to_rows, by_row, pull, through
from torch import nn

from ppo_nlu import llama_block, lora, prefix_tree, tree_attention
from ppo_nlu.config import LoraConfig
from ppo_nlu.llama_block import PackedBlock
from ppo_nlu.model import Policy
from ppo_nlu.prefix_tree import build, run

# Heads that share keys; biases of q, k and v; biases of all.
KINDS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
}
_every_prefix_counts = test_prefix_tree._every_prefix_counts


def made(kind: str, **options) -> Policy:
    policy = tiny.policy(kind.partition(",")[0], **KINDS[kind], **options)
    assert policy.tree and all(isinstance(b, PackedBlock) for b in policy.decoder.layers)
    return policy


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were run written out."""
    seen: list[int] = []
    plain = llama_block._forward

    def spy(weights, *rest):
        seen.append(weights.layer)
        return plain(weights, *rest)

    monkeypatch.setattr(llama_block, "_forward", spy)
    return seen


@pytest.mark.parametrize("targets", ["all-linear", "attention", ["v_proj", "down_proj"]])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_row_at_a_time(kind: str, targets: str | list[str], runs: list[int]) -> None:
    policy = made(kind, lora_cfg=LoraConfig(r=4, alpha=8.0, targets=targets))
    runs.clear()
    for shape in SHAPES.values():
        assert_equal_to_rows(policy.decoder, lora.lora_parameters(policy.model), shape)
    assert runs == [0, 1] * len(SHAPES)  # the tree's passes, not those of single rows


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_on_a_trunk_equal_one_row_at_a_time(kind: str, name: str, runs: list[int]) -> None:
    policy = made(kind)
    params = lora.lora_parameters(policy.model)
    prompts, answers, owners = SHAPES[name]
    given = list(range(len(answers))) if owners is None else owners
    runs.clear()
    _, trunk = run(policy.decoder, build(prompts), keep=True)
    actual, _, cost = prefix_tree.grow(policy.decoder, trunk, answers, given)
    assert runs == [0, 1] * (2 if cost.tokens_run else 1)
    expected = by_row(policy.decoder, prompts, answers, owners)
    tiny.close(actual, expected)
    for mine, theirs in zip(pull(actual, params), pull(expected, params), strict=True):
        tiny.close(mine, theirs)


def test_the_gradient_of_the_states_before() -> None:
    """Of a block that is not the first, whose input needs one, and of the keys of an earlier pass:
    against the library's modules with the same attention."""
    policy = made("qwen2")
    prompts, answers, owners = SHAPES["several answers a prompt"]
    found = []
    for written_out in (True, False):
        if not written_out:
            llama_block.detach(policy.decoder)
        table = policy.decoder.embed_tokens.weight.requires_grad_()
        _, trunk = run(policy.decoder, build(prompts), keep=True)
        hidden, _, _ = prefix_tree.grow(policy.decoder, trunk, answers, owners or [])
        found.append([hidden, *pull(hidden, [table, *lora.lora_parameters(policy.model)])])
    for ours, theirs in zip(*found, strict=True):
        tiny.close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind: str, runs: list[int]) -> None:
    policy = made(kind)
    prompts, answers, _ = SHAPES["two clusters"]
    longest = [[*answer, 6, 4, 17][:3] for answer in answers]
    places = torch.tensor([len(prompt) for prompt in prompts])
    with torch.no_grad():
        state = run(policy.decoder, build(prompts), keep=True)[1]
        cache = state.start(range(len(prompts)), 2)
        runs.clear()
        for step in range(2):
            token = torch.tensor([answer[step] for answer in longest])
            hidden = cache.step(policy.decoder, token, places + step)
        assert runs == [0, 1] * 2
        rows = zip(prompts, longest, strict=True)
        expected = torch.stack([tiny.alone(policy.decoder, p, a)[2] for p, a in rows])
    tiny.close(hidden, expected)


def test_the_reference(runs: list[int]) -> None:
    """LoRA off, and LoRA of a frozen copy."""
    policy = made("llama")
    shape = SHAPES["shared prefix"]
    tree = build(*shape)
    runs.clear()
    with torch.no_grad():
        lora.freeze_reference(policy.model)
        copied = through(policy.decoder, tree)
        tiny.shake(policy, seed=3)
        with lora.lora_disabled(policy.model):
            tiny.close(through(policy.decoder, tree), copied)
            for layer in lora.lora_layers(policy.model).values():
                layer.ref_a = layer.ref_b = None
            base = through(policy.decoder, tree)
            tiny.close(base, by_row(policy.decoder, *shape))
    assert len(runs) == 6 and float((base - copied).abs().max()) > 1e-3


def test_checkpointed(runs: list[int]) -> None:
    shape = SHAPES["several answers a prompt"]
    found = []
    for checkpointed in (False, True):
        policy = made("llama")
        if checkpointed:
            tree_attention.checkpoint_blocks(policy.decoder)
        runs.clear()
        hidden = through(policy.decoder, build(*shape))
        found.append([hidden, *pull(hidden, lora.lora_parameters(policy.model))])
        assert len(runs) == (4 if checkpointed else 2)  # each block once more in the backward
    for plain, again in zip(*found, strict=True):
        tiny.close(plain, again, 1e-6)


def test_in_double_precision(runs: list[int]) -> None:
    """Against finite differences, so against no other code: of A and B of every layer."""
    policy = made("llama, biases", lora_cfg=LoraConfig(r=1, alpha=2.0))
    policy.model.double()
    policy.decoder.norm = nn.Identity()  # which rounds to single precision, as the library's do
    decoder, params = policy.decoder, lora.lora_parameters(policy.model)
    prompts, answers, owners = SHAPES["several answers a prompt"]
    tree_attention.trim(decoder)
    runs.clear()

    def value() -> torch.Tensor:
        return (through(decoder, build(prompts, answers, owners)) ** 2).sum()

    slopes = torch.autograd.grad(value(), params)
    assert runs == [0, 1]
    draw = torch.Generator().manual_seed(4)
    ways = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in params]
    for p, slope, way in zip(params, slopes, ways, strict=True):
        values = []
        with torch.no_grad():
            for size in (1e-6, -2e-6):
                p.add_(way, alpha=size)
                values.append(float(value()))
            p.add_(way, alpha=1e-6)
        difference = (values[0] - values[1]) / 2e-6
        assert difference == pytest.approx(float((slope * way).sum()), rel=1e-5, abs=1e-5)


def test_weights_that_moved_before_the_backward() -> None:
    """Autograd says so, as it does of the library's modules."""
    policy = made("llama")
    hidden = through(policy.decoder, build(*SHAPES["shared prefix"]))
    with torch.no_grad():
        lora.lora_parameters(policy.model)[-1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_keys_and_values_that_stay_hold_nothing_else() -> None:
    """Of a pass without a graph; with heads that share keys q is the larger part."""
    policy = made("llama")
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            state = run(policy.decoder, build(SHAPES["shared prefix"][0]), keep=True)[1]
        assert state.layers is not None
        for x in (x for pair in state.layers for x in pair):
            assert (x.untyped_storage().nbytes() == 4 * x.numel()) is not graph


def test_a_window_is_refused_here_too() -> None:
    policy = tiny.policy("mistral", sliding_window=13)
    assert not policy.tree and isinstance(policy.decoder.layers[0], PackedBlock)
    shape = SHAPES["shared prefix"]
    with torch.no_grad():
        through(policy.decoder, build(*shape))  # 13 positions, all inside of it
        policy.model.config.sliding_window = 12
        with pytest.raises(NotImplementedError, match="plain attention"):
            through(policy.decoder, build(*shape))


def test_a_model_can_still_be_pickled() -> None:
    policy = made("llama")
    again = pickle.loads(pickle.dumps(policy.model))
    assert type(again.base_model.layers[1]) is type(policy.decoder.layers[1])
    shape = SHAPES["shared prefix"]
    with torch.no_grad():
        expected = through(policy.decoder, build(*shape))
        assert torch.equal(through(again.base_model, build(*shape)), expected)


def test_other_passes_take_the_library(runs: list[int]) -> None:
    shape = SHAPES["shared prefix"]

    def states(policy: Policy) -> torch.Tensor:
        runs.clear()
        hidden = through(policy.decoder, build(*shape))
        assert not runs
        return hidden

    trained = made("llama")
    trained.decoder.layers[0].mlp.up_proj.base.weight.requires_grad_()
    weight = trained.decoder.layers[1].input_layernorm.weight.requires_grad_()
    assert pull(states(trained), [weight])[0].abs().max() > 0
    dropped = made("llama", lora_cfg=LoraConfig(r=4, alpha=8.0, dropout=0.5))
    expected = through(dropped.decoder, build(*shape))
    with lora.dropout_on(dropped.model):
        assert float((states(dropped) - expected).abs().max()) > 1e-3
    policy = made("llama")
    for block in policy.decoder.layers:
        block.self_attn.attention_dropout = 0.5
    through(policy.decoder, build(*shape))
    policy.model.train()
    with pytest.raises(NotImplementedError, match="without dropout"):
        states(policy)
    low = made("llama")
    low.model.to(torch.bfloat16)
    with torch.no_grad():
        states(low)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_merged_model_is_run_as_it_is(checkpointed: bool) -> None:
    """A copy's blocks read the copy's weights, not those of the model they were attached to."""
    policy = made("llama")
    if checkpointed:
        tree_attention.checkpoint_blocks(policy.decoder)
    shape = SHAPES["shared prefix"]
    merged = lora.merge(policy.model).requires_grad_(False)
    with torch.no_grad():
        expected = through(policy.decoder, build(*shape))
        tiny.close(through(merged.base_model, build(*shape)), expected)
        tiny.shake(policy, seed=3)
        tiny.close(through(merged.base_model, build(*shape)), expected)
        assert float((through(policy.decoder, build(*shape)) - expected).abs().max()) > 1e-3


def test_what_is_not_known_is_left_alone() -> None:
    """Other architectures, norms that train, a further part in the attention."""
    for kind in ("gpt2", "neox", "llama"):  # whose norms are the library's here
        assert llama_block.attach(tiny.causal_lm(kind).base_model) == 0
    policy = made("llama")
    llama_block.detach(policy.decoder)
    assert not any(isinstance(module, PackedBlock) for module in policy.decoder.modules())
    policy.decoder.layers[0].self_attn.q_norm = nn.Identity()
    assert llama_block.attach(policy.decoder) == 1
    assert llama_block.attach(policy.decoder) == 0  # they are attached

"""The prefix tree equals the plain forward of one row at a time: states and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from ppo_nlu import lora, prefix_tree
from ppo_nlu.model import choose_path
from ppo_nlu.prefix_tree import build, common, pad, run

BASE = [5, 9, 3, 14, 22, 7, 30, 11]
OTHER = [6, 4, 17, 25, 8, 19]

# name: (prompts, answers, owners)
SHAPES: dict[str, tuple[list[list[int]], list[list[int]], list[int] | None]] = {
    "shared prefix": (
        [[*BASE, 20, 21], [*BASE, 23], [*BASE, 24, 26, 27, 28]],
        [[31, 12, 2], [31], [13, 15]],
        None,
    ),
    "nothing shared": ([BASE, OTHER, [40, 41, 42]], [[31, 12], [13, 15, 16], [2]], None),
    "two clusters": (
        [[*BASE, 20], [*OTHER, 21, 22], [*BASE, 23, 29], [*OTHER, 24], [*OTHER, 26]],
        [[31, 12], [13], [15, 16, 2], [33, 34], [35]],
        None,
    ),
    "a prompt opens or equals another": (
        [BASE, BASE[:5], [*BASE, 20, 21], list(BASE)],
        [[31, 12], [13, 15, 2], [16], [33, 34]],
        None,
    ),
    "several answers a prompt": (
        [[*BASE, 20, 21], [*BASE, 23], [*BASE, 24, 26, 27]],
        [[31, 12, 2], [31], [13, 15], [16, 2], [16, 31, 33, 2], [34]],
        [0, 0, 0, 1, 1, 2],
    ),
    "owners out of order, one prompt without": (
        [[*BASE, 20], OTHER, [*BASE, 23]],
        [[31, 12], [13], [15, 16, 2]],
        [2, 0, 2],
    ),
    "answers of one token": (
        [[*BASE, 20], [*BASE, 21, 22]],
        [[31], [12], [13], [15]],
        [0, 0, 1, 1],
    ),
    "one row": ([BASE], [[31, 12, 2]], None),
    "one prompt, four answers": ([BASE], [[31, 12], [13, 15, 16], [2], [31, 13]], [0, 0, 0, 0]),
}


def weights_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5)) / count


def pull(hidden: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a fixed random projection of the states (zeros where there is none)."""
    loss = (hidden * weights_of(*hidden.shape)).sum()
    return list(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))


def by_row(decoder: nn.Module, prompts, answers, owners) -> Tensor:
    owners = range(len(answers)) if owners is None else owners
    rows = zip(owners, answers, strict=True)
    return torch.cat([tiny.alone(decoder, prompts[o], answer) for o, answer in rows])


def through(decoder: nn.Module, tree: prefix_tree.Tree, positions: bool = True) -> Tensor:
    flat, _ = run(decoder, tree, positions)
    return flat[tree.positions[tree.mask]]


def assert_equal_to_rows(
    decoder: nn.Module, params, shape, shared: bool = True, positions: bool = True
) -> None:
    prompts, answers, owners = shape
    actual = through(decoder, build(prompts, answers, owners, shared), positions)
    expected = by_row(decoder, prompts, answers, owners)
    tiny.close(actual, expected)
    for mine, theirs in zip(pull(actual, params), pull(expected, params), strict=True):
        tiny.close(mine, theirs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_tree_equals_one_row_at_a_time(kind: str, name: str, training: bool) -> None:
    decoder = tiny.causal_lm(kind).base_model.train(training)
    assert_equal_to_rows(decoder, list(decoder.parameters()), SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_eager_attention_too(name: str) -> None:
    model = tiny.causal_lm("llama")
    model.set_attn_implementation("eager")
    assert_equal_to_rows(model.base_model, list(model.base_model.parameters()), SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["mpt", "llama", "mistral"])
def test_plain_path_equals_one_row_at_a_time(kind: str, name: str) -> None:
    changes = {"sliding_window": 4} if kind == "mistral" else {}
    decoder = tiny.causal_lm(kind, **changes).base_model
    params = list(decoder.parameters())
    assert_equal_to_rows(decoder, params, SHAPES[name], shared=False, positions=kind != "mpt")


@pytest.mark.parametrize("model", ["stories260K", "tinystories-656k"])
def test_pretrained_models(model: str) -> None:
    policy = tiny.pretrained(model)
    tiny.shake(policy)
    assert policy.tree
    head = policy.encode("Once upon a time, there was a little girl named Lily. She loved to play")
    tails = [" outside in the park.", " with her red ball", " and to sing and to dance in the sun."]
    prompts = [head + policy.encode(tail)[1:] for tail in tails]
    answers = [policy.encode("One day, she")[1:], policy.encode("The end")[1:], [400], [7, 9, 11]]
    shape = (prompts, answers, [0, 0, 1, 2])
    assert_equal_to_rows(policy.decoder, lora.lora_parameters(policy.model), shape)


@pytest.mark.parametrize(
    ("kind", "changes", "tree"),
    [(kind, {}, True) for kind in tiny.TREE_KINDS]
    + [("mpt", {}, False), ("mistral", {"sliding_window": 16}, False)]
    + [("mistral", {"sliding_window": None}, True)],
)
def test_choose_path(kind: str, changes: dict, tree: bool) -> None:
    policy = tiny.policy(kind, **changes)
    assert policy.tree is tree
    assert choose_path(policy, "plain") is False
    prompts, answers, owners = SHAPES["several answers a prompt"]
    long = [prompt * 4 for prompt in prompts]
    policy.tree = tree
    hidden, _ = policy.hidden(long, answers, owners)
    tiny.close(hidden, by_row(policy.decoder, long, answers, owners))


def test_window_breaks_the_tree_where_padding_stands_between() -> None:
    """Why a window takes the plain path: the tree would be far off."""
    decoder = tiny.causal_lm("mistral", sliding_window=4).base_model
    with torch.no_grad():
        tree = through(decoder, build(*SHAPES["two clusters"]))
        gap = (tree - by_row(decoder, *SHAPES["two clusters"])).abs().max()
    assert gap > 0.01


@pytest.mark.parametrize("shared", [True, False], ids=["tree", "plain"])
@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing(name: str, shared: bool) -> None:
    decoder = tiny.causal_lm("llama").base_model
    tree = build(*SHAPES[name], shared=shared)
    with torch.no_grad():
        before = through(decoder, tree)
        for level in tree.levels:
            level.ids = torch.where(level.mask, level.ids, 37)
        tiny.close(through(decoder, tree), before, 1e-6)


def test_nothing_that_needs_a_gradient_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.causal_lm("llama").base_model
    made: list[tuple[Tensor, int, Tensor]] = []
    plain = prefix_tree.forward

    def spy(*args):
        out = plain(*args)
        for layer in out.past_key_values.layers:
            for x in (layer.keys, layer.values):
                made.append((x, x._version, x.detach().clone()))
        return out

    monkeypatch.setattr(prefix_tree, "forward", spy)
    tree = build(*SHAPES["several answers a prompt"])
    assert len(tree.levels) == 3
    flat, _ = run(decoder, tree)
    flat.sum().backward()
    assert len(made) == 3 * 2 * 2
    for tensor, version, copy in made:
        assert tensor.requires_grad and tensor._version == version
        assert torch.equal(tensor, copy)


def test_gather_leaves_the_given_cache_alone() -> None:
    decoder = tiny.causal_lm("llama").base_model
    for prompts in ([BASE], [BASE, OTHER]):
        _, state = run(decoder, build(prompts))
        given: list[Any] = state.cache.layers
        before = [(layer.keys.clone(), layer.values.clone()) for layer in given]
        rows = torch.tensor([len(prompts) - 1, 0, 0])
        taken = prefix_tree.gather(state.cache, rows)
        taken.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), 0)
        new_layers: list[Any] = taken.layers
        for layer, (keys, values), new in zip(given, before, new_layers, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
            assert torch.equal(new.keys[:, :, : keys.shape[2]], keys[rows])
            assert torch.equal(new.values[:, :, : keys.shape[2]], values[rows])


def test_hand_made_tree() -> None:
    """8 shared tokens; 2, 1 and 4 more per prompt; answers without their last: 2, 0 and 1."""
    tree = build(*SHAPES["shared prefix"])
    head, tails = tree.levels
    assert head.ids.tolist() == [BASE]
    assert tails.parent is not None and tails.parent.tolist() == [0, 0, 0]
    assert tails.ids.tolist() == [
        [20, 21, 31, 12, 0],
        [23, 0, 0, 0, 0],
        [24, 26, 27, 28, 13],
    ]
    assert tails.mask.sum(1).tolist() == [4, 1, 5]
    assert tree.tokens == 8 + (2 + 1 + 4) + (2 + 0 + 1)
    assert tree.ends.tolist() == [8 + 1, 8 + 5 + 0, 8 + 10 + 3]
    assert tree.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert tree.positions[tree.mask].tolist() == [9, 10, 11, 13, 21, 22]
    assert tree.lengths == [10, 9, 12]


@pytest.mark.parametrize("group", [1, 4])
def test_distinct_tokens_run_once(group: int) -> None:
    """16 rows with 80 shared, 20 own and 6 answer tokens (the last of which predicts nothing)."""
    shared = [i % 40 + 3 for i in range(80)]
    prompts = [[*shared, 50 + row, *range(19)] for row in range(16)]
    answers = [[60 + row, 1, 2, 3, 4, 5] for row in range(16 * group)]
    tree = build(prompts, answers, [row // group for row in range(16 * group)])
    assert tree.tokens == 80 + 16 * 20 + 16 * group * 5
    assert sum(level.ids.numel() for level in tree.levels) == tree.tokens  # no padding either
    plain = build(prompts, answers, [row // group for row in range(16 * group)], shared=False)
    assert plain.tokens == 16 * group * 105


def test_decoder_sees_each_level_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.causal_lm("llama").base_model
    sizes: list[tuple[int, ...]] = []
    plain = prefix_tree.forward

    def spy(decoder, ids, *rest):
        sizes.append(tuple(ids.shape))
        return plain(decoder, ids, *rest)

    monkeypatch.setattr(prefix_tree, "forward", spy)
    prompts = [[*BASE * 5, 20 + row] for row in range(6)]
    run(decoder, build(prompts, [[31, 12]] * 12, [row // 2 for row in range(12)]))
    assert sizes == [(1, 40), (6, 1), (12, 1)]


def test_prompt_ends_and_lengths_without_answers() -> None:
    decoder = tiny.causal_lm("llama").base_model
    prompts = SHAPES["two clusters"][0]
    for shared in (True, False):
        tree = build(prompts, shared=shared)
        flat, state = run(decoder, tree)
        expected = torch.cat([tiny.alone(decoder, prompt, [0]) for prompt in prompts])
        tiny.close(flat[tree.ends], expected)
        assert tree.lengths == state.lengths.tolist() == [len(prompt) for prompt in prompts]


def test_common_and_pad() -> None:
    assert [common(BASE, x) for x in (OTHER, BASE[:3], [*BASE, 1], BASE)] == [0, 3, 8, 8]
    ids, mask = pad([[1, 2, 3], [4], []], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    ids, mask = pad([[1, 2, 3], [4]], left=True)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]

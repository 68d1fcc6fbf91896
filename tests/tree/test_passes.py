"""A pass over a tree equals the plain forward of one row at a time: states and every gradient."""

from __future__ import annotations

import pytest
import tiny
import torch

from ppo_nlu.model import lora
from ppo_nlu.model.path_check import choose_path
from ppo_nlu.tree import attention, passes, trim
from ppo_nlu.tree.pack import build
from ppo_nlu.tree.passes import cache_prefix, run
from tests.tree.shapes import BASE, SHAPES, assert_equal_to_rows, by_row, pull, through

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_tree_equals_one_row_at_a_time(kind: str, name: str, training: bool) -> None:
    decoder = tiny.causal_lm(kind).base_model.train(training)
    assert_equal_to_rows(decoder, list(decoder.parameters()), SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [*tiny.TREE_KINDS, "llama, as on a GPU"])
def test_answers_behind_a_prompt_pass_equal_one_row_at_a_time(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, unfused = kind.partition(",")
    if unfused:
        monkeypatch.setattr(attention, "FUSED_ON", "none")
    decoder = tiny.causal_lm(kind).base_model
    params = list(decoder.parameters())
    trim.trim(decoder)  # the last block runs the ends of the prompts alone
    prompts, answers, prompt_of = SHAPES[name]
    given = list(range(len(answers))) if prompt_of is None else prompt_of
    _, prompt_pass = run(decoder, build(prompts), keep=True)
    actual, mask, cost = passes.run_answers(decoder, prompt_pass, answers, given)
    assert mask.sum(1).tolist() == [len(answer) for answer in answers]
    assert cost.tokens_run == sum(len(answer) - 1 for answer in answers)
    whole = tiny.causal_lm(kind).base_model
    expected = by_row(whole, prompts, answers, prompt_of)
    tiny.close(actual, expected)
    pulled = pull(expected, list(whole.parameters()))
    for mine, theirs in zip(pull(actual, params), pulled, strict=True):
        tiny.close(mine, theirs)


@pytest.mark.parametrize("name", ["shared prefix", "several answers a prompt"])
@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_a_prefix_cache_is_run_once_for_many_passes(kind: str, name: str) -> None:
    """Its tokens are those that all prompts begin with; scores and decoding equal single rows."""
    policy = tiny.policy(kind)
    decoder = policy.decoder
    prompts, answers, prompt_of = SHAPES[name]
    prompt_of = list(range(len(answers))) if prompt_of is None else prompt_of
    found = cache_prefix(decoder, prompts)
    assert found is not None and found.tokens == BASE
    with torch.no_grad():
        for part in (slice(0, 2), slice(1, 3)):
            few = prompts[part]
            mine = [j for j, p in enumerate(prompt_of) if p in range(*part.indices(3))]
            tree = build(few, [answers[j] for j in mine], [prompt_of[j] - part.start for j in mine],
                         prefix_cache=found)  # fmt: skip
            assert tree.cost.tokens_run == sum(len(prompt) - 8 for prompt in few) + sum(
                len(answers[j]) - 1 for j in mine
            )
            expected = by_row(
                decoder, prompts, [answers[j] for j in mine], [prompt_of[j] for j in mine]
            )
            tiny.close(through(decoder, tree), expected)
        prompt_pass = run(decoder, build(prompts, prefix_cache=found), keep=True)[1]
        token = torch.tensor([31, 12, 13])
        places = torch.tensor([len(prompt) for prompt in prompts])
        for static in (False, True):
            hidden = prompt_pass.decode_cache([0, 1, 2], 1, static).step(decoder, token, places)
            for row, prompt in enumerate(prompts):
                expected = tiny.alone(decoder, prompt, [int(token[row]), 5])
                tiny.close(prompt_pass.ends[row], expected[0])
                tiny.close(hidden[row], expected[1])


@pytest.mark.parametrize("name", SHAPES)
def test_eager_attention_too(name: str) -> None:
    model = tiny.causal_lm("llama")
    model.set_attn_implementation("eager")
    assert_equal_to_rows(model.base_model, list(model.base_model.parameters()), SHAPES[name])


@pytest.mark.parametrize("model", ["stories260K", "tinystories-656k"])
def test_pretrained_models(model: str) -> None:
    policy = tiny.pretrained(model)
    tiny.shake(policy)
    assert policy.tree
    prefix = policy.encode(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )
    tails = [" outside in the park.", " with her red ball", " and to sing and to dance in the sun."]
    prompts = [prefix + policy.encode(tail)[1:] for tail in tails]
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
    prompts, answers, prompt_of = SHAPES["several answers a prompt"]
    long = [prompt * 4 for prompt in prompts]
    policy.tree = tree
    hidden, _ = policy.hidden(long, answers, prompt_of)
    tiny.close(hidden, by_row(policy.decoder, long, answers, prompt_of))


def test_the_decoder_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.causal_lm("llama").base_model
    sizes = tiny.sizes_of_passes(monkeypatch)
    prompts = [[*BASE * 5, 20 + row] for row in range(6)]
    run(decoder, build(prompts, [[31, 12]] * 12, [row // 2 for row in range(12)]))
    assert sizes == [40 + 6 + 12]


def test_prompt_ends_and_lengths_without_answers() -> None:
    decoder = tiny.causal_lm("llama").base_model
    prompts = SHAPES["two clusters"][0]
    for packed in (True, False):
        tree = build(prompts, packed=packed)
        flat, _ = run(decoder, tree)
        expected = torch.cat([tiny.alone(decoder, prompt, [0]) for prompt in prompts])
        tiny.close(flat[tree.ends], expected)
        assert tree.lengths == [len(prompt) for prompt in prompts]

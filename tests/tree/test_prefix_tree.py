"""The prefix tree equals the plain forward of one row at a time: states and every gradient."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from ppo_nlu.model import lora
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.path_check import choose_path
from ppo_nlu.tree import prefix_tree, tree_attention
from ppo_nlu.tree.prefix_tree import build, common, pad, run

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


@pytest.fixture(autouse=True)
def _every_prefix_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes are small: let even a few shared tokens be worth a run of their own."""
    monkeypatch.setattr(prefix_tree, "HEAD_COST", 0)


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
@pytest.mark.parametrize("kind", [*tiny.TREE_KINDS, "llama, as on a GPU"])
def test_answers_on_a_trunk_equal_one_row_at_a_time(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, _, unfused = kind.partition(",")
    if unfused:
        monkeypatch.setattr(tree_attention, "FUSED_ON", "none")
    decoder = tiny.causal_lm(kind).base_model
    params = list(decoder.parameters())
    tree_attention.trim(decoder)  # the trunk's last block runs the ends of the prompts alone
    prompts, answers, owners = SHAPES[name]
    given = list(range(len(answers))) if owners is None else owners
    _, trunk = run(decoder, build(prompts), keep=True)
    actual, mask, cost = prefix_tree.grow(decoder, trunk, answers, given)
    assert mask.sum(1).tolist() == [len(answer) for answer in answers]
    assert cost.tokens_run == sum(len(answer) - 1 for answer in answers)
    whole = tiny.causal_lm(kind).base_model
    expected = by_row(whole, prompts, answers, owners)
    tiny.close(actual, expected)
    pulled = pull(expected, list(whole.parameters()))
    for mine, theirs in zip(pull(actual, params), pulled, strict=True):
        tiny.close(mine, theirs)


@pytest.mark.parametrize("name", ["shared prefix", "several answers a prompt"])
@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_an_opening_is_run_once_for_many_passes(kind: str, name: str) -> None:
    """Its tokens are those that all prompts begin with; scores and decoding equal single rows."""
    policy = tiny.policy(kind)
    decoder = policy.decoder
    prompts, answers, owners = SHAPES[name]
    owners = list(range(len(answers))) if owners is None else owners
    opening = prefix_tree.opening_of(decoder, prompts)
    assert opening is not None and opening.tokens == BASE
    with torch.no_grad():
        for part in (slice(0, 2), slice(1, 3)):
            few = prompts[part]
            mine = [j for j, owner in enumerate(owners) if owner in range(*part.indices(3))]
            tree = build(few, [answers[j] for j in mine], [owners[j] - part.start for j in mine],
                         opening=opening)  # fmt: skip
            assert tree.cost.tokens_run == sum(len(prompt) - 8 for prompt in few) + sum(
                len(answers[j]) - 1 for j in mine
            )
            expected = by_row(
                decoder, prompts, [answers[j] for j in mine], [owners[j] for j in mine]
            )
            tiny.close(through(decoder, tree), expected)
        state = run(decoder, build(prompts, opening=opening), keep=True)[1]
        token = torch.tensor([31, 12, 13])
        places = torch.tensor([len(prompt) for prompt in prompts])
        for static in (False, True):
            hidden = state.start([0, 1, 2], 1, static).step(decoder, token, places)
            for row, prompt in enumerate(prompts):
                expected = tiny.alone(decoder, prompt, [int(token[row]), 5])
                tiny.close(state.ends[row], expected[0])
                tiny.close(hidden[row], expected[1])


def test_an_opening_that_does_not_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy("llama")
    opening = prefix_tree.opening_of(policy.decoder, [[*BASE, 20], [*BASE, 21]])
    assert opening is not None
    for prompts in ([[*BASE, 20], OTHER], [[*BASE, 20], BASE], [[*BASE[:7], 2, 20]]):
        tree, plain = build(prompts, opening=opening), build(prompts)
        assert torch.equal(tree.ids, plain.ids) and tree.plan.past is None  # type: ignore[union-attr]
    assert build([[*BASE, 20]], shared=False, opening=opening).plan is None
    assert prefix_tree.opening_of(policy.decoder, [BASE, BASE]).tokens == BASE[:-1]  # type: ignore[union-attr]
    monkeypatch.setattr(prefix_tree, "HEAD_COST", 16)
    assert prefix_tree.opening_of(policy.decoder, [[*BASE, 20], [*BASE, 21]]) is None
    policy.tree = False
    assert policy.opening([[*BASE * 3, 20], [*BASE * 3, 21]]) is None


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


def test_a_window_is_refused_by_the_tree() -> None:
    """Its attention is not plain; `choose_path` takes the other path."""
    decoder = tiny.causal_lm("mistral", sliding_window=4).base_model
    with torch.no_grad(), pytest.raises(NotImplementedError, match="plain attention"):
        through(decoder, build(*SHAPES["two clusters"]))


@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(kind: str) -> None:
    shape = SHAPES["several answers a prompt"]
    found, kept = [], []
    for checkpointed in (False, True):
        decoder = tiny.causal_lm(kind).base_model
        if checkpointed:
            tree_attention.checkpoint_blocks(decoder)
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


def test_the_attention_of_a_model_is_its_own_again() -> None:
    model = tiny.causal_lm("llama")
    run(model.base_model, build(*SHAPES["shared prefix"]))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        run(model.base_model, build([[tiny.VOCAB]]))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_nothing(name: str) -> None:
    decoder = tiny.causal_lm("llama").base_model
    tree = build(*SHAPES[name], shared=False)
    assert tree.seen is not None
    with torch.no_grad():
        before = through(decoder, tree)
        tree.ids = torch.where(tree.seen, tree.ids, 37)
        tiny.close(through(decoder, tree), before, 1e-6)


def test_hand_made_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 shared tokens; 2, 1 and 4 more per prompt; answers without their last: 2, 0 and 1. The
    longest run, the third prompt's, lies first."""
    tree = build(*SHAPES["shared prefix"])
    assert tree.ids.tolist() == [*BASE, 24, 26, 27, 28, 13, 20, 21, 31, 12, 23]
    assert tree.places.tolist() == [*range(8), 8, 9, 10, 11, 12, 8, 9, 10, 11, 8]
    assert tree.heads == [(0, 8)] and tree.parents == [0, 0, 0]
    assert tree.tails == [(13, 4), (17, 1), (8, 5)]
    # Causal pairs of 8, 4, 1 and 5 tokens, and 10 tokens that see the 8 shared ones.
    pairs = 36 + 10 + 1 + 15 + 10 * 8
    assert tree.cost == prefix_tree.Cost(18, (10 + 2) + (9 + 0) + (12 + 1), pairs, wanted=6)
    assert tree.ends.tolist() == [14, 17, 11]
    assert tree.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert tree.positions[tree.mask].tolist() == [14, 15, 16, 17, 11, 12]
    assert tree.lengths == [10, 9, 12]
    monkeypatch.setattr(prefix_tree, "HEAD_COST", 16)  # the 2 x 8 tokens saved are not worth it
    few = build(*SHAPES["shared prefix"])
    assert few.heads == [] and few.parents == [-1, -1, -1]


@pytest.mark.parametrize("group", [1, 4])
def test_distinct_tokens_run_once(group: int) -> None:
    """16 rows with 80 shared, 20 own and 6 answer tokens (the last of which predicts nothing)."""
    shared = [i % 40 + 3 for i in range(80)]
    prompts = [[*shared, 50 + row, *range(19)] for row in range(16)]
    answers = [[60 + row, 1, 2, 3, 4, 5] for row in range(16 * group)]
    tree = build(prompts, answers, [row // group for row in range(16 * group)])
    assert tree.cost.tokens_run == len(tree.ids) == 80 + 16 * 20 + 16 * group * 5
    assert tree.cost.tokens_full == 16 * group * 105
    plain = build(prompts, answers, [row // group for row in range(16 * group)], shared=False)
    full = 16 * group * 105
    assert plain.cost == prefix_tree.Cost(full, full, full * 106 // 2)


def test_the_decoder_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.causal_lm("llama").base_model
    sizes = tiny.sizes_of_passes(monkeypatch)
    prompts = [[*BASE * 5, 20 + row] for row in range(6)]
    run(decoder, build(prompts, [[31, 12]] * 12, [row // 2 for row in range(12)]))
    assert sizes == [40 + 6 + 12]


@pytest.mark.parametrize("name", SHAPES)
def test_the_products_of_a_gpu_are_those_of_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products on any device, the fused kernel on the CPU: output and gradients agree."""
    tree = build(*SHAPES[name])
    assert tree.plan is not None
    draw = torch.Generator().manual_seed(1)
    size = (len(tree.ids), 4, 8)
    q, k, v = (torch.randn(size, generator=draw, requires_grad=True) for _ in range(3))
    weights = torch.randn(size, generator=draw)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(tree_attention, "FUSED_ON", "cpu" if fused else "none")
        out = tree_attention._TreeAttention.apply(tree.plan, 0.3, q, k, v)
        found.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        tiny.close(a, b, 1e-6)


def test_prompt_ends_and_lengths_without_answers() -> None:
    decoder = tiny.causal_lm("llama").base_model
    prompts = SHAPES["two clusters"][0]
    for shared in (True, False):
        tree = build(prompts, shared=shared)
        flat, _ = run(decoder, tree)
        expected = torch.cat([tiny.alone(decoder, prompt, [0]) for prompt in prompts])
        tiny.close(flat[tree.ends], expected)
        assert tree.lengths == [len(prompt) for prompt in prompts]


def test_common_and_pad() -> None:
    assert [common(BASE, x) for x in (OTHER, BASE[:3], [*BASE, 1], BASE)] == [0, 3, 8, 8]
    ids, mask = pad([[1, 2, 3], [4], []], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    ids, mask = pad([[1, 2, 3], [4]], left=True)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_the_last_block_runs_the_wanted_tokens_alone(kind: str) -> None:
    """Of 18 tokens the 6 that predict an answer are wanted; states and gradients agree."""
    prompts, answers, owners = SHAPES["shared prefix"]
    model = tiny.causal_lm(kind)
    tree = build(prompts, answers, owners)
    expected = through(model.base_model, tree)
    gradients = pull(expected, list(model.base_model.parameters()))
    names = tree_attention.trim(model.base_model)
    assert any("mlp" in name for name in names) and len(names) >= 2
    sizes: list[int] = []
    block = tree_attention._blocks(model.base_model)[-1]
    inner = next(m for m in block.mlp.modules() if not list(m.children()) and list(m.parameters()))
    inner.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    actual = through(model.base_model, build(prompts, answers, owners))
    assert sizes == [6] and len(tree.ids) == 18
    tiny.close(actual, expected)
    for mine, theirs in zip(
        pull(actual, list(model.base_model.parameters())), gradients, strict=True
    ):
        tiny.close(mine, theirs)
    tree_attention.trim(model.base_model)  # a second policy around the same model
    tiny.close(through(model.base_model, build(prompts, answers, owners)), expected)
    assert tree_attention._running == [None]
    with tree_attention.whole():
        through(model.base_model, build(prompts, answers, owners))
    assert sizes == [6, 6, 18]


@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_bf16_sums_and_normalises_in_fp32(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further from the truth than softmax in float64 that is rounded to bf16 at its end, but for
    the weights, which a fused kernel may round: one bit more. Scores near 40, of which bf16 would
    keep steps of a quarter."""
    monkeypatch.setattr(tree_attention, "FUSED_ON", "cpu" if fused else "none")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 32).bfloat16() for _ in range(3))
    q, k = q * 4, k * 2
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    later = torch.ones(50, 50, dtype=torch.bool).triu_(1)
    scores = (wide[0] @ wide[1].transpose(-1, -2)).masked_fill(later, -torch.inf)
    exact = scores.softmax(-1) @ wide[2]
    out, lse = tree_attention.partial_attention(q, k, v, True, None, 1.0)
    assert lse.dtype == torch.float32
    assert float((lse - scores.detach().logsumexp(-1)).abs().max()) < 1e-4
    rounding = float((exact.bfloat16().double() - exact).detach().abs().max())
    assert float((out - exact).detach().abs().max()) <= 2 * rounding
    grad = torch.randn(out.shape).bfloat16()
    expected = torch.autograd.grad(exact, wide, grad.double())
    found = tree_attention._backward(grad, q, k, v, out, lse, True, None, 1.0)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pass_under_autocast(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward (inside and outside of the region) and decoding, as in bf16."""
    monkeypatch.setattr(tree_attention, "FUSED_ON", "cpu" if fused else "none")
    policy = tiny.policy(kind)
    prompts, answers, owners = SHAPES["several answers a prompt"]
    expected = policy.score(prompts, answers, owners).logprobs.detach()
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scored = policy.score(prompts, answers, owners)
            if inside:
                scored.logprobs.sum().backward()
        if not inside:
            scored.logprobs.sum().backward()
        assert float((scored.logprobs - expected).detach().abs().max()) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = generate(policy, prompts, 4, Sampling(greedy=True))
    assert drawn.logprobs.dtype == torch.float32

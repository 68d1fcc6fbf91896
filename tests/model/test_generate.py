"""Generation: greedy equals transformers token for token, samples follow the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from ppo_nlu.config import ModelConfig
from ppo_nlu.model import generate as generation
from ppo_nlu.model.generate import Sampling, generate, invert
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.value_head import ValueHead

KINDS = (*tiny.TREE_KINDS, "mpt", "mistral")


def policy_of(kind: str, **options: Any) -> Policy:
    if kind == "mistral":
        options["sliding_window"] = 8
    return tiny.policy(kind, **options)


def ragged(seed: int = 0, rows: int = 5, size: int = tiny.VOCAB) -> list[list[int]]:
    """Prompts of 3 to 30 tokens, three of them with a common prefix."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, size, (count,), generator=draw).tolist()

    prefix = ids(9)
    return [prefix + ids(2), ids(3), prefix + ids(11), ids(30), [*prefix, 4]][:rows]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy(most: int) -> Sampling:
    return Sampling(most, greedy=True)


def endless(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stops any more."""
    monkeypatch.setattr(policy.stop, "ended", lambda rows: [False] * len(rows))


def theirs(policy: Policy, prompt: Sequence[int], count: int) -> list[int]:
    """The continuation by transformers, of one row alone, eos not heeded."""
    ids = torch.tensor([prompt])
    out = policy.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(kind)
    policy.model.generation_config.eos_token_id = None
    endless(policy, monkeypatch)
    prompts = ragged()
    ours = generate(policy, prompts, greedy(20)).rows
    assert ours == [theirs(policy, prompt, 20) for prompt in prompts]
    assert len({tuple(row) for row in ours}) > 1


def test_greedy_equals_transformers_pretrained() -> None:
    policy = tiny.pretrained("stories260K")
    texts = ("Once upon a time", "Lily and Tom went to the park. They saw a big", "The cat")
    prompts = [policy.encode(text) for text in texts]
    ours = generate(policy, prompts, greedy(20)).rows
    assert ours == [theirs(policy, prompt, 20) for prompt in prompts]
    assert policy.decode(ours[0]).startswith(", there was a little girl named Lily")


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_values_are_those_of_the_scoring_pass(kind: str) -> None:
    policy = policy_of(kind)
    prompts, samples, temperature = ragged(1), 3, 0.7
    made = generate(
        policy, prompts, Sampling(6, samples, temperature), generator=seeded(), critic=True
    )
    prompt_of = [p for p in range(len(prompts)) for _ in range(samples)]
    with torch.no_grad():
        scored = policy.score(prompts, made.rows, prompt_of, temperature, values=True)
    assert torch.equal(scored.mask, made.mask)
    tiny.close(made.logprobs, scored.logprobs)
    assert made.values is not None and scored.values is not None and made.hidden is not None
    tiny.close(made.values, scored.values)
    tiny.close(made.hidden, scored.hidden)
    assert not made.logprobs[~made.mask].any() and not made.values[~made.mask].any()
    assert not made.tokens[~made.mask].any()
    assert len({tuple(row) for row in made.rows}) > 10, "samples differ"


def first_tokens(policy: Policy, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Frequencies of `samples` first tokens, and the softmax of the plain forward."""
    prompt = [5, 9, 3, 7]
    made = generate(policy, [prompt], sampling, generator=seeded(3))
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    frequency = torch.bincount(made.tokens[:, 0], minlength=len(logits)) / sampling.samples
    return frequency, torch.softmax(logits / sampling.temperature, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    """χ² over 12 words: 11 degrees of freedom, 31.3 at p = 0.001."""
    count = 5000
    frequency, probs = first_tokens(tiny.policy(few=True), Sampling(1, count, temperature))
    chi = (count * (frequency - probs).square() / probs).sum()
    assert float(chi) < 31.3
    spread = (probs * (1 - probs) / count).sqrt()
    assert bool(((frequency - probs).abs() < 4 * spread).all())
    assert float(probs.max()) > 0.12, "a distribution with something to tell"


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.6}], ids=["k", "p"])
def test_top_k_and_top_p_leave_out_the_rest(cut: dict[str, Any]) -> None:
    count = 5000
    sampling = Sampling(1, count, **cut)
    frequency, probs = first_tokens(tiny.policy(few=True), sampling)
    order = probs.argsort(descending=True).tolist()
    kept: list[int] = []
    for token in order:  # the smallest set of mass top_p, or the k most likely
        if len(kept) == (sampling.top_k or 12) or float(probs[kept].sum()) >= sampling.top_p:
            break
        kept.append(token)
    assert 1 < len(kept) < 8
    assert set(frequency.nonzero().squeeze(1).tolist()) == set(kept)
    expected = probs[kept] / probs[kept].sum()
    spread = (expected * (1 - expected) / count).sqrt()
    assert bool(((frequency[kept] - expected).abs() < 4 * spread).all())


def test_logprobs_are_before_top_k() -> None:
    policy = tiny.policy(few=True)
    made = generate(policy, [[5, 9]], Sampling(1, top_k=1))
    with torch.no_grad():
        scored = policy.score([[5, 9]], made.rows)
    tiny.close(made.logprobs, scored.logprobs)
    assert float(made.logprobs) < -0.1


def test_invert_by_hand() -> None:
    """Weights 1, 0, 3: draws below a quarter give 0, all others 2, none ever 1."""
    weights = torch.tensor([[1.0, 0.0, 3.0]]).expand(5, 3)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.6, 1 - 2**-53], dtype=torch.float64)
    assert invert(weights, draws).tolist() == [0, 0, 2, 2, 2]
    ends = torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3)
    assert invert(ends, draws).tolist() == [1] * 5


@pytest.mark.parametrize("vocab", [256, 300, 1000])
def test_invert_over_several_blocks(vocab: int) -> None:
    """Against numpy's running sum in double precision, some tokens without any weight."""
    draw = torch.Generator().manual_seed(vocab)
    weights = torch.rand(64, vocab, generator=draw) ** 8
    weights[:, ::3] = 0.0
    weights[:8, 128:256] = 0.0  # a whole block
    draws = torch.rand(64, generator=draw, dtype=torch.float64)
    draws[0], draws[1] = 0.0, 1 - 2**-53
    sums = np.cumsum(weights.double().numpy(), axis=1)
    aims = (draws.numpy() * sums[:, -1])[:, None]
    found = invert(weights, draws)
    assert bool((weights.gather(1, found[:, None]) > 0).all())
    # Both round: the token found is that of the sum, or borders on it within a part in 10⁶.
    above = np.take_along_axis(sums, found.numpy()[:, None], 1)
    below = above - np.take_along_axis(weights.double().numpy(), found.numpy()[:, None], 1)
    slack = 1e-6 * sums[:, -1:]
    assert bool(((aims <= above + slack) & (aims >= below - slack)).all())
    assert (found.numpy() == (sums <= aims).sum(1)).mean() > 0.95


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt", "mistral"])
@pytest.mark.parametrize("samples", [1, 4])
def test_rows_that_leave_change_nothing_for_the_others(
    kind: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run in which nothing ever stops, cut at each row's first stop, is the same run."""
    policy = policy_of(kind, few=True)
    prompts = ragged(2, size=12)
    with_stop = generate(policy, prompts, Sampling(10, samples), seeded(5), critic=True)
    ended = policy.stop.ended
    endless(policy, monkeypatch)
    whole = generate(policy, prompts, Sampling(10, samples), seeded(5), critic=True)
    lengths = []
    for row, full in zip(with_stop.rows, whole.rows, strict=True):
        stops = [t for t in range(10) if ended([full[: t + 1]])[0]]
        length = stops[0] + 1 if stops else 10
        assert row == full[:length]
        lengths.append(length)
    assert len(set(lengths)) > 2 and max(lengths) > min(lengths) + 3
    width = max(lengths)
    keep = torch.arange(width) < torch.tensor(lengths)[:, None]
    assert torch.equal(with_stop.mask, keep)
    assert with_stop.values is not None and whole.values is not None
    tiny.close(with_stop.logprobs, whole.logprobs[:, :width] * keep, 1e-6)
    tiny.close(with_stop.values, whole.values[:, :width] * keep, 1e-6)


def test_a_row_does_not_depend_on_the_batch() -> None:
    policy = tiny.policy()
    prompts = ragged(4)
    together = generate(policy, prompts, greedy(8)).rows
    assert together == [generate(policy, [prompt], greedy(8)).rows[0] for prompt in prompts]


def test_out_of_memory_behind_a_kept_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts' graph is let go, and the same answers are drawn without it."""
    policy = tiny.policy()
    endless(policy, monkeypatch)
    decode, prefill, kept = generation._decode, generation._prefill, []

    def spy(*args: Any):
        state, graph = prefill(*args)
        kept.append(graph)
        return state, graph

    def short_of_memory(*args: Any):
        if len(kept) == 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return decode(*args)

    monkeypatch.setattr(generation, "_prefill", spy)
    monkeypatch.setattr(generation, "_decode", short_of_memory)
    first = generate(policy, ragged(), Sampling(6, 2), seeded(), keep_graph=10_000)
    second = generate(policy, ragged(), Sampling(6, 2), seeded(), keep_graph=10_000)
    assert kept == [True, True, False]
    assert first.prompt_pass is not None and second.prompt_pass is None
    assert torch.equal(first.tokens, second.tokens)
    tiny.close(first.logprobs, second.logprobs, 1e-6)
    kept[:] = [False]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        generate(policy, ragged(), Sampling(6, 2), seeded())


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a quarter of the rows has ended, only those go on that have not."""
    policy = tiny.policy(few=True)
    sizes = tiny.sizes_of_passes(monkeypatch)
    made = generate(policy, ragged(2, size=12), Sampling(10, 4), seeded(5))
    lengths = made.mask.sum(1)
    expected, batch = [], len(lengths)
    for alive in (int((lengths > t).sum()) for t in range(1, 10)):
        if alive:
            batch = alive if alive <= 0.75 * batch else batch
            expected.append(batch)
    assert sizes[1:] == expected and len(set(expected)) > 2


def says(policy: Policy, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the policy say these words after any prompt (greedily), whatever it reads."""
    ids = policy.tokenizer.convert_tokens_to_ids(list(words))
    step = [-1]

    def logits(hidden: Tensor) -> Tensor:
        step[0] += 1
        table = torch.zeros(len(hidden), len(policy.tokenizer))
        table[:, ids[step[0]]] = 20.0
        return table

    monkeypatch.setattr(policy, "logits", logits)
    return ids


@pytest.mark.parametrize(
    ("words", "length"),
    [
        (["Positive", "</Judgement>", "film", "film"], 2),
        (["</Judgement>", "Positive", "film", "film"], 1),
        (["Positive", "</s>", "</Judgement>", "film"], 2),
        (["Positive", "<Judgement>", "film", "</Judgement>"], 4),
        (["Positive", "film", "film", "film", "</Judgement>"], 4),
    ],
)
def test_nothing_behind_the_stop(words, length, monkeypatch) -> None:
    """The prompt holds the closing tag too, which does not count; the limit cuts at 4."""
    policy = tiny.policy()
    prompt = policy.encode(tiny.render(tiny.SST2, {"sentence": "good"}))
    assert policy.tokenizer.convert_tokens_to_ids("</Judgement>") in prompt
    ids = says(policy, words, monkeypatch)
    made = generate(policy, [prompt], greedy(4))
    assert made.rows == [ids[:length]]
    assert made.mask.tolist() == [[True] * length]


def test_each_of_several_eos_ids_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.policy(few=True).model
    model.generation_config.eos_token_id = [7, 2]
    policy = tiny.policy(few=True)
    policy.stop = type(policy.stop)(model, policy.tokenizer)
    rows = generate(policy, [[5, 9]], Sampling(6, 200), seeded(1)).rows
    last = {row[-1] for row in rows if len(row) < 6}
    tag = policy.tokenizer.convert_tokens_to_ids("</Judgement>")
    assert last == {2, 7, tag}
    assert not any({2, 7, tag} & set(row[:-1]) for row in rows)


def test_length_limit_and_seed() -> None:
    policy = tiny.policy()
    one, two, other = (generate(policy, ragged(), Sampling(5, 2), seeded(s)) for s in (1, 1, 2))
    assert one.rows == two.rows and torch.equal(one.logprobs, two.logprobs)
    assert one.rows != other.rows
    assert one.tokens.shape == (10, 5) and all(1 <= len(row) <= 5 for row in one.rows)
    assert generate(policy, ragged(), greedy(1)).tokens.shape == (5, 1)


def test_in_bf16_the_answers_come_from_the_distribution_that_is_scored() -> None:
    """Log-probs of the decode pass are those of fp32 logits of its states, and the draw inverts
    their distribution function; rounded to bf16 the logits would be off by a hundredth."""
    model = tiny.causal_lm("llama", scale=0.6).to(torch.bfloat16).requires_grad_(False)
    policy = Policy(model, tiny.tokenizer(), ValueHead(32), ModelConfig())
    prompts = ragged(3)
    drawn = generate(policy, prompts, Sampling(5, 40), seeded())
    assert drawn.hidden is not None
    logits = drawn.hidden.double() @ model.lm_head.weight.double().t()
    tokens = drawn.tokens[drawn.mask]
    exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert float((drawn.logprobs[drawn.mask] - exact).abs().max()) < 1e-5
    rounded = (drawn.hidden @ model.lm_head.weight.t()).float().log_softmax(-1)
    assert float((rounded.gather(1, tokens[:, None])[:, 0] - exact).abs().max()) > 1e-2
    scored = policy.score(prompts, drawn.rows, [p for p in range(5) for _ in range(40)])
    first = (scored.logprobs - drawn.logprobs)[:, 0]  # the same state, run in one pass too
    assert float(first.abs().max()) < 0.2


def test_invert_on_the_border_of_two_blocks() -> None:
    """Weight 1 at token 3 and at token 130: a draw of one half aims at 1, the sum of the first
    block, where the second begins; what is below goes to the first."""
    weights = torch.zeros(3, 256)
    weights[:, [3, 130]] = 1.0
    draws = torch.tensor([0.5, 0.5 - 2**-53, 0.0], dtype=torch.float64)
    assert invert(weights, draws).tolist() == [130, 3, 3]


def test_invert_on_the_border_of_two_tokens_of_a_later_block() -> None:
    """Block 0 has 2, and tokens 200 and 201 have 1 each: three quarters aim at 3, where 201
    begins."""
    weights = torch.zeros(2, 256)
    weights[:, [5, 200, 201]] = torch.tensor([2.0, 1.0, 1.0])
    draws = torch.tensor([0.75, 0.75 - 2**-53], dtype=torch.float64)
    assert invert(weights, draws).tolist() == [201, 200]


def test_invert_never_leads_past_the_last_token_of_any_weight() -> None:
    """The largest draw there is aims just below the sum, and rounding puts it on the sum for many
    of these rows; the answer is the last token with any weight all the same."""
    weights = torch.zeros(64, 300)
    weights[:, :5] = torch.rand(64, 5, generator=seeded(1)).clamp_(min=0.1)
    weights[32:, 140:145] = weights[32:, :5]
    draws = torch.full((64,), 1 - 2**-53, dtype=torch.float64)
    assert invert(weights, draws).tolist() == [4] * 32 + [144] * 32

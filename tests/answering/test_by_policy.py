"""A policy answers: label scoring against a naive computation, order, seeds, early ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from ppo_nlu import data
from ppo_nlu.answering.answer import DECODES, Answer
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.answering.load_run import load_trained, run_config
from ppo_nlu.config import Config
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks import Example, get_task
from ppo_nlu.tasks.prompts import answer, render
from ppo_nlu.tree import prefixes

SPEC = get_task("sst2")


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> tuple[Config, Policy]:
    cfg = run_config(finished_run)
    answerer = load_trained(cfg, finished_run)
    assert isinstance(answerer, PolicyAnswerer)
    return cfg, answerer.policy


@pytest.fixture(scope="module")
def rows(loaded: tuple[Config, Policy]) -> list[Example]:
    """Sentences of very different lengths, so that sorting by length moves them."""
    found = data.load_split(SPEC, "dev", loaded[0].data).examples[:12]
    return [
        replace(row, fields={"sentence": row.fields["sentence"] * (1 + 3 * (i % 4))})
        for i, row in enumerate(found)
    ]


def answered(policy: Policy, cfg: Config, rows: list[Example], decode: str) -> list[Answer]:
    return list(PolicyAnswerer(policy, cfg).answer(SPEC, rows, decode))


def naive(policy: Policy, row: Example) -> list[float]:
    """Label probabilities by the plain Hugging Face model, one unpadded sequence at a time."""
    prompt = render(SPEC, row.fields)
    start = len(policy.tokenizer(prompt)["input_ids"])
    sums = []
    for word in SPEC.words:
        ids = policy.tokenizer(prompt + answer(word))["input_ids"]
        assert ids[:start] == policy.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        sums.append(sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))))
    return torch.tensor(sums).softmax(0).tolist()


@pytest.mark.parametrize("tree", [True, False])
def test_label_scores_equal_the_naive_computation(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    tree: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg, policy = loaded
    monkeypatch.setattr(policy, "tree", tree)
    found = answered(policy, cfg, rows, "score")
    for row, got in zip(rows, found, strict=True):
        wanted = naive(policy, row)
        assert got.probabilities is not None and list(got.probabilities) == list(SPEC.words)
        assert list(got.probabilities.values()) == pytest.approx(wanted, abs=1e-5)
        assert got.prediction == SPEC.words[wanted.index(max(wanted))]
    assert len({got.prediction for got in found}) == 2  # else the argmax has not been tested


@pytest.mark.parametrize("decode", DECODES)
def test_the_order_is_that_of_the_examples(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    decode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Across windows too (of 16 batches), and greedy and scored answers ignore the batching."""
    cfg, policy = loaded
    few = replace(cfg, eval=replace(cfg.eval, batch_size=2))
    many = (rows * 3)[:33]  # a window of 16 batches of 2, and one row
    found = answered(policy, few, many, decode)
    assert [got.example for got in found] == many
    if decode != "sample":
        alone = [answered(policy, few, [row], decode)[0].response for row in rows]
        assert [got.response for got in found[:12]] == alone


@pytest.mark.parametrize("decode", ["greedy", "score"])
def test_what_all_prompts_begin_with_is_run_once_a_window(
    loaded: tuple[Config, Policy],
    rows: list[Example],
    decode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokens of the first pass of each batch: without the shared prefix, which one pass has
    run. The scores are those of batches that run it themselves."""
    cfg, policy = loaded
    few = replace(cfg, eval=replace(cfg.eval, batch_size=4))
    sizes = tiny.sizes_of_passes(monkeypatch)
    found = answered(policy, few, rows, decode)
    prompts = [policy.encode(render(SPEC, row.fields)) for row in rows]
    length = min(prefixes.common(prompts[0], prompt) for prompt in prompts)
    longest = sorted(map(len, prompts), reverse=True)[:4]  # the first batch
    own = sum(longest) - 4 * length
    labels = 0 if decode == "greedy" else sizes[1] - own  # their tokens but the last
    assert length > 40 and sizes[0] == length and sizes[1] == own + labels
    assert 0 <= labels < 4 * 2 * 4
    monkeypatch.setattr(type(policy), "prefix_cache", lambda self, prompts: None)
    sizes.clear()
    again = answered(policy, few, rows, decode)
    assert sizes[0] > length and [got.response for got in again] == [got.response for got in found]
    for one, other in zip(found, again, strict=True):
        if one.probabilities is not None:
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_stop_ends_the_answers_early(loaded: tuple[Config, Policy], rows: list[Example]) -> None:
    cfg, policy = loaded
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 1

    assert list(PolicyAnswerer(policy, cfg).answer(SPEC, rows, "greedy", stop)) == []
    assert len(asked) == 2


def samples(policy: Policy, cfg: Config, rows: list[Example], seed: int) -> list[str]:
    found = answered(policy, replace(cfg, seed=seed), rows, "sample")
    return [got.response for got in found]


def test_samples_depend_on_the_seed_alone(
    loaded: tuple[Config, Policy], rows: list[Example]
) -> None:
    cfg, policy = loaded
    first = samples(policy, cfg, rows, 1)
    assert samples(policy, cfg, rows, 1) == first
    assert samples(policy, cfg, rows, 2) != first


def test_samples_come_as_often_as_their_probability_says(
    loaded: tuple[Config, Policy], rows: list[Example]
) -> None:
    """The rate of right samples is within four standard errors of what the model's own
    probabilities of the two whole answers give; other texts that parse to a word count apart."""
    cfg, policy = loaded
    few, seeds = rows[:4], 60
    right = total = 0
    for seed in range(seeds):
        for row, text in zip(few, samples(policy, cfg, few, seed), strict=True):
            exact = [word for word in SPEC.words if text == answer(word)]
            right += exact == [row.label]
            total += bool(exact)
    assert total > seeds  # enough whole answers to measure by
    # P(right | one of the two whole answers), weighted by how often that happens in each row.
    weights, expected = [], []
    for row in few:
        prompt = render(SPEC, row.fields)
        ids = [policy.encode(prompt + answer(word)) for word in SPEC.words]
        start = len(policy.encode(prompt))
        with torch.no_grad():
            scored = policy.score([ids[0][:start]], [i[start:] for i in ids], [0, 0])
        mass = scored.logprobs.sum(1).exp()
        weights.append(float(mass.sum()))
        assert row.label is not None
        expected.append(float(mass[SPEC.words.index(row.label)]))
    rate = sum(expected) / sum(weights)
    error = (rate * (1 - rate) / total) ** 0.5
    assert right / total == pytest.approx(rate, abs=4 * error + 0.01)
    assert total / (4 * seeds) == pytest.approx(sum(weights) / 4, abs=0.12)

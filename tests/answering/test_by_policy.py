"""A policy answers: label scoring against a naive computation, order, seeds, early ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ppo_nlu import data
from ppo_nlu.answering.answer import DECODES, Answer
from ppo_nlu.answering.by_policy import PolicyAnswerer, label_probabilities
from ppo_nlu.answering.load_run import load_trained, run_config
from ppo_nlu.config import Config, DataConfig, PromptConfig
from ppo_nlu.data import shots as shots_module
from ppo_nlu.methods.prompts import fit_prompt
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks import Example, TaskSpec, get_task
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


# ---- labels of different lengths (eval.label_scores)

LENGTHS = ("good", "very bad film", "a film that is not good and not bad")
UNEVEN = replace(
    SPEC, labels=tuple(replace(SPEC.labels[0], word=word, value=word) for word in LENGTHS)
)


def scoring(how: str, **changes: object) -> Config:
    cfg = Config(task="sst2", **changes)  # type: ignore[arg-type]
    return replace(cfg, eval=replace(cfg.eval, label_scores=how, batch_size=2))


@torch.no_grad()
def token_logprobs(made: Policy, spec: TaskSpec, prompt: str) -> list[list[float]]:
    """log π of each token of each label, one unpadded row at a time."""
    start, found = len(made.encode(prompt)), []
    for word in spec.words:
        ids = made.encode(prompt + answer(word))
        logprobs = made.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append([float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids))])
    return found


def by_hand(
    made: Policy, row: Example, how: str, shots: Sequence[Example] = (), spec: TaskSpec = UNEVEN
) -> list[float]:
    """The probabilities of the labels: with s the log-probs of a label's tokens, sum(s),
    sum(s) / len(s), or sum(s) - sum(s behind the prompt without text)."""
    nothing = dict.fromkeys(spec.fields, "")
    own = token_logprobs(made, spec, render(spec, row.fields, shots))
    bare = token_logprobs(made, spec, render(spec, nothing, shots))
    scores = {
        "sum": [sum(s) for s in own],
        "mean": [sum(s) / len(s) for s in own],
        "prior": [sum(s) - sum(without) for s, without in zip(own, bare, strict=True)],
    }[how]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def probabilities(found: Sequence[Answer]) -> list[list[float]]:
    return [list((row.probabilities or {}).values()) for row in found]


@pytest.mark.parametrize("how", ["sum", "mean", "prior"])
def test_labels_of_different_lengths_are_scored_as_asked(how: str) -> None:
    made, rows = tiny.policy(seed=3), tiny.examples(5)
    found = list(PolicyAnswerer(made, scoring(how)).answer(UNEVEN, rows, "score"))
    wanted = [by_hand(made, row, how) for row in rows]
    for got, ours, theirs in zip(found, probabilities(found), wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
        assert got.prediction == LENGTHS[theirs.index(max(theirs))]
    for other in {"sum", "mean", "prior"} - {how}:  # the three can be told apart
        far = [by_hand(made, row, other) for row in rows]
        assert max(abs(a[0] - b[0]) for a, b in zip(far, wanted, strict=True)) > 0.01


@pytest.mark.parametrize("how", ["mean", "prior"])
def test_a_rating_is_the_expectation_under_the_scores_that_are_asked_for(
    loaded: tuple[Config, Policy], how: str
) -> None:
    stsb, made = get_task("stsb"), loaded[1]
    texts = {"sentence1": "A good film.", "sentence2": "A bad film!"}
    row = Example("0", texts, "1.0", "stsb")

    def expectation(how: str) -> float:
        chances = by_hand(made, row, how, spec=stsb)
        return sum(float(word) * p for word, p in zip(stsb.words, chances, strict=True))

    (found,) = PolicyAnswerer(made, scoring(how)).answer(stsb, [row], "score")
    assert found.prediction is not None
    assert float(found.prediction) == pytest.approx(expectation(how), abs=2e-3)
    assert abs(expectation(how) - expectation("sum")) > 0.01


def test_by_default_a_label_scores_its_sum_to_the_last_bit() -> None:
    """As the engine always had it: one pass, the sum over all columns, the softmax."""
    made, rows = tiny.policy(seed=3), tiny.examples(4)
    prompts = [fit_prompt(made, UNEVEN, row, 200) for row in rows]
    replies = [made.encode(answer(word)) for word in LENGTHS] * len(rows)
    places = [number for number in range(len(rows)) for _ in LENGTHS]
    scored = made.score([prompt.ids for prompt in prompts], replies, places)
    wanted = scored.logprobs.detach().sum(1).view(len(rows), -1).softmax(-1)
    assert torch.equal(label_probabilities(made, UNEVEN, prompts), wanted)
    assert Config(task="sst2").eval.label_scores == "sum"


def test_the_prior_is_run_once_for_a_task_and_its_number_of_shots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six rows in batches of two, asked twice: six passes and one for each prior. A row that
    leaves no room for the second shot is compared with one shot and no text."""
    shots = [replace(row, id=f"shot-{row.id}") for row in tiny.examples(5)[2:5]]
    monkeypatch.setattr(shots_module, "_drawn", lambda spec, cfg: tuple(shots))
    made = tiny.policy(seed=3)
    rows = [Example(str(i), {"sentence": "bad " * (3 + 9 * (i % 2))}, None) for i in range(6)]
    longest = len(made.encode(render(UNEVEN, rows[1].fields, shots[:2]))) - 1
    cfg = scoring("prior", prompt=PromptConfig(shots=2), data=DataConfig(max_prompt_tokens=longest))
    passes: list[int] = []
    score = made.score

    def counted(prompts: Sequence[Sequence[int]], *more: Any, **options: Any) -> Any:
        passes.append(len(prompts))
        return score(prompts, *more, **options)

    monkeypatch.setattr(made, "score", counted)
    answerer = PolicyAnswerer(made, cfg)
    found = [list(answerer.answer(UNEVEN, rows, "score")) for _ in range(2)]
    assert sorted(passes) == [1] * 2 + [2] * 6
    assert [row.dropped for row in found[0]] == [0, 1] * 3
    assert probabilities(found[0]) == probabilities(found[1])
    for row, got, dropped in zip(rows, probabilities(found[0]), [0, 1] * 3, strict=True):
        assert got == pytest.approx(by_hand(made, row, "prior", shots[: 2 - dropped]), abs=2e-5)

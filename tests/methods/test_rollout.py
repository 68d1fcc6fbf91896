"""Answers that are sampled, parsed and scored, and their KL to the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ppo_nlu.config import Config, DataConfig, PPOConfig, RewardConfig, RolloutConfig
from ppo_nlu.losses import kl_penalty
from ppo_nlu.methods import sampler
from ppo_nlu.methods.rollout import Rollout, seeded
from ppo_nlu.methods.sampler import Sampler, score_rows
from ppo_nlu.model.lora import lora_disabled, lora_parameters
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks.prompts import render


def config(estimator: str = "k1", temperature: float = 1.0, **changes) -> Config:
    rollout = RolloutConfig(4, 3, 5, temperature)
    return Config(task="sst2", rollout=rollout, ppo=PPOConfig(kl_estimator=estimator), **changes)


def collected(policy: Policy, cfg: Config, step: int = 0) -> Rollout:
    estimator: Any = cfg.ppo.kl_estimator
    return steps_1_to_3(Sampler(policy, tiny.SPECS, cfg, estimator=estimator), step=step)


def steps_1_to_3(made: Sampler, label: str | None = None, step: int = 0) -> Rollout:
    rows = tiny.examples(4, label) if label else tiny.examples(4)
    rollout = made.sample(rows, step)
    made.score(rollout)
    made.kl(rollout)
    return rollout


def there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


# ---- answers --------------------------------------------------------------------------------


def length(policy: Policy, sentence: str) -> int:
    return len(policy.encode(render(tiny.SST2, {"sentence": sentence})))


def test_cut_prompts_are_counted() -> None:
    policy = tiny.policy(shaken=False)
    limit = length(policy, "a good film")
    rollout = collected(policy, config(data=DataConfig(max_prompt_tokens=limit)))
    longer = [e for e in tiny.examples(4) if length(policy, e.fields["sentence"]) > limit]
    assert rollout.truncated == len(longer) == 2
    assert max(map(len, rollout.prompts)) <= limit
    assert collected(policy, config()).truncated == 0


def test_a_rollout_says_what_was_known_when_the_answers_were_given() -> None:
    policy = tiny.policy()
    cfg = config(temperature=0.8)
    rollout = collected(policy, cfg)
    assert rollout.size == 12 and rollout.prompt_of == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [e.id for e in rollout.examples] == [str(p) for p in rollout.prompt_of]
    assert rollout.responses == [policy.decode(answer) for answer in rollout.answers]
    assert rollout.mask.sum(1).tolist() == [len(answer) for answer in rollout.answers]
    with torch.no_grad():
        again = policy.score(rollout.prompts, rollout.answers, rollout.prompt_of, 0.8, values=True)
    assert again.values is not None
    tiny.close(rollout.logprobs, again.logprobs)
    tiny.close(there(rollout.values), again.values)
    same = collected(policy, cfg)
    assert rollout.answers == same.answers and torch.equal(rollout.logprobs, same.logprobs)
    assert rollout.answers != collected(policy, cfg, step=1).answers


@pytest.mark.parametrize(
    ("scale", "expected"), [("paper", [1.0, 0.0, -1.0, -1.0]), ("code", [1.0, -1.0, -3.0, -3.0])]
)
def test_scores(scale, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, wrong, cut before the tag, ended by eos without the tag."""
    policy = tiny.policy()
    said = ("Positive </Judgement>", "Negative </Judgement>", "Positive film good bad", "good </s>")
    answers = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in said]
    tiny.force(monkeypatch, policy, answers)
    cfg = config(reward=RewardConfig(scale))
    made = Sampler(policy, tiny.SPECS, replace(cfg, rollout=RolloutConfig(4, 1, 4)))
    rollout = steps_1_to_3(made, "Positive")
    assert rollout.predictions == ["Positive", "Negative", None, None]
    assert rollout.scores.tolist() == expected and rollout.scores.dtype == torch.float32
    assert rollout.mask.sum(1).tolist() == [2, 2, 4, 2], "eos counts, though it is the pad too"


def test_rows_takes_each_prompt_once() -> None:
    """Prompts come in the order of their answers, so that one answer a prompt needs no level."""
    rollout = collected(tiny.policy(), config())
    prompts, answers, prompt_of = rollout.rows([7, 2, 6, 11])
    assert prompts == [rollout.prompts[p] for p in (2, 0, 3)]
    assert answers == [rollout.answers[j] for j in (7, 2, 6, 11)]
    assert prompt_of == [0, 1, 0, 2]


def test_seeded_depends_on_every_part() -> None:
    parts = [("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("a", 0, 2), ("a", 0)]
    draws = [float(torch.rand(1, generator=seeded(*p))) for p in [*parts, ("a", 0, 1)]]
    assert len(set(draws)) == len(parts) and draws[0] == draws[-1]


def test_equal_answers_to_one_prompt_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of eight rows are distinct; results and gradients are those of all eight."""
    policy = tiny.policy()
    said = ["Positive </Judgement>", "bad </s>", "good film Positive", "bad </s>"] * 3
    answers = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in said]
    tiny.force(monkeypatch, policy, answers)
    rollout = collected(policy, config())
    index = [0, 2, 1, 3, 4, 5, 3, 0]  # prompts 0 0 0 1 1 1 1 0
    whole = policy.score(*rollout.rows(index), 0.8, values=True, entropy_grad=True)
    plain, run = policy.score, []

    def spy(prompts, answers, *rest, **named):
        run.append(len(answers))
        return plain(prompts, answers, *rest, **named)

    monkeypatch.setattr(policy, "score", spy)
    found = score_rows(policy, rollout, index, 0.8, values=True, entropy_grad=True)
    assert run == [5]
    assert torch.equal(found.mask, whole.mask)
    weight = torch.randn(whole.mask.shape, generator=seeded("weight"))
    sums = []
    for scored in (found, whole):
        assert scored.values is not None
        parts = scored.logprobs + 0.1 * scored.entropy + scored.values
        sums.append(torch.autograd.grad((parts * weight).sum(), lora_parameters(policy.model)))
    for name in ("logprobs", "entropy", "values", "hidden"):
        tiny.close(getattr(found, name), getattr(whole, name))
    for one, other in zip(*sums, strict=True):
        tiny.close(one, other)


# ---- old log-probs --------------------------------------------------------------------------


def shifted(patch: pytest.MonkeyPatch, by: float) -> None:
    """Makes the decode pass say log-probs that are `by` too low at one token."""
    plain = sampler.generate

    def generate(*arguments, **options):
        drawn = plain(*arguments, **options)
        drawn.logprobs[2, 0] -= by
        return drawn

    patch.setattr(sampler, "generate", generate)


@pytest.mark.parametrize(
    ("mode", "given", "by", "reused"),
    [
        ("auto", None, 0.0, True),
        ("auto", None, 2e-4, False),
        ("auto", True, 2e-4, True),  # settled before
        ("auto", False, 0.0, False),
        ("always", None, 2e-4, True),
        ("never", None, 0.0, False),
    ],
)
def test_old_logprobs_come_from_the_decode_pass_where_it_is_exact(
    mode: str, given: bool | None, by: float, reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, cfg = tiny.policy(), config()
    cfg = replace(cfg, rollout=replace(cfg.rollout, reuse_logprobs=mode))
    shifted(monkeypatch, by)
    plain, passes = policy.score, []

    def spy(*arguments, **options):
        passes.append(1)
        return plain(*arguments, **options)

    monkeypatch.setattr(policy, "score", spy)
    made = Sampler(policy, tiny.SPECS, cfg)
    made.reuse = made.reuse if given is None else given
    rollout = made.sample(tiny.examples(4), 0)
    compared = mode == "auto" and given is None
    assert len(passes) == (1 if compared or not reused else 0)
    assert rollout.reused is reused and (rollout.gap is None) is (not passes)
    with torch.no_grad():
        right = plain(rollout.prompts, rollout.answers, rollout.prompt_of, values=True)
    gap = float((rollout.logprobs - right.logprobs).abs().max())
    assert gap == pytest.approx(by if reused else 0, abs=2e-5)
    tiny.close(there(rollout.values), there(right.values))
    assert made.reuse is reused, "settled for the steps to come"
    assert len(rollout.messages) == compared, "told once"
    for told in rollout.messages:
        assert ("from the decode pass" in told) is reused and f"{rollout.gap:.1e}" in told


def test_nothing_is_asked_of_the_reference_without_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "lora_disabled", lambda model: pytest.fail("asked"))
    policy, cfg = tiny.policy(), config()
    found = steps_1_to_3(Sampler(policy, tiny.SPECS, cfg, critic=False))
    assert found.kl is None and found.ref_logprobs is None and found.values is None


# ---- KL to the reference --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_kl_is_zero_before_any_update(estimator: str) -> None:
    rollout = collected(tiny.policy(shaken=False), config(estimator))
    assert float(there(rollout.kl).abs().max()) < (1e-4 if estimator == "k1" else 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt"])
def test_exact_kl_equals_the_sum_over_the_vocabulary(kind: str) -> None:
    policy, temperature = tiny.policy(kind), 0.8
    rollout = collected(policy, config("exact", temperature))
    assert bool((there(rollout.kl) >= 0).all()) and float(there(rollout.kl).max()) > 1e-3
    assert not there(rollout.kl)[~rollout.mask].any()
    for j, answer in enumerate(rollout.answers):
        ids = torch.tensor([[*rollout.prompts[rollout.prompt_of[j]], *answer[:-1]]])
        with torch.no_grad():
            now = policy.model(input_ids=ids, use_cache=False).logits[0, -len(answer) :]
            with lora_disabled(policy.model):
                then = policy.model(input_ids=ids, use_cache=False).logits[0, -len(answer) :]
        for t in range(len(answer)):
            p = torch.softmax(now[t].double() / temperature, -1)
            q = torch.softmax(then[t].double() / temperature, -1)
            brute = sum(float(p[v] * (p[v] / q[v]).log()) for v in range(len(p)))
            assert abs(float(there(rollout.kl)[j, t]) - brute) < 1e-5


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_sampled_kl_is_against_lora_off_at_the_sampling_temperature(estimator: str) -> None:
    policy = tiny.policy()
    rollout = collected(policy, config(estimator, 0.8))
    with torch.no_grad(), lora_disabled(policy.model):
        then = policy.score(rollout.prompts, rollout.answers, rollout.prompt_of, 0.8).logprobs
    tiny.close(there(rollout.kl), kl_penalty(rollout.logprobs, then, estimator))  # type: ignore[arg-type]
    assert float(there(rollout.kl).abs().max()) > 1e-3


def test_in_low_precision_old_logprobs_are_those_of_the_training_pass() -> None:
    policy = tiny.policy()
    policy.model.to(torch.bfloat16)
    rollout = collected(policy, config("exact"))
    with torch.no_grad():
        again = policy.score(rollout.prompts, rollout.answers, rollout.prompt_of, values=True)
    assert again.values is not None
    assert torch.equal(rollout.logprobs, again.logprobs)
    assert torch.equal(there(rollout.values), again.values)
    assert there(rollout.kl).dtype == there(rollout.values).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_answers_are_drawn_at_the_temperature_that_they_are_scored_at(temperature: float) -> None:
    """The decode pass agrees with a training pass at `rollout.temperature`, so it is taken."""
    found = collected(tiny.policy(), config(temperature=temperature))
    assert found.reused and found.gap is not None and found.gap < 1e-4

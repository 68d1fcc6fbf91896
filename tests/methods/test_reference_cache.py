"""The kept log-probs of the reference: right, asked for once, bounded, and the same on a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ppo_nlu.config import (
    Config,
    GRPOConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RolloutConfig,
)
from ppo_nlu.methods.grpo import GRPO
from ppo_nlu.methods.ppo import PPO
from ppo_nlu.methods.reference_cache import ReferenceCache
from ppo_nlu.methods.registry import METHODS
from ppo_nlu.model.lora import lora_disabled
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import optimizer_state

PROMPTS = [[5, 6, 7], [5, 6], [5, 6, 7, 8]]
ANSWERS = [[3, 4], [3], [3, 4], [9, 9, 4], [3], [3, 4]]
PROMPT_OF = [0, 0, 0, 1, 1, 2]


def spied(policy: Policy, patch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each pass runs, from now on."""
    plain, run = policy.score, list[int]()

    def score(prompts, answers, *rest, **named):
        run.append(len(answers))
        return plain(prompts, answers, *rest, **named)

    patch.setattr(policy, "score", score)
    return run


def expected(policy: Policy, temperature: float = 1.0) -> Tensor:
    with torch.no_grad(), lora_disabled(policy.model):
        return policy.score(PROMPTS, ANSWERS, PROMPT_OF, temperature).logprobs


def test_only_what_is_new_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six rows five are distinct; the second time one row is new, the third time none is."""
    policy, cache = tiny.policy(), ReferenceCache()
    wanted = expected(policy, 0.8)
    run = spied(policy, monkeypatch)
    first = cache.logprobs(policy, PROMPTS, ANSWERS, PROMPT_OF, 0.8)
    tiny.close(first, wanted)
    assert run == [5] and (cache.hits, cache.misses) == (1, 5)
    tiny.shake(policy, 7)  # the policy moves, its reference does not
    again = cache.logprobs(policy, PROMPTS, [*ANSWERS, [4]], [*PROMPT_OF, 2], 0.8)
    assert torch.equal(again[:6], first) and run == [5, 1]
    with torch.no_grad(), lora_disabled(policy.model):
        tiny.close(again[6:, :1], policy.score([PROMPTS[2]], [[4]], None, 0.8).logprobs)
    run.clear()
    back = cache.logprobs(policy, PROMPTS[::-1], [[3], [3, 4]], [1, 2], 0.8)
    assert torch.equal(back, torch.stack([again[4, :2], again[0, :2]])) and not run
    assert back[0, 1] == 0


def test_prompt_and_answer_are_told_apart() -> None:
    """[1, 2] + [3] is not [1] + [2, 3], and no answer is another's beginning."""
    policy, cache = tiny.policy(), ReferenceCache()
    pairs = [([1, 2], [3]), ([1], [2, 3]), ([1], [2]), ([1, 2, 3], [3]), ([1], [23])]
    for prompt, answer in pairs:
        cache.logprobs(policy, [prompt], [answer], [0], 1.0)
    assert cache.hits == 0 and cache.misses == len(pairs) == len(cache.kept)


def test_the_oldest_are_given_up() -> None:
    policy, cache = tiny.policy(), ReferenceCache(limit=3)
    for token in (3, 4, 5, 6):
        cache.logprobs(policy, [[1, 2]], [[token]], [0], 1.0)
    assert len(cache.kept) == 3
    wanted = expected(policy)
    more = cache.logprobs(policy, PROMPTS, ANSWERS, PROMPT_OF, 1.0)  # than it holds
    tiny.close(more, wanted)
    assert len(cache.kept) == 3
    cache.hits = 0
    cache.logprobs(policy, PROMPTS, ANSWERS[3:], PROMPT_OF[3:], 1.0)
    assert cache.hits == 3, "the newest three are there"


def test_the_state_comes_back_to_the_last_bit() -> None:
    policy, cache = tiny.policy(), ReferenceCache(limit=5)
    first = cache.logprobs(policy, PROMPTS, ANSWERS, PROMPT_OF, 1.0)
    other = ReferenceCache(limit=5)
    other.set_state(json.loads(json.dumps(cache.state())))
    assert list(other.kept.items()) == list(cache.kept.items()) and len(other.kept) == 5
    assert torch.equal(other.logprobs(policy, PROMPTS, ANSWERS, PROMPT_OF, 1.0), first)
    assert other.misses == 0
    other.set_state(ReferenceCache().state())
    assert other.kept == {}


# ---- in training ----------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.causal_lm("llama", len(tiny.tokenizer(few=True)), scale=0.3).save_pretrained(tmp_path)
    tiny.tokenizer(few=True).save_pretrained(tmp_path)
    return tmp_path


def config(model: Path, method: str, **rollout: Any) -> Config:
    return Config(
        task="sst2",
        method=method,
        model=ModelConfig(name_or_path=str(model), device="cpu"),
        lora=LoraConfig(r=4, alpha=8.0),
        rollout=RolloutConfig(4, 4, 2, **rollout),
        ppo=PPOConfig(minibatch_size=8, epochs=2, kl_coef=0.1),
        grpo=GRPOConfig(kl_coef=0.1, drop_even=False),
        optim=OptimConfig(name="adamw", lr=1e-2),
    )


def trained(cfg: Config, steps: int, cut: int | None = None, keep: bool = True) -> PPO | GRPO:
    """A method after some steps on the same rows. After `cut` steps it is stopped and resumed as
    from a checkpoint; with `keep=False` the reference's values are forgotten there."""

    def fresh() -> PPO | GRPO:
        method = METHODS[cfg.method](cfg, tiny.SPECS)
        assert isinstance(method, PPO | GRPO)
        return method

    method = fresh()
    for step in range(steps):
        if step == cut:
            state = json.loads(json.dumps(method.state()))
            groups = {k: {n: t.clone() for n, t in g.items()} for k, g in method.weights().items()}
            tensors, rest = optimizer_state.flatten_optimizer(method.optimizer)
            method = fresh()
            method.restore(groups, "here")
            method.set_state(state)
            optimizer_state.restore_optimizer(method.optimizer, tensors, rest)
            if not keep:
                method.sampler.reference = ReferenceCache()
        method.update(method.collect(tiny.examples(4), step), step)
    return method


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_run_goes_on_to_the_last_bit(model: Path, method: str) -> None:
    cfg = config(model, method)
    whole, cut = trained(cfg, 6), trained(cfg, 6, 3)
    assert whole.sampler.reference is not None and cut.sampler.reference is not None
    assert whole.sampler.reference.hits > 20 and whole.sampler.reference.misses > 20
    assert list(whole.sampler.reference.kept.items()) == list(cut.sampler.reference.kept.items())
    assert cut.sampler.reference.misses < whole.sampler.reference.misses, (
        "what was seen is not asked again"
    )
    for group, tensors in whole.weights().items():
        assert all(torch.equal(t, cut.weights()[group][n]) for n, t in tensors.items())
    assert cut.sampler.reuse is whole.sampler.reuse is True


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_cache_changes_no_more_than_rounding(model: Path, method: str) -> None:
    kept = trained(config(model, method), 2)
    without = trained(config(model, method, reference_cache=False), 2)
    assert (
        without.sampler.reference is None
        and kept.sampler.reference is not None
        and kept.sampler.reference.hits
    )
    for group, tensors in kept.weights().items():
        for name, tensor in tensors.items():
            tiny.close(tensor, without.weights()[group][name], 1e-3)


def test_exact_kl_is_measured_anew(model: Path) -> None:
    cfg = config(model, "ppo")
    method = trained(replace(cfg, ppo=replace(cfg.ppo, kl_estimator="exact")), 2)
    assert method.sampler.reference is not None and not method.sampler.reference.kept

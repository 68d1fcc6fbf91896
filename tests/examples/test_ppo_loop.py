"""The example that stands beside the library: its length, its numbers, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_nlu.data.bundled import splits
from ppo_nlu.examples import ppo_loop
from ppo_nlu.tasks import get_task
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import STOP
from ppo_nlu.tasks.rewards import score

SST2 = get_task("sst2")
LABELS = dict(splits()["train"])  # of the sentences
TEMPERATURE = 0.7  # not 1, so that a place where it is forgotten shows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Few short answers a step, from a fixed seed."""
    torch.manual_seed(0)
    settings = {"B": 8, "R": 4, "MINIBATCH": 4, "EPOCHS": 1, "TEMPERATURE": TEMPERATURE}
    sampling = {"temperature": TEMPERATURE, "max_new_tokens": 4}
    for name, value in settings.items():
        monkeypatch.setattr(ppo_loop, name, value)
    monkeypatch.setattr(ppo_loop, "SAMPLING", {**ppo_loop.SAMPLING, **sampling})
    return monkeypatch


def spied(patch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """What a function of the example is given, call by call, its result at the end."""
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = getattr(ppo_loop, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append((*args, result))
        return result

    patch.setattr(ppo_loop, name, call)
    return calls


def test_it_is_at_most_80_lines_long() -> None:
    assert len(Path(ppo_loop.__file__).read_text("utf-8").splitlines()) <= 80


def test_its_reviews_are_those_of_the_stand_in_for_sst2() -> None:
    rows = splits()["train"][:1000]
    lines = ["sentence\tlabel", *(f"{text} \t{label}" for text, label in rows)]
    text = (ppo_loop.ASSETS / "examples" / "reviews.tsv").read_text("utf-8")
    assert text == "".join(f"{line}\n" for line in lines)


def test_every_ratio_of_the_first_minibatch_is_1(small: pytest.MonkeyPatch) -> None:
    calls = spied(small, "policy_loss")
    list(ppo_loop.ppo(steps=2))
    assert len(calls) == 4
    for logprobs, old_logprobs, _, mask, _ in (calls[0], calls[2]):  # the first of each step
        assert ((logprobs - old_logprobs).exp() - 1)[mask].abs().max() < 1e-4
    logprobs, old_logprobs, _, mask, _ = calls[1]
    assert ((logprobs - old_logprobs).exp() - 1)[mask].abs().max() > 1e-3  # the weights have moved


def test_the_numbers_are_those_of_plain_transformers(small: pytest.MonkeyPatch) -> None:
    """Row by row without padding: the log-prob of each token at the sampling temperature, the mask
    and the score from the text, which the package's own parser reads. In the second step the
    reference alone is the plain model."""
    measured, shaped = spied(small, "measure"), spied(small, "shaped_rewards")
    rewards = list(ppo_loop.ppo(steps=2))
    model = AutoModelForCausalLM.from_pretrained(ppo_loop.ASSETS / "tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(ppo_loop.ASSETS / "tiny")
    collected = [args for args in measured if not args[-1][0].requires_grad]
    for step, (scores, old, reference, mask, _, _) in enumerate(shaped):
        _, tokens, attention, _ = collected[2 * step]
        plain = torch.stack([_logprobs(model, *row) for row in zip(tokens, attention, strict=True)])
        torch.testing.assert_close(reference, plain, atol=1e-4, rtol=0)
        assert torch.allclose(old, plain, atol=1e-4) == (step == 0)
        assert rewards[step] == pytest.approx(scores.mean().item())
        for row, counts, earned in zip(tokens, mask.tolist(), scores.tolist(), strict=True):
            assert counts == sorted(counts, reverse=True)
            answer = tokenizer.decode(row[-4:][: sum(counts)])
            stops = answer.count(STOP)
            assert (stops == 1 and answer.endswith(STOP)) or (stops == 0 and all(counts))
            sentence = tokenizer.decode(row[:-4]).partition('the sentence "')[2].partition('".')[0]
            assert earned == score(parse(SST2, answer), SST2.word_of(LABELS[sentence]) or "")


def _logprobs(model: Any, tokens: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """log π of a row's last four tokens."""
    row = tokens[attention.bool()]
    with torch.no_grad():
        logits = model(row[None]).logits[0, -5:-1]
    return torch.log_softmax(logits / TEMPERATURE, -1).gather(1, row[-4:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_it_learns_what_is_rewarded(small: pytest.MonkeyPatch, tmp_path: Path, sign: int) -> None:
    """Every label is the same: the reward goes up. With the sign of the advantages turned it goes
    down, so this test would see it."""
    text = (ppo_loop.ASSETS / "examples" / "reviews.tsv").read_text("utf-8")
    head, *lines = text.splitlines()
    favourable = tmp_path / "favourable.tsv"
    favourable.write_text("\n".join([head, *(f"{line[:-1]}1" for line in lines)]), "utf-8")
    real = ppo_loop.policy_loss
    small.setattr(ppo_loop, "policy_loss", lambda p, old, a, m: real(p, old, sign * a, m))
    for name, value in {"B": 16, "MINIBATCH": 8, "EPOCHS": 2, "LR": 3e-4}.items():
        small.setattr(ppo_loop, name, value)
    rewards = list(ppo_loop.ppo(tsv=favourable, steps=8))
    assert (rewards[-1] > rewards[0] + 0.3) if sign == 1 else (rewards[-1] < rewards[0] - 0.3)


@pytest.mark.slow
def test_it_learns_to_judge_the_bundled_reviews() -> None:
    """As it stands in its file. A coin earns 0.5, and the bundled model begins near that; the mean
    of ten steps has a sampling error of 0.03."""
    torch.manual_seed(0)
    rewards: list[float] = []
    for reward in ppo_loop.ppo():
        rewards.append(reward)
        if len(rewards) >= 10 and sum(rewards[-10:]) / 10 > 0.7:
            break
    assert sum(rewards[:5]) / 5 < 0.65
    assert sum(rewards[-10:]) / 10 > 0.7

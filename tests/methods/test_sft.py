"""Supervised fine-tuning: which tokens are learnt, that micro-batches change nothing, and that SFT
and PPO share prompts, label words and parser."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import tiny
import torch

from ppo_nlu.config import Config, LoraConfig, PromptConfig, RolloutConfig, SFTConfig
from ppo_nlu.methods import sft
from ppo_nlu.model import lora
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.tasks import TASKS, Example
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.prompts import OPENING, render

CFG = Config(task="sst2", method="sft", rollout=RolloutConfig(4, 1, 4))


def optimizer_of(policy, lr: float = 0.0):
    return torch.optim.SGD(lora.lora_parameters(policy.model), lr=lr)


def made(policy, cfg: Config = CFG) -> sft.SFT:
    return sft.SFT(cfg, tiny.SPECS, policy)


def learn(method: sft.SFT, rows: list[Example], step: int = 0) -> sft.Report:
    return method.update(method.collect(rows, step), step)


def gradients(policy, cfg: Config, rows: list[Example]) -> tuple[dict, list[torch.Tensor]]:
    """The step's metrics and gradients; the weights stay."""
    method = made(policy, replace(cfg, optim=replace(cfg.optim, max_grad_norm=0.0)))
    kept = tiny.keep_gradients(method)
    return learn(method, rows).metrics, kept


@pytest.mark.parametrize("span", ["completion", "all"])
def test_the_loss_is_that_of_one_row_at_a_time(span: str) -> None:
    """Against the Hugging Face forward of each whole text and cross_entropy on its own tokens."""
    policy, rows = tiny.policy(), tiny.examples(5)
    cfg = replace(CFG, sft=SFTConfig(5, 0, span))
    metrics, found = gradients(policy, cfg, rows)
    policy.model.zero_grad()
    total, count = torch.zeros(()), 0
    for row in rows:
        prompt = policy.encode(render(tiny.SST2, row.fields))
        whole = policy.encode(render(tiny.SST2, row.fields) + f" {row.label} </Judgement>")
        assert whole[: len(prompt)] == prompt
        start = len(prompt) if span == "completion" else 1
        logits = policy.model(input_ids=torch.tensor([whole])).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], torch.tensor(whole[start:]), reduction="sum"
        )
        count += len(whole) - start
    (total / count).backward()
    assert metrics["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert metrics["answer/tokens"] == count / 5
    for gradient, parameter in zip(found, lora.lora_parameters(policy.model), strict=True):
        tiny.close(gradient, parameter.grad, 1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_change_memory_only(size: int) -> None:
    policy, rows = tiny.policy(), tiny.examples(5)
    whole, wanted = gradients(policy, replace(CFG, sft=SFTConfig(5)), rows)
    parts, found = gradients(policy, replace(CFG, sft=SFTConfig(5, size)), rows)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        tiny.close(a, b, 1e-5)


def test_a_batch_is_learnt_by_heart_and_then_answered() -> None:
    policy, rows = tiny.policy(shaken=False), tiny.examples(4)
    optimizer = torch.optim.AdamW(lora.lora_parameters(policy.model), lr=2e-2)
    method = made(policy)
    method.optimizer = optimizer
    first = learn(method, rows).metrics
    for _ in range(60):
        last = learn(method, rows).metrics
    # The frozen head of this random model bounds the likelihood.
    assert first["answer/likelihood"] < 0.05 and last["answer/likelihood"] > 0.7
    prompts = [policy.encode(render(tiny.SST2, row.fields)) for row in rows]
    drawn = generate(policy, prompts, Sampling(4, greedy=True))
    said = [parse(tiny.SST2, policy.decode(reply)) for reply in drawn.rows]
    assert said == [row.label for row in rows]


@pytest.mark.parametrize("form", ["judgement", "analysis"])
@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.words])
def test_what_is_taught_is_what_the_evaluator_reads(name: str, form: str) -> None:
    """The released code of the paper trained some tasks on words its evaluator could not read:
    here every SFT target of every task parses to the gold label, behind PPO's own prompt."""
    spec, policy = TASKS[name], tiny.pretrained("stories260K")
    fields = dict.fromkeys(spec.fields, "a word")
    style = PromptConfig(form=form)
    cfg = replace(CFG, task=name, prompt=style, rollout=RolloutConfig(4, 1, 32))
    cfg = replace(cfg, data=replace(cfg.data, max_prompt_tokens=400))
    for word in spec.words:
        prompt, answer, _ = sft.targets(policy, spec, cfg, Example("1", fields, word, name))
        text = policy.decode(prompt + answer)
        assert render(spec, fields, form=form) in text
        said = text.rpartition(OPENING[form])[2]
        assert parse(spec, said, form) == word


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    policy = tiny.policy()
    with torch.no_grad():
        lora.lora_parameters(policy.model)[0][0, 0] = float("nan")
    before = [p.detach().clone() for p in lora.lora_parameters(policy.model)]
    method = made(policy)
    method.optimizer = optimizer_of(policy, 0.1)
    report = learn(method, tiny.examples(3))
    assert report.bad is not None and [row["id"] for row in report.bad.rows] == ["0", "1", "2"]
    for old, new in zip(before, lora.lora_parameters(policy.model), strict=True):
        assert torch.equal(old, new) or bool(old.isnan().any())


def test_dropout_has_an_effect_and_a_seed_of_its_own() -> None:
    """The same step draws the same masks whatever was drawn before, another step others."""

    def moved(dropout: float, step: int) -> torch.Tensor:
        policy = tiny.policy(lora_cfg=LoraConfig(r=4, alpha=8.0, dropout=dropout))
        method = made(policy, Config(task="sst2"))
        method.optimizer = optimizer_of(policy, 1e-2)
        learn(method, tiny.examples(4), step)
        assert not any(layer.training for layer in lora.lora_layers(policy.model).values())
        return torch.cat([p.detach().flatten() for p in lora.lora_parameters(policy.model)])

    plain, first = moved(0.0, 0), moved(0.5, 0)
    torch.rand(3)
    assert torch.equal(moved(0.5, 0), first)
    assert not torch.equal(moved(0.5, 1), first) and not torch.equal(plain, first)
    assert torch.equal(moved(0.0, 1), plain)


def test_a_token_across_the_end_of_the_prompt_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the opening tag and the label are one token, the part to learn begins before the tag:
    the label is learnt, not read."""
    policy, row = tiny.policy(), tiny.examples(1, "Positive")[0]
    known: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        pieces = re.findall(r"<Judgement> \w+ (?=</)|</?Judgement>|\w+|[^\w\s]", text)
        return [known.setdefault(piece, len(known)) for piece in pieces]

    monkeypatch.setattr(policy, "encode", encode)
    monkeypatch.setattr(policy, "seal", lambda text: text)
    prompt, answer, _ = sft.targets(policy, tiny.SST2, CFG, row)
    assert answer == [known["<Judgement> Positive "], known["</Judgement>"]]
    alone = encode(render(tiny.SST2, row.fields))
    assert prompt == alone[:-1] and alone[-1] == known["<Judgement>"]

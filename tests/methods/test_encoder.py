"""A step of the encoder against plain torch, dropout replayed, and that it learns."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import BertForSequenceClassification

from ppo_nlu.config import Config, OptimConfig
from ppo_nlu.methods import encoder, encoder_load, encoder_model, encoder_save
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks import Example, Rating, TaskSpec, get_task
from tests.methods.encoders import MRPC, STSB, WORDS, config, learn, pairs, parameters, same


@pytest.mark.parametrize("limit", [0.0, 0.05])
@pytest.mark.parametrize(
    ("spec", "labels"),
    [(MRPC, ["Yes", "No", "No", "Yes", "Yes"]), (STSB, ["0.000", "5.000", "2.533", "4", "1.2"])],
)
def test_a_step_is_that_of_plain_torch(spec: TaskSpec, labels: list[str], limit: float) -> None:
    """Row by row, unpadded, by the library's own model; SGD, since Adam hides the gradient."""
    cfg = config(spec.name, dropout=0.0, optim=OptimConfig(max_grad_norm=limit))
    made, rows = encoder_load.load(cfg, spec), pairs(spec, labels)
    plain = BertForSequenceClassification(made.model.config).eval()
    plain.load_state_dict(made.model.state_dict())

    loss, right = torch.zeros(()), 0
    for row in rows:
        first, second = (row.fields[name] for name in spec.fields)
        logits = plain(**made.tokenizer(first, second, return_tensors="pt")).logits[0]
        if spec.rating:
            loss = loss + (logits[0] - float(row.label or "")) ** 2 / len(rows)
            right += round(logits[0].clamp(0, 5).item(), 1) == round(float(row.label or ""), 1)
        else:
            gold = ["Yes", "No"].index(row.label or "")
            loss = loss + (logits.exp().sum().log() - logits[gold]) / len(rows)
            right += int(logits[gold] > logits[1 - gold])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    factor = min(1.0, limit / float(norm)) if limit else 1.0

    metrics = learn(made, torch.optim.SGD(made.parameters(), lr=0.5), cfg, rows, 0)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert metrics["answer/accuracy"] == pytest.approx(right / len(rows))
    assert factor < 1 or not limit, "the bound acts"
    for name, p in plain.named_parameters():
        wanted = p - 0.5 * factor * p.grad if p.grad is not None else p
        tiny.close(made.model.get_parameter(name), wanted, 1e-6)
    assert not made.model.training
    assert all(p.grad is None for p in made.parameters())


def test_a_rating_is_learned_in_fifths_of_its_range() -> None:
    """-50 to 50 is trained as 0 to 5: the same loss and the same step."""
    wide = replace(STSB, rating=Rating(-50.0, 50.0, 1.0))
    found = []
    for spec, labels in ((STSB, ["0", "1", "5"]), (wide, ["-50", "-30", "50"])):
        cfg = config("stsb")
        made = encoder_load.load(cfg, spec)
        optimizer = build_optimizer(cfg.optim, made.parameters())
        metrics = learn(made, optimizer, cfg, pairs(spec, labels), 0)
        found.append((metrics["loss"], parameters(made)))
    assert found[0][0] == pytest.approx(found[1][0])
    for name, p in found[0][1].items():
        tiny.close(p, found[1][1][name], 1e-6)


def test_a_step_replayed_is_the_same_to_the_last_bit() -> None:
    cfg = config("mrpc", dropout=0.3, seed=7, optim=OptimConfig(name="adamw", lr=1e-3))
    rows = pairs(MRPC, ["Yes", "No", "No", "Yes"])

    def after(step: int, cfg: Config = cfg) -> dict[str, Tensor]:
        made = encoder_load.load(cfg, MRPC)
        learn(made, build_optimizer(cfg.optim, made.parameters()), cfg, rows, step)
        return encoder_save.weights(made)

    torch.manual_seed(1)
    first = after(3)
    state = torch.get_rng_state()
    torch.rand(1000)
    assert same(first, after(3)), "whatever torch drew before"
    assert not same(first, after(4)), "dropout is on, and differs from step to step"
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the program's own numbers are untouched"


def test_interrupted_and_resumed_is_the_same_to_the_last_bit() -> None:
    from ppo_nlu.runtime.optimizer_state import flatten_optimizer, restore_optimizer

    cfg = config("mrpc", dropout=0.2, optim=OptimConfig(name="adamw", lr=1e-3))
    rows = pairs(MRPC, ["Yes", "No", "No", "Yes"])
    one = encoder_load.load(cfg, MRPC)
    optimizer = build_optimizer(cfg.optim, one.parameters())
    for step in range(4):
        if step == 2:
            kept, moments = encoder_save.weights(one), flatten_optimizer(optimizer)
        learn(one, optimizer, cfg, rows, step)
    two = encoder_load.load(replace(cfg, seed=cfg.seed), MRPC)
    again = build_optimizer(cfg.optim, two.parameters())
    encoder_save.load_weights(two, kept)
    restore_optimizer(again, *moments)
    for step in (2, 3):
        learn(two, again, cfg, rows, step)
    assert same(encoder_save.weights(one), encoder_save.weights(two))


def test_what_is_not_finite_is_no_step() -> None:
    cfg = config("mrpc")
    made, rows = encoder_load.load(cfg, MRPC), pairs(MRPC, ["Yes", "No"])
    with torch.no_grad():
        made.model.classifier.bias.fill_(float("nan"))
    before = parameters(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    method = encoder.EncoderTuning(cfg, {"mrpc": MRPC}, made)
    method.optimizer = optimizer
    report = method.update(method.collect(rows, 0), 0)
    assert report.bad is not None and math.isnan(report.bad.metrics["loss"])
    assert [row["id"] for row in report.bad.rows] == [row.id for row in rows]
    now = parameters(made)
    assert all(torch.equal(now[k], before[k]) for k in now if k != "classifier.bias")
    assert all(p.grad is None for p in made.parameters())
    assert list(encoder_model.answer_all(made, MRPC, cfg, rows, "sample")) == [(None, None)] * 2


def test_low_precision_keeps_fp32_weights() -> None:
    cfg = config(
        "mrpc", dtype="bfloat16", dropout=0.0, optim=OptimConfig(name="adamw", lr=1e-5, eps=1e-12)
    )
    made, rows = encoder_load.load(cfg, MRPC), pairs(MRPC, ["Yes", "No"])
    exact = encoder_load.load(config("mrpc", dropout=0.0), MRPC)
    with torch.no_grad():
        low, full = made(made.read(rows, 64)), exact(exact.read(rows, 64))
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    tiny.close(low, full, 0.05)
    before = parameters(made)
    learn(made, build_optimizer(cfg.optim, made.parameters()), cfg, rows, 0)
    # Steps of 1e-5 on weights of about 0.02: bf16, with its 8 bits, would lose many of them.
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    moved = (made.model.get_parameter(name) - before[name]).abs()
    assert ((moved > 0.9e-5) & (moved < 1.1e-5)).float().mean() > 0.95
    assert {p.dtype for p in made.parameters()} == {torch.float32}


# ---- learning -------------------------------------------------------------------------------


def train(made: Encoder, cfg: Config, rows: list[Example], steps: int) -> None:
    optimizer = build_optimizer(cfg.optim, made.parameters())
    for step in range(steps):
        batch = [rows[i % len(rows)] for i in range(16 * step, 16 * step + 16)]
        learn(made, optimizer, cfg, batch, step)


def opinions(count: int, seed: int) -> list[Example]:
    """Sentences of noise and one word that decides."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        word, label = draw.choice([("good", "Positive"), ("bad", "Negative")])
        text = draw.choices(WORDS, k=draw.randint(3, 10))
        text.insert(draw.randint(0, len(text)), word)
        rows.append(Example(str(i), {"sentence": " ".join(text)}, label, "sst2"))
    return rows


def test_it_learns_to_classify() -> None:
    spec = get_task("sst2")
    cfg = config(optim=OptimConfig(name="adamw", lr=1e-3))
    made, held = encoder_load.load(cfg, spec), opinions(200, 1)
    train(made, cfg, opinions(640, 0), 90)
    found = [word for word, _ in encoder_model.answer_all(made, spec, cfg, held, "greedy")]
    right = sum(word == row.label for word, row in zip(found, held, strict=True))
    assert right > 0.9 * len(held), right


def test_it_learns_to_rate() -> None:
    """The rating is 5 where both sentences hold "good", 0 with none, 2.5 with one."""
    cfg = config("stsb", optim=OptimConfig(name="adamw", lr=1e-3))
    draw = random.Random(0)

    def rows(count: int) -> list[Example]:
        made = []
        for i in range(count):
            marks = [draw.random() < 0.5 for _ in range(2)]
            texts = [draw.choices(WORDS, k=5) + ["good"] * mark for mark in marks]
            fields = {f: " ".join(t) for f, t in zip(STSB.fields, texts, strict=True)}
            made.append(Example(str(i), fields, f"{2.5 * sum(marks):.3f}", "stsb"))
        return made

    made, held = encoder_load.load(cfg, STSB), rows(100)
    train(made, cfg, rows(640), 120)
    found = list(encoder_model.answer_all(made, STSB, cfg, held, "score"))
    given = [float(text or "nan") for text, _ in found]
    gold = [float(row.label or "nan") for row in held]
    assert torch.corrcoef(torch.tensor([given, gold]))[0, 1] > 0.9
    assert all(p is None for _, p in found)

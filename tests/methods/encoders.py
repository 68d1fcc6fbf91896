"""What the tests of the encoder share: configs, rows, a step, run folders."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from ppo_nlu.config import Config, EncoderConfig, ModelConfig
from ppo_nlu.methods import encoder, encoder_load, encoder_save
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.tasks import Example, TaskSpec, get_task

WORDS = "the film was long and slow but it had a story of people in town who never go".split()
MRPC, STSB, MNLI = get_task("mrpc"), get_task("stsb"), get_task("mnli")


def config(task: str = "sst2", name: str = "bundled", **changes: Any) -> Config:
    model = ModelConfig(name, device="cpu", dtype=changes.pop("dtype", "float32"))
    rows = {k: changes.pop(k) for k in ("dropout", "max_length") if k in changes}
    return Config(
        task=task, method="encoder", model=model, encoder=EncoderConfig(**rows), **changes
    )


def pairs(spec: TaskSpec, labels: list[str]) -> list[Example]:
    """Rows of unlike length, two fields each."""
    draw, rows = random.Random(0), []
    for i, label in enumerate(labels):
        texts = [" ".join(draw.choices(WORDS, k=2 + i + 3 * j)) for j in range(2)]
        rows.append(Example(str(i), dict(zip(spec.fields, texts, strict=True)), label, spec.name))
    return rows


def learn(
    made: Encoder,
    optimizer: torch.optim.Optimizer,
    cfg: Config,
    rows: list[Example],
    step: int,
) -> dict[str, float]:
    """The metrics of a step of the method on this encoder."""
    method = encoder.EncoderTuning(cfg, {made.spec.name: made.spec}, made)
    method.optimizer = optimizer
    return method.update(method.collect(rows, step), step).metrics


def parameters(made: Encoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def finished(folder: Path, spec: TaskSpec, seed: int = 0) -> Encoder:
    """A run folder, of a model whose every weight has moved."""
    made = encoder_load.load(config(spec.name, seed=seed), spec)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=draw))
    encoder_save.save(made, folder / "encoder")
    return made


def pretrained(folder: Path, kind: str) -> nn.Module:
    """A folder as pre-training leaves it: a body, no head for our task."""
    made = encoder_load.load(config("mrpc"), MRPC)
    made.tokenizer.save_pretrained(folder)
    size = {"vocab_size": len(made.tokenizer), "pad_token_id": 3}
    torch.manual_seed(11)
    if kind == "roberta":
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        body = RobertaModel(
            RobertaConfig(**size, **heads, hidden_size=32, max_position_embeddings=520)
        )
    elif kind == "distilbert":
        body = DistilBertModel(
            DistilBertConfig(**size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        )
    elif kind == "mlm":
        body = BertForMaskedLM(made.model.config)
    elif kind == "classifier":
        plain = made.model.config
        plain.id2label, plain.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
        body = BertForSequenceClassification(plain)
    else:
        body = BertModel(made.model.config)
    body.save_pretrained(folder)
    return body

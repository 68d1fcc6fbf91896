"""Where an encoder comes from: a seed, the library, another run (STILTs); mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ppo_nlu.config import Config, ModelConfig, OptimConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_load, encoder_model, encoder_save
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks import Rating, TaskSpec, get_task
from tests.methods.encoders import (
    MNLI,
    MRPC,
    STSB,
    config,
    finished,
    learn,
    pairs,
    parameters,
    pretrained,
    same,
)


def test_one_seed_is_one_start() -> None:
    one, two = (encoder_load.load(config("mrpc", seed=3), MRPC) for _ in range(2))
    other = encoder_load.load(config("mrpc", seed=4), MRPC)
    assert same(parameters(one), parameters(two)) and not same(parameters(one), parameters(other))
    shape = other.model.config
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (128, 2, 2)


def test_stilts_takes_the_body_and_only_a_head_of_the_same_words(tmp_path: Path) -> None:
    """Phang et al.: MNLI first, then another task; SNLI has the words of MNLI."""
    source = parameters(finished(tmp_path, MNLI))
    start = str(tmp_path)
    twin = encoder_load.load(config("snli", seed=5, init_from=start), get_task("snli"))
    assert same(parameters(twin), source)
    swapped = replace(MNLI, labels=MNLI.labels[::-1])
    for spec in (MRPC, STSB, swapped):
        cfg = config(spec.name, seed=5, init_from=start)
        target = parameters(encoder_load.load(cfg, spec))
        fresh = parameters(encoder_load.load(replace(cfg, init_from=None), spec))
        for name, p in target.items():
            body = name.startswith("bert.")
            assert torch.equal(p, source[name] if body else fresh[name]), name
            assert body or p.shape != source[name].shape or not torch.equal(p, source[name])
    assert same(
        parameters(encoder_load.load(config("mnli", init_from=f"{start}/encoder"), MNLI)), source
    )


def test_stilts_between_ratings_asks_for_the_same_range(tmp_path: Path) -> None:
    source = parameters(finished(tmp_path, STSB))
    cfg = config("stsb", seed=5, init_from=str(tmp_path))
    assert same(parameters(encoder_load.load(cfg, STSB)), source)
    stored = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert stored["problem_type"] == "regression" and len(stored["id2label"]) == 1
    wide = replace(STSB, rating=Rating(0.0, 10.0))
    head = encoder_load.load(cfg, wide).model.classifier.weight
    assert not torch.equal(head, source["classifier.weight"])


@pytest.mark.parametrize("kind", ["bert", "mlm", "classifier", "roberta", "distilbert"])
def test_any_encoder_of_the_library(tmp_path: Path, kind: str) -> None:
    body = pretrained(tmp_path, kind)
    cfg = config("mrpc", str(tmp_path), dropout=0.25)
    made, again = encoder_load.load(cfg, MRPC), encoder_load.load(cfg, MRPC)
    assert same(parameters(made), parameters(again)), "a fresh head and pooler come from the seed"
    prefix = made.model.base_model_prefix
    own = parameters(made)
    taken = getattr(body, prefix, body).state_dict()
    for name in [k.removeprefix(f"{prefix}.") for k in own if k.startswith(f"{prefix}.")]:
        if name in taken:
            assert torch.equal(own[f"{prefix}.{name}"], taken[name]), name
        else:
            assert kind == "mlm" and "pooler" in name, name
    if kind == "classifier":
        assert not torch.equal(made.model.classifier.weight, body.classifier.weight)
    drops = {m.p for m in made.model.modules() if isinstance(m, nn.Dropout)}
    assert drops == {0.25}
    rows = pairs(MRPC, ["Yes", "No", "Yes"])
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-3), made.parameters())
    first = learn(made, optimizer, cfg, rows, 0)["loss"]
    for step in range(1, 10):
        last = learn(made, optimizer, cfg, rows, step)["loss"]
    assert last < first
    encoder_save.save(made, tmp_path / "out")
    again = encoder_load.load_saved(cfg, MRPC, tmp_path / "out")
    answers = [list(encoder_model.answer_all(m, MRPC, cfg, rows, "score")) for m in (made, again)]
    assert answers[0] == answers[1]


def test_a_finished_classifier_brings_its_head_where_its_words_are_ours(tmp_path: Path) -> None:
    source = finished(tmp_path, MNLI)
    made = encoder_load.load(config("mnli", str(tmp_path / "encoder"), seed=8), MNLI)
    assert same(parameters(made), parameters(source))


# ---- mistakes -------------------------------------------------------------------------------


def refused(text: str, cfg: Config, spec: TaskSpec = MRPC) -> None:
    with pytest.raises(UserError, match=text):
        encoder_load.load(cfg, spec)


def test_mistakes_in_the_config() -> None:
    free = replace(MRPC, labels=())
    refused("task: mrpc asks for a free text", config("mrpc"), free)
    refused("model.dtype: float16", config("mrpc", dtype="float16"))
    refused("encoder.max_length: 513 tokens are more than the 512", config(max_length=513))
    refused("init_from: /nowhere holds no encoder", config(init_from="/nowhere"))
    if not torch.cuda.is_available():
        cfg = replace(config(), model=ModelConfig(device="cuda"))
        refused("model.device: cuda", cfg)


def test_mistakes_in_a_model_folder(tmp_path: Path) -> None:
    at = str(tmp_path)
    refused("holds no config.json", config(name=at))
    refused("there is no folder", config(name=f"{at}/none"))
    (tmp_path / "config.json").write_text("{}")
    refused("model.name_or_path: cannot load", config(name=at))
    pretrained(tmp_path, "bert")
    whole = load_file(tmp_path / "model.safetensors")
    part = {k: x for k, x in whole.items() if "layer.1.attention" not in k}
    save_file(part, tmp_path / "model.safetensors", {"format": "pt"})
    refused("are not whole: 10 tensors .*layer.1.attention", config(name=at))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    refused("model.name_or_path: cannot load .* as an encoder", config(name=at))


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    tiny.causal_lm("gpt2").save_pretrained(tmp_path)
    words = tiny.tokenizer()
    words.pad_token = None
    words.save_pretrained(tmp_path)
    refused("has no padding token", config(name=str(tmp_path)))


def test_mistakes_in_a_run_folder(tmp_path: Path) -> None:
    finished(tmp_path, MNLI)
    folder = tmp_path / "encoder"
    with pytest.raises(UserError, match=r"its head gives Entailment, Neutral, .* asks for Yes, No"):
        encoder_load.load_saved(config("mrpc"), MRPC, folder)
    pretrained(tmp_path / "other", "roberta")
    start = config("mrpc", str(tmp_path / "other"), init_from=str(tmp_path))
    refused("init_from: .* tensors are missing or of another shape", start)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
        encoder_load.load_saved(config("mnli"), MNLI, folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is damaged, or no safetensors"):
        encoder_load.load_saved(config("mnli"), MNLI, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UserError, match=r"its config.json cannot be read"):
        encoder_load.load_saved(config("mnli"), MNLI, folder)

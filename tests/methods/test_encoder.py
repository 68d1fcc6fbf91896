"""The encoder baseline: a step against plain torch, STILTs, dropout replayed, folders, mistakes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from ppo_nlu.config import Config, EncoderConfig, EvalConfig, ModelConfig, OptimConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder, encoder_model
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks import Example, Rating, TaskSpec, get_task

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


def test_control_tokens_in_a_row_are_text() -> None:
    """`</s>` frames a row; in its text it is four signs like any other."""
    made = encoder_model.load(config(), get_task("sst2"))
    frame = made.tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    row = Example("1", {"sentence": "so </s> bad <s>"}, "Positive", "sst2")
    ids = made.read([row], 64)["input_ids"][0].tolist()
    assert [ids.count(token) for token in frame] == [1, 1]


def learn(
    made: encoder_model.Encoder,
    optimizer: torch.optim.Optimizer,
    cfg: Config,
    rows: list[Example],
    step: int,
) -> dict[str, float]:
    """The metrics of a step of the method on this encoder."""
    method = encoder.EncoderTuning(cfg, {made.spec.name: made.spec}, made)
    method.optimizer = optimizer
    return method.update(method.collect(rows, step), step).metrics


def parameters(made: encoder_model.Encoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---- what is read ---------------------------------------------------------------------------


def test_a_pair_is_framed_as_bert_reads_it() -> None:
    made = encoder_model.load(config("mrpc"), MRPC)
    rows = pairs(MRPC, ["Yes", "No", "Yes"])
    batch = made.read(rows, 128)
    for i, row in enumerate(rows):
        first, second = (
            made.tokenizer(row.fields[f], add_special_tokens=False)["input_ids"]
            for f in MRPC.fields
        )
        ids = [1, *first, 2, *second, 2]  # <s> and </s>
        pad = batch["input_ids"].shape[1] - len(ids)
        kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert batch["input_ids"][i].tolist() == ids + [3] * pad
        assert batch["token_type_ids"][i].tolist() == kinds + [0] * pad
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * pad


def test_a_single_field_and_more_than_two() -> None:
    sst2, copa = get_task("sst2"), get_task("copa")
    assert encoder_model.as_pair(sst2, {"sentence": " a film "}) == ("a film", "")
    fields = {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": "effect"}
    assert encoder_model.as_pair(copa, fields) == ("It rained.", "A. B. effect")
    made = encoder_model.load(config(), sst2)
    batch = made.read([Example("0", {"sentence": "a film"}, None)], 128)
    assert batch["input_ids"][0, 0] == 1 and batch["input_ids"][0].tolist().count(2) == 1
    assert not batch["token_type_ids"].any()


def test_the_longer_part_is_cut() -> None:
    made = encoder_model.load(config("mrpc"), MRPC)
    row = Example("0", {"sentence1": "a film", "sentence2": "a b c d e f g h i j"}, None)
    short = made.tokenizer("a film", add_special_tokens=False)["input_ids"]
    ids = made.read([row], 10)["input_ids"][0].tolist()
    assert len(ids) == 10 and ids[1 : 1 + len(short)] == short and ids[-1] == 2


# ---- a step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.05])
@pytest.mark.parametrize(
    ("spec", "labels"),
    [(MRPC, ["Yes", "No", "No", "Yes", "Yes"]), (STSB, ["0.000", "5.000", "2.533", "4", "1.2"])],
)
def test_a_step_is_that_of_plain_torch(spec: TaskSpec, labels: list[str], limit: float) -> None:
    """Row by row, unpadded, by the library's own model; SGD, since Adam hides the gradient."""
    cfg = config(spec.name, dropout=0.0, optim=OptimConfig(max_grad_norm=limit))
    made, rows = encoder_model.load(cfg, spec), pairs(spec, labels)
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
    """0 to 100 is trained as 0 to 5: the same loss and the same step."""
    wide = replace(STSB, rating=Rating(-50.0, 50.0, 1.0))
    found = []
    for spec, labels in ((STSB, ["0", "1", "5"]), (wide, ["-50", "-30", "50"])):
        cfg = config("stsb")
        made = encoder_model.load(cfg, spec)
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
        made = encoder_model.load(cfg, MRPC)
        learn(made, build_optimizer(cfg.optim, made.parameters()), cfg, rows, step)
        return encoder_model.weights(made)

    torch.manual_seed(1)
    first = after(3)
    state = torch.get_rng_state()
    torch.rand(1000)
    assert same(first, after(3)), "whatever torch drew before"
    assert not same(first, after(4)), "dropout is on, and another one in each step"
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the program's own numbers are untouched"


def test_interrupted_and_resumed_is_the_same_to_the_last_bit() -> None:
    from ppo_nlu.runtime.optimizer_state import flatten_optimizer, restore_optimizer

    cfg = config("mrpc", dropout=0.2, optim=OptimConfig(name="adamw", lr=1e-3))
    rows = pairs(MRPC, ["Yes", "No", "No", "Yes"])
    one = encoder_model.load(cfg, MRPC)
    optimizer = build_optimizer(cfg.optim, one.parameters())
    for step in range(4):
        if step == 2:
            kept, moments = encoder_model.weights(one), flatten_optimizer(optimizer)
        learn(one, optimizer, cfg, rows, step)
    two = encoder_model.load(replace(cfg, seed=cfg.seed), MRPC)
    again = build_optimizer(cfg.optim, two.parameters())
    encoder_model.load_weights(two, kept)
    restore_optimizer(again, *moments)
    for step in (2, 3):
        learn(two, again, cfg, rows, step)
    assert same(encoder_model.weights(one), encoder_model.weights(two))


def test_what_is_not_finite_is_no_step() -> None:
    cfg = config("mrpc")
    made, rows = encoder_model.load(cfg, MRPC), pairs(MRPC, ["Yes", "No"])
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
    made, rows = encoder_model.load(cfg, MRPC), pairs(MRPC, ["Yes", "No"])
    exact = encoder_model.load(config("mrpc", dropout=0.0), MRPC)
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


def train(made: encoder_model.Encoder, cfg: Config, rows: list[Example], steps: int) -> None:
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
    made, held = encoder_model.load(cfg, spec), opinions(200, 1)
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

    made, held = encoder_model.load(cfg, STSB), rows(100)
    train(made, cfg, rows(640), 120)
    found = list(encoder_model.answer_all(made, STSB, cfg, held, "score"))
    given = [float(text or "nan") for text, _ in found]
    gold = [float(row.label or "nan") for row in held]
    assert torch.corrcoef(torch.tensor([given, gold]))[0, 1] > 0.9
    assert all(p is None for _, p in found)


# ---- answers --------------------------------------------------------------------------------


def sharpened() -> encoder_model.Encoder:
    """Probabilities that differ from row to row."""
    made = encoder_model.load(config("mnli"), MNLI)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = made.model.classifier.weight
        head.copy_(torch.randn(head.shape, generator=draw) * 0.3)
    return made


def test_answers_are_the_most_probable_words_in_the_order_of_the_rows() -> None:
    made, rows = sharpened(), pairs(MNLI, ["Neutral"] * 9)
    with torch.no_grad():
        table = torch.cat([made(made.read([row], 128)) for row in rows]).softmax(-1)
    few = config("mnli", eval=EvalConfig(batch_size=2))
    for cfg in (config("mnli"), few):
        for decode in ("greedy", "score"):
            found = list(encoder_model.answer_all(made, MNLI, cfg, rows, decode))
            for (word, probabilities), wanted in zip(found, table, strict=True):
                assert probabilities is not None
                assert list(probabilities) == ["Entailment", "Neutral", "Contradiction"]
                assert list(probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-5)
                assert word == max(probabilities, key=lambda w: probabilities[w])
    draws = [list(encoder_model.answer_all(made, MNLI, cfg, rows, "sample")) for cfg in (few, few)]
    assert draws[0] == draws[1]
    alone = [w for w, _ in encoder_model.answer_all(made, MNLI, config("mnli"), rows, "sample")]
    assert alone == [w for w, _ in draws[0]], "the batch size changes no draw"
    alike = [w for w, _ in encoder_model.answer_all(made, MNLI, few, rows[:1] * 40, "sample")]
    assert alike[:20] != alike[20:] and len(set(alike[::2])) > 1, "each row has its own draw"
    calls = iter([False, False, True])
    assert (
        list(encoder_model.answer_all(made, MNLI, few, rows, "greedy", lambda: next(calls))) == []
    )


def test_samples_follow_the_probabilities() -> None:
    output = torch.tensor([0.2, 0.5, 0.3]).log()
    found = [encoder_model._given(MNLI, output, "sample", ("test", i))[0] for i in range(3000)]
    for word, share in zip(MNLI.words, (0.2, 0.5, 0.3), strict=True):
        assert abs(found.count(word) / 3000 - share) < 0.04  # 4 standard deviations
    assert encoder_model._given(MNLI, output, "greedy", ())[0] == "Neutral"


@pytest.mark.parametrize(
    ("output", "text"), [(2.53349, "2.533"), (-0.2, "0.000"), (7.0, "5.000"), (float("inf"), None)]
)
def test_a_rating_stays_in_its_range(output: float, text: str | None) -> None:
    assert encoder_model._given(STSB, torch.tensor([output]), "sample", ("test",)) == (text, None)


# ---- loading --------------------------------------------------------------------------------


def test_one_seed_is_one_start() -> None:
    one, two = (encoder_model.load(config("mrpc", seed=3), MRPC) for _ in range(2))
    other = encoder_model.load(config("mrpc", seed=4), MRPC)
    assert same(parameters(one), parameters(two)) and not same(parameters(one), parameters(other))
    shape = other.model.config
    assert (shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads) == (128, 2, 2)


def finished(folder: Path, spec: TaskSpec, seed: int = 0) -> encoder_model.Encoder:
    """A run folder, of a model whose every weight has moved."""
    made = encoder_model.load(config(spec.name, seed=seed), spec)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=draw))
    encoder_model.save(made, folder / "encoder")
    return made


def test_stilts_takes_the_body_and_only_a_head_of_the_same_words(tmp_path: Path) -> None:
    """Phang et al.: MNLI first, then another task; SNLI has the words of MNLI."""
    source = parameters(finished(tmp_path, MNLI))
    start = str(tmp_path)
    twin = encoder_model.load(config("snli", seed=5, init_from=start), get_task("snli"))
    assert same(parameters(twin), source)
    swapped = replace(MNLI, labels=MNLI.labels[::-1])
    for spec in (MRPC, STSB, swapped):
        cfg = config(spec.name, seed=5, init_from=start)
        target = parameters(encoder_model.load(cfg, spec))
        fresh = parameters(encoder_model.load(replace(cfg, init_from=None), spec))
        for name, p in target.items():
            body = name.startswith("bert.")
            assert torch.equal(p, source[name] if body else fresh[name]), name
            assert body or p.shape != source[name].shape or not torch.equal(p, source[name])
    assert same(
        parameters(encoder_model.load(config("mnli", init_from=f"{start}/encoder"), MNLI)), source
    )


def test_stilts_between_ratings_asks_for_the_same_range(tmp_path: Path) -> None:
    source = parameters(finished(tmp_path, STSB))
    cfg = config("stsb", seed=5, init_from=str(tmp_path))
    assert same(parameters(encoder_model.load(cfg, STSB)), source)
    stored = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert stored["problem_type"] == "regression" and len(stored["id2label"]) == 1
    wide = replace(STSB, rating=Rating(0.0, 10.0))
    head = encoder_model.load(cfg, wide).model.classifier.weight
    assert not torch.equal(head, source["classifier.weight"])


def test_a_saved_folder_is_the_librarys(tmp_path: Path) -> None:
    cfg, rows = config("mnli"), pairs(MNLI, ["Neutral"] * 5)
    made = finished(tmp_path, MNLI)
    folder = tmp_path / "encoder"
    list(encoder_model.answer_all(made, MNLI, cfg, rows, "greedy"))
    encoder_model.save(made, folder)  # over the first
    assert {path.name for path in folder.iterdir()} == {
        "checksums.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "Entailment", 1: "Neutral", 2: "Contradiction"}
    assert model.config.problem_type == "single_label_classification"
    again = encoder_model.load_saved(cfg, MNLI, folder)
    for row in rows:
        batch = words(*row.fields.values(), return_tensors="pt")
        with torch.no_grad():
            wanted = model(**batch).logits
            assert torch.equal(made(made.read([row], 128)), wanted)
            assert torch.equal(again(again.read([row], 128)), wanted)
    assert same(encoder_model.weights(made), encoder_model.weights(again))
    assert same(encoder_model.weights(made), load_file(folder / "model.safetensors"))
    assert not again.model.training and again.spec is MNLI


def test_what_was_read_before_changes_no_byte_of_a_saved_folder(tmp_path: Path) -> None:
    """The library keeps in the tokenizer how the last rows were cut and padded. A run that was
    killed at its end and resumed has read none."""
    cfg, rows = config("mnli"), pairs(MNLI, ["Neutral"] * 5)
    made = encoder_model.load(cfg, MNLI)
    encoder_model.save(made, tmp_path / "unread")
    list(encoder_model.answer_all(made, MNLI, cfg, rows, "greedy"))
    encoder_model.save(made, tmp_path / "read")
    for path in (tmp_path / "unread").iterdir():
        assert path.read_bytes() == (tmp_path / "read" / path.name).read_bytes(), path.name


def test_an_encoder_is_saved_without_a_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    made = encoder_model.load(config("mnli"), MNLI)
    encoder_model.save(made, tmp_path / "encoder")
    assert not [p.name for p in (tmp_path / "encoder").iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "encoder"
    made = finished(tmp_path, MNLI)
    tensors = encoder_model.weights(made)
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    (folder / "checksums.json").unlink()
    for spoilt in (torch.full_like(tensors[name], value), tensors[name].int()):
        save_file(tensors | {name: spoilt}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"{name} holds"):
            encoder_model.load_saved(config("mnli"), MNLI, folder)


def test_weights_are_copies() -> None:
    made = encoder_model.load(config(), get_task("sst2"))
    kept = encoder_model.weights(made)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert len({x.untyped_storage().data_ptr() for x in kept.values()}) == len(kept)
    assert all(x.is_contiguous() for x in kept.values()) and kept["classifier.weight"].any()
    encoder_model.load_weights(made, kept)
    assert same(encoder_model.weights(made), kept)
    kept.pop("classifier.bias")
    with pytest.raises(UserError, match=r"1 tensors are missing .*classifier.bias"):
        encoder_model.load_weights(made, kept)


def pretrained(folder: Path, kind: str) -> nn.Module:
    """A folder as pre-training leaves it: a body, no head for our task."""
    made = encoder_model.load(config("mrpc"), MRPC)
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


@pytest.mark.parametrize("kind", ["bert", "mlm", "classifier", "roberta", "distilbert"])
def test_any_encoder_of_the_library(tmp_path: Path, kind: str) -> None:
    body = pretrained(tmp_path, kind)
    cfg = config("mrpc", str(tmp_path), dropout=0.25)
    made, again = encoder_model.load(cfg, MRPC), encoder_model.load(cfg, MRPC)
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
    encoder_model.save(made, tmp_path / "out")
    again = encoder_model.load_saved(cfg, MRPC, tmp_path / "out")
    answers = [list(encoder_model.answer_all(m, MRPC, cfg, rows, "score")) for m in (made, again)]
    assert answers[0] == answers[1]


def test_a_finished_classifier_brings_its_head_where_its_words_are_ours(tmp_path: Path) -> None:
    source = finished(tmp_path, MNLI)
    made = encoder_model.load(config("mnli", str(tmp_path / "encoder"), seed=8), MNLI)
    assert same(parameters(made), parameters(source))


# ---- mistakes -------------------------------------------------------------------------------


def refused(text: str, cfg: Config, spec: TaskSpec = MRPC) -> None:
    with pytest.raises(UserError, match=text):
        encoder_model.load(cfg, spec)


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
        encoder_model.load_saved(config("mrpc"), MRPC, folder)
    pretrained(tmp_path / "other", "roberta")
    start = config("mrpc", str(tmp_path / "other"), init_from=str(tmp_path))
    refused("init_from: .* tensors are missing or of another shape", start)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model.safetensors: is damaged"):
        encoder_model.load_saved(config("mnli"), MNLI, folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is damaged, or no safetensors"):
        encoder_model.load_saved(config("mnli"), MNLI, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UserError, match=r"its config.json cannot be read"):
        encoder_model.load_saved(config("mnli"), MNLI, folder)

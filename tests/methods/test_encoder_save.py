"""The folder that an encoder is saved in, and its weights as copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_load, encoder_model, encoder_save
from ppo_nlu.tasks import get_task
from tests.methods.encoders import MNLI, config, finished, pairs, same


def test_a_saved_folder_is_the_librarys(tmp_path: Path) -> None:
    cfg, rows = config("mnli"), pairs(MNLI, ["Neutral"] * 5)
    made = finished(tmp_path, MNLI)
    folder = tmp_path / "encoder"
    list(encoder_model.answer_all(made, MNLI, cfg, rows, "greedy"))
    encoder_save.save(made, folder)  # over the first
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
    again = encoder_load.load_saved(cfg, MNLI, folder)
    for row in rows:
        batch = words(*row.fields.values(), return_tensors="pt")
        with torch.no_grad():
            wanted = model(**batch).logits
            assert torch.equal(made(made.read([row], 128)), wanted)
            assert torch.equal(again(again.read([row], 128)), wanted)
    assert same(encoder_save.weights(made), encoder_save.weights(again))
    assert same(encoder_save.weights(made), load_file(folder / "model.safetensors"))
    assert not again.model.training and again.spec is MNLI


def test_what_was_read_before_changes_no_byte_of_a_saved_folder(tmp_path: Path) -> None:
    """The tokenizer remembers how the last rows were cut and padded. A run that was killed at its
    end and resumed has read no rows."""
    cfg, rows = config("mnli"), pairs(MNLI, ["Neutral"] * 5)
    made = encoder_load.load(cfg, MNLI)
    encoder_save.save(made, tmp_path / "unread")
    list(encoder_model.answer_all(made, MNLI, cfg, rows, "greedy"))
    encoder_save.save(made, tmp_path / "read")
    for path in (tmp_path / "unread").iterdir():
        assert path.read_bytes() == (tmp_path / "read" / path.name).read_bytes(), path.name


def test_an_encoder_is_saved_without_a_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    made = encoder_load.load(config("mnli"), MNLI)
    encoder_save.save(made, tmp_path / "encoder")
    assert not [p.name for p in (tmp_path / "encoder").iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "encoder"
    made = finished(tmp_path, MNLI)
    tensors = encoder_save.weights(made)
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    (folder / "checksums.json").unlink()
    for spoilt in (torch.full_like(tensors[name], value), tensors[name].int()):
        save_file(tensors | {name: spoilt}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"{name} holds"):
            encoder_load.load_saved(config("mnli"), MNLI, folder)


def test_weights_are_copies() -> None:
    made = encoder_load.load(config(), get_task("sst2"))
    kept = encoder_save.weights(made)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert len({x.untyped_storage().data_ptr() for x in kept.values()}) == len(kept)
    assert all(x.is_contiguous() for x in kept.values()) and kept["classifier.weight"].any()
    encoder_save.load_weights(made, kept)
    assert same(encoder_save.weights(made), kept)
    kept.pop("classifier.bias")
    with pytest.raises(UserError, match=r"1 tensors are missing .*classifier.bias"):
        encoder_save.load_weights(made, kept)

"""What a method's runs leave, and which model answers for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from ppo_nlu.answering import load_run
from ppo_nlu.answering.by_encoder import EncoderAnswerer
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.config import Config, ModelConfig, dump
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_load
from ppo_nlu.runtime import run_folder

CFG = Config(task="sst2", model=ModelConfig(device="cpu"))
ENCODER = replace(CFG, method="encoder")


@pytest.mark.parametrize(("cfg", "name"), [(CFG, "adapter"), (ENCODER, "encoder")])
def test_a_run_has_finished_when_its_folder_is_whole(
    tmp_path: Path, cfg: Config, name: str
) -> None:
    run = tmp_path / "run"
    run_folder.claim(run, dump(cfg)).release()
    assert load_run.trained_folder(run, cfg) == run / name
    with pytest.raises(UserError, match=f"has not finished and left no {name}/; .*--resume"):
        load_run.run_config(run)
    (run / name).mkdir()
    (run / name / ("config.json" if name == "encoder" else "adapter_config.json")).write_text("")
    assert load_run.run_config(run) == cfg


def test_the_method_says_which_model_answers() -> None:
    policy = tiny.policy()
    assert isinstance(load_run.answerer_of(policy, CFG), PolicyAnswerer)
    encoder = encoder_load.load(ENCODER, tiny.SST2)
    answerer = load_run.answerer_of(encoder, ENCODER)
    assert isinstance(answerer, EncoderAnswerer) and answerer.device == encoder.device
    answerer.require_fit(tiny.SST2)
    rows = tiny.examples(3)
    found = list(answerer.answer(tiny.SST2, rows, "score"))
    assert [got.example for got in found] == rows
    for got in found:
        assert got.prediction == got.response and got.probabilities is not None
        assert got.probabilities[got.response] == max(got.probabilities.values())
    assert list(answerer.answer(tiny.SST2, rows, "score", lambda: True)) == []


def test_an_encoder_answers_only_after_training() -> None:
    with pytest.raises(UserError, match="give its run folder"):
        load_run.load_base(ENCODER)

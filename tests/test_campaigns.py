"""A small part of the campaigns; the whole ones are programs, see tests/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from campaigns import adapters, damage, kill, runs
from safetensors.torch import save_file

from ppo_nlu.model import BUNDLED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> runs.Place:
    return runs.Place(tmp_path_factory.mktemp("campaign"))


def test_killed_runs_end_as_if_they_never_were(place: runs.Place) -> None:
    campaign = kill.Campaign(place, seed=3, kinds=["sft"])
    campaign.go(2)
    assert campaign.failures == [] and sum(campaign.kills.values()) == 2


def test_damage_is_a_line_or_changes_nothing(place: runs.Place) -> None:
    campaign = damage.Campaign(place, seed=2, kinds=["sft"])
    campaign.go(4)
    assert campaign.failures == [] and sum(campaign.outcomes.values()) == 4


def test_the_campaigns_notice_a_difference(place: runs.Place, tmp_path: Path) -> None:
    """A run that ends otherwise, and a file that is left, do not pass."""
    whole = runs.result(place.reference("sft"))
    assert runs.difference(whole, whole) == ""
    assert runs.difference(whole, whole | {"step 2": {}}) == "step 2"
    assert runs.difference(whole, {**whole, "more": b""}) == "more"
    (tmp_path / ".tmp-x").write_text("")
    assert runs.leftovers(tmp_path) and not runs.leftovers(place.reference("sft"))


# A checkout whose training takes no time; its one weight hangs on a constant and on the block.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy
from safetensors.numpy import save_file
from ppo_nlu import llama_block
folder = Path(sys.argv[-1])
(folder / "adapter").mkdir(parents=True)
weight = numpy.float32([1, {rate} + llama_block.attach(None)])
save_file({{"weight": weight}}, folder / "adapter" / "adapter_model.safetensors")
(folder / "metrics.jsonl").write_text(json.dumps({{"step": 1, "loss": 0.5}}))
(folder / "predictions.jsonl").write_text("")
"""


def _checkout(folder: Path, rate: str, block: int = 0) -> str:
    (folder / "ppo_nlu").mkdir(parents=True)
    (folder / "ppo_nlu" / "__init__.py").write_text("")
    (folder / "ppo_nlu" / "train.py").write_text(PROGRAM.format(rate=rate))
    (folder / "ppo_nlu" / "llama_block.py").write_text(f"def attach(decoder): return {block}")
    return str(folder)


def test_adapters_of_two_checkouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal, another constant, another block, and a program that fails."""
    old = _checkout(tmp_path / "old", "1.0")
    assert adapters.main([old, old, "--cases", "sft"]) == 0
    assert "same to the bit" in capsys.readouterr().out
    assert adapters.main([old, _checkout(tmp_path / "new", "1.5"), "--cases", "sft,grpo"]) == 1
    said = capsys.readouterr().out
    assert "adapter_model.safetensors weight differs by up to 0.5 (1 of 1 tensors)" in said
    assert "2 cases: 2 differ" in said
    block = _checkout(tmp_path / "block", "1.0", block=1)
    assert adapters.main([block, old, "--cases", "sft"]) == 1
    assert adapters.main([block, old, "--cases", "sft", "--without-blocks"]) == 0
    assert adapters.main([old, _checkout(tmp_path / "bad", "missing"), "--cases", "sft"]) == 1
    assert "exit code 1 in place of 0: NameError: name 'missing'" in capsys.readouterr().out


def _left(folder: Path, tensors: dict[str, torch.Tensor], loss: float, answer: str) -> Path:
    (folder / "adapter").mkdir(parents=True)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    row = {"step": 1, "loss": loss, "time/step_s": float(len(folder.name))}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "predictions.jsonl").write_text(f'{{"response": "{answer}"}}\n')
    return folder


@pytest.mark.parametrize(
    ("tensors", "loss", "answer", "told"),
    [
        ({"a": torch.zeros(2), "b": torch.ones(1)}, 0.5, "x", ""),
        ({"a": torch.tensor([0.0, -0.0]), "b": torch.ones(1)}, 0.5, "x", "a differs by up to 0 "),
        ({"a": torch.zeros(2)}, 0.5, "x", "b is only in OLD"),
        ({"a": torch.zeros(2).half(), "b": torch.ones(1)}, 0.5, "x", "a is torch.float16"),
        ({"a": torch.zeros(2), "b": torch.ones(1)}, 0.25, "x", "line 1: loss: 0.5 and 0.25"),
        ({"a": torch.zeros(2), "b": torch.ones(1)}, 0.5, "y", "predictions: line 1 (1 of 1 lines)"),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], loss: float, answer: str, told: str
) -> None:
    """Times differ in each, and are not compared; a negative zero is another bit."""
    old = _left(tmp_path / "old", {"a": torch.zeros(2), "b": torch.ones(1)}, 0.5, "x")
    said = adapters.difference(old, _left(tmp_path / "later", tensors, loss, answer), steps=1)
    assert told in said and bool(told) == bool(said)

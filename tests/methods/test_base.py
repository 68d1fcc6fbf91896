"""The shape of the methods: how far the loop is from the surrogate, and how calls are written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tiny

from ppo_nlu import config, losses
from ppo_nlu.methods import base, ppo
from ppo_nlu.methods.registry import METHODS

FOLDER = Path(base.__file__).parent


def test_every_name_of_the_config_has_a_class_with_the_two_verbs() -> None:
    assert tuple(METHODS) == config.METHODS
    for made in METHODS.values():
        assert isinstance(made, type) and made.__mro__[1] is base.Method, "two levels of classes"
        assert {"collect", "update"} <= vars(made).keys(), "on its own page"


def test_from_an_update_to_the_surrogate_are_four_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """And `train` above them makes five, in train.py, ppo.py and losses.py."""

    class ReachedError(Exception):
        pass

    def policy_loss(*args, **named):
        raise ReachedError

    method = ppo.PPO(config.Config(task="sst2"), tiny.SPECS, tiny.policy())
    batch = method.collect(tiny.examples(4), 0)
    monkeypatch.setattr(losses, "policy_loss", policy_loss)
    with pytest.raises(ReachedError) as caught:
        method.update(batch, 0)
    frames = [(entry.name, Path(entry.path).name) for entry in caught.traceback[1:]]
    assert frames[:-1] == [("update", "ppo.py"), ("loss", "ppo.py"), ("ppo_loss", "losses.py")]
    assert frames[-1][0] == "policy_loss"


def test_the_loop_calls_the_two_verbs_itself() -> None:
    source = (FOLDER.parent / "train.py").read_text("utf-8")
    (loop,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )
    calls = {ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)}
    assert {"method.collect", "method.update"} <= calls


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_call_has_more_than_seven_arguments_by_position(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            assert len(node.args) <= 7, f"{path.name}:{node.lineno}"
            if ast.unparse(node.func).endswith(("ppo_loss", "grpo_loss", "sft_loss")):
                assert not node.args, f"{path.name}:{node.lineno}: losses are called by keyword"
        if isinstance(node, ast.FunctionDef):
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= 8, f"{path.name}:{node.lineno}: seven beside self"

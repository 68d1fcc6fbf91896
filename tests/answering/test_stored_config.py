"""What a run folder may not switch on, and the command that resumes a run."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu import evaluate, export, predict, submit, train
from ppo_nlu.answering.stored_config import read_config, resume_command, stored_config
from ppo_nlu.config import dump, load_config
from ppo_nlu.errors import UserError
from ppo_nlu.model import BUNDLED
from ppo_nlu.runtime import cli


@pytest.fixture
def trusting(finished_run: Path, tmp_path: Path) -> Path:
    """A stranger's run whose config switches on the code of its base, which tells that it ran."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(BUNDLED, base, ignore=shutil.ignore_patterns("*.txt", "*.md"))
    (base / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    config["model_type"] = "their-own"
    (base / "config.json").write_text(json.dumps(config))
    shutil.copytree(finished_run, run)
    cfg = load_config(run / "config.yaml")
    model = replace(cfg.model, trust_remote_code=True, name_or_path=str(base))
    (run / "config.yaml").write_text(dump(replace(cfg, model=model)))
    return run


@pytest.mark.parametrize(
    "call",
    [
        lambda run: (predict.main, [run]),
        lambda run: (evaluate.main, [run]),
        lambda run: (evaluate.main, [run / "config.yaml"]),
        lambda run: (export.main, [run, "--output", run / "out"]),
        lambda run: (export.main, [run, "--output", run / "out", "--merge"]),
        lambda run: (submit.main, [run, "--benchmark", "glue", "--output", run / "out.zip"]),
        lambda run: (train.main, [run / "config.yaml", "--resume", run]),
        lambda run: (train.main, [run / "config.yaml", "--output", run / "out"]),
    ],
)
def test_a_run_folder_may_not_switch_on_code(
    trusting: Path, tmp_path: Path, capsys: Any, call: Callable[[Path], tuple[Any, list[Any]]]
) -> None:
    main, arguments = call(trusting)
    assert cli.run(main, [str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "add model.trust_remote_code=true" in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_the_command_line_may_switch_it_on(trusting: Path) -> None:
    said = "model.trust_remote_code=true"
    assert stored_config(trusting, [said]).model.trust_remote_code
    assert not stored_config(trusting, ["model.trust_remote_code=false"]).model.trust_remote_code
    # a config that the user wrote is his word
    own = trusting.parent / "own.yaml"
    shutil.copyfile(trusting / "config.yaml", own)
    assert read_config(own).model.trust_remote_code


@pytest.mark.parametrize("links", [["R/config.yaml"], ["b.yaml", "R/config.yaml"], ["R2/c.yaml"]])
def test_a_link_to_the_config_of_a_run_is_no_word_of_the_users(
    trusting: Path, tmp_path: Path, links: list[str]
) -> None:
    """Straight, over another link, and through a folder that is a link itself."""
    (tmp_path / "R").symlink_to(trusting)
    (tmp_path / "R2").symlink_to(trusting)
    (trusting / "c.yaml").symlink_to("config.yaml")
    names = ["a.yaml", *links[:-1]]
    for name, target in zip(names, links, strict=True):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError, match=r"add model.trust_remote_code=true"):
        read_config(tmp_path / "a.yaml", training=True)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop"):
        read_config(tmp_path / "loop")


def test_the_command_to_resume_can_be_typed(tmp_path: Path) -> None:
    """Spaces and quotes in the path, and what the run folder may not say by itself."""
    path = tmp_path / "c.yaml"
    path.write_text("task: sst2\nmodel: {trust_remote_code: true}\n")
    folder = Path("my runs/it's")
    words = shlex.split(resume_command(folder, load_config(path)))
    assert words[:3] == ["python", "-m", "ppo_nlu.train"]
    assert words[3:] == [
        str(folder / "config.yaml"),
        "model.trust_remote_code=true",
        "--resume",
        str(folder),
    ]

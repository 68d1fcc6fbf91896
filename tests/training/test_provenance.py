"""What a resumed run is compared by."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppo_nlu import evaluate, export, predict, teach_form, train
from ppo_nlu.errors import UserError
from ppo_nlu.methods import base
from ppo_nlu.model import BUNDLED
from ppo_nlu.pretrain import __main__ as pretrain
from ppo_nlu.runtime import cli, run_folder
from ppo_nlu.storage import folders, locks
from ppo_nlu.tasks import Example
from ppo_nlu.training import provenance
from ppo_nlu.training.run import Run

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)

CONFIG = """\
task: mine
method: METHOD
model: {name_or_path: MODEL}
custom:
  {name: mine, train: TRAIN, dev: DEV, fields: [text], labels: [good, bad], query: "{text} Good?",
   reward: REWARD}
rollout: {batch_size: 4, max_new_tokens: 4}
ppo: {epochs: 1}
sft: {batch_size: 4}
lora: {r: 2, targets: attention}
train: {steps: 3, checkpoint_every: 1, eval_every: 1}
eval: {before: false, limit: 4, batch_size: 4, bootstrap: 0}
log: {plot: false, progress: false}
"""
REWARD = "def score(text, row):\n    return float(row['label'] in text)\n"


class Place:
    """A task of the user's own, with a base and a reward that a test can change."""

    def __init__(self, root: Path):
        self.root, self.run = root, root / "a run"
        self.base = root / "base"
        shutil.copytree(BUNDLED, self.base, ignore=shutil.ignore_patterns("*.txt", "*.md"))
        for name in ("train", "dev"):
            self.rows(name, "a good film", "a bad film", "so good", "so bad")

    def rows(self, name: str, *texts: str) -> None:
        labels = ["good" if "good" in text else "bad" for text in texts]
        lines = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
        (self.root / f"{name}.csv").write_text("\n".join(["text,label", *lines, ""]))

    def config(self, method: str = "sft", reward: str = "auto") -> Path:
        text = CONFIG.replace("METHOD", method).replace("MODEL", str(self.base))
        text = text.replace("TRAIN", str(self.root / "train.csv"))
        text = text.replace("DEV", str(self.root / "dev.csv")).replace("REWARD", reward)
        path = self.root / "config.yaml"
        path.write_text(text)
        return path

    def stopped(self, patch: pytest.MonkeyPatch, config: Path, *more: str) -> None:
        """A run that was stopped behind its second step."""
        real = train._told

        def told(run: Run, *rest: Any) -> dict[str, Any]:
            if run.step == 2:
                raise KeyboardInterrupt
            return real(run, *rest)

        with patch.context() as inside:
            inside.setattr(train, "_told", told)
            assert start(config, *more, "--output", self.run) == 130

    def resume(self, *more: str) -> int:
        return start(self.run / "config.yaml", *more, "--resume", self.run)


def start(*arguments: object) -> int:
    return cli.run(train.main, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- --resume on other inputs -----------------------------------------------------------------


def one_weight(place: Place) -> None:
    """The same shapes, one number of one tensor another."""
    path = place.base / "model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[5] += 0.5
    save_file(tensors, path, {"format": "pt"})


def chat_template(place: Place) -> None:
    (place.base / "chat_template.jinja").write_text("{{ messages[0].content }}")


def theta(place: Place) -> None:
    path = place.base / "config.json"
    config = json.loads(path.read_text()) | {"rms_norm_eps": 3e-5}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.rows("train", "a good film", "bad"), "now: training rows (mine)"),
        (lambda p: p.rows("dev", "a good film", "bad"), "now: evaluation rows (mine)"),
        (one_weight, "model.safetensors"),
        (chat_template, "chat_template.jinja"),
        (theta, "config.json"),
    ],
)
def test_other_inputs_are_refused_and_nothing_is_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any, change: Any, words: str
) -> None:
    place.stopped(monkeypatch, place.config())
    before = snapshot(place.run)
    change(place)
    capsys.readouterr()
    assert place.resume() == 2
    error = capsys.readouterr().err
    assert words in error and "--resume" in error and error.count("\n") == 1
    assert snapshot(place.run) == before


def test_an_edited_config_in_the_run_folder_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The run would go on with it, and its first steps were made with another."""
    place.stopped(monkeypatch, place.config())
    path = place.run / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("lr: 0.0002", "lr: 0.0003"))
    assert path.read_text() != text
    capsys.readouterr()
    assert place.resume() == 2
    error = capsys.readouterr().err
    assert "now: config (optim.lr)" in error and error.count("\n") == 1
    path.write_text(text.replace("checkpoint_every: 1", "checkpoint_every: 2"))
    assert place.resume() == 0


@pytest.mark.slow
def test_a_run_of_relative_paths_works_from_any_folder(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And after it was moved; no file of the adapter tells the machine's paths."""
    config = place.config()
    config.write_text(config.read_text().replace(f"{place.root}/", ""))
    monkeypatch.chdir(place.root)
    place.stopped(monkeypatch, Path("config.yaml"))
    (place.root / "elsewhere").mkdir()
    monkeypatch.chdir(place.root / "elsewhere")
    assert start("../a run/config.yaml", "--resume", "../a run") == 0
    shutil.move("../a run", "moved")
    for main, words in (
        (evaluate.main, ["moved"]),
        (predict.main, ["moved", "prompt.shots=1", "--input", "../dev.csv", "--output", "a.csv"]),
        (export.main, ["moved", "--merge", "--output", "merged"]),
    ):
        assert cli.run(main, words) == 0
    for path in Path("moved/adapter").iterdir():
        assert str(place.root).encode() not in path.read_bytes()


@pytest.mark.slow
def test_a_folder_may_be_named_relatively_when_a_run_is_resumed(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place.stopped(monkeypatch, place.config())
    monkeypatch.chdir(place.root)
    assert start("config.yaml", "model.name_or_path=base/", "--resume", "a run") == 0
    assert "another" not in capsys.readouterr().out


def test_a_relative_path_that_an_earlier_version_noted_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    now: dict[str, Any] = {key: {} for key in (*provenance.REFUSED, *provenance.TOLD)}
    before = now | {"config": {"model.name_or_path": "base", "init_from": "runs/a"}}
    now["config"] = {
        "model.name_or_path": str(tmp_path / "base"),
        "init_from": str(tmp_path / "runs" / "a"),
    }
    assert provenance.compare(tmp_path, before, now) == []
    before["config"]["model.name_or_path"] = "other"
    with pytest.raises(UserError, match=r"config \(model.name_or_path\)"):
        provenance.compare(tmp_path, before, now)


def test_a_key_that_an_earlier_version_did_not_have_is_at_its_default(tmp_path: Path) -> None:
    now: dict[str, Any] = {name: {} for name in provenance.REFUSED} | dict.fromkeys(provenance.TOLD)
    now["config"] = {"seed": 0, "eval.label_scores": "sum"}
    before = now | {"config": {"seed": 0}}
    assert provenance.compare(tmp_path, before, now) == []
    now["config"] = {"seed": 0, "eval.label_scores": "prior"}
    with pytest.raises(UserError, match=r"config \(eval.label_scores\)"):
        provenance.compare(tmp_path, before, now)


def test_another_start_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first = place.root / "first"
    assert start(place.config(), "train.steps=1", "--output", first) == 0
    place.stopped(monkeypatch, place.config(), f"init_from={first}")
    weights = first / "adapter" / "adapter_model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    (first / "adapter" / folders.CHECKSUMS).unlink()
    assert place.resume() == 2
    assert "now: init_from (adapter_model.safetensors)" in capsys.readouterr().err


def test_another_reward_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The file of the reward itself, and one that it imports."""
    from ppo_nlu.tasks import rewards

    package = place.root / "their_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("from their_rewards.inner import score\n")
    (package / "inner.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(place.root))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    said = "custom.reward=their_rewards:score"

    def fresh() -> None:
        rewards.load.cache_clear()
        for name in ("their_rewards", "their_rewards.inner"):
            sys.modules.pop(name, None)

    fresh()
    place.stopped(monkeypatch, place.config("ppo"), said)
    fresh()
    assert place.resume() == 2  # a run folder may not name code
    assert shlex.quote(said) in capsys.readouterr().err
    (package / "inner.py").write_text(REWARD + "\n")
    fresh()
    assert place.resume(said) == 2
    assert "now: reward (their_rewards:score)" in capsys.readouterr().err
    (package / "inner.py").write_text(REWARD)
    fresh()
    assert place.resume(said) == 0
    fresh()


def before_the_end(err: str) -> list[str]:
    """What stderr says besides the warnings of the end, of a model that has learned nothing."""
    return [line for line in err.splitlines() if not line.startswith("warning: mine: ")]


def test_another_machine_is_told_and_gone_on_with(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place.stopped(monkeypatch, place.config())
    capsys.readouterr()
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    monkeypatch.setattr(provenance, "_version", lambda package: "0.0.1")
    try:
        assert place.resume("eval.bootstrap=10") == 0
    finally:
        torch.set_num_threads(before)
    out, err = capsys.readouterr()
    (line,) = before_the_end(err)
    assert f"threads {before} before, {before + 1} now" in line and "0.0.1 now" in line
    assert "last bits" in line
    assert "resumed with another eval.bootstrap" in out


def test_the_same_inputs_are_told_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    place.stopped(monkeypatch, place.config())
    capsys.readouterr()
    assert place.resume() == 0
    out, err = capsys.readouterr()
    assert before_the_end(err) == [] and "resumed after step 2 of 3" in out


def test_rows_differ_by_all_that_they_hold() -> None:
    row = Example("1", {"text": "good"}, "good", "mine", "g", {"row": {"a": "1"}})
    others = [
        replace(row, id="2"), replace(row, fields={"text": "bad"}), replace(row, label=None),
        replace(row, group=""), replace(row, extra={"row": {"a": "2"}}), replace(row, task="x"),
    ]  # fmt: skip
    found = {provenance.rows_hash([each]) for each in (row, *others)}
    assert len(found) == 7
    assert provenance.rows_hash([row, others[0]]) != provenance.rows_hash([others[0], row])


def test_every_tensor_of_a_large_file_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beyond the size that is hashed whole: each tensor's first, middle and last bytes."""
    monkeypatch.setattr(provenance, "_WHOLE", 1000)
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.zeros(40, 40) for name in "abc"}
    save_file(tensors, path)
    first = provenance.stamp(tmp_path)
    assert provenance.stamp(tmp_path) == first and list(first) == [path.name]
    for name in "abc":
        for place in (0, 800, 1599):
            changed = {key: tensor.clone() for key, tensor in tensors.items()}
            changed[name].view(-1)[place] = 1.0
            save_file(changed, path)
            assert provenance.stamp(tmp_path) != first, (name, place)
    path.write_bytes(b"no safetensors file" * 1000)
    assert provenance.stamp(tmp_path) != first


def test_a_stamp_is_cheap(tmp_path: Path) -> None:
    """At most 0.1 s for a model of 1 GB in 300 tensors; the file has holes, reading has not."""
    names = [f"{number:03d}" for number in range(300)]
    size = 3_500_000
    table = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [k * size, (k + 1) * size]}
        for k, name in enumerate(names)
    }
    header = json.dumps(table).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size * len(names))
    began = time.process_time()
    provenance.stamp(tmp_path)
    provenance.own_source()
    assert time.process_time() - began < 0.1


def typed(error: str) -> list[str]:
    """The words behind the program's name of the command in a line of error."""
    return shlex.split(error.partition("go on with: python -m ppo_nlu.train ")[2])


def test_the_command_in_a_line_of_error_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A run with a reward of the user's own: while it trains, and while it is loaded again."""
    (place.root / "my_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(place.root))
    config = place.config("ppo", "my_reward:score")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(train, "_told", full)
        assert start(config, "--output", place.run) == 2
    words = typed(capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(base, "build_optimizer", broken)
        assert start(*words) == 1
    error = capsys.readouterr().err
    crash = place.run / "crash.txt"
    assert str(crash) in error and "in broken" in crash.read_text() and typed(error) == words
    assert start(*words) == 0
    assert not crash.exists()  # the run is whole


def test_a_second_process_is_refused(place: Place, capsys: Any) -> None:
    """A run folder in which another process works: one line, and nothing is changed."""
    assert start(place.config(), "--output", place.run) == 0
    with locks.FolderLock(place.run):
        before = snapshot(place.run)
        capsys.readouterr()
        assert place.resume() == 2
        error = capsys.readouterr().err
        assert "is working in it" in error and error.count("\n") == 1
        assert start(place.config(), "--output", place.run) == 2
        error = capsys.readouterr().err
        assert f"process {os.getpid()} on" in error and "is working in it" in error
        assert "--resume" not in error and snapshot(place.run) == before
    assert not (place.run / locks.LOCK).exists()
    with pytest.raises(UserError, match="a finished run"):
        run_folder.require_free(place.run)


def test_no_program_works_in_a_taken_folder(place: Place, capsys: Any) -> None:
    """Nor do those that train without a run folder."""
    tiny = place.root / "tiny.yaml"
    tiny.write_text("{}\n")
    folder = place.root / "taken"
    folder.mkdir()
    for main, config in ((teach_form.main, place.config()), (pretrain.main, tiny)):
        with locks.FolderLock(folder):
            assert cli.run(main, [str(config), "--output", str(folder)]) == 2
        error = capsys.readouterr().err
        assert "is working in it" in error and error.count("\n") == 1
        assert not list(folder.iterdir())

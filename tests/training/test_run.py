"""How a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short_run import QUICK, run

from ppo_nlu import evaluate, predict, train
from ppo_nlu.data import shots
from ppo_nlu.methods import memory
from ppo_nlu.model import BUNDLED
from ppo_nlu.runtime import cli
from ppo_nlu.training.run import Run

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


def test_the_memory_plan_comes_before_the_first_step(config: Path, tmp_path: Path, capsys) -> None:
    assert run(config, *QUICK, "train.steps=1", "--output", tmp_path / "run") == 0
    out, err = capsys.readouterr()
    plan = out.index("memory plan: ")
    assert out.index("model: ") < plan < out.index("run folder: ")
    assert "weights 14 MiB" in out and "micro-batch: no limit of tokens" in out
    assert out.index("run folder: ") < out.index("old log-probs are taken")
    # nor is any other word on stderr that is no warning of the end
    assert all(line.startswith("warning: SST-2: ") for line in err.splitlines())


def test_a_gpus_limit_reaches_the_method(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's number of tokens, while the run's own config stays as it was given."""
    seen = []
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * 2**20)
    original = train.train

    def spy(at: Run, stop: Any) -> None:
        assert at.method.budget is not None
        seen.append(at.method.budget.tokens)
        original(at, stop)

    monkeypatch.setattr(train, "train", spy)
    assert run(config, *QUICK, "train.steps=1", "--output", tmp_path / "run") == 0
    assert 100 < seen[0] < 40 * 2**20 / (20 * 2**10)  # at least 20 KiB a token and layer
    assert "micro_batch_tokens: 0\n" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_the_shots_are_drawn_once_a_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """For the memory plan, training and every evaluation: each draw reads the training file."""
    drawn, original = [], shots._drawn
    monkeypatch.setattr(shots, "_drawn", lambda *a: [drawn.append(1), original(*a)][1])
    more = (f"method={method}", "prompt.shots=1", "train.steps=2", "train.eval_every=1")
    assert run(config, *QUICK, *more, "eval.limit=2", "--output", tmp_path / "run") == 0
    assert len(drawn) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "encoder"])
def test_texts_of_one_word_and_of_thousands(tmp_path: Path, capsys, method: str) -> None:
    """In train, evaluate and predict; prompts that are cut are told before and after training."""
    path, config, folder = tmp_path / "a.csv", tmp_path / "c.yaml", tmp_path / "run"
    texts = ["word", "word " * 3000, "other", "third"]
    path.write_text("text,label\n" + "".join(f"{t},{'AB'[n % 2]}\n" for n, t in enumerate(texts)))
    config.write_text(
        "task: t\ncustom: {name: t, fields: [text], query: 'Judge {text}.', labels: [A, B],\n"
        f"  train: {path}, dev: {path}}}\n"
        "rollout: {max_new_tokens: 4}\n"
        "sft: {batch_size: 4}\nencoder: {batch_size: 4}\ntrain: {steps: 1}\neval: {bootstrap: 0}\n"
    )
    assert run(config, *QUICK, f"method={method}", "--output", folder) == 0
    out, err = capsys.readouterr()
    limit = {"encoder": "128 tokens (encoder.max_length)"}.get(method, "2,044 tokens (the context)")
    told = f"warning: t: about 1 of 4 rows to train on are longer than {limit}; the end of their"
    assert told in err
    if method != "encoder":
        line = "prompts cut to fit: 1 of 4 in training, 1 of 4 in the evaluation"
        assert line in out.splitlines()
    assert cli.run(evaluate.main, [str(folder), "--decode", "greedy"]) == 0
    answers = str(tmp_path / "answers.jsonl")
    assert cli.run(predict.main, [str(folder), "--input", str(path), "--output", answers]) == 0
    assert len(Path(answers).read_text().splitlines()) == 4

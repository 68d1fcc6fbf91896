"""Whole runs of every method through the programs: SFT, PPO from SFT, several tasks, an encoder,
few-shot, the user's own task, chat; and that each resumes to the last bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ppo_nlu import data, evaluate, export, predict, teach_form, train
from ppo_nlu.answering.answer import DECODES
from ppo_nlu.config import PromptConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import grpo, ppo, sft
from ppo_nlu.methods.prompts import fit_prompt
from ppo_nlu.methods.report import check_form
from ppo_nlu.model import BUNDLED
from ppo_nlu.runtime import checkpoint, cli
from ppo_nlu.tasks import Example, get_task

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)

COMMON = """
data: {path: glue}
lora: {r: 4}
rollout: {batch_size: 8, max_new_tokens: 4}
ppo: {minibatch_size: 4, epochs: 1}
sft: {batch_size: 6}
encoder: {batch_size: 6}
optim: {name: adamw, lr: 1.0e-3}
train: {steps: 4, eval_every: 2, checkpoint_every: 1}
eval: {limit: 8, batch_size: 8, bootstrap: 20}
log: {plot: false, progress: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with small SST-2 and CoLA files in the official layouts."""
    monkeypatch.chdir(tmp_path)
    for name in ("SST-2", "CoLA"):
        (tmp_path / "glue" / name).mkdir(parents=True)
    for split, rows in (("train", 40), ("dev", 12)):
        sst2 = [
            "sentence\tlabel",
            *(f"film {split} number {i} is long \t{i % 2}" for i in range(rows)),
        ]
        cola = [f"x\t{int(i % 3 > 0)}\t\tBill {split} sang {i} songs." for i in range(rows)]
        (tmp_path / "glue" / "SST-2" / f"{split}.tsv").write_text("\n".join(sst2) + "\n")
        (tmp_path / "glue" / "CoLA" / f"{split}.tsv").write_text("\n".join(cola) + "\n")
    return tmp_path


def write(folder: Path, head: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(head + COMMON)
    return path


def run(*arguments: object) -> int:
    return cli.run(train.main, [str(a) for a in arguments])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [
        *folder.glob("adapter/adapter_model.safetensors"),
        *folder.glob("encoder/*.safetensors"),
    ]
    return load_file(path)


@pytest.mark.parametrize(
    ("head", "module", "name"),
    [
        ("task: sst2\nmethod: sft\n", sft.SFT, "update"),
        ("tasks: [sst2, cola]\nmethod: sft\nmixture: {mixing: equal}\n", sft.SFT, "update"),
        ("tasks: [sst2, cola]\nreward: {normalise: true}\n", ppo.PPO, "update"),
        ("task: sst2\nmethod: grpo\ngrpo: {kl_coef: 0.1, drop_even: false}\n", grpo.GRPO, "update"),
        ("tasks: [sst2, cola]\nmethod: grpo\nreward: {normalise: true}\n", grpo.GRPO, "update"),
        ("task: cola\nmethod: encoder\n", train.mixture, "batch"),
    ],
)
def test_every_method_resumes_to_the_last_bit(
    folder: Path, head: str, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(folder, head)
    assert run(config, "--output", "whole") == 0
    original, calls = getattr(module, name), []

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        assert run(config, "--output", "cut") == 143
    assert not (folder / "cut" / "summary.json").exists()
    assert run("cut/config.yaml", "--resume", "cut") == 0
    wanted, found = weights(folder / "whole"), weights(folder / "cut")
    assert wanted.keys() == found.keys() and len(wanted) > 2
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)

    def timeless(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if "time/" not in k} for row in lines(path)]

    assert timeless(folder / "whole" / "metrics.jsonl") == timeless(
        folder / "cut" / "metrics.jsonl"
    )


def test_several_tasks_have_rewards_tables_and_predictions_of_their_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(folder, "tasks: [sst2, cola]\n")
    assert run(config, "--output", "run") == 0
    out = capsys.readouterr().out
    assert "SST-2, dev: accuracy" in out and "CoLA, dev: mcc" in out and "Mean over" in out
    log = lines(folder / "run" / "metrics.jsonl")
    assert all("reward/sst2/mean" in row or "reward/cola/mean" in row for row in log)
    assert "eval/cola/mcc" in log[1] and "eval/sst2/accuracy" in log[1]
    summary = read(folder / "run" / "summary.json")
    assert summary["task"] == "sst2+cola" and set(summary["tasks"]) == {"sst2", "cola"}
    for when in ("before", "after"):
        for decode in DECODES:
            each = [entry[when][decode] for entry in summary["tasks"].values()]
            assert summary[when][decode] == pytest.approx(sum(each) / 2)
    for entry in summary["tasks"].values():
        assert entry["train_partial"] is False
        assert "CoLA" in entry["train_note"] or "SST-2" in entry["train_note"]
    rows = lines(folder / "run" / "predictions.jsonl")
    assert [row["task"] for row in rows] == ["sst2"] * 8 + ["cola"] * 8
    # One of the two, by name, from the same adapter.
    (folder / "new.txt").write_text("Bill sang.\n")
    arguments = ["run", "--input", "new.txt", "--output", "a.jsonl"]
    assert cli.run(predict.main, arguments) == 2
    assert "--task" in capsys.readouterr().err
    assert cli.run(predict.main, [*arguments, "--task", "cola"]) == 0
    assert set(lines(folder / "a.jsonl")[0]["probabilities"]) == {"Yes", "No"}
    assert cli.run(evaluate.main, ["run", "--output", "scores"]) == 0
    assert set(read(folder / "scores" / "summary.json")["tasks"]) == {"sst2", "cola"}
    assert (folder / "scores" / "cola" / "predictions-score.jsonl").is_file()


def test_sft_counts_its_labels_and_leaves_an_adapter_for_ppo(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(folder, "task: sst2\nmethod: sft\n")
    assert run(config, "--output", "sft") == 0
    summary = read(folder / "sft" / "summary.json")
    assert summary["method"] == "sft" and summary["train_samples"] == 4 * 6
    assert not (folder / "sft" / "adapter" / "value_head.safetensors").exists()
    assert "\nbase " in capsys.readouterr().out
    from_sft = ("method=ppo", "init_from=sft", "eval.base=true", "ppo.kl_coef=0.1")
    assert run(config, *from_sft, "--output", "ppo") == 0
    shown = capsys.readouterr().out
    assert shown.index("\nbase ") < shown.index("\nstart ") < shown.index("\ntuned ")
    first = lines(folder / "ppo" / "metrics.jsonl")[0]
    # The SFT adapter is policy and reference at once, so the KL starts at 0.
    assert first["kl/ref"] == pytest.approx(0, abs=1e-4)
    found = read(folder / "ppo" / "summary.json")
    assert found["before"]["score"] == summary["after"]["score"]  # of the start: the SFT adapter
    assert found["base"] == summary["before"] and summary["base"] is None
    # The finished run is whole without the one it started from.
    shutil.rmtree(folder / "sft")
    assert cli.run(evaluate.main, ["ppo", "--output", "again"]) == 0
    again = read(folder / "again" / "summary.json")["after"]
    assert again == read(folder / "ppo" / "summary.json")["after"]


def test_grpo_is_evaluated_and_exported_like_any_other_run(folder: Path) -> None:
    """8 answers a prompt, no critic: none is saved, none is asked for."""
    config = write(folder, "task: sst2\nmethod: grpo\n")
    assert run(config, "--output", "run") == 0
    summary = read(folder / "run" / "summary.json")
    assert summary["method"] == "grpo" and summary["train_labels"] == 4 * 8
    assert summary["train_samples"] == 4 * 8 * 8
    log = lines(folder / "run" / "metrics.jsonl")
    assert all(0 <= row["grpo/even_groups"] <= 8 and "kl/ref" not in row for row in log)
    assert not (folder / "run" / "adapter" / "value_head.safetensors").exists()
    assert cli.run(evaluate.main, ["run", "--output", "again", "--decode", "greedy"]) == 0
    again = read(folder / "again" / "summary.json")
    assert again["after"]["greedy"] == summary["after"]["greedy"]
    assert cli.run(export.main, ["run", "--output", "exported"]) == 0


def test_an_encoder_is_evaluated_and_answers_like_any_other_run(folder: Path) -> None:
    config = write(folder, "task: cola\nmethod: encoder\n")
    assert run(config, "--output", "run") == 0
    summary = read(folder / "run" / "summary.json")
    assert summary["before"] is None and set(summary["after"]) == {
        "sample",
        "greedy",
        "score",
        "unparsed",
    }
    (folder / "new.txt").write_text("Bill sang.\nSang Bill it.\n")
    assert cli.run(predict.main, ["run", "--input", "new.txt", "--output", "a.jsonl"]) == 0
    rows = lines(folder / "a.jsonl")
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)


def test_few_shot_evaluation_shows_the_rows_of_training_and_says_what_it_is(folder: Path) -> None:
    config = write(folder, "task: sst2\n")
    for shots, method in ((0, "zero-shot"), (2, "few-shot")):
        arguments = [str(config), f"prompt.shots={shots}", "--output", method]
        assert cli.run(evaluate.main, arguments) == 0
        assert read(folder / method / "summary.json")["method"] == method
    # A diagnostic set shows rows of the task it belongs to.
    (folder / "glue" / "MNLI").mkdir()
    (folder / "glue" / "AX").mkdir()
    head = "sentence1\tsentence2\tgold_label\n"
    rows = "".join(f"p {i}\th {i}\tneutral\n" for i in range(8))
    (folder / "glue" / "MNLI" / "train.tsv").write_text(head + rows)
    full = "Premise\tHypothesis\tLabel\r\na\tb\tentailment\r\nc\td\tneutral\r\n"
    (folder / "glue" / "AX" / "diagnostic-full.tsv").write_text(full)
    assert cli.run(evaluate.main, [str(config), "task=ax", "prompt.shots=2"]) == 0
    many = [str(config), "prompt.shots=2", "data.max_prompt_tokens=120", "--output", "tight"]
    assert cli.run(evaluate.main, many) == 0
    assert read(folder / "tight" / "summary.json")["dropped_eval_shots"] > 0


OWN = """
task: mine
custom:
  name: mine
  train: mine.csv
  fields: [text]
  query: 'Is "{text}" long?'
  labels: [no, yes]
"""


def test_a_task_of_one_s_own_from_file_to_predictions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "mine.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([f'a "quoted", text {i}', ("no", "yes")[i % 2]] for i in range(60))
    config = write(folder, OWN)
    assert cli.run(train.main, [str(config), "data.path=null", "--output", "run"]) == 0
    assert "mine, dev: accuracy" in capsys.readouterr().out
    (folder / "new.csv").write_text('text\n"a, b"\nc\n')
    arguments = ["run", "--input", "new.csv", "--output", "answers.csv"]
    assert cli.run(predict.main, arguments) == 0
    with (folder / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["a, b", "c"]
    assert all(row["prediction"] in ("no", "yes") for row in rows)


def test_a_run_says_that_it_learned_from_a_part_of_the_official_set(folder: Path) -> None:
    (folder / "glue" / "QNLI").mkdir()
    for name, count in (("train.subset10k.tsv", 20), ("dev.tsv", 8)):
        rows = [
            f"{i}\tWho sang {i}?\tBill did.\t{'not_' * (i % 2)}entailment" for i in range(count)
        ]
        text = "\n".join(["index\tquestion\tsentence\tlabel", *rows, ""])
        (folder / "glue" / "QNLI" / name).write_text(text)
    assert run(write(folder, "task: qnli\n"), "--output", "run") == 0
    entry = read(folder / "run" / "summary.json")["tasks"]["qnli"]
    assert entry["train_partial"] is True and "train.subset10k.tsv" in entry["train_note"]
    assert entry["partial"] is False


@pytest.mark.slow
def test_a_form_is_taught_without_a_label(folder: Path, capsys) -> None:
    """The bundled model never says CoLA's words. After 40 steps it does, whatever the labels in the
    file."""
    config = write(folder, "task: cola\n")
    arguments = [str(config), "train.steps=40", "sft.batch_size=8", "--output", "form"]
    assert cli.run(teach_form.main, arguments) == 0
    summary = read(folder / "form" / "summary.json")
    assert summary["unparsed_before"]["cola"] > 0.9 and summary["unparsed_after"]["cola"] < 0.3
    taught = load_file(folder / "form" / "model" / "model.safetensors")
    swapped = folder / "glue" / "CoLA" / "train.tsv"
    text = swapped.read_text().replace("\t0\t", "\t@\t").replace("\t1\t", "\t0\t")
    swapped.write_text(text.replace("\t@\t", "\t1\t"))
    assert cli.run(teach_form.main, [*arguments[:-1], "again"]) == 0
    again = load_file(folder / "again" / "model" / "model.safetensors")
    assert all(torch.equal(taught[key], again[key]) for key in taught)
    # What the bundled model has seen stays left out of the training of its offspring.
    assert data.saw_labels(str(folder / "form" / "model")) and data.saw_labels("bundled")
    assert not data.saw_labels("no/such/model")
    # A task whose files are not there does not keep the others from it.
    capsys.readouterr()
    two = write(folder, "tasks: [qqp, cola]\n")
    some = [str(two), "train.steps=1", "sft.batch_size=4", "--output", "some"]
    assert cli.run(teach_form.main, some) == 0
    assert "warning: qqp is left out" in capsys.readouterr().err
    assert read(folder / "some" / "summary.json")["left_out"] == ["qqp"]
    config = write(folder, "task: cola\n")
    assert run(config, "model.name_or_path=form/model", "--output", "run") == 0
    assert cli.run(teach_form.main, arguments) == 2


def test_a_base_without_the_form_is_told_at_the_first_step() -> None:
    assert check_form(0.5) == []
    assert "teach_form" in check_form(0.95)[0]


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_the_chat_form_wraps_the_same_text_once() -> None:
    policy = tiny.pretrained("stories260K")
    row = Example("1", {"sentence": "a good film"}, "Positive", "sst2")
    style = PromptConfig(chat_template=True)
    with pytest.raises(UserError, match=r"prompt.chat_template"):
        fit_prompt(policy, tiny.SST2, row, 1000, style)
    policy.tokenizer.chat_template = CHAT
    fit = fit_prompt(policy, tiny.SST2, row, 1000, style)
    assert fit.text.startswith("<s>[system] You read a sentence") and "[user] Now judge" in fit.text
    assert fit.text.endswith("[assistant] <Judgement>")
    assert fit.ids.count(policy.tokenizer.bos_token_id) == 1
    policy.tokenizer.chat_template = NO_SYSTEM + CHAT
    merged = fit_prompt(policy, tiny.SST2, row, 1000, style)
    assert merged.text.startswith("<s>[user] You read a sentence") and "Now judge" in merged.text


def test_what_is_missing_in_the_config_is_told(folder: Path, capsys) -> None:
    config = write(folder, "task: sst2\n")
    for override, words in (
        (["tasks=[sst2, cola]"], "keep one of the two"),
        (["task=null", "tasks=[sst2, sst2]"], "names a task twice"),
        (["task=null", "tasks=[sst2, cola]", "method=encoder"], "one head"),
        (["prompt.form=analysis"], "hold no reason"),
        (["task=rte"], "glue/rte or superglue/rte"),
        (["task=nope"], "unknown task"),
    ):
        assert run(config, *override) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert checkpoint.latest(folder) is None
    assert get_task("MNLI-m").name == "mnli"

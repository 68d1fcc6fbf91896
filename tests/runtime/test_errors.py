"""The user's mistakes: exit code 2, one line that says where and how to mend it, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_nlu import evaluate, export, predict, train
from ppo_nlu.model import BUNDLED
from ppo_nlu.runtime import checkpoint, cli, run_folder

ROOT = Path(__file__).resolve().parents[2]
OTHER_MODEL = ROOT.parent / "shared" / "models" / "tinystories-656k"

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)

CONFIG = """\
task: sst2
data: {path: DATA, exclude_pretraining_labels: false}
rollout: {batch_size: 4, max_new_tokens: 4}
ppo: {epochs: 1}
train: {steps: 2, checkpoint_every: 1}
eval: {before: false, limit: 4, batch_size: 4}
log: {plot: false, progress: false}
"""
HEADER = "sentence\tlabel\n"
GOOD = HEADER + "a good film\t1\na bad film\t0\n" * 4


class Place:
    """A folder with a config and data that are in order, for a test to spoil."""

    def __init__(self, root: Path):
        self.root, self.config, self.data = root, root / "run.yaml", root / "data" / "SST-2"
        self.run = root / "run"
        self.data.mkdir(parents=True)
        for split in ("train", "dev"):
            (self.data / f"{split}.tsv").write_text(GOOD)
        self.yaml("")

    def yaml(self, more: str) -> Path:
        self.config.write_text(CONFIG.replace("DATA", str(self.root / "data")) + more)
        return self.config

    def model(self, **files: bytes | None) -> Path:
        """A copy of the bundled model with some files replaced or (None) left out."""
        folder = self.root / "model"
        folder.mkdir()
        changed = {name.replace("__", "."): content for name, content in files.items()}
        for path in BUNDLED.iterdir():
            if path.name not in changed and path.name != "seen_labels.txt":
                shutil.copyfile(path, folder / path.name)
        for name, content in changed.items():
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    def unfinished(self) -> Path:
        """A run that was begun and has left nothing yet."""
        from ppo_nlu.config import dump, load_config

        run_folder.claim(self.run, dump(load_config(self.config))).release()
        return self.run

    def snapshot(self) -> dict[str, bytes]:
        files = (path for path in self.root.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def refused(
    main: Callable[[list[str]], int], arguments: list[object], words: list[str], capsys: Any
) -> None:
    """The program ends with 2 and one line on stderr that has all the words."""
    capsys.readouterr()
    code = cli.run(main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


# Each case spoils something and gives the arguments of ppo_nlu.train, without --output.
Case = Callable[[Place], list[object]]


def yaml(more: str) -> Case:
    return lambda place: [place.yaml(more)]


def text(content: str) -> Case:
    def case(place: Place) -> list[object]:
        place.config.write_text(content)
        return [place.config]

    return case


def given(*overrides: str) -> Case:
    return lambda place: [place.config, *overrides]


def table(split: str, content: bytes | None) -> Case:
    def case(place: Place) -> list[object]:
        path = place.data / f"{split}.tsv"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        return [place.config]

    return case


def zipped(place: Place) -> list[object]:
    (place.data / "train.tsv").unlink()
    (place.data / "train.tsv.gz").write_bytes(b"\x1f\x8b\x08 cut off")
    return [place.config]


def unlabelled(place: Place) -> list[object]:
    (place.data / "test.tsv").write_text("index\tsentence\n0\ta\n")
    return [place.config, "eval.split=test"]


def no_task(place: Place) -> list[object]:
    shutil.rmtree(place.data)
    return [place.config]


def model(**files: bytes | None) -> Case:
    return lambda place: [place.config, f"model.name_or_path={place.model(**files)}"]


def emptied_model(place: Place) -> list[object]:
    folder = place.root / "model"
    folder.mkdir()
    return [place.config, f"model.name_or_path={folder}"]


class Evil:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


def pickled_model(place: Place) -> list[object]:
    folder = place.model(model__safetensors=None)
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    return [place.config, f"model.name_or_path={folder}"]


def model_without_a_tensor(place: Place) -> list[object]:
    from safetensors.torch import load_file, save_file

    folder = place.model()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return [place.config, f"model.name_or_path={folder}"]


TRAIN_ERRORS: dict[str, tuple[Case, list[str]]] = {
    "missing YAML": (lambda p: [p.root / "rum.yaml"], ["rum.yaml: no such file", "run.yaml?"]),
    "malformed YAML": (text("task: sst2\nppo: {clip: 1"), ["run.yaml:2: not valid YAML", "check"]),
    "unknown key": (yaml("model: {dtyp: x}\n"), [".yaml:8: model.dtyp", "mean model.dtype?"]),
    "duplicate key": (yaml("seed: 1\nseed: 2\n"), [".yaml:9: seed", "given twice", "keep one"]),
    "wrong type": (yaml("seed: yes\n"), [".yaml:8: seed", "expected a whole number, got 'yes'"]),
    "wrong clip": (given("ppo.clip=-1"), ["command line: ppo.clip", "more than 0"]),
    "wrong rank": (given("lora.r=0"), ["command line: lora.r", "at least 1"]),
    "no override": (given("seed"), ["command line: 'seed'", "section.key=value"]),
    "unknown option": (given("--outptu=x"), ["--outptu", "--help"]),
    "unknown task": (given("task=sst3"), ["task: unknown task 'sst3'", "did you mean 'sst2'?"]),
    "unknown method": (given("method=dpo"), ["command line: method", "use ppo"]),
    "no such data": (given("data.path=/no/where"), ["data.path: /no/where", "train.tsv"]),
    "data without the task": (no_task, ["data.path: ", "does not hold SST-2", "glue/SST-2/"]),
    "no data at all": (
        given("data.path=null", "data.url=http://127.0.0.1:9"),
        ["data.path: no SST-2 data", "data.fallback=bundled"],
    ),
    "unreadable data": (
        table("train", HEADER.encode() + b"\xff\t1\n"),
        ["train.tsv:2: not UTF-8", "save it as UTF-8"],
    ),
    "damaged gzip": (zipped, ["train.tsv.gz: cannot be read"]),
    "wrong columns": (
        table("train", b"text\tlabel\na\t1\n"),
        ["train.tsv:1: the header has the columns text, label; expected columns: sentence, label"],
    ),
    "unknown label": (
        table("dev", HEADER.encode() + b"a\t1\nb\t2\n"),
        ["dev.tsv:3: SST-2 has no label '2'; it has 1, 0"],
    ),
    "empty split": (table("dev", HEADER.encode()), ["dev.tsv: there are no rows"]),
    "missing split": (table("dev", None), ["no dev split", "dev.tsv is not there"]),
    "unlabelled split": (
        unlabelled,
        ["eval.split: test has no labels", "use dev"],
    ),
    "nothing left": (given("data.min_words=9"), ["data.min_words", "lower data.min_words (9)"]),
    "no model folder": (
        given("model.name_or_path=/no/where"),
        ["model.name_or_path: there is no folder /no/where", "check the path"],
    ),
    "empty model folder": (emptied_model, ["model.name_or_path", "no config.json", "give"]),
    "damaged weights": (
        model(model__safetensors=b"x" * 99),
        ["model.name_or_path: cannot load", "header too large", "give a folder"],
    ),
    "missing weights": (
        model_without_a_tensor,
        ["model.name_or_path", "not whole", "model.layers.0.mlp.up_proj.weight"],
    ),
    "damaged model config": (
        model(config__json=b'{"model_type": '),
        ["model.name_or_path: cannot load", "not a valid JSON"],
    ),
    "damaged tokenizer": (
        model(tokenizer__json=b"{}"),
        ["model.name_or_path: cannot load", "give a folder with config.json"],
    ),
    "pickled weights": (pickled_model, ["model.name_or_path: cannot load", "pickle of more"]),
    "targets without a layer": (
        given("lora.targets=[query_key]"),
        ["lora.targets: query_key matches no linear layer", "self_attn.q_proj"],
    ),
    "targets as a word": (given("lora.targets=q_proj"), ["lora.targets", "[q_proj]"]),
    "no room for a prompt": (
        given("rollout.max_new_tokens=100000"),
        ["rollout.max_new_tokens: 100000 leaves no room", "lower it"],
    ),
    "too little for the form": (
        given("data.max_prompt_tokens=9"),
        ["data.max_prompt_tokens", "9 are allowed"],
    ),
    "no adapter to start from": (
        given("init_from=/no/where"),
        ["init_from: /no/where holds no adapter_config.json", "give"],
    ),
}


@pytest.mark.parametrize("name", TRAIN_ERRORS)
def test_train_refuses(place: Place, capsys: Any, name: str) -> None:
    case, words = TRAIN_ERRORS[name]
    arguments = case(place)
    before = place.snapshot()
    refused(train.main, [*arguments, "--output", place.run], words, capsys)
    assert place.snapshot() == before  # nothing lost, and no run folder left behind
    assert not Path("unpickled").exists()


def test_a_hub_name_without_network_is_told_at_once(place: Place, capsys: Any) -> None:
    """The library alone repeats every request for half a minute."""
    began = time.process_time(), time.monotonic()
    arguments = [place.config, "model.name_or_path=some-one/some-model", "--output", place.run]
    refused(train.main, arguments, ["model.name_or_path", "some-one/some-model"], capsys)
    waited = time.monotonic() - began[1] - (time.process_time() - began[0])
    assert waited < 20
    assert not place.run.exists()


@pytest.mark.skipif(not OTHER_MODEL.is_dir(), reason="needs a model with a lossy tokenizer")
def test_a_tokenizer_that_loses_the_tag(place: Place, capsys: Any) -> None:
    arguments = [place.config, f"model.name_or_path={OTHER_MODEL}", "--output", place.run]
    words = ["model.name_or_path: the tokenizer of", "Positive </Judgement>", "use a model whose"]
    refused(train.main, arguments, words, capsys)
    assert not place.run.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(place: Place, capsys: Any) -> None:
    arguments = [place.config, "model.device=cuda", "--output", place.run]
    refused(train.main, arguments, ["model.device: cuda", "use cpu or auto"], capsys)
    assert not place.run.exists()


def test_an_output_that_is_taken(place: Place, capsys: Any) -> None:
    place.run.mkdir()
    (place.run / "thesis.tex").write_text("years of work")
    before = place.snapshot()

    def told(output: Path, words: list[str]) -> None:
        refused(train.main, [place.config, "--output", output], words, capsys)

    told(place.run, [str(place.run), "is not empty and no run of ppo_nlu", "--output"])
    told(place.config, ["run.yaml: is a file; name a folder with --output"])
    told(place.config / "run", ["run.yaml/run: cannot be written", "check the folder"])
    assert place.snapshot() == before
    (place.run / "thesis.tex").unlink()
    place.unfinished()
    before = place.snapshot()
    told(place.run, ["holds an unfinished run", f"--resume {place.run}"])
    both = [place.config, "--output", place.run, "--resume", place.run]
    refused(train.main, both, ["not allowed with argument", "--help"], capsys)
    assert place.snapshot() == before


def test_a_resume_that_cannot_be(place: Place, capsys: Any) -> None:
    def told(arguments: list[object], words: list[str]) -> None:
        before = place.snapshot()
        refused(train.main, [place.config, *arguments], words, capsys)
        assert place.snapshot() == before

    told(["--resume", place.run], [f"{place.run}: no such run folder"])
    told(["--resume", place.data], [f"{place.data}: not a run folder", "ppo_nlu.train wrote"])
    place.unfinished()
    told(
        ["ppo.clip=0.1", "optim.lr=1", "--resume", place.run],
        ["another config (differs in ppo.clip, optim.lr)", f"{place.run}/config.yaml", "--output"],
    )
    damaged = place.run / "checkpoints" / "step_000001"
    checkpoint.save(place.run, 1, {"adapter": {}}, {})
    (damaged / "adapter.safetensors").write_bytes(b"\0" * 20)
    told(["--resume", place.run], [f"{damaged}/adapter.safetensors: the checkpoint is damaged"])
    (damaged / "state.json").write_text("{")
    told(["--resume", place.run], [f"{damaged}/state.json: not a checkpoint, or damaged"])
    (damaged / "state.json").write_text('{"format": 1, "step": 1, "files": [], "state": {}}')
    told(["--resume", place.run], [f"{damaged}: checkpoint format 1, this version reads 2"])


def test_a_full_disk_keeps_what_was_saved(
    place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_new

    def full(path: Path, data: bytes) -> None:
        if "step_000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_new", full)
        words = ["step_000002: no space left on the disk", "free some space", "--resume"]
        refused(train.main, [place.config, "--output", place.run], words, capsys)
    assert [p.name for p in (place.run / "checkpoints").iterdir()] == ["step_000001"]
    resume = [str(place.run / "config.yaml"), "--resume", str(place.run)]
    assert cli.run(train.main, resume) == 0
    assert "resumed after step 1 of 2" in capsys.readouterr().out


def test_a_prompt_too_long_is_cut_and_counted(place: Place, capsys: Any) -> None:
    long = "a film that goes on and on " * 1000
    (place.data / "train.tsv").write_text(f"{HEADER}{long}\t0\n")
    arguments = [str(place.config), "train.steps=1", "--output", str(place.run)]
    assert cli.run(train.main, arguments) == 0
    assert '"truncated_prompts": 4' in (place.run / "summary.json").read_text()
    assert '"answer/truncated_prompts": 4' in (place.run / "metrics.jsonl").read_text()


def inputs(place: Place, name: str, content: str) -> Path:
    path = place.root / name
    path.write_text(content)
    return path


@pytest.mark.parametrize("program", ["evaluate", "predict", "export"])
def test_what_is_no_finished_run(place: Place, capsys: Any, program: str) -> None:
    main: Any = {"evaluate": evaluate.main, "predict": predict.main, "export": export.main}[program]
    more = {"export": ["--output", place.root / "out"]}.get(program, [])
    place.unfinished()
    before = place.snapshot()
    refused(main, [place.data, *more], [f"{place.data}: not a run folder"], capsys)
    refused(main, [place.run, *more], [str(place.run), "no adapter/", "finish"], capsys)
    nowhere = "no such file" if program == "evaluate" else "no such run folder"
    refused(main, [place.root / "nowhere", *more], [nowhere], capsys)
    assert place.snapshot() == before


PREDICT_ERRORS: dict[str, tuple[Callable[[Place], list[object]], list[str]]] = {
    "missing input": (lambda p: ["--input", "/no/x.txt"], ["--input /no/x.txt: no such file"]),
    "unknown kind of input": (
        lambda p: ["--input", inputs(p, "x.pdf", "a")],
        ["x.pdf: unknown kind of file", ".jsonl"],
    ),
    "wrong columns": (
        lambda p: ["--input", inputs(p, "x.csv", "text\na\n")],
        ["x.csv:1: the header has the columns text; expected columns: sentence"],
    ),
    "a row too short": (
        lambda p: ["--input", inputs(p, "x.tsv", "id\tsentence\n1\ta\n2\n")],
        ["x.tsv:3: 1 columns; the header has 2"],
    ),
    "not JSON": (lambda p: ["--input", inputs(p, "x.jsonl", "{")], ["x.jsonl:1: not JSON"]),
    "unknown label": (
        lambda p: ["--input", inputs(p, "x.jsonl", '{"sentence": "a", "label": "7"}')],
        ["x.jsonl:1: SST-2 has no label '7'"],
    ),
    "no rows": (lambda p: ["--input", inputs(p, "x.txt", "")], ["x.txt: there are no rows"]),
    "unknown output format": (
        lambda p: ["--input", inputs(p, "x.txt", "a"), "--output", p.root / "y.xml"],
        ["y.xml: unknown format; use .jsonl, .csv, .tsv"],
    ),
    "output there already": (
        lambda p: ["--input", inputs(p, "x.txt", "a"), "--output", inputs(p, "y.csv", "dear")],
        ["y.csv: exists already", "new file"],
    ),
    "output nowhere": (
        lambda p: ["--input", inputs(p, "x.txt", "a"), "--output", "/no/where.csv"],
        ["there is no folder /no; make it first"],
    ),
    "another rank": (
        lambda p: ["lora.r=8", "--input", inputs(p, "x.txt", "a")],
        ["adapter_config.json: r is 4", "lora.r=8", "make them agree"],
    ),
}


@pytest.mark.parametrize("name", PREDICT_ERRORS)
def test_predict_refuses(place: Place, finished_run: Path, capsys: Any, name: str) -> None:
    case, words = PREDICT_ERRORS[name]
    arguments = case(place)
    before = place.snapshot()
    refused(predict.main, [finished_run, *arguments], words, capsys)
    assert place.snapshot() == before


def test_evaluate_refuses(place: Place, finished_run: Path, capsys: Any) -> None:
    out = place.root / "results"
    told = [finished_run, "--output"]
    refused(evaluate.main, [*told, place.config], ["run.yaml: is a file"], capsys)
    refused(evaluate.main, [*told, place.root], ["holds files of other kinds"], capsys)
    refused(evaluate.main, [*told, out, "--decode", "beam"], ["--decode", "--help"], capsys)
    empty = [place.config, "--split", "test", "--output", out]
    refused(evaluate.main, empty, ["no test split", "test.tsv is not there"], capsys)
    assert not out.exists()


def test_a_run_without_its_value_head(place: Place, finished_run: Path, capsys: Any) -> None:
    copy = place.root / "copy"
    shutil.copytree(finished_run, copy)
    head = copy / "adapter" / "value_head.safetensors"
    head.write_bytes(head.read_bytes()[:50])
    source = inputs(place, "x.txt", "a")
    refused(predict.main, [copy, "--input", source], ["value_head.safetensors", "--resume"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("override", ["ppo.clipp=1", "lora.targets=[query_key]"])
def test_a_real_process_says_one_line(place: Place, override: str) -> None:
    """Nothing else gets to stderr: no traceback, and no warning of a library."""
    command = [sys.executable, "-m", "ppo_nlu.train", str(place.config), override]
    command += ["--output", str(place.run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert override.partition("=")[0] in done.stderr
    assert not place.run.exists()

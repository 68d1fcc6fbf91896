"""Prediction: every kind of file in and out, order, probabilities, and nothing half-written."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppo_nlu import predict
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.answering.load_run import load_trained, run_config
from ppo_nlu.answering.new_rows import FORMATS
from ppo_nlu.config import EvalConfig
from ppo_nlu.runtime import cli
from ppo_nlu.tasks import Example, get_task

SPEC = get_task("sst2")
SENTENCES = [
    "a film",
    'she calls it " great " , and it is not',
    "dull , dull , dull and much too long for what little it has to say about anything at all",
    "é 中 ; funny",
    "a triumph",
]


def jsonl(rows: list[str]) -> str:
    return "".join(json.dumps({"sentence": row}) + "\n" for row in rows)


def comma(rows: list[str]) -> str:
    out = io.StringIO()
    table = csv.writer(out)
    table.writerows([["sentence"], *([row] for row in rows)])
    return out.getvalue()


KINDS: dict[str, Callable[[list[str]], str]] = {
    ".txt": lambda rows: "\n".join(rows) + "\n",
    ".csv": comma,
    ".tsv": lambda rows: "sentence\n" + "".join(row + "\n" for row in rows),
    ".jsonl": jsonl,
}


@pytest.fixture
def once(finished_run: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any) -> Path:
    """The finished run, its model loaded only once for all tests."""
    monkeypatch.setattr(predict, "load_trained", lambda cfg, run_dir: loaded)
    return finished_run


@pytest.fixture(scope="module")
def loaded(finished_run: Path) -> Any:
    return load_trained(run_config(finished_run), finished_run)


@pytest.fixture(scope="module")
def wanted(loaded: Any) -> list[dict[str, float]]:
    """The label probabilities of the sentences, one row at a time."""
    rows = [Example(str(i), {"sentence": s}, None) for i, s in enumerate(SENTENCES)]
    found = [next(loaded.answer(SPEC, [row], "score")) for row in rows]
    return [row.probabilities or {} for row in found]


def write(folder: Path, suffix: str, rows: list[str]) -> Path:
    path = folder / f"in{suffix}"
    path.write_text(KINDS[suffix](rows), encoding="utf-8", newline="")
    return path


def run(*arguments: object) -> int:
    return cli.run(predict.main, [str(argument) for argument in arguments])


def check(rows: list[dict[str, Any]], wanted: list[dict[str, float]]) -> None:
    """In the order of the input, with the right probabilities, and the likelier word."""
    assert [row["sentence"] for row in rows] == SENTENCES
    for row, expected in zip(rows, wanted, strict=True):
        found = row["probabilities"]
        assert sum(found.values()) == pytest.approx(1, abs=1e-6)
        assert found == pytest.approx(expected, abs=1e-5)
        assert row["prediction"] == max(found, key=lambda word: found[word])


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_input(
    once: Path, tmp_path: Path, wanted: list[dict[str, float]], suffix: str, capsys: Any
) -> None:
    assert run(once, "--input", write(tmp_path, suffix, SENTENCES)) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    rows = [json.loads(line) for line in shown.out.splitlines()]
    check(rows, wanted)
    assert [row["id"] for row in rows] == [str(i) for i in range(len(SENTENCES))]


def test_what_is_no_file_is_said_before_the_model_is_loaded(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(predict, "load_trained", None)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dead.csv").symlink_to("nowhere")
    good = write(tmp_path, ".txt", SENTENCES)
    cases: list[tuple[list[object], str]] = [
        (["--input", tmp_path / "pipe.txt"], "is not a regular file"),
        (["--input", tmp_path], "is not a regular file"),
        (["--input", "/dev/null"], "is not a regular file"),
        (["--input", tmp_path / "dead.csv"], "no such file"),
        (["--input", "x" * 300 + ".txt"], "File name too long"),
        (["--input", good, "--output", tmp_path / ("x" * 300 + ".csv")], "name is too long"),
        (["--input", good, "--output", tmp_path / ("x" * 300) / "a.csv"], "make it first"),
        (["--input", good, "--output", tmp_path / "dead.csv"], "exists already"),
    ]
    for words, reason in cases:
        assert run(finished_run, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {words[-2]} ") and reason in error
        assert error.count("\n") == 1


def test_sentences_from_stdin(
    once: Path, wanted: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(SENTENCES) + "\n"))
    assert run(once) == 0
    check([json.loads(line) for line in capsys.readouterr().out.splitlines()], wanted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert run(once) == 2
    assert "no sentence came on stdin" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert run(once) == 2
    assert "stdin is not UTF-8" in capsys.readouterr().err


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if path.suffix == ".csv":
        cells = list(csv.reader(io.StringIO(text)))
    else:
        cells = [line.split("\t") for line in text.splitlines()]
    rows: list[dict[str, Any]] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    for row in rows:
        row["probabilities"] = {word: float(row.pop(f"p_{word}")) for word in SPEC.words}
    return rows


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_output(
    once: Path, tmp_path: Path, wanted: list[dict[str, float]], suffix: str, capsys: Any
) -> None:
    source, target = write(tmp_path, ".txt", SENTENCES), tmp_path / f"out{suffix}"
    assert run(once, "--input", source, "--output", target) == 0
    check(read(target), wanted)
    shown = capsys.readouterr()
    assert shown.out == "" and "predict" in shown.err and f"written: {target}" in shown.err
    # what was written can be read in again, and says the same
    again = tmp_path / f"again{suffix}"
    assert run(once, "log.progress=false", "--input", target, "--output", again) == 0
    assert capsys.readouterr().err == f"written: {again}\n"
    check(read(again), wanted)


def test_ids_and_labels_are_passed_on(once: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,sentence,label\nx7,a good film,1\ny,a bad film,Negative\nz,a film,\n")
    assert run(once, "--input", source) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["x7", "y", "z"]
    assert [row.get("label") for row in rows] == ["Positive", "Negative", None]


def test_a_tab_inside_a_sentence_does_not_break_the_tsv(once: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    source.write_text(jsonl(["a\tgood\nfilm", "b"]))
    assert run(once, "--input", source, "--output", target) == 0
    assert [row["sentence"] for row in read(target)] == ["a good film", "b"]


def test_an_error_in_the_middle_leaves_no_output(
    once: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 10 is wrong, and by then a window of eight has been answered and written."""
    monkeypatch.setattr(predict, "islice", lambda rows, n: list(_take(rows, 8)))
    source, target = write(tmp_path, ".jsonl", ["a film"] * 9), tmp_path / "out.csv"
    with source.open("a") as file:
        file.write("{}\n")
    assert run(once, "log.progress=false", "--input", source, "--output", target) == 2
    assert "in.jsonl:10: 'sentence' must be there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def _take(rows: Any, count: int) -> Any:
    for _, row in zip(range(count), rows, strict=False):
        yield row


def test_rows_are_read_a_window_at_a_time(loaded: Any) -> None:
    """An endless input is answered as it comes."""
    small = PolicyAnswerer(loaded.policy, replace(loaded.cfg, eval=EvalConfig(batch_size=1)))
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield Example(str(len(taken)), {"sentence": "a film"}, None)

    answers = predict.predict(small, SPEC, endless(), 16)
    assert [next(answers).example.id for _ in range(20)] == [str(i + 1) for i in range(20)]
    assert len(taken) == 32


def test_cells_that_a_spreadsheet_would_run_are_neutralised(once: Path, tmp_path: Path) -> None:
    """In .csv a text gets a `'` in front; ids and numbers, and other formats, stay as they are."""
    odd = ["=1+1", "+a", "-b", "@sum", "-1.5", "\uff1dx", "a=b"]
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "sentence"])
        table.writerows([f"={place}", text] for place, text in enumerate(odd))
    assert run(once, "--input", source, "--output", tmp_path / "a.csv") == 0
    assert run(once, "--input", source, "--output", tmp_path / "a.tsv") == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").open(newline="")))
    wanted = ["'=1+1", "'+a", "'-b", "'@sum", "-1.5", "'\uff1dx", "a=b"]
    assert [row["sentence"] for row in rows] == wanted
    assert [row["id"] for row in rows] == [f"={place}" for place in range(len(odd))]
    lines = (tmp_path / "a.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in lines] == odd


def test_json_on_a_terminal_of_few_letters_is_still_json(
    once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert run(once, "--input", write(tmp_path, ".txt", SENTENCES)) == 0
    lines = narrow.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert [json.loads(line)["sentence"] for line in lines] == SENTENCES


def test_stdin_that_is_closed(once: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(once) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_sentences_are_utf_8_whatever_the_terminal(
    once: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("é\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(once) == 0
    assert json.loads(capsys.readouterr().out)["sentence"] == "é"

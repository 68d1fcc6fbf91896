"""Prediction: every kind of file in and out, order, probabilities, and nothing half-written."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_nlu import predict
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.answering.load_run import load_trained, run_config
from ppo_nlu.answering.new_rows import FORMATS
from ppo_nlu.config import EvalConfig, dump, load_config
from ppo_nlu.model import lora
from ppo_nlu.runtime import checkpoint, cli
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
    monkeypatch.setattr(predict, "load_trained", lambda cfg, run_dir, which: loaded)
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


def read(path: Path, more: str = "") -> list[dict[str, Any]]:
    """The rows, with the probabilities of the columns that end in `more`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        found = [json.loads(line) for line in text.splitlines()]
        return [row | {"probabilities": row[f"probabilities{more}"]} for row in found]
    if path.suffix == ".csv":
        cells = list(csv.reader(io.StringIO(text)))
    else:
        cells = [line.split("\t") for line in text.splitlines()]
    rows: list[dict[str, Any]] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    for row in rows:
        row["probabilities"] = {word: float(row.pop(f"p_{word}{more}")) for word in SPEC.words}
    return rows


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_kind_of_output(
    once: Path, tmp_path: Path, wanted: list[dict[str, float]], suffix: str, capsys: Any
) -> None:
    source, target = write(tmp_path, ".txt", SENTENCES), tmp_path / f"out{suffix}"
    assert run(once, "--input", source, "--output", target) == 0
    check(read(target), wanted)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"written: {target}\n", "no bar in a pipe"
    # what was written can be read in again, and says the same behind the earlier answers
    again = tmp_path / f"again{suffix}"
    assert run(once, "log.progress=false", "--input", target, "--output", again) == 0
    note = "note: the input has a column 'prediction'; the new columns end in _2\n"
    assert capsys.readouterr().err == f"{note}written: {again}\n"
    first, second = read(target), read(again, "_2")
    check(second, wanted)
    assert [row.pop("prediction_2") for row in second] == [row["prediction"] for row in first]


CSV = """day,id,text,topic,,,=x
2026-01-02,T-7,"late, again
and again",Delivery,a,b,-
2026-01-03,T-9,broken lid,,,c,1.50
"""
TICKETS = """
task: tickets
custom:
  {name: tickets, train: t.csv, fields: [text], query: 'Topic of "{text}"?', label_column: topic,
   labels: [Delivery, Product]}
"""


@pytest.fixture
def tickets(once: Path, tmp_path: Path) -> Path:
    """The finished run as one of a task of the user's own."""
    run_dir = tmp_path / "run"
    shutil.copytree(once, run_dir)
    (tmp_path / "own.yaml").write_text(TICKETS + "lora: {r: 4}\nmodel: {device: cpu}\n")
    (run_dir / "config.yaml").write_text(dump(load_config(tmp_path / "own.yaml")))
    return run_dir


def test_a_csv_keeps_its_columns_and_the_answers_stand_behind_them(
    tickets: Path, tmp_path: Path
) -> None:
    """The label under its own name and with its own value, columns without a name, the id."""
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(CSV)
    assert run(tickets, "--input", source, "--output", target) == 0
    before = list(csv.reader(io.StringIO(CSV)))
    head, *rows = csv.reader(target.open(newline=""))
    assert head == [
        "day", "id", "text", "topic", "column_5", "column_6", "'=x",
        "prediction", "p_Delivery", "p_Product",
    ]  # fmt: skip
    before[1][-1] = "'-"
    assert [row[:7] for row in rows] == before[1:]
    for row in rows:
        shares = dict(zip(["Delivery", "Product"], map(float, row[8:]), strict=True))
        assert row[7] == max(shares, key=lambda word: shares[word])
        assert sum(shares.values()) == pytest.approx(1)


def test_json_keeps_its_values_and_their_types(tickets: Path, tmp_path: Path, capsys: Any) -> None:
    """Rows with different keys, in lines and in a table."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    given: list[dict[str, Any]] = [
        {"n": 7, "text": "late", "tags": ["a", {"b": None}], "share": 1.0},
        {"text": "broken", "topic": None, "open": True, "prediction": "x"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    assert run(tickets, "--input", source) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    for place, (row, wanted) in enumerate(zip(rows, given, strict=True)):
        own = ["prediction_2", "probabilities_2"]
        assert list(row) == ["id", *wanted, *own] and row["id"] == str(place)
        assert {name: row[name] for name in wanted} == wanted
    assert isinstance(rows[0]["share"], float) and isinstance(rows[0]["n"], int)
    assert run(tickets, "--input", source, "--output", target) == 0
    lines = [line.split("\t") for line in target.read_text().splitlines()]
    assert lines[0][:8] == ["id", "n", "text", "tags", "share", "topic", "open", "prediction"]
    assert lines[0][8:] == ["prediction_2", "p_Delivery_2", "p_Product_2"]
    assert lines[1][:8] == ["0", "7", "late", '["a", {"b": null}]', "1.0", "", "", ""]
    assert lines[2][:8] == ["1", "", "broken", "", "", "", "true", "x"]


def test_a_parquet_keeps_its_columns(tickets: Path, tmp_path: Path, capsys: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    days = [datetime.date(2026, 1, 2), None]
    table = pyarrow.table({"text": ["late", "x"], "n": [1, None], "day": days, "v": [[1.5], []]})
    parquet.write_table(table, tmp_path / "in.parquet")
    assert run(tickets, "--input", tmp_path / "in.parquet") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [
        {"id": "0", "text": "late", "n": 1, "day": "2026-01-02", "v": [1.5]},
        {"id": "1", "text": "x", "n": None, "day": None, "v": []},
    ]
    assert [dict(list(row.items())[:5]) for row in rows] == wanted


def test_texts_of_one_word_and_of_a_book(once: Path, tmp_path: Path, capsys: Any) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    book = " ".join(f"word{number % 977}" for number in range(100_000))
    source.write_text(f"ok\n{book}\n{book}\n")
    assert run(once, "log.progress=false", "--input", source, "--output", target) == 0
    assert "2 of 3 texts were cut" in capsys.readouterr().err
    assert [len(row["sentence"]) for row in read(target)] == [2, len(book), len(book)]


def test_the_weights_of_a_kept_checkpoint(
    finished_run: Path, loaded: Any, tmp_path: Path, capsys: Any
) -> None:
    """A run that was stopped after two steps: LoRA weights that are all zero are the base."""
    run_dir, source = tmp_path / "run", write(tmp_path, ".txt", SENTENCES)
    run_dir.mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copyfile(finished_run / name, run_dir / name)
    trained = lora.state_dict(loaded.policy.model)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    checkpoint.save(run_dir, 1, {"adapter": zeros}, {})
    checkpoint.save(run_dir, 2, {"adapter": trained}, {})
    shares = {}
    for which in ("step_1", "step_000002", "last"):
        assert run(run_dir, "--checkpoint", which, "--input", source) == 0
        shown = capsys.readouterr().out.splitlines()
        shares[which] = [json.loads(line)["probabilities"] for line in shown]
    rows = [Example(str(i), {"sentence": s}, None) for i, s in enumerate(SENTENCES)]
    after = [answer.probabilities for answer in loaded.answer(SPEC, rows, "score")]
    with lora.lora_disabled(loaded.policy.model):
        before = [answer.probabilities for answer in loaded.answer(SPEC, rows, "score")]
    for which, wanted in (("step_1", before), ("step_000002", after), ("last", after)):
        for found, share in zip(shares[which], wanted, strict=True):
            assert found == pytest.approx(share, abs=1e-5)
    assert before[0] != pytest.approx(after[0], abs=1e-3)
    for which, said in (
        ("best", "has no best checkpoint; train with train.eval_every=N"),
        ("step_3", "has no step_3 checkpoint; there are step_000001, step_000002"),
        ("newest", "--checkpoint newest: is no checkpoint; give best, last or step_N"),
    ):
        assert run(run_dir, "--checkpoint", which, "--input", source) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


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
    source, target = write(tmp_path, ".tsv", ["a film"] * 9), tmp_path / "out.csv"
    with source.open("a") as file:
        file.write("a\tfilm\n")
    assert run(once, "log.progress=false", "--input", source, "--output", target) == 2
    assert "in.tsv:11: 2 columns; the header has 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.tsv"]


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

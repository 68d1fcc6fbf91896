"""Rows in the user's own files: every kind of file, and what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from ppo_nlu.config import CustomConfig, DataConfig
from ppo_nlu.data import load_split, read_inputs, train_examples
from ppo_nlu.data.__main__ import main as data_program
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, Example, TaskSpec, get_task
from ppo_nlu.tasks.custom import CustomSpec, spec_of
from tests import tickets
from tests.data.files import SST2, json_lines_of, says


def _read(path: Path, text: str | bytes) -> list[Example]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return bare(read_inputs(path, SST2))


def bare(rows: Iterable[Example]) -> list[Example]:
    """The rows without what is passed on of them."""
    return [replace(row, extra={}) for row in rows]


def _example(id_: str, sentence: str, label: str | None = None) -> Example:
    return Example(id_, {"sentence": sentence}, label, "sst2")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "fine\r\nso \u2028 so\n", [_example("0", "fine"), _example("1", "so \u2028 so")]),
        ("a.txt", "fine\n\n \r\n", [_example("0", "fine")]),  # empty lines at the end
        ("a.tsv", "sentence\nfine\n\n", [_example("0", "fine")]),
        ("a.tsv", 'sentence\n"fine\n', [_example("0", '"fine')]),
        (
            "a.tsv",
            "index\tsentence\tlabel\n7\tfine\t1\n9\tdull\t\n",
            [_example("7", "fine", "Positive"), _example("9", "dull")],
        ),
        (
            "a.csv",
            '\ufefflabel,sentence\nnegative,"dull, ""very""\ndull"\n\n1,fine\n',
            [_example("0", 'dull, "very"\ndull', "Negative"), _example("1", "fine", "Positive")],
        ),
        (
            "a.jsonl",
            '{"sentence": "fine", "label": 1, "id": "x"}\n{"sentence": "dull", "label": null}',
            [_example("x", "fine", "Positive"), _example("1", "dull")],
        ),
    ],
)
def test_inputs_of_every_kind(
    tmp_path: Path, name: str, text: str, expected: list[Example]
) -> None:
    assert _read(tmp_path / name, text) == expected
    assert _read(tmp_path / f"{name}.gz", gzip.compress(text.encode())) == expected


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.xlsx", "x", ["a.xlsx", ".txt, .csv, .tsv, .jsonl, .parquet"]),
        ("a.txt", "", ["no rows"]),
        ("a.txt", "fine\n\ndull\n", ["a.txt:2", "empty line"]),
        ("a.txt", b"fine\n\xff\n", ["a.txt:2", "UTF-8"]),
        ("a.tsv", "sentence\tlabel\nfine\t1\ndull\n", ["a.tsv:3", "1 columns", "has 2"]),
        ("a.tsv", "text\nfine\n", ["a.tsv:1", "text", "sentence"]),
        ("a.tsv", "sentence\n", ["no rows"]),
        ("a.csv", "", ["a.csv:1", "sentence"]),
        ("a.csv", 'sentence,label\n"fi\nne",1\na,b,c\n', ["a.csv:4", "3 columns", "has 2"]),
        ("a.csv", 'sentence\n"never closed\n', ["a.csv:2", "not CSV"]),
        ("a.csv", "sentence,label\nfine,2\n", ["a.csv:2", "'2'", "1, 0"]),
        ("a.jsonl", '{"sentence": "fine"}\n{oops\n', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "not JSON"]),
        ("a.jsonl", "1" * 5000, ["a.jsonl:1", "not JSON"]),
        ("a.jsonl", '"fine"\n', ["a.jsonl:1", "object"]),
        ("a.jsonl", '{"text": "fine"}\n', ["a.jsonl:1", "'sentence'"]),
        ("a.jsonl", '{"sentence": 3}\n', ["a.jsonl:1", "'sentence'", "string"]),
        ("a.jsonl", '{"sentence": "\\ud800"}\n', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", '{"sentence": "fine", "label": true}\n', ["a.jsonl:1", "'true'"]),
    ],
)
def test_bad_inputs_are_named_with_their_line(
    tmp_path: Path, name: str, text: str | bytes, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _read(tmp_path / name, text)
    says(error, name, *parts)


def test_inputs_stream_and_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 10 + b"\xff\n")
    rows = read_inputs(path, SST2)
    assert [next(rows).id for _ in range(10)] == [str(n) for n in range(10)]
    with pytest.raises(UserError, match=r"a\.txt:11"):
        next(rows)
    with pytest.raises(UserError, match=r"b\.csv: cannot be read: No such file"):
        list(read_inputs(tmp_path / "b.csv", SST2))


def test_a_task_of_two_fields_takes_no_plain_text(tmp_path: Path) -> None:
    pair = TaskSpec("p", "Pair", "glue", "P", "", "", ("a", "b"), SST2.labels)
    (tmp_path / "x.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"x\.txt: Pair has the fields a, b"):
        read_inputs(tmp_path / "x.txt", pair)


@pytest.mark.parametrize("name", TASKS)
def test_rows_to_predict_by_the_names_of_the_fields(tmp_path: Path, name: str) -> None:
    spec = TASKS[name]
    row = {field: f"the {field}" for field in spec.fields}
    (tmp_path / "a.jsonl").write_text(json_lines_of(row))
    (found,) = bare(read_inputs(tmp_path / "a.jsonl", spec))
    assert found == Example("0", row, None, name)
    for ending, sign in (("tsv", "\t"), ("csv", ",")):
        lines = [sign.join(spec.fields), sign.join(row.values())]
        (tmp_path / f"a.{ending}").write_text("\n".join(lines))
        assert next(read_inputs(tmp_path / f"a.{ending}", spec)).fields == row


def test_rows_to_predict_by_the_official_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("index\tsentence1\tsentence2\tgold_label\n5\tA\tB\tneutral\n")
    fields = {"premise": "A", "hypothesis": "B"}
    assert bare(read_inputs(path, get_task("mnli"))) == [Example("5", fields, "Neutral", "mnli")]
    (tmp_path / "a.jsonl").write_text('{"sentence1": "A", "sentence2": "B"}\n')
    assert next(read_inputs(tmp_path / "a.jsonl", get_task("ax-b"))).fields == fields
    path.write_text("premise\tsentence1\thypothesis\nA\tx\tB\n")  # its own name wins
    assert next(read_inputs(path, get_task("mnli"))).fields == fields
    path.write_text("sentence1\tsentence2\tscore\nA\tB\t4.2\n")
    assert next(read_inputs(path, get_task("stsb"))).label == "4.2"


# ---- rows without a label or a text


def _tickets(path: Path, missing: str, fields: tuple[str, ...] = ("text",)) -> CustomSpec:
    """The task of the ticket file, as train, dev and test."""
    section = CustomConfig(
        name="tickets",
        train=str(path),
        dev=str(path),
        test=str(path),
        fields=list(fields),
        query="Judge {text}.",
        label_column="category",
        missing=missing,
        labels=list(tickets.SHARES),
    )
    return spec_of(section)


def test_rows_without_a_label_or_a_text_are_refused_with_their_number(tmp_path: Path) -> None:
    rows = tickets.write(tmp_path / "t.csv", 1500)
    lines, place = (tmp_path / "t.csv").read_text("utf-8").splitlines(), ""
    for number, line in enumerate(lines, start=1):  # the first row that ends so or has no text
        if line.endswith(",") or (line.startswith("T-") and not line.split(",")[1].strip()):
            place = f"t.csv:{number}: "
            break
    labels = sum(not row["category"] for row in rows)
    texts = sum(not row["text"].strip() and bool(row["category"]) for row in rows)
    assert (labels, texts) == (3, 2)
    for split in ("train", "dev"):
        with pytest.raises(UserError) as error:
            load_split(_tickets(tmp_path / "t.csv", "error"), split, DataConfig())
        says(error, place, "is empty", "3 rows have no label", "2 rows have no text")
        says(error, "mend them, or leave them out: custom.missing=drop")


def test_rows_without_a_label_or_a_text_are_dropped_and_told(tmp_path: Path, capsys) -> None:
    rows = tickets.write(tmp_path / "t.csv", 1500)
    whole = [n for n, row in enumerate(rows) if row["category"] and row["text"].strip()]
    spec = _tickets(tmp_path / "t.csv", "drop")
    for split in ("train", "dev"):
        found = load_split(spec, split, DataConfig())
        assert [row.id for row in found.examples] == [f"{split}-{n}" for n in whole]
        assert "3 rows left out: no label" in found.note and found.malformed == 5
        assert "2 rows left out: no text" in found.note
    assert "2 rows left out: no text" in train_examples(spec, DataConfig(), False).note
    # What is to be predicted is never dropped.
    assert len(load_split(spec, "test", DataConfig()).examples) == 1500
    assert len(list(read_inputs(tmp_path / "t.csv", spec))) == 1500
    config = tmp_path / "c.yaml"
    config.write_text(
        "task: t\ncustom: {name: t, fields: [text], query: 'Judge {text}.', missing: drop,\n"
        f"  label_column: category, train: {tmp_path / 't.csv'}, labels: {list(tickets.SHARES)}}}\n"
    )
    assert data_program(["check", str(config)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told.count("t train: 3 rows left out: no label") == 1
    assert "t train: 2 rows left out: no text" in told and not [
        line for line in told if line.startswith("t dev: ") and "left out" in line
    ]
    header, train = told[0].split(), told[1]
    assert "left" in header and "  5  " in train


def test_what_counts_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "a", "channel": "", "category": "Praise"},
        {"text": None, "channel": " \u200b", "category": "Praise"},
        {"text": "b", "channel": "x", "category": None},
        {"text": "c", "channel": "x"},
        {"text": "NA", "channel": "nan", "category": "Praise"},  # words like any other
    ]
    path.write_text(json_lines_of(*rows))
    spec = _tickets(path, "drop", ("text", "channel"))
    found = load_split(spec, "train", DataConfig())
    assert [row.id for row in found.examples] == ["train-0", "train-4"]
    assert "2 rows left out: no label" in found.note and "1 rows left out: no text" in found.note
    with pytest.raises(
        UserError, match=r"a\.jsonl:2: 'text' and 'channel' are empty; 1 row has no"
    ):
        load_split(_tickets(path, "error", ("text", "channel")), "train", DataConfig())
    path.write_text(json_lines_of(*rows[2:4]))
    with pytest.raises(UserError, match="no row is left: 2 rows have no label"):
        load_split(spec, "train", DataConfig())
    path.write_text(json_lines_of(*rows[3:4]))  # no row at all has the column
    with pytest.raises(UserError, match=r"a\.jsonl:1: there is no 'category'; name the column"):
        load_split(spec, "train", DataConfig())

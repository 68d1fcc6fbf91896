"""Tasks of the user's own: what the config may say, their files, and the share kept for dev."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ppo_nlu.config import Config, CustomConfig, DataConfig, load_config
from ppo_nlu.data import load_split, read_inputs, train_examples
from ppo_nlu.data.__main__ import main as check_data
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, Label, Rating, get_task
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.custom import DESCRIPTION, METRICS, spec_of, specs_of
from ppo_nlu.tasks.prompts import answer, render
from ppo_nlu.tasks.rewards import reward

MOOD = CustomConfig(
    name="mood",
    fields=["text"],
    query='Now judge the feeling of the message "{text}".',
    labels={"Positive": ["Normal"], "Negative": ["Depression", "Anxiety"]},
)
CFG = DataConfig()


def test_labels_may_be_a_map_or_a_list() -> None:
    spec = spec_of(MOOD)
    assert spec.words == ("Positive", "Negative") and spec.kind == "choice"
    assert spec.word_of("Anxiety") == "Negative" and spec.submitted_as("Negative") == "Depression"
    assert (spec.metrics, spec.reward, spec.description) == (("accuracy",), "label", DESCRIPTION)
    assert spec_of(replace(MOOD, labels=["Up", "Down"])).labels == (
        Label("Up", "Up"),
        Label("Down", "Down"),
    )
    one = {"Up": "1", "Down": ["0"]}  # a text stands for a list of one
    assert spec_of(replace(MOOD, labels=one)).word_of("1") == "Up"  # type: ignore[arg-type]


def test_a_range_makes_a_rating_and_neither_makes_free_text() -> None:
    rated = spec_of(replace(MOOD, labels=[], low=1.0, high=3.0, step=0.5))
    assert rated.rating == Rating(1.0, 3.0, 0.5) and rated.words == (
        "1.0",
        "1.5",
        "2.0",
        "2.5",
        "3.0",
    )
    assert (rated.metrics, rated.reward) == (("pearson", "spearman"), "rating")
    free = spec_of(replace(MOOD, labels=[]))
    assert (free.kind, free.metrics, free.reward) == ("text", ("exact", "token_f1"), "f1")
    assert spec_of(replace(MOOD, labels=[], reward="exact")).reward == "exact"
    assert spec_of(replace(MOOD, metrics=["mcc", "f1"])).metrics == ("mcc", "f1")
    for path in ("mine.rewards:score", "mine.rewards.score", "mine:score"):
        assert spec_of(replace(MOOD, reward=path)).reward == path


def test_the_metrics_are_those_of_the_metrics_room() -> None:
    from ppo_nlu.tasks import metrics

    for kind, names in METRICS.items():
        assert all(metrics.METRICS[name].kind == kind for name in names)


@pytest.mark.parametrize(
    ("key", "changed", "part"),
    [
        ("name", {"name": None}, "None is not a name"),
        ("name", {"name": "my mood"}, "use letters"),
        ("name", {"name": "sst2"}, "is a task of the tables"),
        ("fields", {"fields": []}, "is empty"),
        ("fields", {"fields": ["text", "text"]}, "'text' is there twice"),
        ("fields", {"fields": ["text", "a.b"]}, "'a.b' cannot be"),
        ("label_column", {"label_column": "text"}, "is a field too"),
        (
            "query",
            {"query": None},
            'is missing; write what is asked of a row, such as Now judge "{text}"',
        ),
        ("query", {"query": "Judge {message}."}, "{message} is not in custom.fields (text)"),
        ("query", {"query": "Judge {}."}, "{} is not in"),
        ("query", {"query": "Judge {text!r}."}, "write {text} alone"),
        ("query", {"query": "Judge {text:>9}."}, "write {text} alone"),
        ("query", {"query": "Judge {text"}, "write {{ and }}"),
        ("query", {"query": "Judge it."}, "holds no text of the row; add {text}"),
        ("description", {"description": "On {topic}."}, "{topic} is not in custom.fields"),
        ("labels", {"labels": ["Only"]}, "has 1 word"),
        ("labels", {"labels": ["Up", ""]}, "'' cannot be a label word"),
        ("labels", {"labels": ["Up", "</Judgement>"]}, "cannot be a label word"),
        ("labels", {"labels": ["Up", "Down", "up"]}, "are the same word"),
        ("labels", {"labels": ["Stra\u00dfe", "Weg", "STRASSE"]}, "are the same word"),
        ("labels", {"labels": ["Ca\u0301t", "C\u00e1t"]}, "are the same word"),
        ("labels", {"labels": ["very good", "bad", "Very  good"]}, "are the same word"),
        ("labels", {"labels": ["\u200b", "Down"]}, "cannot be a label word"),
        ("labels", {"labels": {"Up": ["1"], "Down": [" "]}}, "'Down' has an empty value"),
        ("labels", {"labels": {"Up": ["1"], "Down": []}}, "'Down' has no value"),
        ("labels", {"labels": {"Up": ["1"], "Down": ["0", "1"]}}, "the value '1' is listed twice"),
        ("low", {"low": 0.0}, "labels or a range, not both"),
        ("high", {"labels": [], "low": 0.0}, "is missing beside custom.low"),
        ("low", {"labels": [], "high": 1.0}, "is missing beside custom.high"),
        ("low", {"labels": [], "low": 2.0, "high": 2.0}, "is not below custom.high (2)"),
        ("step", {"labels": [], "low": 0.0, "high": 1.0, "step": 0.05}, "more than one decimal"),
        ("high", {"labels": [], "low": 0.0, "high": 0.25}, "more than one decimal"),
        ("step", {"labels": [], "low": 0.0, "high": 1.0, "step": 0.3}, "does not divide the range"),
        ("reward", {"reward": "rating"}, "does not suit this task"),
        ("reward", {"labels": [], "reward": "label"}, "use f1 or exact"),
        ("reward", {"reward": "labels"}, "did you mean 'label'"),
        ("metrics", {"metrics": ["acuracy"]}, "'acuracy' is unknown; use accuracy, f1"),
        ("metrics", {"metrics": ["pearson"]}, "does not suit this task"),
        ("metrics", {"metrics": ["mcc", "mcc"]}, "is there twice"),
        ("metrics", {"labels": ["a", "b", "c"], "metrics": ["f1"]}, "use macro_f1"),
    ],
)
def test_what_is_wrong_is_told_under_its_key(
    key: str, changed: dict[str, object], part: str
) -> None:
    with pytest.raises(UserError) as error:
        spec_of(replace(MOOD, **changed))  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(f"custom.{key}: ") and part in message and "\n" not in message


def test_words_that_only_look_alike_are_kept_apart() -> None:
    assert spec_of(replace(MOOD, labels=["No", "Not", "entailment", "not_entailment"])).words


def test_a_label_may_be_a_part_of_another_one() -> None:
    spec = spec_of(replace(MOOD, labels=["negative", "very negative", "positive", "not positive"]))
    assert [parse(spec, answer(word)) for word in spec.words] == list(spec.words)


def test_names_of_columns_may_have_the_marks_of_their_script() -> None:
    spec = spec_of(replace(MOOD, name="भाव", fields=["पाठ"], query="Judge {पाठ}."))
    assert "Judge अच्छा." in render(spec, {"पाठ": "अच्छा"})


def test_braces_may_be_doubled() -> None:
    spec = spec_of(replace(MOOD, query="Judge {{so}} {text}"))
    assert "Judge {so} fine" in render(spec, {"text": "fine"})


# ---- the tasks of a config


def test_the_name_selects_the_users_task() -> None:
    assert specs_of(Config(task="mood", custom=MOOD)) == {"mood": spec_of(MOOD)}
    several = specs_of(Config(tasks=["STS-B", "mood", "glue/rte"], custom=MOOD))
    assert list(several) == ["stsb", "mood", "glue/rte"] and several["stsb"] is get_task("stsb")
    # A task of the tables needs nothing of the section, whatever is in it.
    assert list(specs_of(Config(task="sst2", custom=replace(MOOD, query=None)))) == ["sst2"]


@pytest.mark.parametrize(
    ("cfg", "parts"),
    [
        (Config(task="modo", custom=MOOD), ["task: ", "did you mean 'mood' (custom.name)"]),
        (Config(task="mood", custom=replace(MOOD, name=None)), ["custom.name: ", "`name: mood`"]),
        (Config(task="sst3"), ["task: ", "did you mean 'sst2'"]),
        (Config(tasks=["stsb", "STS-B"]), ["tasks: ", "twice"]),
        (Config(task="mood", custom=replace(MOOD, fields=[])), ["custom.fields: "]),
    ],
)
def test_a_task_that_cannot_be_found(cfg: Config, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        specs_of(cfg)
    assert str(error.value).startswith(parts[0])
    assert all(part in str(error.value) for part in parts)


def test_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "mood.yaml").write_text(
        "task: mood\n"
        "custom:\n"
        "  name: mood\n"
        "  fields: [text]\n"
        "  query: Judge {text}\n"
        "  labels: {Positive: 1, Negative: [0, 2]}\n"
        f"  train: {tmp_path / 'a.csv'}\n"
    )
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"row {n},{n % 3}\n" for n in range(9))
    )
    cfg = load_config(tmp_path / "mood.yaml")
    spec = specs_of(cfg)["mood"]
    rows = [r for split in ("train", "dev") for r in load_split(spec, split, cfg.data).examples]
    assert Counter(row.label for row in rows) == {"Positive": 3, "Negative": 6}


# ---- files

ROWS = [('fine, "so"', "Normal"), ("sad\nvery", "Depression"), ("worried", "Anxiety")]
EXPECTED = [(ROWS[0][0], "Positive"), (ROWS[1][0], "Negative"), (ROWS[2][0], "Negative")]


def _json(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_files_of_every_kind(tmp_path: Path, kind: str, packed: bool) -> None:
    table = {
        "csv": 'x,text,label\n,"fine, ""so""",Normal\n,"sad\nvery",Depression\n,worried,Anxiety\n',
        "tsv": 'label\ttext\nNormal\tfine, "so"\nDepression\tsad very\nAnxiety\tworried\n',
        "jsonl": _json(ROWS),
    }
    path = tmp_path / f"a.{kind}{'.gz' if packed else ''}"
    content = table[kind].encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    spec = spec_of(replace(MOOD, dev=str(path)))
    found = load_split(spec, "dev", CFG)
    expected = [(text.replace("\n", " ") if kind == "tsv" else text, w) for text, w in EXPECTED]
    assert [(row.fields["text"], row.label) for row in found.examples] == expected
    assert [row.id for row in found.examples] == ["dev-0", "dev-1", "dev-2"]
    assert {row.task for row in found.examples} == {"mood"} and found.source == str(path)
    assert str(path) in found.note and not found.partial
    assert [row.fields["text"] for row in read_inputs(path, spec)] == [text for text, _ in expected]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "text": [text for text, _ in ROWS],
        "label": [1.0, 0.0, float("nan")],
        "id": [7, 8, 9],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    spec = spec_of(
        replace(MOOD, labels={"Up": ["1"], "Down": ["0"]}, test=str(tmp_path / "a.parquet"))
    )
    found = load_split(spec, "test", CFG).examples
    assert [(row.fields["text"], row.label) for row in found] == [
        (ROWS[0][0], "Up"),
        (ROWS[1][0], "Down"),
        (ROWS[2][0], None),
    ]
    assert [row.id for row in read_inputs(tmp_path / "a.parquet", spec)] == ["7", "8", "9"]
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        list(read_inputs(tmp_path / "b.parquet", spec))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    spec = spec_of(replace(MOOD, dev=str(tmp_path / "a.parquet")))
    with pytest.raises(UserError, match=r"a\.parquet: .*pip install -e '\.\[parquet\]'"):
        load_split(spec, "dev", CFG)


def test_paths_are_those_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(_json(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PPO_NLU_DATA", "/nowhere")  # is for the tables only
    assert len(load_split(spec_of(replace(MOOD, dev="a.jsonl")), "dev", CFG).examples) == 3


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        (
            "a.csv",
            "text,label\nfine,Normal\nodd,Stress\n",
            ["a.csv:3", "'Stress'", "add it to custom.labels or drop the rows"],
        ),
        ("a.csv", "text,label\nfine,\n", ["a.csv:2", "'label' is empty; 1 row has no label"]),
        ("a.csv", "text,mood\nfine,Normal\n", ["a.csv:2", "'label'", "custom.label_column"]),
        ("a.csv", "message,label\nfine,Normal\n", ["a.csv:1", "message, label", "columns: text"]),
        ("a.tsv", "text\tlabel\nfine\n", ["a.tsv:2", "1 columns"]),
        ("a.jsonl", '{"text": "fine"}\n', ["a.jsonl:1", "'label'"]),
        ("a.jsonl", '{"text": 3, "label": "Normal"}\n', ["a.jsonl:1", "'text'"]),
        ("a.csv", "text,label\n", ["a.csv", "no rows"]),
        ("a.csv", "text,label,label\nfine,Normal,Anxiety\n", ["a.csv:1", "'label' is there twice"]),
        ("a.tsv", "text\ttext\tlabel\na\tb\tNormal\n", ["a.tsv:1", "'text' is there twice"]),
        ("a.csv", "text,label,x,x\nfine,Normal,1,2\n", ["a.csv:1", "'x' is there twice"]),
        (
            "a.jsonl",
            '{"text": "a", "label": "Normal"}\n{"text": "b", "label": "Normal", "label": 3}',
            ["a.jsonl:2", "'label' is there twice"],
        ),
        ("a.jsonl", '{"text": "a", "label": "Normal", "x": {"y": 1, "y": 2}}', ["jsonl:1", "'y'"]),
        ("a.jsonl", '{"text": "a", "label": "Normal"}\n\n{"text": 1}', ["a.jsonl:2", "empty line"]),
        ("a.csv", f"text,label\nfine,{'N' * 200_000}\n", ["a.csv:2", "NNN...'"]),
        ("a.xlsx", "", ["a.xlsx", "unknown kind of file", ".parquet"]),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error(
    tmp_path: Path, name: str, text: str, parts: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_split(spec_of(replace(MOOD, train=str(tmp_path / name))), "train", CFG)
    assert all(part in str(error.value) for part in parts), error.value


def test_empty_texts_and_a_single_label_are_told(tmp_path: Path, capsys) -> None:
    path, config = tmp_path / "a.jsonl", tmp_path / "c.yaml"
    texts = ["fine", "", " \u200b", "good", "so so"]
    rows = [{"text": text, "more": "x", "label": "Normal"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_of(replace(MOOD, fields=["text", "more"], train=str(path), dev=str(path)))
    note = train_examples(spec, CFG, bundled_model=False).note
    assert "2 rows have an empty text; every row has the label 'Positive', so" in note
    config.write_text(
        f"task: mood\ncustom: {{name: mood, fields: [text, more], query: 'Judge {{text}}.', "
        f"labels: {{Positive: [Normal], Negative: [Odd]}}, train: {path}, dev: {path}}}\n"
    )
    assert check_data(["check", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mood dev: 2 rows have an empty text" in lines
    assert "mood train: 2 rows have an empty text" in lines
    assert [line for line in lines if line.startswith("mood train: every row has the label")]
    # Nothing is said where there is nothing to say.
    rows = [rows[0], rows[3] | {"label": "Anxiety"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = train_examples(spec, CFG, bundled_model=False).note
    assert "empty text" not in note and "every row" not in note


@pytest.mark.parametrize("cell", ["e\u0301", "\u00e9", " \u00e9 "])
def test_a_label_is_known_however_its_letters_are_composed(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": cell}) + "\n")
    for labels in (["\u00e9", "b"], ["e\u0301", "b"]):
        spec = spec_of(replace(MOOD, labels=labels, dev=str(path)))
        assert load_split(spec, "dev", CFG).examples[0].label == labels[0]


def test_labels_that_differ_only_in_case_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    labels = {"Up": ["ab"], "Down": ["AB"]}
    spec = spec_of(replace(MOOD, labels=labels, dev=str(path)))
    path.write_text("text,label\nx,ab\ny,AB\n")
    assert [row.label for row in load_split(spec, "dev", CFG).examples] == ["Up", "Down"]
    path.write_text("text,label\nx,Ab\n")
    with pytest.raises(UserError, match="has no label 'Ab'"):
        load_split(spec, "dev", CFG)


def test_json_that_python_cannot_take_is_told_in_our_words(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    spec = spec_of(replace(MOOD, train=str(path)))
    for value, words in (
        ("9" * 5000, "a number has too many digits"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    ):
        path.write_text(f'{{"text": "a", "label": "Normal", "x": {value}}}\n')
        with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{words}") as caught:
            load_split(spec, "train", CFG)
        assert "set_int_max" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", "  ", "\u200b", "\u2003", None])
def test_an_empty_right_answer_is_refused(tmp_path: Path, empty: str | None) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "fine", "label": "Paris"}, {"text": "fine", "label": empty}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(path), "dev": str(path), "test": str(path)}
    spec = spec_of(replace(MOOD, labels=[], **files))  # type: ignore[arg-type]
    for split in ("train", "dev"):
        with pytest.raises(UserError, match=r"a\.jsonl:2: 'label' is empty"):
            load_split(spec, split, CFG)
    assert [row.label for row in load_split(spec, "test", CFG).examples] == ["Paris", None]
    assert [row.label for row in read_inputs(path, spec)] == ["Paris", None]
    for other in ({}, {"labels": [], "low": 0.0, "high": 1.0}):
        path.write_text(json.dumps(rows[1]) + "\n")
        with pytest.raises(UserError, match=r"a\.jsonl:1: "):
            load_split(spec_of(replace(MOOD, **other, **files)), "train", CFG)  # type: ignore[arg-type]


@pytest.mark.parametrize("tag", ["</Judgement>", "<Judgement>", "</Analysis>"])
def test_an_answer_that_the_parser_would_cut_is_refused(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x", "label": f"a {tag} b", "why": f"so {tag}"}) + "\n")
    free = spec_of(replace(MOOD, labels=[], dev=str(path)))
    with pytest.raises(UserError, match=rf"a\.jsonl:1: 'label' holds {tag}"):
        load_split(free, "dev", CFG)
    reasoned = replace(MOOD, labels=["a", "b"], dev=str(path), rationale="why")
    path.write_text(json.dumps({"text": tag, "label": "a", "why": f"so {tag}"}) + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:1: 'why' holds {tag}"):
        load_split(spec_of(reasoned), "dev", CFG)
    # In the text of a row it is text like any other.
    reasoned = replace(reasoned, rationale=None)
    assert load_split(spec_of(reasoned), "dev", CFG).examples[0].fields == {"text": tag}


def test_long_cells_are_read(tmp_path: Path) -> None:
    long = "word " * 40_000  # more than the 131,072 letters at which the csv module stops
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"{long}",Normal\n')
    limit = csv.field_size_limit(131_072)  # as in a process that has just begun
    try:
        rows = load_split(spec_of(replace(MOOD, dev=str(path))), "dev", CFG).examples
        assert rows[0].fields["text"] == long
        csv.field_size_limit(131_072)
        assert next(read_inputs(path, spec_of(MOOD))).fields["text"] == long
    finally:
        csv.field_size_limit(limit)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n  \n\n"])
@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
def test_empty_lines_at_the_end_are_no_rows(tmp_path: Path, kind: str, end: str) -> None:
    text = {"jsonl": _json(ROWS[2:]), "tsv": "text\tlabel\na\tNormal\n"}
    text["csv"] = text["tsv"].replace("\t", ",")
    if kind == "csv" and "  " in end:
        end = "\n\n"
    path = tmp_path / f"a.{kind}"
    path.write_text(text[kind] + end)
    assert len(load_split(spec_of(replace(MOOD, dev=str(path))), "dev", CFG).examples) == 1
    assert len(list(read_inputs(path, spec_of(MOOD)))) == 1


def test_parquet_with_two_columns_of_a_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = [pyarrow.array([word]) for word in ("fine", "Normal", "Anxiety")]
    table = pyarrow.Table.from_arrays(columns, names=["text", "label", "label"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:1: the column 'label' is there twice"):
        load_split(spec_of(replace(MOOD, train=str(tmp_path / "a.parquet"))), "train", CFG)


def test_a_split_without_file() -> None:
    spec = spec_of(MOOD)
    for split in ("train", "dev", "test"):
        with pytest.raises(UserError, match=rf"custom\.{split}: mood has no {split} split; give"):
            load_split(spec, split, CFG)
    missing = spec_of(replace(MOOD, train="nowhere.csv"))
    with pytest.raises(UserError, match=r"custom\.train: nowhere\.csv: no such file; give"):
        load_split(missing, "train", CFG)
    for path in ("/dev/zero", "/dev"):
        device = spec_of(replace(MOOD, train=path))
        with pytest.raises(UserError, match=f"custom.train: {path}: is not a regular file"):
            load_split(device, "train", CFG)


def test_test_rows_may_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nfine,Normal\nodd,\n")
    (tmp_path / "b.csv").write_text("text\nfine\n")
    rows = load_split(spec_of(replace(MOOD, test=str(tmp_path / "a.csv"))), "test", CFG).examples
    assert rows[1] == Example("1", {"text": "odd"}, None, "mood", extra={"idx": 1})
    assert rows[0].label == "Positive"
    rows = load_split(spec_of(replace(MOOD, test=str(tmp_path / "b.csv"))), "test", CFG).examples
    assert rows[0].label is None


def test_ratings_free_texts_and_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "label": 2.5, "why": "It is."}\n')
    rated = spec_of(
        replace(MOOD, labels=[], low=0.0, high=4.0, train=str(path), dev=str(path), rationale="why")
    )
    row = load_split(rated, "train", CFG).examples[0]
    assert row.label == "2.5" and row.extra == {"rationale": "It is."}
    assert reward(rated, row, "3.5", "") == 1.0  # half the range, 2, less the error, 1
    free = spec_of(replace(MOOD, labels=[], train=str(path), dev=str(path), label_column="why"))
    row = load_split(free, "dev", CFG).examples[0]
    assert row.label == "It is." and row.extra == {}
    path.write_text('{"text": "fine", "label": 9}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: '9' is not a decimal number between 0 and 4"):
        load_split(rated, "train", CFG)


# ---- the share of dev


def _shared(tmp_path: Path, texts: list[str], share: float = 0.1) -> dict[str, list[Example]]:
    path = tmp_path / "a.jsonl"
    path.write_text(_json([(text, "Normal") for text in texts]))
    spec = spec_of(replace(MOOD, train=str(path), dev_share=share))
    return {split: load_split(spec, split, CFG).examples for split in ("train", "dev")}


def test_a_share_of_train_is_dev(tmp_path: Path) -> None:
    texts = [f"row {n}" for n in range(2000)]
    found = _shared(tmp_path, texts)
    # Binomial: 200 of 2,000 with deviation sqrt(2000 * 0.1 * 0.9) = 13.4.
    assert abs(len(found["dev"]) - 200) < 5 * 13.4
    sides = {split: {row.fields["text"] for row in rows} for split, rows in found.items()}
    assert sides["train"] | sides["dev"] == set(texts) and not sides["train"] & sides["dev"]
    assert [row.id for row in found["dev"]][:2] != ["dev-0", "dev-1"]  # places in the file
    more = _shared(tmp_path, texts[::-1] + [f"new {n}" for n in range(100)])
    assert sides["dev"] <= {row.fields["text"] for row in more["dev"]}
    larger = {row.fields["text"] for row in _shared(tmp_path, texts, 0.3)["dev"]}
    assert sides["dev"] <= larger and abs(len(larger) - 600) < 5 * 20.5


def test_rows_of_the_same_text_stay_together(tmp_path: Path) -> None:
    found = _shared(tmp_path, [f"{'Row' if n % 2 else ' row'}  {n // 2}" for n in range(100)])
    sides = {
        split: {row.fields["text"].split()[1] for row in rows} for split, rows in found.items()
    }
    assert not sides["train"] & sides["dev"] and sides["dev"]


@pytest.mark.parametrize("share", [1e-6, 0.5, 0.999])
def test_neither_side_is_empty(tmp_path: Path, share: float) -> None:
    for count in (2, 3):
        found = _shared(tmp_path, [f"row {n}" for n in range(count)], share)
        assert found["train"] and found["dev"]
    with pytest.raises(UserError, match=r"give custom.dev"):
        _shared(tmp_path, ["same", "same"], share)


def test_the_training_rows_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        _json([(f"row number {n}", "Normal") for n in range(5)] + [("short", "Anxiety")])
    )
    spec = spec_of(replace(MOOD, train=str(path), dev=str(path)))
    found = train_examples(spec, DataConfig(min_words=2, limit=3), True)
    assert [row.id for row in found.examples] == ["train-0", "train-1", "train-2"]
    assert "1 rows left out: under 2 words" in found.note

"""Where data is looked for, how files are read, the training rows and their order."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
from collections import Counter
from pathlib import Path

import pytest

from ppo_nlu import data
from ppo_nlu.config import DataConfig
from ppo_nlu.data import (
    batch_indices,
    bundled,
    epoch_order,
    load_split,
    locate,
    read_inputs,
    seen_labels,
)
from ppo_nlu.data.archives import ARCHIVES
from ppo_nlu.data.readers import read_tsv
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, Label, TaskSpec, get_task

SST2 = get_task("sst2")
FILES = {
    "train.tsv": "sentence\tlabel\na fine film \t1\nnot a fine film \t0\ndull \t0\n",
    "dev.tsv": 'sentence\tlabel\nit \'s "good" \t1\n',
    "test.tsv": "index\tsentence\n0\twho knows ?\n1\tnot i .\n",
}


def _fill(folder: Path, **changed: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_bytes(changed.get(name[:-4], text).encode())
    return folder


# ---- the places, in their order


@pytest.mark.parametrize("inner", [".", "SST-2", "glue/SST-2"])
@pytest.mark.parametrize("kind", ["data.path", "$PPO_NLU_DATA"])
def test_a_named_folder_may_be_the_task_the_benchmark_or_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, kind: str
) -> None:
    folder = _fill(tmp_path / inner)
    if kind == "data.path":
        cfg = DataConfig(path=str(tmp_path))
    else:
        cfg = DataConfig()
        monkeypatch.setenv("PPO_NLU_DATA", str(tmp_path))
    source = locate(SST2, cfg)
    assert (source.kind, source.folder) == (kind, folder)
    assert str(folder) in source.note and kind in source.note
    assert load_split(SST2, "dev", cfg).source == str(folder)


def test_the_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("path", "environment", "given_cache", "cache/ppo_nlu"):
        _fill(tmp_path / name / "glue/SST-2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert locate(SST2, DataConfig()).folder == tmp_path / "cache/ppo_nlu/glue/SST-2"
    given = str(tmp_path / "given_cache")
    source = locate(SST2, DataConfig(cache=given))
    assert (source.kind, source.folder) == ("cache", Path(given) / "glue/SST-2")
    monkeypatch.setenv("PPO_NLU_DATA", str(tmp_path / "environment"))
    assert locate(SST2, DataConfig(cache=given)).kind == "$PPO_NLU_DATA"
    cfg = DataConfig(cache=given, path=str(tmp_path / "path"), fallback="bundled")
    assert locate(SST2, cfg).kind == "data.path"


def test_the_cache_is_in_the_home_folder_where_xdg_says_nothing_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _fill(tmp_path / ".cache/ppo_nlu/glue/SST-2")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert locate(SST2, DataConfig()).folder == folder
    assert locate(SST2, DataConfig(path="~/.cache/ppo_nlu")).folder == folder


@pytest.mark.parametrize("kind", ["data.path", "$PPO_NLU_DATA"])
@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_a_named_place_without_the_task_is_an_error_and_no_fall_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    (tmp_path / "empty" / "glue").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    cache = _fill(tmp_path / "cache")
    place = str(tmp_path / name)
    cfg = DataConfig(fallback="bundled", cache=str(cache))
    if kind == "data.path":
        cfg = DataConfig(fallback="bundled", cache=str(cache), path=place)
    else:
        monkeypatch.setenv("PPO_NLU_DATA", place)
    with pytest.raises(UserError) as error:
        locate(SST2, cfg)
    _says(error, kind, place, "SST-2", "train.tsv", "glue/SST-2")


def _says(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_task_without_archive_or_stand_in_asks_for_a_folder(tmp_path: Path) -> None:
    labels = (Label("Yes", "1"), Label("No", "0"))
    files = {"train": ("train.tsv",)}
    other = TaskSpec("x", "X", "glue", "X", "", "{a}", ("a",), labels, files=files)
    with pytest.raises(UserError) as error:
        locate(other, DataConfig(cache=str(tmp_path), fallback="bundled"))
    _says(error, "data.path", "no archive of X is known", "glue/X/")


# ---- reading splits


def test_splits_are_read_by_header_with_their_ids(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(_fill(tmp_path)))
    train, dev, test = (load_split(SST2, name, cfg).examples for name in SST2.files)
    assert train[1] == Example("train-1", {"sentence": "not a fine film "}, "Negative", "sst2")
    assert dev == [Example("dev-0", {"sentence": 'it \'s "good" '}, "Positive", "sst2")]
    assert test[1] == Example("1", {"sentence": "not i ."}, None, "sst2", extra={"idx": 1})
    moved = "label\tx\tsentence\n0\t\tdull\n"
    _fill(tmp_path, dev=moved, test="sentence\tindex\nfine\t17\n")
    assert load_split(SST2, "dev", cfg).examples[0].label == "Negative"
    seventeen = Example("17", {"sentence": "fine"}, None, "sst2", extra={"idx": 17})
    assert load_split(SST2, "test", cfg).examples == [seventeen]


def test_a_test_split_without_index_counts_and_labels_are_read(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(_fill(tmp_path, test="sentence\tlabel\nfine\t1\ndull\t0\n")))
    examples = load_split(SST2, "test", cfg).examples
    assert [(x.id, x.label) for x in examples] == [("0", "Positive"), ("1", "Negative")]


def test_odd_separators_quotes_and_line_ends_stay_in_the_sentence(tmp_path: Path) -> None:
    odd = 'one\u2028two\x85three\x0b"four\x1c\u00a0five\rsix'
    text = f"\ufeffsentence\tlabel\r\n{odd}\t1\r\nfine \t0\r\n"
    examples = load_split(SST2, "dev", DataConfig(path=str(_fill(tmp_path, dev=text)))).examples
    assert [x.fields["sentence"] for x in examples] == [odd, "fine "]
    assert [x.label for x in examples] == ["Positive", "Negative"]


def test_gzip_and_a_last_line_without_end(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\nfine\t1\ndull\t0"))
    cfg = DataConfig(path=str(tmp_path))
    assert len(load_split(SST2, "dev", cfg).examples) == 2
    with pytest.raises(UserError, match=r"no train split; train\.tsv is not there"):
        load_split(SST2, "train", cfg)
    packed = (tmp_path / "dev.tsv.gz").read_bytes()
    for broken in (packed[:-12], b"no gzip", packed[:12] + b"\xff\xff\xff" + packed[15:]):
        (tmp_path / "dev.tsv.gz").write_bytes(broken)
        with pytest.raises(UserError, match=r"dev\.tsv\.gz: cannot be read"):
            load_split(SST2, "dev", cfg)


def test_malformed_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    text = "sentence\tlabel\nfine\t1\nno label\na\tb\t1\n\ndull\t0\n"
    dataset = load_split(SST2, "train", DataConfig(path=str(_fill(tmp_path, train=text))))
    assert [example.id for example in dataset.examples] == ["train-0", "train-4"]
    assert "3 rows left out: malformed" in dataset.note
    assert read_tsv(tmp_path / "train.tsv", ["label"]).malformed == 3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"text\tlabel\nfine\t1\n", ["dev.tsv:1", "text, label", "sentence, label"]),
        (b"sentence,label\nfine,1\n", ["dev.tsv:1", "sentence,label", "sentence, label"]),
        (b"", ["dev.tsv:1", "(none)", "sentence, label"]),
        (b"sentence\tlabel\n", ["dev.tsv", "no rows"]),
        (b"sentence\tlabel\tlabel\nfine\t1\t0\n", ["dev.tsv:1", "'label' is there twice"]),
        (b"sentence\tlabel\nfine\ndull\n", ["dev.tsv", "all 2 rows are malformed"]),
        (b"sentence\tlabel\nfine\t1\nodd\t2\n", ["dev.tsv:3", "SST-2", "'2'", "1, 0"]),
        (b"sentence\tlabel\nfine\tPositive\n", ["dev.tsv:2", "'Positive'"]),
        (b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n", ["dev.tsv:3", "not UTF-8"]),
        ("sentence\tlabel\n".encode("utf-16"), ["dev.tsv:1", "not UTF-8"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    tmp_path: Path, text: bytes, parts: list[str]
) -> None:
    (tmp_path / "dev.tsv").write_bytes(text)
    with pytest.raises(UserError) as error:
        load_split(SST2, "dev", DataConfig(path=str(tmp_path)))
    _says(error, str(tmp_path), *parts)


def test_a_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31m\u202ered"
    _fill(folder, dev="sentence\tlabel\x1b[2J\nfine\t1\n")
    with pytest.raises(UserError) as error:
        load_split(SST2, "dev", DataConfig(path=str(folder)))
    _says(error, "\\x1b[31m\\u202ered", "label\\x1b[2J")
    assert str(error.value).isprintable()


def test_an_unknown_split_and_an_unreadable_file(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(_fill(tmp_path)))
    with pytest.raises(UserError, match=r"'val'.*train, dev, test"):
        load_split(SST2, "val", cfg)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_tsv(tmp_path / "nowhere.tsv", ["sentence"])
    (tmp_path / "dev.tsv").chmod(0)
    if not os.access(tmp_path / "dev.tsv", os.R_OK):
        with pytest.raises(UserError, match="cannot be read: Permission"):
            load_split(SST2, "dev", cfg)
    (tmp_path / "dev.tsv").chmod(stat.S_IRUSR)


def test_the_stand_in_has_the_same_form(tmp_path: Path) -> None:
    cfg = DataConfig(cache=str(tmp_path), fallback="bundled", url="nonsense")
    dev, test = load_split(SST2, "dev", cfg), load_split(SST2, "test", cfg)
    assert dev.source == "bundled" and "stand-in" in dev.note
    sentence, value = bundled.splits()["dev"][3]
    assert value is not None
    label = SST2.word_of(value)
    assert dev.examples[3] == Example("dev-3", {"sentence": sentence}, label, "sst2")
    assert test.examples[3].id == "3" and test.examples[3].label is None


def test_the_official_files(real_data: Path) -> None:
    cfg = DataConfig(path=str(real_data))
    train, dev, test = (load_split(SST2, name, cfg) for name in SST2.files)
    assert [len(d.examples) for d in (train, dev, test)] == [67349, 872, 1821]
    assert Counter(x.label for x in train.examples) == {"Positive": 37569, "Negative": 29780}
    assert Counter(x.label for x in dev.examples) == {"Positive": 444, "Negative": 428}
    assert [x.id for x in test.examples] == [str(n) for n in range(1821)]
    assert not any("left out" in d.note for d in (train, dev, test))
    folder = Path(train.source)
    for name, (_, digest) in ARCHIVES["glue/SST-2"].files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


# ---- the training rows


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "seen_labels.txt"
    path.write_text("a fine film\nsomething else\n")
    monkeypatch.setattr(seen_labels, "SEEN_LABELS", path)
    return path


def _train(folder: Path, bundled_model: bool, **cfg: object) -> tuple[list[str], str]:
    settings = DataConfig(path=str(_fill(folder)), **cfg)  # type: ignore[arg-type]
    dataset = data.train_examples(SST2, settings, bundled_model)
    return [example.id[len("train-") :] for example in dataset.examples], dataset.note


def test_rows_seen_in_pretraining_are_left_out_for_the_bundled_model_only(
    tmp_path: Path, seen: Path
) -> None:
    ids, note = _train(tmp_path / "a", True)
    assert ids == ["1", "2"] and "1 rows left out: seen with their labels" in note
    for bundled_model, exclude in ((False, True), (True, False)):
        ids, note = _train(tmp_path / "a", bundled_model, exclude_pretraining_labels=exclude)
        assert ids == ["0", "1", "2"] and "left out" not in note
    seen.write_text("A  FINE\tfilm\n\n")  # as a row would be normalised
    assert data.exclusions() == {"a fine film"}
    seen.unlink()
    with pytest.raises(UserError, match="exclude_pretraining_labels"):
        data.exclusions()


def test_the_dev_split_keeps_what_training_leaves_out(tmp_path: Path, seen: Path) -> None:
    _fill(tmp_path / "a", dev="sentence\tlabel\na fine film \t1\n")
    cfg = DataConfig(path=str(tmp_path / "a"), min_words=9, limit=1)
    assert len(load_split(SST2, "dev", cfg).examples) == 1
    assert len(load_split(SST2, "train", cfg).examples) == 3


def test_short_rows_and_the_limit(tmp_path: Path, seen: Path) -> None:
    ids, note = _train(tmp_path / "a", False, min_words=3)
    assert ids == ["0", "1"] and "1 rows left out: under 3 words" in note
    ids, note = _train(tmp_path / "a", True, limit=1)  # the limit comes last
    assert ids == ["1"] and "the first 1 rows" in note
    assert _train(tmp_path / "a", False, limit=99)[0] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"data.min_words: no training row is left of 3"):
        _train(tmp_path / "a", False, min_words=9)


# ---- the order


@pytest.mark.parametrize(("n", "size"), [(7, 3), (12, 4), (5, 5), (3, 8), (1, 2), (100, 1)])
def test_steps_run_through_each_epoch_exactly(n: int, size: int) -> None:
    steps = -(-4 * n // size)
    flat = [index for step in range(steps) for index in batch_indices(n, size, step, seed=5)]
    assert all(len(batch_indices(n, size, step, seed=5)) == size for step in range(steps))
    for epoch in range(4):
        assert flat[epoch * n : (epoch + 1) * n] == epoch_order(n, 5, epoch)
        assert sorted(epoch_order(n, 5, epoch)) == list(range(n))


def test_a_step_is_a_function_of_its_number() -> None:
    later = batch_indices(50, 8, 33, seed=1)
    for step in range(40):
        batch_indices(50, 8, step, seed=2)
    assert batch_indices(50, 8, 33, seed=1) == later != batch_indices(50, 8, 33, seed=2)
    # The sequence is fixed for good: a resumed run may be on another machine or Python.
    assert epoch_order(10, 0, 0) == ORDER
    assert epoch_order(10, 0, 1) != ORDER


ORDER = [1, 8, 7, 6, 2, 3, 0, 5, 9, 4]


def test_every_place_is_equally_likely() -> None:
    # 4,000 orders of 5: each (row, place) pair is expected 800 times with deviation 25.3.
    orders = [epoch_order(5, seed, 0) for seed in range(4000)]
    counts = Counter((row, place) for order in orders for place, row in enumerate(order))
    assert len(counts) == 25 and all(abs(count - 800) < 5 * 25.3 for count in counts.values())


def test_what_has_no_order_is_refused() -> None:
    for n, size, step in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError):
            batch_indices(n, size, step, seed=0)


# ---- rows to predict


def _read(path: Path, text: str | bytes) -> list[Example]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_inputs(path, SST2))


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
    _says(error, name, *parts)


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

"""The rows of a split: of which file, whole or in part, and what is said about them."""

from __future__ import annotations

import gzip
import os
import stat
from pathlib import Path

import pytest

from ppo_nlu.config import DataConfig
from ppo_nlu.data import bundled, load_split, train_examples
from ppo_nlu.data.readers.tables import read_tsv
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, get_task
from tests.data.files import SST2, fill, json_lines_of, load, says


def test_a_message_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[31m\u202ered"
    fill(folder, dev="sentence\tlabel\x1b[2J\nfine\t1\n")
    with pytest.raises(UserError) as error:
        load_split(SST2, "dev", DataConfig(path=str(folder)))
    says(error, "\\x1b[31m\\u202ered", "label\\x1b[2J")
    assert str(error.value).isprintable()


def test_an_unknown_split_and_an_unreadable_file(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(fill(tmp_path)))
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


@pytest.mark.parametrize(
    ("name", "other"), [("ax", "mnli"), ("ax-b", "superglue/rte"), ("ax-g", "superglue/rte")]
)
def test_a_diagnostic_set_names_what_to_train_on(tmp_path: Path, name: str, other: str) -> None:
    with pytest.raises(UserError, match=f"no training rows; train on {other}") as error:
        load_split(get_task(name), "train", DataConfig(path=str(tmp_path)))
    assert str(error.value).startswith("task: ") and get_task(other)


def test_boolq_without_train_is_divided(tmp_path: Path) -> None:
    rows = [
        {"passage": "A.", "question": f"is it {n}", "label": n % 2 == 0, "idx": n} for n in range(6)
    ]
    dev = load(tmp_path, "boolq", "dev", dev=json_lines_of(*rows))
    train = load_split(get_task("boolq"), "train", DataConfig(path=str(tmp_path)))
    assert [row.id for row in dev.examples] == ["dev-0", "dev-4"]
    assert [row.id for row in train.examples] == ["train-1", "train-2", "train-3", "train-5"]
    assert train.partial and dev.partial
    assert (
        "train.jsonl is not there, so train is a part of val.jsonl: 4 of its 6 rows" in train.note
    )
    whole = load(tmp_path, "boolq", "dev", train=json_lines_of(*rows))
    assert len(whole.examples) == 6 and not whole.partial


def test_another_file_than_the_first_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "glue/QNLI"
    folder.mkdir(parents=True)
    text = b"index\tquestion\tsentence\tlabel\n0\tWhy?\tA.\tentailment\n"
    (folder / "train.subset10k.tsv.gz").write_bytes(gzip.compress(text))
    cfg = DataConfig(path=str(tmp_path))
    part = load_split(get_task("qnli"), "train", cfg)
    told = "train is only a part of the official set: train.subset10k.tsv.gz, 1 rows"
    assert part.partial and told in part.note and part.file == "train.subset10k.tsv.gz"
    assert train_examples(get_task("qnli"), cfg, False).partial
    (folder / "train.tsv.gz").write_bytes(gzip.compress(text))
    whole = load_split(get_task("qnli"), "train", cfg)
    assert not whole.partial and "part" not in whole.note and whole.file == "train.tsv.gz"


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    row = {"premise": "A", "hypothesis": "B", "label": "neutral"}
    load(tmp_path, "cb", "dev", dev=json_lines_of(row))
    cfg = DataConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"CB: no test split; test\.jsonl is not there"):
        load_split(get_task("cb"), "test", cfg)
    with pytest.raises(UserError, match="SNLI has no split 'test'; train, dev"):
        load_split(get_task("snli"), "test", cfg)

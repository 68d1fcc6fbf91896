"""Files of SST-2 and of other tasks, as the tests of data write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppo_nlu import data
from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import get_task

SST2 = get_task("sst2")
FILES = {
    "train.tsv": "sentence\tlabel\na fine film \t1\nnot a fine film \t0\ndull \t0\n",
    "dev.tsv": 'sentence\tlabel\nit \'s "good" \t1\n',
    "test.tsv": "index\tsentence\n0\twho knows ?\n1\tnot i .\n",
}
ARTICLE = "Ann Lee met Bo in Rome\n@highlight\nAnn won\n@highlight\nBo left."
#          0123456789012345678901
SPANS = [(0, 6), (12, 13), (18, 21), (34, 36), (0, 6)]  # the last character belongs to the span


def fill(folder: Path, **changed: str) -> Path:
    """A folder of SST-2, by split; some of its files may have other texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_bytes(changed.get(name[:-4], text).encode())
    return folder


def load(folder: Path, name: str, split: str, **files: str) -> data.Dataset:
    """A split of the task, read from its folder in a benchmark with these texts by split."""
    spec = get_task(name)
    place = folder / spec.benchmark / spec.folder
    place.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        # The ending is the one of the task's own files: dev -> dev.tsv or val.jsonl.
        (place / spec.files[file][0]).write_bytes(text.encode())
    return load_split(spec, split, DataConfig(path=str(folder)))


def json_lines_of(*rows: object) -> str:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def says(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    """The message is one line that holds all of these parts."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message

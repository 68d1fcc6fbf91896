"""The real files of every task: rows, labels, groups and marks."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from ppo_nlu import data
from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split, train_examples
from ppo_nlu.data.archives import ARCHIVES
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, get_task
from tests.data.files import SST2

# Rows and labels of the real files, copied by hand from the published tables of the data.
REAL: dict[tuple[str, str], tuple[int, dict[str, int]]] = {
    ("cola", "train"): (8551, {"Yes": 6023, "No": 2528}),
    ("cola", "dev"): (1043, {"Yes": 721, "No": 322}),
    ("cola", "test"): (1063, {}),
    ("sst2", "train"): (67349, {"Positive": 37569, "Negative": 29780}),
    ("sst2", "dev"): (872, {"Positive": 444, "Negative": 428}),
    ("sst2", "test"): (1821, {}),
    ("mrpc", "train"): (3668, {"Yes": 2474, "No": 1194}),
    ("mrpc", "dev"): (408, {"Yes": 279, "No": 129}),
    ("mrpc", "test"): (1725, {}),
    ("qqp", "train"): (8999, {"No": 5747, "Yes": 3252}),
    ("qqp", "dev"): (1000, {"No": 623, "Yes": 377}),
    ("stsb", "train"): (5749, {}),
    ("stsb", "dev"): (1500, {}),
    ("stsb", "test"): (1379, {}),
    ("mnli", "train"): (9999, {"Entailment": 3408, "Neutral": 3313, "Contradiction": 3278}),
    ("mnli", "dev"): (9815, {"Entailment": 3479, "Neutral": 3123, "Contradiction": 3213}),
    ("mnli-mm", "train"): (9999, {"Entailment": 3408, "Neutral": 3313, "Contradiction": 3278}),
    ("qnli", "train"): (9999, {"Yes": 5027, "No": 4972}),
    ("qnli", "dev"): (5463, {"Yes": 2702, "No": 2761}),
    ("qnli", "test"): (5463, {}),
    ("glue/rte", "train"): (2490, {"Yes": 1249, "No": 1241}),
    ("glue/rte", "dev"): (277, {"Yes": 146, "No": 131}),
    ("glue/rte", "test"): (3000, {}),
    ("wnli", "train"): (635, {"No": 323, "Yes": 312}),
    ("wnli", "dev"): (71, {"No": 40, "Yes": 31}),
    ("wnli", "test"): (146, {}),
    ("ax", "dev"): (1104, {"Entailment": 460, "Neutral": 386, "Contradiction": 258}),
    ("ax", "test"): (1104, {}),
    # Without a train file the 3,270 dev rows serve as both: rows 0, 4, 8, ... are 818.
    ("boolq", "train"): (2452, {}),
    ("boolq", "dev"): (818, {}),
    ("boolq", "test"): (3245, {}),
    ("cb", "train"): (250, {"Contradiction": 119, "Entailment": 115, "Neutral": 16}),
    ("cb", "dev"): (56, {"Contradiction": 28, "Entailment": 23, "Neutral": 5}),
    ("cb", "test"): (250, {}),
    ("copa", "train"): (400, {}),
    ("copa", "dev"): (100, {}),
    ("copa", "test"): (500, {}),
    ("multirc", "train"): (27243, {"True": 12025, "False": 15218}),
    ("multirc", "dev"): (4848, {"True": 2075, "False": 2773}),
    ("multirc", "test"): (9693, {}),
    ("superglue/rte", "train"): (2490, {"Yes": 1249, "No": 1241}),
    ("superglue/rte", "dev"): (277, {"Yes": 146, "No": 131}),
    ("superglue/rte", "test"): (3000, {}),
    ("wic", "train"): (5428, {"Same": 2714, "Different": 2714}),
    ("wic", "dev"): (638, {"Same": 319, "Different": 319}),
    ("wic", "test"): (1400, {}),
    ("wsc", "train"): (554, {"No": 295, "Yes": 259}),
    ("wsc", "dev"): (104, {"No": 66, "Yes": 38}),
    ("wsc", "test"): (146, {}),
    ("ax-b", "dev"): (1104, {"No": 644, "Yes": 460}),
    ("ax-b", "test"): (1104, {"No": 644, "Yes": 460}),
    ("ax-g", "dev"): (356, {"No": 178, "Yes": 178}),
    ("ax-g", "test"): (356, {"No": 178, "Yes": 178}),
    ("snli", "train"): (9999, {}),
    ("snli", "dev"): (9842, {}),
    ("siga-nli", "train"): (600, {}),
    ("siga-nli", "dev"): (175, {}),
    ("siga-nli", "ood"): (234, {}),
    ("ag_news", "train"): (10001, {}),
    ("ag_news", "dev"): (
        7600,
        {"World": 1900, "Sports": 1900, "Business": 1900, "Technology": 1900},
    ),
    ("mr", "train"): (6135, {"Negative": 3092, "Positive": 3043}),  # of 8,180 rows every fourth
    ("mr", "dev"): (2045, {"Negative": 1031, "Positive": 1014}),  # is dev
}
UNLABELLED = {  # the test files without labels
    *("cola", "sst2", "mrpc", "stsb", "qnli", "glue/rte", "wnli", "ax", "boolq", "cb", "copa"),
    *("multirc", "superglue/rte", "wic", "wsc"),
}
PARTIAL = {
    *((name, "train") for name in ("qqp", "mnli", "mnli-mm", "qnli", "snli", "ag_news")),
    *((name, split) for name in ("record", "boolq", "mr") for split in ("train", "dev")),
    ("qqp", "dev"),
}
ABSENT = {
    *(("qqp", "test"), ("mnli", "test"), ("mnli-mm", "dev"), ("mnli-mm", "test")),
    ("record", "test"),
}


def _full(folder: Path) -> DataConfig:
    """The config of the folder; skips where it has fewer tasks than the table above."""
    if not all((folder / part).is_dir() for part in ("glue", "superglue", "extra")):
        pytest.skip("needs the real data of every task")
    return DataConfig(path=str(folder))


@pytest.mark.parametrize("name", TASKS)
def test_every_split_of_the_real_data(real_data: Path, name: str) -> None:
    cfg, spec = _full(real_data), TASKS[name]
    for split in spec.files:
        key = (name, split)
        if key in ABSENT:
            with pytest.raises(UserError, match=f"no {split} split; {spec.files[split][0]}"):
                load_split(spec, split, cfg)
            continue
        found = load_split(spec, split, cfg)
        assert found.partial == (key in PARTIAL), key
        assert ("part of" in found.note) == found.partial and found.malformed == 0
        rows = found.examples
        assert len({row.id for row in rows}) == len(rows)
        for row in rows:
            assert row.task == name and tuple(row.fields) == spec.fields
            assert row.label is None or spec.rating or row.label in spec.words
            assert split != "test" or isinstance(row.extra["idx"], int | tuple)
        assert all((row.label is None) == (split == "test" and name in UNLABELLED) for row in rows)
        if name == "record":
            assert len({row.group for row in rows}) == 32
            continue
        count, labels = REAL[key]
        assert len(rows) == count, key
        assert not labels or Counter(row.label for row in rows) == labels
    assert {k for k in REAL if k[0] == name} | {k for k in ABSENT if k[0] == name} == (
        {(name, split) for split in spec.files} if name != "record" else {("record", "test")}
    )


@pytest.mark.slow
def test_real_groups_ids_and_ranges(real_data: Path) -> None:
    cfg = _full(real_data)
    groups = {split: set() for split in ("train", "dev")}
    for split, seen in groups.items():
        seen |= {row.group for row in load_split(get_task("multirc"), split, cfg).examples}
    assert [len(seen) for seen in groups.values()] == [5131, 953]
    test = load_split(get_task("multirc"), "test", cfg).examples
    assert test[0].id == "0-0-0" and test[-1].extra["idx"] == (165, 1819, 9692)
    pairs = Counter(row.group for row in load_split(get_task("ax-g"), "test", cfg).examples)
    assert len(pairs) == 178 and set(pairs.values()) == {2}
    scores = [float(x.label or -1) for x in load_split(get_task("stsb"), "train", cfg).examples]
    assert (min(scores), max(scores)) == (0.0, 5.0)
    assert load_split(get_task("ax-b"), "test", cfg).examples[3].extra == {"idx": 3}
    boolq = {
        split: {
            row.fields["question"] for row in load_split(get_task("boolq"), split, cfg).examples
        }
        for split in ("train", "dev")
    }
    assert len(boolq["train"] & boolq["dev"]) < 20  # a few questions are asked of two passages
    both = Counter(
        row.label
        for split in ("train", "dev")
        for row in load_split(get_task("boolq"), split, cfg).examples
    )
    assert both == {"Yes": 2033, "No": 1237}


def test_real_pronouns(real_data: Path) -> None:
    cfg, wsc = _full(real_data), get_task("wsc")
    notes = {split: load_split(wsc, split, cfg).note for split in wsc.files}
    # In one dev row the index is one word early: "want to use it ,".
    assert "1 pronouns not at their index" in notes["dev"]
    assert all("pronoun" not in notes[split] for split in ("train", "test"))
    for split in wsc.files:
        for row in load_split(wsc, split, cfg).examples:
            marked = re.findall(r"\*([^*]+)\*", row.fields["text"])
            assert marked == [row.fields["span2_text"]]


def test_real_training_rows(real_data: Path) -> None:
    cfg = _full(real_data)
    record = train_examples(get_task("record"), cfg, False)
    for group in {row.group for row in record.examples}:
        members = Counter(row.label for row in record.examples if row.group == group)
        assert members["Yes"] == members["No"] > 0
    assert "as many No as Yes" in record.note
    assert train_examples(get_task("record"), cfg, False).examples == record.examples
    # MR shares its sentences with SST-2, on which the bundled model was trained with labels.
    held = data.exclusions()
    mr = train_examples(get_task("mr"), cfg, True)
    assert "seen with their labels in pretraining" in mr.note
    assert not held & {data.normalise(row.fields["sentence"]) for row in mr.examples}


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

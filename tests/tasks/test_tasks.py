"""Every task of the tables: its real files, and the quirks of the official forms."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from string import Formatter

import pytest

from ppo_nlu import data
from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split, read_inputs, readers, train_examples
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, Example, get_task
from ppo_nlu.tasks.custom import REWARDS

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


# ---- the tables themselves


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_the_table_fits_together(name: str) -> None:
    spec = TASKS[name]
    used = {
        place
        for text in (spec.query, spec.description)
        for _, place, _, _ in Formatter().parse(text)
        if place is not None
    }
    assert used == set(spec.fields)
    assert set(spec.columns) <= set(spec.fields)
    assert spec.reader in readers._TABLES and spec.reward in REWARDS[spec.kind]
    assert len({label.value for label in spec.labels}) == len(spec.labels) and spec.files
    assert get_task(name) is spec


def test_names_are_found_in_any_spelling() -> None:
    assert get_task("STS-B").name == "stsb" and get_task("MNLI-m").name == "mnli"
    assert get_task("AX_b").name == "ax-b" and get_task("superglue/RTE").benchmark == "superglue"
    with pytest.raises(UserError, match=r"'rte' is in both benchmarks.*glue/rte or superglue/rte"):
        get_task("rte")
    with pytest.raises(UserError, match="did you mean 'multirc'"):
        get_task("multrc")


# ---- quirks of the official forms


def _load(folder: Path, name: str, split: str, **files: str) -> data.Dataset:
    spec = get_task(name)
    place = folder / spec.benchmark / spec.folder
    place.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        # The ending is the one of the task's own files: dev -> dev.tsv or val.jsonl.
        (place / spec.files[file][0]).write_bytes(text.encode())
    return load_split(spec, split, DataConfig(path=str(folder)))


def test_cola_has_no_header_but_its_test_file_has(tmp_path: Path) -> None:
    dev = _load(tmp_path, "cola", "dev", dev='gj04\t1\t\tHe "left.\ngj04\t0\t*\tLeft he.\nodd\n')
    assert [(row.id, row.label) for row in dev.examples] == [("dev-0", "Yes"), ("dev-1", "No")]
    assert dev.examples[0].fields == {"sentence": 'He "left.'} and dev.malformed == 1
    test = _load(tmp_path, "cola", "test", test="index\tsentence\n7\tHe left.\n")
    assert test.examples == [Example("7", {"sentence": "He left."}, None, "cola", extra={"idx": 7})]
    # A copy with a header is understood too.
    dev = _load(tmp_path, "cola", "dev", dev="sentence\tlabel\nHe left.\t1\n")
    assert [row.id for row in dev.examples] == ["dev-0"]


def test_mrpc_begins_with_a_mark(tmp_path: Path) -> None:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    dev = _load(tmp_path, "mrpc", "dev", dev=head + '1\t10\t20\t"A\tB"\n')
    assert dev.examples[0] == Example(
        "dev-0", {"sentence1": '"A', "sentence2": 'B"'}, "Yes", "mrpc"
    )
    head = "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    test = _load(tmp_path, "mrpc", "test", test=head + "4\t10\t20\tA\tB\n")
    assert test.examples[0].extra == {"idx": 4} and test.examples[0].label is None


def test_official_qqp_rows_may_be_malformed(tmp_path: Path) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = head + "133273\t213221\t213222\tHow?\tWhy?\t1\n402555\t536040\t536041\tHow\n"
    train = _load(tmp_path, "qqp", "train", train=rows)
    assert [(row.id, row.label) for row in train.examples] == [("train-0", "Yes")]
    assert train.malformed == 1 and "1 rows left out: malformed" in train.note
    assert not train.partial
    test = _load(tmp_path, "qqp", "test", test="id\tquestion1\tquestion2\n5\tHow?\tWhy?\n")
    assert test.examples[0].extra == {"idx": 5}


MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
)


def test_official_mnli_rows_without_agreement_are_left_out(tmp_path: Path) -> None:
    row = "{0}\t1\t2\tfiction\t(b)\t(b)\t(p)\t(p)\tA.\tB.\tneutral\tneutral\t{1}\n"
    text = MNLI_HEAD + row.format(0, "neutral") + row.format(1, "-") + row.format(2, "entailment")
    dev = _load(tmp_path, "mnli", "dev", dev=text)
    assert [(row.id, row.label) for row in dev.examples] == [
        ("dev-0", "Neutral"),
        ("dev-2", "Entailment"),
    ]
    assert dev.examples[0].fields == {"premise": "A.", "hypothesis": "B."}
    assert "1 rows left out: without a gold label" in dev.note and dev.malformed == 0


def test_the_labelled_ax_file_names_its_columns_otherwise(tmp_path: Path) -> None:
    full = "Lexical Semantics\tPremise\tHypothesis\tLabel\r\n\tA.\tB.\tcontradiction\r\n"
    dev = _load(tmp_path, "ax", "dev", dev=full)
    fields = {"premise": "A.", "hypothesis": "B."}
    assert dev.examples == [Example("dev-0", fields, "Contradiction", "ax")]
    test = _load(tmp_path, "ax", "test", test="index\tsentence1\tsentence2\n3\tA.\tB.\n")
    assert test.examples == [Example("3", fields, None, "ax", extra={"idx": 3})]


@pytest.mark.parametrize(
    ("name", "other"), [("ax", "mnli"), ("ax-b", "superglue/rte"), ("ax-g", "superglue/rte")]
)
def test_a_diagnostic_set_names_what_to_train_on(tmp_path: Path, name: str, other: str) -> None:
    with pytest.raises(UserError, match=f"no training rows; train on {other}") as error:
        load_split(get_task(name), "train", DataConfig(path=str(tmp_path)))
    assert str(error.value).startswith("task: ") and get_task(other)


def test_quoted_csv(tmp_path: Path) -> None:
    text = 'premise,statement,label,x\n"A, ""so""\nB",C,entailment,\nshort\nD,E,neutral,\n'
    dev = _load(tmp_path, "siga-nli", "dev", dev=text)
    assert [row.id for row in dev.examples] == ["dev-0", "dev-1"] and dev.malformed == 1
    assert dev.examples[0].fields == {"premise": 'A, "so"\nB', "statement": "C"}


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_json_labels_may_be_booleans_or_texts(tmp_path: Path, value: object) -> None:
    row = {"passage": "A.", "question": "is it", "label": value, "idx": 0}
    dev = _load(tmp_path, "boolq", "dev", dev=_lines(row), train=_lines(row, row))
    assert dev.examples[0].label == "Yes" and not dev.partial


def test_json_labels_and_numbers_may_be_texts(tmp_path: Path) -> None:
    row = {"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": "4"}
    for value in (1, "1"):
        dev = _load(tmp_path, "copa", "dev", dev=_lines(row | {"label": value}))
        assert dev.examples[0].label == "Second"
    test = _load(tmp_path, "copa", "test", test=_lines(row, row | {"idx": 5}))
    assert [(row.id, row.extra) for row in test.examples] == [("4", {"idx": 4}), ("5", {"idx": 5})]
    for key, value, part in (
        ("label", 7, "has no label '7'; it has 0, 1"),
        ("label", None, "has no label ''"),
        ("premise", 3, "'premise' must be there"),
    ):
        with pytest.raises(UserError, match=rf"val\.jsonl:2: .*{part}"):
            bad = row | {"label": 0} | {key: value}
            _load(tmp_path, "copa", "dev", dev=_lines(row | {"label": 0}, bad))
    with pytest.raises(UserError, match=r"val\.jsonl:1: .*'label' is missing"):
        _load(tmp_path, "copa", "dev", dev=_lines(row))
    with pytest.raises(UserError, match=r"test\.jsonl:1: 'x' is no row number"):
        _load(tmp_path, "copa", "test", test=_lines(row | {"idx": "x"}))


def test_boolq_without_train_is_divided(tmp_path: Path) -> None:
    rows = [
        {"passage": "A.", "question": f"is it {n}", "label": n % 2 == 0, "idx": n} for n in range(6)
    ]
    dev = _load(tmp_path, "boolq", "dev", dev=_lines(*rows))
    train = load_split(get_task("boolq"), "train", DataConfig(path=str(tmp_path)))
    assert [row.id for row in dev.examples] == ["dev-0", "dev-4"]
    assert [row.id for row in train.examples] == ["train-1", "train-2", "train-3", "train-5"]
    assert train.partial and dev.partial
    assert (
        "train.jsonl is not there, so train is a part of val.jsonl: 4 of its 6 rows" in train.note
    )
    whole = _load(tmp_path, "boolq", "dev", train=_lines(*rows))
    assert len(whole.examples) == 6 and not whole.partial


def test_multirc_is_unfolded(tmp_path: Path) -> None:
    answers = [{"text": "B", "idx": 8, "label": 1}, {"text": "C", "idx": 9, "label": 0}]
    paragraph = {
        "idx": 2,
        "passage": {
            "text": "A.",
            "questions": [
                {"question": "Why?", "idx": 5, "answers": answers},
                {"question": "How?", "idx": 6, "answers": answers[:1]},
            ],
        },
    }
    dev = _load(tmp_path, "multirc", "dev", dev=_lines(paragraph)).examples
    assert dev[1] == Example(
        "dev-2-5-9",
        {"passage": "A.", "question": "Why?", "answer": "C"},
        "False",
        "multirc",
        "2-5",
        {"idx": (2, 5, 9)},
    )
    assert [row.group for row in dev] == ["2-5", "2-5", "2-6"]
    for answer in answers:
        del answer["label"]
    test = _load(tmp_path, "multirc", "test", test=_lines(paragraph)).examples
    assert [(row.id, row.label) for row in test] == [
        ("2-5-8", None),
        ("2-5-9", None),
        ("2-6-8", None),
    ]
    with pytest.raises(UserError, match=r"test\.jsonl:1: not in the official form: 'questions'"):
        _load(tmp_path, "multirc", "test", test='{"idx": 0, "passage": {"text": "A."}}\n')


ARTICLE = "Ann Lee met Bo in Rome\n@highlight\nAnn won\n@highlight\nBo left."
#          0123456789012345678901
SPANS = [(0, 6), (12, 13), (18, 21), (34, 36), (0, 6)]  # the last character belongs to the span


def _news(**query: object) -> str:
    entities = [{"start": start, "end": end} for start, end in SPANS]
    asked = {"query": "@placeholder was glad, said @placeholder", "idx": 71} | query
    row = {"source": "x", "idx": 3, "qas": [asked]}
    return _lines(row | {"passage": {"text": ARTICLE, "entities": entities}})


def test_record_has_a_row_for_each_distinct_name(tmp_path: Path) -> None:
    answers = [{"start": 12, "end": 13, "text": "Bo"}, {"start": 40, "end": 41, "text": "Bo"}]
    dev = _load(tmp_path, "record", "dev", dev=_news(answers=answers)).examples
    assert [row.extra["entity"] for row in dev] == ["Ann Lee", "Bo", "Rome", "Ann"]
    assert [row.label for row in dev] == ["No", "Yes", "No", "No"]
    assert dev[1] == Example(
        "dev-71-1",
        {
            "passage": "Ann Lee met Bo in Rome. Ann won. Bo left.",
            "statement": "Bo was glad, said Bo",
        },
        "Yes",
        "record",
        "71",
        {"idx": 71, "answers": ["Bo"], "entity": "Bo"},
    )
    test = _load(tmp_path, "record", "test", test=_news()).examples
    assert test[1].id == "71-1" and test[1].label is None
    assert test[1].extra == {"idx": 71, "entity": "Bo"}
    with pytest.raises(UserError, match=r"val\.jsonl:1: .*'answers' is missing"):
        _load(tmp_path, "record", "dev", dev=_news())


@pytest.mark.parametrize("answers", [[], [{"text": ""}], [{"text": "Bo"}, {"text": " "}]])
def test_a_cloze_without_a_right_answer_is_refused(tmp_path: Path, answers: list) -> None:
    with pytest.raises(UserError, match=r"val\.jsonl:1: a query has no answer, or an empty one"):
        _load(tmp_path, "record", "dev", dev=_news(answers=answers))


def test_record_trains_on_as_many_wrong_names_as_right_ones(tmp_path: Path) -> None:
    def query(index: int, *names: str) -> dict[str, object]:
        return {"query": "@placeholder", "idx": index, "answers": [{"text": n} for n in names]}

    entities = [{"start": start, "end": end} for start, end in SPANS]
    queries = [query(n, "Bo") for n in range(30)] + [query(30, "Ann", "Ann Lee"), query(31, "Zoe")]
    row = {"idx": 3, "qas": queries, "passage": {"text": ARTICLE, "entities": entities}}
    _load(tmp_path, "record", "train", train=_lines(row))
    cfg = DataConfig(path=str(tmp_path))
    found = train_examples(get_task("record"), cfg, False)
    kept = [
        [row.extra["entity"] for row in found.examples if row.group == str(n)] for n in range(32)
    ]
    assert all("Bo" in names and len(names) == 2 for names in kept[:30])
    wrong = Counter(name for names in kept[:30] for name in names if name != "Bo")
    assert set(wrong) == {"Ann Lee", "Rome", "Ann"} and max(wrong.values()) < 22
    assert sorted(kept[30]) == ["Ann", "Ann Lee", "Bo", "Rome"] and kept[31] == []
    assert "64 rows left out: as many No as Yes" in found.note  # 32 * 4 - 30 * 2 - 4
    again = train_examples(get_task("record"), cfg, True).examples
    assert again == found.examples


def test_wsc_marks_the_pronoun_at_its_index(tmp_path: Path) -> None:
    def row(text: str, pronoun: str, index: int) -> dict[str, object]:
        target = {"span1_text": "Ann", "span1_index": 0, "span2_text": pronoun}
        return {"text": text, "target": target | {"span2_index": index}, "idx": 0, "label": False}

    rows = [
        row("Ann saw it because it fell.", "it", 4),
        row('Ann:  "Good for him," she said.', "him", 3),  # of the token him,"
        row("it is  said that Ann sees it , not it", "it", 4),  # nearest: token 6
        row("Ann sees It now and it", "it", 1),  # the nearest in the same case
        row("Ann sees It now", "it", 1),
        row("They said that they left.", "they", 0),  # in its place, if in another case
        row("Ann fits in", "it", 1),  # no whole word
    ]
    dev = _load(tmp_path, "wsc", "dev", dev=_lines(*rows))
    assert [row.fields["text"] for row in dev.examples] == [
        "Ann saw it because *it* fell.",
        'Ann:  "Good for *him*," she said.',
        "it is  said that Ann sees *it* , not it",
        "Ann sees It now and *it*",
        "Ann sees *It* now",
        "*They* said that they left.",
        "Ann fits in",
    ]
    assert "3 pronouns not at their index" in dev.note and "1 pronouns not in" in dev.note
    assert dev.examples[0].label == "No" and dev.examples[0].fields["span1_text"] == "Ann"


def test_a_marked_pronoun_is_a_whole_word_in_every_script() -> None:
    assert readers.mark("นี่ไม่ดี ดี", "ดี", 0) == ("นี่ไม่ดี *ดี*", "moved")
    assert readers.mark("non-it it", "it", 0) == ("non-it *it*", "moved")
    assert readers.mark("so it's", "it", 1) == ("so *it*'s", "exact")


def test_a_long_text_is_marked_in_linear_time() -> None:
    text, pause = "it is " * 10_000, time.process_time()
    assert readers.mark(text, "it", 19_998)[1] == "exact"
    assert time.process_time() - pause < 2  # 8,000 words once took 2.6 s


def test_ax_g_pairs(tmp_path: Path) -> None:
    row = {"premise": "A", "hypothesis": "B", "label": "entailment", "pair_id": 551646}
    test = _load(tmp_path, "ax-g", "test", test=_lines(*(row | {"idx": n} for n in range(4))))
    assert [row.group for row in test.examples] == ["0", "0", "1", "1"]
    assert test.examples[3].extra == {"idx": 3} and test.examples[3].label == "Yes"


def test_a_rating_must_be_in_its_range(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tscore\n"
    dev = _load(tmp_path, "stsb", "dev", dev=head + "0\tA\tB\t2.533\n")
    assert dev.examples[0].label == "2.533"
    for value in ("5.1", "much", "", "nan"):
        with pytest.raises(
            UserError, match=r"dev\.tsv:2: .* is not a decimal number between 0 and"
        ):
            _load(tmp_path, "stsb", "dev", dev=head + f"0\tA\tB\t{value}\n")


# ---- files and folders


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


def test_the_folder_of_another_task_is_not_taken(tmp_path: Path) -> None:
    text = "sentence\tlabel\nfine\t1\n"
    for name in ("SST-2", "plain"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        (tmp_path / "glue" / name / "dev.tsv").write_text(text)
    sst2, mr = get_task("sst2"), get_task("mr")
    for root in ("glue/SST-2", "glue", "."):
        assert load_split(sst2, "dev", DataConfig(path=str(tmp_path / root))).examples
    for task in (mr, get_task("cola")):
        with pytest.raises(UserError, match=f"does not hold {task.title}"):
            load_split(task, "dev", DataConfig(path=str(tmp_path / "glue/SST-2")))
    assert load_split(mr, "dev", DataConfig(path=str(tmp_path / "glue/plain"))).examples
    # A root that holds files beside the benchmark's folders: the folder comes first.
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nwrong\t0\n")
    assert load_split(sst2, "dev", DataConfig(path=str(tmp_path))).examples[0].label == "Positive"


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    _load(
        tmp_path, "cb", "dev", dev=_lines({"premise": "A", "hypothesis": "B", "label": "neutral"})
    )
    cfg = DataConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"CB: no test split; test\.jsonl is not there"):
        load_split(get_task("cb"), "test", cfg)
    with pytest.raises(UserError, match="SNLI has no split 'test'; train, dev"):
        load_split(get_task("snli"), "test", cfg)


# ---- rows


def test_the_first_rows_keep_groups_whole() -> None:
    rows = [Example(str(n), {}, None, group=group) for n, group in enumerate("aabbbc")]
    sizes = {limit: len(data.first(rows, limit)) for limit in range(8)}
    # A group that is longer than the limit is cut: nothing else could be given.
    assert sizes == {0: 6, 1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 6, 7: 6}
    alone = [replace(row, group="") for row in rows]
    assert [len(data.first(alone, limit)) for limit in (0, 3, 6, 9)] == [6, 3, 6, 6]
    assert data.first([], 3) == []
    assert data.first([rows[0], *alone], 3) == [rows[0], *alone[:2]]


@pytest.mark.parametrize("name", TASKS)
def test_rows_to_predict_by_the_names_of_the_fields(tmp_path: Path, name: str) -> None:
    spec = TASKS[name]
    row = {field: f"the {field}" for field in spec.fields}
    (tmp_path / "a.jsonl").write_text(_lines(row))
    assert next(read_inputs(tmp_path / "a.jsonl", spec)) == Example("0", row, None, name)
    for ending, sign in (("tsv", "\t"), ("csv", ",")):
        lines = [sign.join(spec.fields), sign.join(row.values())]
        (tmp_path / f"a.{ending}").write_text("\n".join(lines))
        assert next(read_inputs(tmp_path / f"a.{ending}", spec)).fields == row


def test_rows_to_predict_by_the_official_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("index\tsentence1\tsentence2\tgold_label\n5\tA\tB\tneutral\n")
    fields = {"premise": "A", "hypothesis": "B"}
    assert list(read_inputs(path, get_task("mnli"))) == [Example("5", fields, "Neutral", "mnli")]
    (tmp_path / "a.jsonl").write_text('{"sentence1": "A", "sentence2": "B"}\n')
    assert next(read_inputs(tmp_path / "a.jsonl", get_task("ax-b"))).fields == fields
    path.write_text("premise\tsentence1\thypothesis\nA\tx\tB\n")  # its own name wins
    assert next(read_inputs(path, get_task("mnli"))).fields == fields
    path.write_text("sentence1\tsentence2\tscore\nA\tB\t4.2\n")
    assert next(read_inputs(path, get_task("stsb"))).label == "4.2"

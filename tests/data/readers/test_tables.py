"""Tab-separated and comma-separated files: what is read, left out and refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ppo_nlu.config import DataConfig
from ppo_nlu.data import load_split
from ppo_nlu.data.readers.tables import read_tsv
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example
from tests.data.files import SST2, fill, load, says


def test_splits_are_read_by_header_with_their_ids(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(fill(tmp_path)))
    train, dev, test = (load_split(SST2, name, cfg).examples for name in SST2.files)
    assert train[1] == Example("train-1", {"sentence": "not a fine film "}, "Negative", "sst2")
    assert dev == [Example("dev-0", {"sentence": 'it \'s "good" '}, "Positive", "sst2")]
    assert test[1] == Example("1", {"sentence": "not i ."}, None, "sst2", extra={"idx": 1})
    moved = "label\tx\tsentence\n0\t\tdull\n"
    fill(tmp_path, dev=moved, test="sentence\tindex\nfine\t17\n")
    assert load_split(SST2, "dev", cfg).examples[0].label == "Negative"
    seventeen = Example("17", {"sentence": "fine"}, None, "sst2", extra={"idx": 17})
    assert load_split(SST2, "test", cfg).examples == [seventeen]


def test_a_test_split_without_index_counts_and_labels_are_read(tmp_path: Path) -> None:
    cfg = DataConfig(path=str(fill(tmp_path, test="sentence\tlabel\nfine\t1\ndull\t0\n")))
    examples = load_split(SST2, "test", cfg).examples
    assert [(x.id, x.label) for x in examples] == [("0", "Positive"), ("1", "Negative")]


def test_odd_separators_quotes_and_line_ends_stay_in_the_sentence(tmp_path: Path) -> None:
    odd = 'one\u2028two\x85three\x0b"four\x1c\u00a0five\rsix'
    text = f"\ufeffsentence\tlabel\r\n{odd}\t1\r\nfine \t0\r\n"
    examples = load_split(SST2, "dev", DataConfig(path=str(fill(tmp_path, dev=text)))).examples
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
    dataset = load_split(SST2, "train", DataConfig(path=str(fill(tmp_path, train=text))))
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
    says(error, str(tmp_path), *parts)


def test_cola_has_no_header_but_its_test_file_has(tmp_path: Path) -> None:
    dev = load(tmp_path, "cola", "dev", dev='gj04\t1\t\tHe "left.\ngj04\t0\t*\tLeft he.\nodd\n')
    assert [(row.id, row.label) for row in dev.examples] == [("dev-0", "Yes"), ("dev-1", "No")]
    assert dev.examples[0].fields == {"sentence": 'He "left.'} and dev.malformed == 1
    test = load(tmp_path, "cola", "test", test="index\tsentence\n7\tHe left.\n")
    assert test.examples == [Example("7", {"sentence": "He left."}, None, "cola", extra={"idx": 7})]
    # A copy with a header is understood too.
    dev = load(tmp_path, "cola", "dev", dev="sentence\tlabel\nHe left.\t1\n")
    assert [row.id for row in dev.examples] == ["dev-0"]


def test_mrpc_begins_with_a_mark(tmp_path: Path) -> None:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    dev = load(tmp_path, "mrpc", "dev", dev=head + '1\t10\t20\t"A\tB"\n')
    assert dev.examples[0] == Example(
        "dev-0", {"sentence1": '"A', "sentence2": 'B"'}, "Yes", "mrpc"
    )
    head = "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    test = load(tmp_path, "mrpc", "test", test=head + "4\t10\t20\tA\tB\n")
    assert test.examples[0].extra == {"idx": 4} and test.examples[0].label is None


def test_official_qqp_rows_may_be_malformed(tmp_path: Path) -> None:
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    rows = head + "133273\t213221\t213222\tHow?\tWhy?\t1\n402555\t536040\t536041\tHow\n"
    train = load(tmp_path, "qqp", "train", train=rows)
    assert [(row.id, row.label) for row in train.examples] == [("train-0", "Yes")]
    assert train.malformed == 1 and "1 rows left out: malformed" in train.note
    assert not train.partial
    test = load(tmp_path, "qqp", "test", test="id\tquestion1\tquestion2\n5\tHow?\tWhy?\n")
    assert test.examples[0].extra == {"idx": 5}


MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
)


def test_official_mnli_rows_without_agreement_are_left_out(tmp_path: Path) -> None:
    row = "{0}\t1\t2\tfiction\t(b)\t(b)\t(p)\t(p)\tA.\tB.\tneutral\tneutral\t{1}\n"
    text = MNLI_HEAD + row.format(0, "neutral") + row.format(1, "-") + row.format(2, "entailment")
    dev = load(tmp_path, "mnli", "dev", dev=text)
    assert [(row.id, row.label) for row in dev.examples] == [
        ("dev-0", "Neutral"),
        ("dev-2", "Entailment"),
    ]
    assert dev.examples[0].fields == {"premise": "A.", "hypothesis": "B."}
    assert "1 rows left out: without a gold label" in dev.note and dev.malformed == 0


def test_the_labelled_ax_file_names_its_columns_otherwise(tmp_path: Path) -> None:
    full = "Lexical Semantics\tPremise\tHypothesis\tLabel\r\n\tA.\tB.\tcontradiction\r\n"
    dev = load(tmp_path, "ax", "dev", dev=full)
    fields = {"premise": "A.", "hypothesis": "B."}
    assert dev.examples == [Example("dev-0", fields, "Contradiction", "ax")]
    test = load(tmp_path, "ax", "test", test="index\tsentence1\tsentence2\n3\tA.\tB.\n")
    assert test.examples == [Example("3", fields, None, "ax", extra={"idx": 3})]


def test_quoted_csv(tmp_path: Path) -> None:
    text = 'premise,statement,label,x\n"A, ""so""\nB",C,entailment,\nshort\nD,E,neutral,\n'
    dev = load(tmp_path, "siga-nli", "dev", dev=text)
    assert [row.id for row in dev.examples] == ["dev-0", "dev-1"] and dev.malformed == 1
    assert dev.examples[0].fields == {"premise": 'A, "so"\nB', "statement": "C"}


def test_a_rating_must_be_in_its_range(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tscore\n"
    dev = load(tmp_path, "stsb", "dev", dev=head + "0\tA\tB\t2.533\n")
    assert dev.examples[0].label == "2.533"
    for value in ("5.1", "much", "", "nan"):
        with pytest.raises(
            UserError, match=r"dev\.tsv:2: .* is not a decimal number between 0 and"
        ):
            load(tmp_path, "stsb", "dev", dev=head + f"0\tA\tB\t{value}\n")

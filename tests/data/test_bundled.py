"""The stand-in reviews: balanced, disjoint, always the same, and labelled as a reader would."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from ppo_nlu.config import DataConfig
from ppo_nlu.data import bundled, load_split
from ppo_nlu.tasks import get_task

LABELLED = [row for split in ("train", "dev") for row in bundled.splits()[split]]


def test_the_splits_have_their_sizes_and_are_balanced_and_disjoint() -> None:
    splits = bundled.splits()
    assert {name: len(rows) for name, rows in splits.items()} == bundled.SIZES
    for name in ("train", "dev"):
        share = sum(value == "1" for _, value in splits[name]) / len(splits[name])
        assert abs(share - 0.5) <= 0.02
        first = sum(value == "1" for _, value in splits[name][:200])
        assert 70 < first < 130  # shuffled: a limit keeps both labels
        assert [value for _, value in splits[name][:8]] not in (["1", "0"] * 4, ["0", "1"] * 4)
    assert {value for _, value in splits["test"]} == {None}
    sentences = [text.removesuffix(" .") for rows in splits.values() for text, _ in rows]
    assert len(set(sentences)) == len(sentences)


def test_the_sentences_look_like_those_of_sst() -> None:
    for text, _ in LABELLED:
        assert re.fullmatch(r"[a-z,.;' -]+", text) and text == " ".join(text.split()), text
        assert not re.search(r"\S[,.;]|[{}_]", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiouh]", text), text
    lengths = sorted(len(text.split()) for text, _ in LABELLED)
    assert lengths[0] >= 2 and lengths[-1] <= 40 and 6 <= lengths[len(lengths) // 2] <= 15


def test_no_word_is_favourable_and_unfavourable_at_once() -> None:
    good = {word for pair in bundled.LEXICON.values() for word in pair[0]}
    bad = {word for pair in bundled.LEXICON.values() for word in pair[1]}
    neutral = {word for words in bundled.NEUTRAL.values() for word in words}
    assert not good & bad and not (good | bad) & neutral
    assert len(good | bad) > 250
    for side in (0, 1):
        for pair in bundled.LEXICON.values():
            assert len(set(pair[side])) == len(pair[side])


def test_the_sentences_are_the_same_everywhere() -> None:
    text = repr(sorted(bundled.splits().items())).encode()
    assert hashlib.sha256(text).hexdigest() == DIGEST
    program = (
        "from ppo_nlu.data import bundled; import hashlib;"
        "print(hashlib.sha256(repr(sorted(bundled.splits().items())).encode()).hexdigest())"
    )
    for seed in ("1", "2"):  # the order of a set would show here
        command = [sys.executable, "-c", program]
        root = str(Path(__file__).parents[2])
        out = subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PYTHONPATH": root}, capture_output=True
        )
        assert out.stdout.decode().strip() == DIGEST, out.stderr
    assert bundled.splits(1)["train"] != bundled.splits(0)["train"]


DIGEST = "28bf6e363f4595322eda61a48a55d248010d9700642ac7a6b62007c85cfa5b47"


# A reader's rule, written apart from the generator: the main clause decides, a negator turns the
# words behind it over, and the words are looked up in the lexicon.
NEGATORS = re.compile(
    r"\b(not|n't|never|hardly|far from|neither|lacks|without|no|nobody)\b|(?<= )n't(?= )"
)
OPENERS = ("although ", "though ", "while ", "even if ")
GOOD = {word for pair in bundled.LEXICON.values() for word in pair[0]}
BAD = {word for pair in bundled.LEXICON.values() for word in pair[1]}


def _main_clause(text: str) -> str:
    text = text.removesuffix(" .")
    for opener in OPENERS:
        if text.startswith(opener):
            return text.split(" , ", 1)[1]
        if f" , {opener}" in text:
            return text.split(f" , {opener}", 1)[0]
    for joint in (" , but ", " , yet "):
        if joint in text:
            return text.split(joint, 1)[1]
    return text


def _reader(text: str) -> str:
    votes = 0
    for clause in re.split(r" ; | because | , and (?!never)(?:so )?", _main_clause(text)):
        negator = NEGATORS.search(clause)
        turn = -1 if negator else 1
        votes += turn * sum((word in GOOD) - (word in BAD) for word in clause.split())
    assert votes, text
    return "1" if votes > 0 else "0"


def test_a_reader_agrees_with_every_label() -> None:
    wrong = [(text, value) for text, value in LABELLED if _reader(text) != value]
    assert not wrong, wrong[:5]


def test_a_reader_who_skips_negation_or_contrast_is_often_wrong() -> None:
    counts = {"negation": 0, "contrast": 0}
    for text, value in LABELLED:
        main = _main_clause(text)
        counts["contrast"] += main != text.removesuffix(" .")
        plain = sum((word in GOOD) - (word in BAD) for word in main.split())
        counts["negation"] += (plain > 0) != (value == "1")
    assert 0.15 < counts["contrast"] / len(LABELLED) < 0.25
    assert 0.08 < counts["negation"] / len(LABELLED) < 0.2


def test_a_bag_of_words_is_neither_useless_nor_enough() -> None:
    splits = bundled.splits()
    bag = CountVectorizer(token_pattern=r"\S+")
    train = bag.fit_transform([text for text, _ in splits["train"]])
    model = LogisticRegression(max_iter=1000).fit(train, [value for _, value in splits["train"]])
    dev = bag.transform([text for text, _ in splits["dev"]])
    assert 0.70 < model.score(dev, [value for _, value in splits["dev"]]) < 0.95


@pytest.mark.parametrize("split", bundled.SIZES)
def test_written_files_are_read_back_row_for_row(tmp_path: Path, split: str) -> None:
    bundled.write(tmp_path / "new" / "SST-2")
    spec = get_task("sst2")
    stored = load_split(spec, split, DataConfig(path=str(tmp_path / "new")))
    rows = bundled.splits()[split]
    assert [example.fields["sentence"].rstrip() for example in stored.examples] == [
        text for text, _ in rows
    ]
    assert [example.label for example in stored.examples] == [
        value and spec.word_of(value) for _, value in rows
    ]
    assert stored.source == str(tmp_path / "new" / "SST-2") and "left out" not in stored.note


def test_the_files_have_the_official_layout(tmp_path: Path, real_data: Path) -> None:
    bundled.write(tmp_path)
    official = next(real_data.glob("**/SST-2"))
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        mine, theirs = ((folder / name).read_bytes() for folder in (tmp_path, official))
        assert mine.split(b"\n")[0] == theirs.split(b"\n")[0]
        assert mine.endswith(b"\n") and mine.count(b"\r") == theirs.count(b"\r") == 0
        pattern = rb"\d+\t[^\t]+\S" if name == "test.tsv" else rb"[^\t]+ \t[01]"
        for text in (mine, theirs):
            assert all(re.fullmatch(pattern, line) for line in text.split(b"\n")[1:-1])

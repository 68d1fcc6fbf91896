"""The official files of JSON lines: what an object becomes, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ppo_nlu.data.readers import json_lines
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example
from tests.data.files import ARTICLE, SPANS, json_lines_of, load


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_json_labels_may_be_booleans_or_texts(tmp_path: Path, value: object) -> None:
    row = {"passage": "A.", "question": "is it", "label": value, "idx": 0}
    dev = load(tmp_path, "boolq", "dev", dev=json_lines_of(row), train=json_lines_of(row, row))
    assert dev.examples[0].label == "Yes" and not dev.partial


def test_json_labels_and_numbers_may_be_texts(tmp_path: Path) -> None:
    row = {"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": "4"}
    for value in (1, "1"):
        dev = load(tmp_path, "copa", "dev", dev=json_lines_of(row | {"label": value}))
        assert dev.examples[0].label == "Second"
    test = load(tmp_path, "copa", "test", test=json_lines_of(row, row | {"idx": 5}))
    assert [(row.id, row.extra) for row in test.examples] == [("4", {"idx": 4}), ("5", {"idx": 5})]
    for key, value, part in (
        ("label", 7, "has no label '7'; it has 0, 1"),
        ("label", None, "has no label ''"),
        ("premise", 3, "'premise' must be there"),
    ):
        with pytest.raises(UserError, match=rf"val\.jsonl:2: .*{part}"):
            bad = row | {"label": 0} | {key: value}
            load(tmp_path, "copa", "dev", dev=json_lines_of(row | {"label": 0}, bad))
    with pytest.raises(UserError, match=r"val\.jsonl:1: .*'label' is missing"):
        load(tmp_path, "copa", "dev", dev=json_lines_of(row))
    with pytest.raises(UserError, match=r"test\.jsonl:1: the row number 'x' is not a whole number"):
        load(tmp_path, "copa", "test", test=json_lines_of(row | {"idx": "x"}))


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
    dev = load(tmp_path, "multirc", "dev", dev=json_lines_of(paragraph)).examples
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
    test = load(tmp_path, "multirc", "test", test=json_lines_of(paragraph)).examples
    assert [(row.id, row.label) for row in test] == [
        ("2-5-8", None),
        ("2-5-9", None),
        ("2-6-8", None),
    ]
    with pytest.raises(UserError, match=r"test\.jsonl:1: not in the official form: 'questions'"):
        load(tmp_path, "multirc", "test", test='{"idx": 0, "passage": {"text": "A."}}\n')


def _news(**query: object) -> str:
    entities = [{"start": start, "end": end} for start, end in SPANS]
    asked = {"query": "@placeholder was glad, said @placeholder", "idx": 71} | query
    row = {"source": "x", "idx": 3, "qas": [asked]}
    return json_lines_of(row | {"passage": {"text": ARTICLE, "entities": entities}})


def test_record_has_a_row_for_each_distinct_name(tmp_path: Path) -> None:
    answers = [{"start": 12, "end": 13, "text": "Bo"}, {"start": 40, "end": 41, "text": "Bo"}]
    dev = load(tmp_path, "record", "dev", dev=_news(answers=answers)).examples
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
    test = load(tmp_path, "record", "test", test=_news()).examples
    assert test[1].id == "71-1" and test[1].label is None
    assert test[1].extra == {"idx": 71, "entity": "Bo"}
    with pytest.raises(UserError, match=r"val\.jsonl:1: .*'answers' is missing"):
        load(tmp_path, "record", "dev", dev=_news())


@pytest.mark.parametrize("answers", [[], [{"text": ""}], [{"text": "Bo"}, {"text": " "}]])
def test_a_cloze_without_a_right_answer_is_refused(tmp_path: Path, answers: list) -> None:
    with pytest.raises(UserError, match=r"val\.jsonl:1: a query has no answer, or an empty one"):
        load(tmp_path, "record", "dev", dev=_news(answers=answers))


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
    dev = load(tmp_path, "wsc", "dev", dev=json_lines_of(*rows))
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
    assert json_lines.mark("นี่ไม่ดี ดี", "ดี", 0) == ("นี่ไม่ดี *ดี*", "moved")
    assert json_lines.mark("non-it it", "it", 0) == ("non-it *it*", "moved")
    assert json_lines.mark("so it's", "it", 1) == ("so *it*'s", "exact")


def test_a_long_text_is_marked_in_linear_time() -> None:
    text, pause = "it is " * 10_000, time.process_time()
    assert json_lines.mark(text, "it", 19_998)[1] == "exact"
    assert time.process_time() - pause < 2  # 8,000 words once took 2.6 s


def test_ax_g_pairs(tmp_path: Path) -> None:
    row = {"premise": "A", "hypothesis": "B", "label": "entailment", "pair_id": 551646}
    test = load(tmp_path, "ax-g", "test", test=json_lines_of(*(row | {"idx": n} for n in range(4))))
    assert [row.group for row in test.examples] == ["0", "0", "1", "1"]
    assert test.examples[3].extra == {"idx": 3} and test.examples[3].label == "Yes"

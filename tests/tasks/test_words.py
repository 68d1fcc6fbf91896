"""What a whole word is, in every script; and what the parser reads where words are hard to tell."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest

from ppo_nlu.data.labels import gold
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Label, Rating, TaskSpec, words
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.metrics.text import exact, normalise
from ppo_nlu.tasks.prompts import answer


def choice(*listed: str) -> TaskSpec:
    labels = tuple(Label(word, str(value)) for value, word in enumerate(listed))
    return TaskSpec("t", "T", "b", "T", "d", "{x}", ("x",), labels)


def read(listed: tuple[str, ...], text: str) -> str | None:
    return parse(choice(*listed), f" {text} </Judgement>")


def test_marks_are_those_of_the_unicode_table() -> None:
    listed = words.letters()
    for code in [*range(0x20, 0x20000), *range(0xE0000, 0xE0200)]:
        sign = chr(code)
        if unicodedata.category(sign)[0] == "M":
            assert words.find(["x"], f"x {sign}") and not words.find(["x"], f"x{sign}y"), hex(code)
    assert len(listed) < 2000


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        (("ดี", "แย่"), "ไม่ดี"),  # Thai: "not good" is one word, with a tone mark before "good"
        (("अच्छ", "बुर"), "अच्छा"),  # Hindi: a vowel sign behind
        (("خوب", "بد"), "نا\u200cخوب"),  # Persian: a joiner between prefix and word
        (("ملك", "بد"), "ملكَ"),  # Arabic: a vowel mark behind
        (("Positive", "Negative"), "non-negative"),
        (("Positive", "Negative"), "non\u2011negative"),  # the hyphen that does not break
        (("Positive", "Negative"), "non\u00adnegative"),  # the soft one is not to be seen
        (("Positive", "Negative"), "Positive\u0301"),
        (("Positive", "Negative"), "Positive's"),
        (("entailment", "neutral"), "non-entailment"),
        (("isn", "t"), "isn't"),
        (("isn", "t"), "isn\u2019t"),
        (("1", "0"), "-1"),
        (("1", "0"), "\u22121"),
        (("1", "0"), "\u20131"),
        (("1", "0"), "+1"),
        (("1", "0"), "1.5"),
        (("1", "5"), "1.5"),
        (("1", "0"), "1,000"),
        (("1", "5"), "0,5"),
        (("5", "0"), ".5"),
        (("1", "0"), "1²"),
        (("A", "B"), "A+"),
        (("Yes", "No"), "№ 5"),  # one sign, which only looks like No
        (("New York", "York City"), "New York City"),  # neither is inside the other
        (("Yes", "No"), "yes/no"),
        (("Yes", "No"), "no_idea"),
    ],
)
def test_what_is_no_whole_word_is_no_answer(listed: tuple[str, ...], text: str) -> None:
    assert read(listed, text) is None


@pytest.mark.parametrize(
    ("listed", "text", "expected"),
    [
        (("ดี", "แย่"), "ดี", "ดี"),
        (("अच्छा", "बुरा"), "अच्छा।", "अच्छा"),
        (("Positive", "Negative"), "'Positive'", "Positive"),
        (("Positive", "Negative"), "\u2018positive\u2019", "Positive"),
        (("Positive", "Negative"), "- Positive", "Positive"),
        (("Positive", "Negative"), "**Positive**", "Positive"),
        (("Positive", "Negative"), "Positive\u2014a fine film", "Positive"),
        (("Positive", "Negative"), "Posi\u00adtive", "Positive"),
        (("Positive", "Negative"), "Ｐｏｓｉｔｉｖｅ", "Positive"),
        (("1", "0"), "１", "1"),
        (("1", "0"), "(1).", "1"),
        (("1", "-1"), "\u22121", "-1"),
        (("non-negative", "negative"), "non\u2011negative", "non-negative"),
        (("don't know", "know"), "Don\u2019t know", "don't know"),
        (("Café", "Bar"), "cafe\u0301", "Café"),
        (("İyi", "Kötü"), "İYİ", "İyi"),
        (("İyi", "Kötü"), "iyi", "İyi"),
        (("groß", "klein"), "GROSS", "groß"),
        (("C", "C++"), "C++", "C++"),
        (("C", "C++"), "C.", "C"),
        (("negative", "very negative"), "very negative", "very negative"),
        (("negative", "very negative"), "Very\n negative.", "very negative"),
        (("negative", "very negative"), "negative", "negative"),
        (("entailment", "not entailment"), "not entailment", "not entailment"),
        (("good", "not good", "not good enough"), "not good enough", "not good enough"),
        # Words, not sentences: the decision is in the docstring of the parser.
        (("Positive", "Negative"), "not positive", "Positive"),
    ],
)
def test_whole_words_are_read(listed: tuple[str, ...], text: str, expected: str) -> None:
    assert read(listed, text) == expected
    assert all(parse(choice(*listed), answer(word)) == word for word in listed)


# Every dash of the Unicode table that joins words; those that part them are in the next test.
HYPHENS = "-\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2043\u2212\u2e17\u2e1a\u2e40\u2e5d"
HYPHENS += "\u30a0\ufe32\ufe58\ufe63\uff0d\U00010ead"


@pytest.mark.parametrize("sign", HYPHENS)
@pytest.mark.parametrize(("prefix", "word"), [("non", "positive"), ("לא", "טוב"), ("ոչ", "լավ")])
def test_a_hyphen_of_any_script_is_part_of_the_word(sign: str, prefix: str, word: str) -> None:
    assert words.find([word], f"{prefix}{sign}{word}") == set()
    assert words.find([f"{prefix}-{word}", word], f"{prefix}{sign}{word}") == {f"{prefix}-{word}"}


def test_dashes_that_part_words() -> None:
    parting = "\u2014\u2015\u2e3a\u2e3b\u301c\u3030\ufe31"
    dashes = {chr(c) for c in range(0x11000) if unicodedata.category(chr(c)) == "Pd"}
    assert dashes - set(HYPHENS) == set(parting)
    for sign in parting:
        assert words.find(["good"], f"good{sign}but long") == {"good"}
    for text in ("good \u2013 but long", "\u2013 good", "\u201cgood\u201d\u2013so"):
        assert words.find(["good"], text) == {"good"}


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("לא", "לא\u05f4ל"),  # Hebrew gershayim: an abbreviation is one word
        ("ל", "ל\u05f3ון"),  # geresh
        ("col", "col\u00b7lega"),  # Catalan
        ("col", "col\u0387lega"),  # the same sign in Greek
        ("col", "col\u2027lega"),
        ("isn", "isn\u02bct"),
        ("isn", "isn\u055at"),
        ("isn", "isn\u00b4t"),
        ("isn", "isn`t"),
        ("isn", "isn\uff07t"),
        ("خوب", "نا\u0640خوب"),  # Arabic tatweel
        ("positive", "non\u200epositive"),  # a sign of direction is not to be seen
    ],
)
def test_signs_that_make_one_word(phrase: str, text: str) -> None:
    assert words.find([phrase], text) == set() and words.find([text], text) == {text}


@pytest.mark.parametrize(
    ("phrase", "text"),
    [
        ("ལེགས", "ལེགས\u0f0bསོ"),  # the Tibetan tsheg
        ("ጥሩ", "ጥሩ\u1361ነው"),  # the Ethiopic space
        ("καλό", "καλό\u0387 όχι"),  # the Greek semicolon, before a space
        ("はい", "はい\u30fbいいえ"),  # of a list in Japanese
        ("خوب", "خـوب"),
        ("خوب", "\u200fخوب\u200f"),
        ("positive", "`positive`"),
    ],
)
def test_signs_that_part_words(phrase: str, text: str) -> None:
    assert words.find([phrase], text) == {phrase}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("−1", "-1"),
        ("\u20130.5", "-0.5"),
        ("３.５", "3.5"),
        ("'3'", "3"),
        ("3.5/5", "3.5"),
        ("3,5", None),  # a decimal comma is not the number 3
        ("1,000", None),
        ("3-4", None),
        ("B-2", None),
        ("é3", None),
        ("3é", None),
        ("๓ก3", None),
        ("3+", None),
        ("3½", None),
        ("--3", None),
        ("..3", None),
        ("1e-5", None),
    ],
)
def test_numbers_that_stand_alone(text: str, expected: str | None) -> None:
    spec = TaskSpec("r", "R", "b", "R", "d", "{x}", ("x",), rating=Rating(-1, 5))
    assert parse(spec, f" {text} </Judgement>") == expected


def test_a_text_that_cannot_be_seen_is_no_answer() -> None:
    free = TaskSpec("f", "F", "b", "F", "d", "{x}", ("x",))
    assert parse(free, " \u200b\u00ad </Judgement>") is None
    assert words.is_empty(" \t\u200b\ufeff\u2003") and not words.is_empty("a\u200b")


def test_articles_are_whole_words_too() -> None:
    # A letter with its mark written apart is no article.
    assert normalise("a\u0301 film") == "a\u0301 film"
    assert normalise("The “a” film") == "“ ” film" and exact("the film", "a film") == 1.0


@pytest.mark.parametrize(
    ("labels", "text", "found"),
    [
        (["טוב", "רע"], "לא־טוב", set()),  # Hebrew maqaf: "not-good"
        (["լավ", "վատ"], "ոչ֊լավ", set()),  # Armenian hyphen
        (["positive", "negative"], "non–positive", set()),  # an en dash between letters
        (["positive", "negative"], "non⁃positive", set()),
        (["positive", "negative"], "non－positive", set()),  # full width
        (["positive", "negative"], "positive – of course", {"positive"}),
        (["positive", "negative"], "positive—of course", {"positive"}),  # an em dash parts words
    ],
)
def test_hyphens_of_every_script_join(labels: list[str], text: str, found: set[str]) -> None:
    assert set(words.find(labels, text)) == found


def test_a_label_of_the_file_may_be_composed_otherwise() -> None:
    """é as one letter and as e with a mark look the same, and are."""
    spec = choice("Oui")
    spec = replace(spec, labels=(Label("Oui", "h\u00e9"), Label("Non", "b")))
    assert gold(spec, "he\u0301", "a.csv:2") == "Oui"
    with pytest.raises(UserError, match="has no label"):
        gold(spec, "he", "a.csv:3")

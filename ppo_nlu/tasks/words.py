"""What a whole word is, and when two words are the same; for every place that looks for words.

Letters, digits and `_` are parts of a word in every script, and so are the marks on them (the vowel
signs of Thai or Hindi, Arabic diacritics), joiners without width, the hyphens of all scripts, and
the signs + and -. So "negative" is not a word of "non-negative", nor "1" of "-1".

Some signs are part of a word only right between two letters: an apostrophe, the Hebrew gershayim,
the middle dot of Catalan, and the en dash, which many write as a hyphen. A point or comma is one
between two digits: "1" is not in "1.5" or "1,000". Any other sign parts words: the slash
("yes/no" are two), the em dash ("good\u2014but long"), and the signs that stand for a space in
Tibetan and Ethiopic or part the items of a list in Japanese.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

JOINERS = "\u200c\u200d\u2060\ufeff"  # without width: words go on across them
# Read as "-": the hyphens of all scripts, the small dash that is used as one, the minus sign.
_HYPHENS = (
    "\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2043\u2212\u2e17\u2e1a\u2e40\u2e5d\u30a0"
    "\ufe58\ufe63\uff0d\U00010ead"
)
_APOSTROPHES = "\u2018\u2019\u201b\u02bc\u055a\u05f3\u00b4`"
_BETWEEN = "'\u2019\u05f4\u00b7\u2027"  # part of a word between two letters
_SAME: Mapping[int, str | None] = {
    **dict.fromkeys(map(ord, _HYPHENS), "-"),
    **dict.fromkeys(map(ord, _APOSTROPHES), "'"),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    0xFE32: "\u2013",  # the en dash of vertical lines
    # Not to be seen: the soft hyphen, signs of direction, and signs that choose how another one is
    # drawn. The Arabic tatweel only makes a word longer.
    **dict.fromkeys((0xAD, 0x640, 0x61C, 0x180E, 0x200E, 0x200F, 0xFE0E, 0xFE0F)),
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2061, 0x2070))),
}


def fold(text: str) -> str:
    """The text in the form in which words are compared: no case, composed letters, plain hyphens,
    apostrophes and widths. "STRASSE" is "straße", and the four Turkish i are one letter."""
    folded = unicodedata.normalize("NFC", text).translate(_SAME).casefold()
    folded = unicodedata.normalize("NFC", folded)
    folded = folded.replace("i\u0307", "i").replace("ı", "i")
    return _dash().sub("-", folded) if "\u2013" in folded else folded


@lru_cache(maxsize=1)
def _dash() -> re.Pattern[str]:
    """An en dash that is meant as a minus, right before a digit, or as a hyphen, in a word."""
    return re.compile(rf"\u2013(?=\d)|(?<=[{letters()}])\u2013(?=[{letters()}])")


def same(one: str, other: str) -> bool:
    """Whether two words or phrases are equal when folded."""
    return fold(one).split() == fold(other).split()


@lru_cache(maxsize=1)
def letters() -> str:
    """All that is part of a word, for a set [...] of a pattern."""
    # No mark lies between these two blocks, and the look takes ten milliseconds.
    codes = [*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)]
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code))[0] == "M")
    return rf"\w{_ranges(marks)}{JOINERS}{_HYPHENS}\xad+\-"


def _ranges(signs: str) -> str:
    """The signs, which are in order, as ranges: a-dx."""
    found: list[list[str]] = []
    for sign in signs:
        if found and ord(sign) == ord(found[-1][1]) + 1:
            found[-1][1] = sign
        else:
            found.append([sign, sign])
    return "".join(f"{first}-{last}" for first, last in found)


def whole_words(pattern: str, apostrophes: str = _BETWEEN) -> str:
    """The pattern, matching whole words only: what stands before and behind is no part of a word.

    Without `apostrophes` these part words, so that "it" is one in "it's".
    """
    part = f"[{letters()}]"
    before, behind = f"(?<!{part})", f"(?!{part})"
    if apostrophes:
        before += f"(?<!{part}[{apostrophes}])"
        behind += f"(?![{apostrophes}]{part})"
    return (
        rf"{before}(?:(?<!\.)(?<!\d,)(?=\d)|(?!\d))(?:{pattern})"
        rf"{behind}(?:(?<=\d)(?![.,]\d)|(?<!\d))"
    )


@lru_cache(maxsize=64)
def _matchers(phrases: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    found = []
    for phrase in phrases:
        words = fold(phrase).split()
        if words:
            found.append((phrase, re.compile(whole_words(r"\s+".join(map(re.escape, words))))))
    return found


def find(phrases: Sequence[str], text: str) -> set[str]:
    """The phrases found as whole words, ignoring case.

    A phrase inside a longer one does not count: where "very negative" stands, "negative" does not.
    """
    folded = fold(text)
    spans = [
        (match.start(), match.end(), phrase)
        for phrase, matcher in _matchers(tuple(phrases))
        for match in matcher.finditer(folded)
    ]
    return {
        phrase
        for start, end, phrase in spans
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
    }


def unmarked(text: str) -> str:
    """Remove marks and joiners, so `\\w` matches in every script."""
    return "".join(c for c in text if unicodedata.category(c)[0] != "M" and c not in JOINERS)


def is_empty(text: str) -> bool:
    """Whether the text shows nothing: only white space, control and format characters."""
    return all(sign.isspace() or unicodedata.category(sign) in ("Cc", "Cf") for sign in text)


def twice(names: Iterable[str]) -> str | None:
    """The first repeated name, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None

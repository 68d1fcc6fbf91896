"""What a whole word is, and when two words are the same; for every place that looks for words.

Letters, digits and `_` are parts of a word in every script, and so are the marks on them (the vowel
signs of Thai or Hindi, Arabic diacritics), joiners without width, hyphens, and the signs + and -.
So "negative" is not a word of "non-negative", nor "1" of "-1". An apostrophe is part of a word
between two letters, a point or comma between two digits: "1" is not in "1.5" or "1,000". Any
other sign parts words, the slash too: "yes/no" are two.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

JOINERS = "\u200c\u200d\u2060\ufeff"  # without width: words go on across them
# Read as "-": hyphens of every script (Armenian, Hebrew, Canadian, Mongolian), and the minus sign.
# An en dash is one between two letters, or before a digit; an em dash parts words.
_HYPHENS = "\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2043\u2212\u2e17\ufe58\ufe63\uff0d"
_APOSTROPHES = "\u2018\u2019\u02bc"
_SAME: Mapping[int, str | None] = {
    **dict.fromkeys(map(ord, _HYPHENS), "-"),
    **dict.fromkeys(map(ord, _APOSTROPHES), "'"),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    # Not to be seen: the soft hyphen, and signs that choose how another one is drawn.
    **dict.fromkeys((0xAD, 0xFE0E, 0xFE0F)),
}


_DASH = re.compile(r"(?<=[^\W\d_])\u2013(?=[^\W\d_])|\u2013(?=\d)")  # an en dash that is meant so


def fold(text: str) -> str:
    """The text in the form in which words are compared: no case, composed letters, plain hyphens,
    apostrophes and widths. "STRASSE" is "straße", and the four Turkish i are one letter."""
    folded = unicodedata.normalize("NFC", text).translate(_SAME).casefold()
    folded = unicodedata.normalize("NFC", folded)
    folded = folded.replace("i\u0307", "i").replace("ı", "i")
    return _DASH.sub("-", folded)


def same(one: str, other: str) -> bool:
    """Whether a reader takes two words or phrases for the same."""
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


def whole_words(pattern: str, apostrophes: str = "'\u2019") -> str:
    """The pattern where it stands as whole words: what stands before and behind is no part of them.

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
    """Those of the phrases that stand in the text as whole words, in any case.

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
    """The text without marks and joiners: of a word of any script, what `\\w` knows is left."""
    return "".join(c for c in text if unicodedata.category(c)[0] != "M" and c not in JOINERS)


def is_empty(text: str) -> bool:
    """Whether there is nothing to be seen: white space, or signs without width."""
    return all(sign.isspace() or unicodedata.category(sign) in ("Cc", "Cf") for sign in text)


def twice(names: Iterable[str]) -> str | None:
    """The first name that is there twice; None where there is none."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None

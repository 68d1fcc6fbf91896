"""The one parser, used by training, evaluation and submission alike."""

from __future__ import annotations

import re

from ppo_nlu.prompts import STOP
from ppo_nlu.tasks import TaskSpec

# A number that stands alone: no part of a word, and of "1e9" not the "1".
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)", re.ASCII)


def parse(spec: TaskSpec, response: str, form: str = "judgement") -> str | None:
    """The answer that a response gives: a label word, a number in the task's range as written, or
    a short text; None where it gives none or more than one.

    Only the text before the first closing tag counts, and a response without the tag gives no
    answer; in the `analysis` form only what stands behind the last opening tag before it. Words
    match whole and in any case, longer words first, so "Not" is no "No" and "not_entailment" is
    no "entailment". Of numbers the first counts.
    """
    text, tag, _ = response.partition(STOP)
    if form == "analysis":
        _, opening, text = text.rpartition("<Judgement>")
        tag = tag and opening
    if not tag:
        return None
    if spec.kind == "choice":
        return _word(spec, text)
    return _number(spec, text) if spec.kind == "rating" else text.strip() or None


def _word(spec: TaskSpec, text: str) -> str | None:
    words = sorted(spec.words, key=len, reverse=True)
    # A group for each word: beyond ASCII a match need not be the word in another case ("ſ" is "s").
    groups = "|".join(f"({re.escape(word)})" for word in words)
    matches = re.finditer(rf"(?<!\w)(?:{groups})(?!\w)", text, flags=re.IGNORECASE)
    found = {words[match.lastindex - 1] for match in matches if match.lastindex}
    return found.pop() if len(found) == 1 else None


def _number(spec: TaskSpec, text: str) -> str | None:
    match = _NUMBER.search(text)
    assert spec.rating is not None
    return match[0] if match and spec.rating.holds(float(match[0])) else None

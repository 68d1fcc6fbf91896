"""The one parser, used by training, evaluation and submission alike."""

from __future__ import annotations

import re
from functools import lru_cache

from ppo_nlu.tasks import TaskSpec, words
from ppo_nlu.tasks.prompts import STOP


def parse(spec: TaskSpec, response: str, form: str = "judgement") -> str | None:
    """The answer that a response gives: a label word, a number in the task's range as written, or
    a short text; None where it gives none or more than one.

    Only the text before the first closing tag counts, and a response without the tag gives no
    answer; in the `analysis` form only what stands behind the last opening tag before it. Label
    words match whole and in any case, as `words` has it, so "Not" is no "No", "not_entailment" and
    "non-entailment" are no "entailment", and "-1" is no "1". A label inside a longer one does not
    count. Of numbers the first counts; a part of "1,5", "3-4" or "B-2" is none.

    The parser finds words and does not understand sentences, in no language: "not positive" is the
    word "positive" behind another one, and reads as Positive. Where a negated word is an answer of
    its own, it must be a label of its own ("not positive"), and then the longer one is read.
    """
    text, tag, _ = response.partition(STOP)
    if form == "analysis":
        _, opening, text = text.rpartition("<Judgement>")
        tag = tag and opening
    if not tag:
        return None
    if spec.kind == "choice":
        found = words.find(spec.words, text)
        return found.pop() if len(found) == 1 else None
    if spec.kind == "rating":
        return _number(spec, text)
    return None if words.is_empty(text) else text.strip()


def _number(spec: TaskSpec, text: str) -> str | None:
    match = _numbers().search(words.fold(text))
    assert spec.rating is not None
    return match[0] if match and spec.rating.holds(float(match[0])) else None


@lru_cache(maxsize=1)
def _numbers() -> re.Pattern[str]:
    """A number that stands alone; of "1e9" not the "1"."""
    return re.compile(words.whole_words(r"(?<!\.)[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"))

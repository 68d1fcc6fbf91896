"""The one parser, used by training, evaluation and prediction alike."""

from __future__ import annotations

import re

from ppo_nlu.prompts import STOP
from ppo_nlu.tasks import TaskSpec


def parse(spec: TaskSpec, response: str) -> str | None:
    """The label word that a response gives, or None where it gives none or more than one.

    Only the text before the first closing tag counts, and a response without the tag gives no
    answer. Words match whole and in any case, longer words first, so "Not" is no "No" and
    "not_entailment" is no "entailment".
    """
    text, tag, _ = response.partition(STOP)
    if not tag:
        return None
    words = sorted(spec.words, key=len, reverse=True)
    # A group for each word: beyond ASCII a match need not be the word in another case ("ſ" is "s").
    groups = "|".join(f"({re.escape(word)})" for word in words)
    matches = re.finditer(rf"(?<!\w)(?:{groups})(?!\w)", text, flags=re.IGNORECASE)
    found = {words[match.lastindex - 1] for match in matches if match.lastindex}
    return found.pop() if len(found) == 1 else None

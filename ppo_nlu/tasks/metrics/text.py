"""Metrics of free text: SQuAD's form for comparison, exact match and F1 of words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ppo_nlu.tasks import Example, words
from ppo_nlu.tasks.metrics.rows import Metric, Rows, share

Match = Callable[[str, str], float]  # of a text and a gold text, 0 to 1
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's form for comparison: lower case, no punctuation, no a, an, the, single spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_articles().sub(" ", bare).split())


@lru_cache(maxsize=1)
def _articles() -> re.Pattern[str]:
    return re.compile(words.whole_words("a|an|the", apostrophes=""))


def exact(text: str, gold: str) -> float:
    """1 where both are the same in SQuAD's form, else 0."""
    return float(normalise(text) == normalise(gold))


def token_f1(text: str, gold: str) -> float:
    """SQuAD's F1 of the words that both texts have; of two empty texts 1."""
    mine, wanted = normalise(text).split(), normalise(gold).split()
    if not mine or not wanted:
        return float(mine == wanted)
    return 2 * sum((Counter(mine) & Counter(wanted)).values()) / (len(mine) + len(wanted))


def best_match(match: Match, text: str | None, example: Example) -> float:
    """The best match with a gold answer: `extra["answers"]`, or else the label; 0 without text."""
    golds = example.extra.get("answers") or [str(example.label)]
    return 0.0 if text is None else max(match(text, gold) for gold in golds)


def _keep_text(match: Match) -> Callable[[Rows], np.ndarray]:
    """(match with the nearest gold answer, 1) of every row."""

    def keep(rows: Rows) -> np.ndarray:
        pairs = zip(rows.predictions, rows.examples, strict=True)
        return rows.summed(np.array([[best_match(match, p, e), 1.0] for p, e in pairs]))

    return keep


METRICS = {
    "exact": Metric("text", _keep_text(exact), share),
    "token_f1": Metric("text", _keep_text(token_f1), share),
}

"""The reward of an answer: one number for the whole response (arXiv 2410.11020, section 3)."""

from __future__ import annotations

# (right, wrong, no answer): the paper's text, and its released code, which is 2 * paper - 1.
SCALES = {"paper": (1.0, 0.0, -1.0), "code": (1.0, -1.0, -3.0)}


def score(prediction: str | None, label: str, scale: str = "paper") -> float:
    """The reward for a parsed answer (None: the response held no answer) given the gold label."""
    right, wrong, exceptional = SCALES[scale]
    if prediction is None:
        return exceptional
    return right if prediction == label else wrong

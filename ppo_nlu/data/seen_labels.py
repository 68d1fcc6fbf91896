"""The sentences whose labels the bundled model saw before any run of ours."""

from __future__ import annotations

from pathlib import Path

from ppo_nlu.data.lines import numbered_lines
from ppo_nlu.data.sources import expand
from ppo_nlu.data.texts import normalise
from ppo_nlu.errors import UserError

SEEN_LABELS = Path(__file__).parents[1] / "assets" / "tiny" / "seen_labels.txt"


def saw_labels(model: str) -> bool:
    """Whether a model is the bundled one, or was made from it and says so by the list beside it."""
    return model == "bundled" or (expand(model) / SEEN_LABELS.name).is_file()


def exclusions() -> set[str]:
    """The sentences, normalised, whose labels the bundled model saw before any run of ours."""
    if not SEEN_LABELS.is_file():
        raise UserError(
            f"data.exclude_pretraining_labels: {SEEN_LABELS} is missing, so what the bundled model "
            "has seen cannot be left out; install the package again"
        )
    return {normalise(line) for _, line in numbered_lines(SEEN_LABELS)} - {""}

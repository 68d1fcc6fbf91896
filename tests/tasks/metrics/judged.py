"""Rows and answers to judge, and one metric of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ppo_nlu.tasks import TASKS, Example, TaskSpec
from ppo_nlu.tasks.metrics import METRICS, Rows, evaluate

WORDS = ("Positive", "Negative")
TEXT = TaskSpec("qa", "QA", "custom", "", "", "{q}", ("q",), metrics=("exact", "token_f1"))
ACCURACY = [METRICS["accuracy"]]


def rows(labels: Sequence[str], groups: Sequence[str] = ()) -> list[Example]:
    names = groups or [""] * len(labels)
    pairs = enumerate(zip(labels, names, strict=True))
    return [Example(str(i), {}, label, group=group) for i, (label, group) in pairs]


def judged(labels: Sequence[str], predictions: Sequence[str | None]) -> Rows:
    return Rows(TASKS["sst2"], rows(labels), predictions)


def measured(
    name: str, task: str, labels: Sequence[str], given: Sequence[str | None], **more: Sequence[str]
) -> float:
    """One metric, whether or not the task's own list has it."""
    return evaluate(replace(TASKS[task], metrics=(name,)), rows(labels, **more), given)[name]


def spelt(predictions: Sequence[str | None]) -> list[str]:
    return [p or "unparsed" for p in predictions]


def random_answers(words: tuple[str, ...], count: int) -> tuple[list[str], list[str | None]]:
    draw = np.random.default_rng(3)
    labels = [words[i] for i in draw.integers(0, len(words), count)]
    options = [*words, None]
    predictions = [options[i] for i in draw.integers(0, len(options), count)]
    right = draw.random(count) < 0.6
    return labels, [labels[i] if right[i] else predictions[i] for i in range(count)]

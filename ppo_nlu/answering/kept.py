"""The answers to a submission's test rows, which are kept in the run folders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ppo_nlu.answering.answer import Answer, Answerer, shown
from ppo_nlu.answering.leaderboard import Entry, FinishedRun
from ppo_nlu.answering.load_run import load_trained
from ppo_nlu.answering.predictions import read_predictions, recorded
from ppo_nlu.storage.files import make_folder
from ppo_nlu.tasks import TaskSpec


def answered(entries: Sequence[Entry], decode: str) -> Iterator[tuple[Entry, list[Answer]]]:
    """The answers to each entry: those kept in the run folder, or else the model's, asked now.

    A run's entries must be neighbours: its model is loaded once, and only if it is needed.
    """
    holder: FinishedRun | None = None
    answerer: Answerer | None = None
    for entry in entries:
        if entry.run is not holder:
            holder, answerer = entry.run, None
        # A query's row is chosen by P(Yes) - P(No), which only scoring gives.
        how = "score" if entry.by_query else decode
        path = entry.run.answers_folder(entry.spec.name) / f"predictions-{how}.jsonl"
        given = kept(path, entry)
        if given is None:
            answerer = answerer or load_trained(entry.run.cfg, entry.run.folder)
            given = ask(answerer, entry, path, how)
        yield entry, given


def kept(path: Path, entry: Entry) -> list[Answer] | None:
    """The answers of an earlier call; None where there are none, where they answer other rows, or
    where they are older than the trained weights."""
    if not path.is_file() or path.stat().st_mtime < entry.run.trained_at:
        return None
    try:
        given = read_predictions(path, entry.examples)
    except ValueError:
        return None
    fits = all(row.prediction is None or _allowed(entry.spec, row.prediction) for row in given)
    return given if fits else None


def _allowed(spec: TaskSpec, prediction: Any) -> bool:
    if spec.rating is None:
        return prediction in spec.words
    try:
        return math.isfinite(float(prediction))
    except (TypeError, ValueError):
        return False


def ask(answerer: Answerer, entry: Entry, path: Path, decode: str) -> list[Answer]:
    """The model's answers to an entry's test rows, written to `path` as they come.

    The model is asked as for the task that the run was trained on: its prompt is the same, and it
    has the rows for shots.
    """
    answerer.require_fit(entry.trained)
    make_folder(path.parent)
    answers = answerer.answer(entry.trained, entry.examples, decode)
    rows = shown(
        recorded(path, answers), entry.name, len(entry.examples), entry.run.cfg.log.progress
    )
    return list(rows)

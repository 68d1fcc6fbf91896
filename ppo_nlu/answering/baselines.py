"""What a task's labels give without a language model, fitted on the training rows of the run and
measured on its evaluation rows.

- `constant`: always the largest class; for ratings the mean.
- `tfidf`: logistic regression on TF-IDF weights of words and pairs of words, by scikit-learn. All
  settings are scikit-learn's defaults, but for pairs (`ngram_range=(1, 2)`), `max_iter=1000` and
  `max_features`. A row's text is its fields joined by spaces.

To bound time and memory, TF-IDF is fitted on at most `ROWS` rows and about `CHARACTERS` characters,
drawn by a fixed seed, and keeps the most frequent features, at most `WEIGHTS` over all classes.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ppo_nlu import data
from ppo_nlu.errors import first_line
from ppo_nlu.tasks import Example, TaskSpec, metrics

ROWS = 50_000
CHARACTERS = 10_000_000
WEIGHTS = 2_000_000
MISSING = "scikit-learn is missing: pip install -e '.[baselines]'"
Figures = dict[str, Any]


def measure(
    spec: TaskSpec, train: Sequence[Example], held: Sequence[Example]
) -> dict[str, Figures]:
    """The baselines of a task by name; none for free text. One that could not be measured has the
    reason as its `error`."""
    if spec.kind == "text":
        return {}
    if spec.kind == "rating":
        return {"constant": mean(spec, train, held)}
    return {"constant": largest_class(spec, train, held), "tfidf": tfidf(spec, train, held)}


def largest_class(spec: TaskSpec, train: Sequence[Example], held: Sequence[Example]) -> Figures:
    """The figures of always answering with the largest class of the training rows."""
    answer = Counter(row.label for row in train).most_common(1)[0][0]
    return {"answer": answer} | _figures(spec, held, [answer] * len(held))


def mean(spec: TaskSpec, train: Sequence[Example], held: Sequence[Example]) -> Figures:
    """The mean error of always answering with the mean rating of the training rows; a constant has
    no correlation."""
    answer = f"{sum(float(str(row.label)) for row in train) / len(train):.3f}"
    rows = metrics.Rows(spec, held, [answer] * len(held))
    return {"answer": answer, "mean_error": metrics.mean_error(rows)}


def tfidf(spec: TaskSpec, train: Sequence[Example], held: Sequence[Example]) -> Figures:
    """The figures of TF-IDF with logistic regression, and the seconds of fitting and predicting.
    Whatever scikit-learn raises is the `error`."""
    rows = drawn(spec, train)
    try:
        predictions, seconds = _fitted(spec, rows, held)
    except ImportError:
        return {"error": MISSING}
    except Exception as error:  # a baseline never ends a run
        return {"error": first_line(error) or type(error).__name__}
    return _figures(spec, held, predictions) | {"train_rows": len(rows), "seconds": seconds}


def drawn(spec: TaskSpec, train: Sequence[Example]) -> list[Example]:
    """The rows to fit on: all, or so many of a seeded order as the bounds allow (at least one)."""
    kept: list[Example] = []
    left = CHARACTERS
    for place in data.epoch_order(len(train), seed=0, epoch=0)[:ROWS]:
        left -= len(data.joined(spec, train[place]))
        if kept and left < 0:
            break
        kept.append(train[place])
    return kept


def _fitted(
    spec: TaskSpec, train: Sequence[Example], held: Sequence[Example]
) -> tuple[list[str], float]:
    """The predicted label words of the evaluation rows, and the seconds that they took."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    started = time.perf_counter()
    texts, asked = ([data.joined(spec, row) for row in rows] for rows in (train, held))
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), max_features=WEIGHTS // len(spec.words)),
        LogisticRegression(max_iter=1000),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(texts, [str(row.label) for row in train])
        words = [str(word) for word in model.predict(asked)]
    return words, time.perf_counter() - started


def _figures(spec: TaskSpec, held: Sequence[Example], predictions: Sequence[str | None]) -> Figures:
    found = metrics.report(spec, held, predictions, resamples=0)
    return {key: found[key] for key in ("metrics", "score", "accuracy", "macro_f1")}

"""How good the predictions are: the benchmarks' metrics, counts, and their spread. numpy only.

Every rate is a fraction of 1, correlations are in [-1, 1]. A response without an answer (None) is
wrong, counts as a prediction of no class, and is reported by itself.

A metric sums up each unit (a row, or a group of rows that are judged together) in a few numbers,
and its value follows from how often each unit was drawn. So the value on all rows and the spread
over rows drawn with replacement come from the same few lines.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec, benchmark_tasks, words

UNPARSED = "unparsed"  # the name of None in a histogram and a confusion table
PARTS = 5  # of a rating's range, in its histogram

# ---- the numbers of a task -------------------------------------------------------------------


def evaluate(
    spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> dict[str, float]:
    """The task's own metrics, by name.

    `predictions` are label words, numbers as text or free text, None where the response held no
    answer; a rating without an answer counts as the middle of the range, the guess that says
    nothing, and one outside the range as its nearer end. `probabilities` by label word let ReCoRD
    pick the best entity of a query. A constant rating has no correlation: 0 and a warning.
    """
    return _evaluate(Rows(spec, examples, predictions, probabilities))


def _evaluate(rows: Rows) -> dict[str, float]:
    table = _metrics_of(rows.spec)
    if rows.spec.kind == "rating":
        _warn_constant(rows.gold_numbers, rows.numbers)
    return {name: metric.of(rows) for name, metric in table.items()}


def task_score(values: Mapping[str, float]) -> float:
    """The mean of a task's metrics: its part in the benchmark's official average."""
    return float(np.mean(list(values.values())))


def report(
    spec: TaskSpec,
    examples: Sequence[Example],
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about the predictions, ready for JSON; `interval` is the 95 % bootstrap interval
    of `score`, the mean of the metrics, over whole groups; None with `resamples=0`."""
    rows = Rows(spec, examples, predictions, probabilities)
    values = _evaluate(rows)
    head = {
        "count": len(rows.examples),
        "metrics": values,
        "score": task_score(values),
        "interval": _interval(rows, list(_metrics_of(spec).values()), resamples, seed),
        "unparsed": float(np.mean([prediction is None for prediction in predictions])),
    }
    if spec.kind == "text":
        return head | {"predicted": {}}
    if spec.kind == "rating":
        return head | {"mean_error": mean_error(rows), "predicted": _histogram(rows)}
    labels = [str(example.label) for example in examples]
    figures = classification_report(labels, predictions, spec.words, resamples=0)
    figures["accuracy_interval"] = _interval(rows, [METRICS["accuracy"]], resamples, seed)
    return head | figures


def mean_error(rows: Rows) -> float:
    """The mean distance of a rating from its gold number, in the rating's own unit."""
    return float(np.mean(np.abs(rows.numbers - rows.gold_numbers)))


def _histogram(rows: Rows) -> dict[str, int]:
    rating = rows.spec.rating
    assert rating is not None
    ends = np.linspace(rating.low, rating.high, PARTS + 1)
    given = rows.numbers[[prediction is not None for prediction in rows.predictions]]
    counts = np.histogram(given, ends)[0].tolist()
    names = [f"{low:g}-{high:g}" for low, high in zip(ends, ends[1:], strict=False)]
    unparsed = len(rows.numbers) - len(given)
    return dict(zip(names, counts, strict=True)) | {UNPARSED: unparsed}


# ---- the numbers of a benchmark --------------------------------------------------------------


def average(
    benchmark: str, scores: Mapping[str, Mapping[str, float]], style: str = "official"
) -> float | None:
    """The benchmark's one number from {task: {metric: value}}; None where a task is missing.

    `benchmark` is glue or superglue. "official" is the leaderboard's, where every task counts with
    the mean of its metrics; "paper" is the plain mean of what the paper's table shows.
    """
    columns = _columns(benchmark, style)
    if not columns or any(spec.name not in scores for column in columns for spec in column):
        return None
    return float(
        np.mean([np.mean([_part(scores[s.name], s, style) for s in column]) for column in columns])
    )


def _columns(benchmark: str, style: str) -> list[list[TaskSpec]]:
    """The tasks in each column of an average; those of one column are averaged first.

    The leaderboard counts MNLI's two test sets as one task, the paper as two.
    """
    columns: dict[str, list[TaskSpec]] = {}
    for spec in benchmark_tasks(benchmark):
        if style in spec.averages:
            home = spec.trained_with if style == "official" else ""
            columns.setdefault(home or spec.name, []).append(spec)
    return list(columns.values())


def _part(values: Mapping[str, float], spec: TaskSpec, style: str) -> float:
    names = spec.shown if style == "paper" else values
    return task_score({name: values[name] for name in names})


# ---- rows, units and draws -------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What is judged: N rows in U units. Raises ValueError where it cannot be."""

    spec: TaskSpec
    examples: Sequence[Example]
    predictions: Sequence[str | None]
    probabilities: Sequence[Mapping[str, float] | None] | None = None

    def __post_init__(self) -> None:
        count = len(self.examples)
        others = (self.predictions, self.probabilities)
        if not count or any(other is not None and len(other) != count for other in others):
            sizes = [len(other) for other in others if other is not None]
            raise ValueError(f"{count} examples and {sizes} predictions and probabilities")
        unlabelled = next((e.id for e in self.examples if e.label is None), None)
        if unlabelled is not None:
            raise ValueError(f"row {unlabelled} has no label")

    @cached_property
    def units(self) -> np.ndarray:
        """The unit of each row, (N,): its group, or itself where it has none."""
        places: dict[Any, int] = {}
        keys = (e.group or i for i, e in enumerate(self.examples))
        return np.array([places.setdefault(key, len(places)) for key in keys])

    @cached_property
    def members(self) -> list[list[int]]:
        """The rows of each unit, in their order."""
        found: list[list[int]] = [[] for _ in range(int(self.units.max()) + 1)]
        for row, unit in enumerate(self.units.tolist()):
            found[unit].append(row)
        return found

    def summed(self, figures: np.ndarray) -> np.ndarray:
        """Figures of each row (N, D) summed over each unit, (U, D)."""
        total = np.zeros((int(self.units.max()) + 1, figures.shape[1]))
        np.add.at(total, self.units, figures)
        return total

    @cached_property
    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Gold and predicted places among the label words, (N,) each; unparsed is the last."""
        labels = [str(example.label) for example in self.examples]
        return encode(labels, self.predictions, self.spec.words)

    @property
    def right(self) -> np.ndarray:
        """Which rows are right, (N,) bool."""
        gold, predicted = self.codes
        return gold == predicted

    @property
    def positive(self) -> int:
        """The place of the positive word: the one that stands for 1 in the data, else the first."""
        return self.spec.words.index(self.spec.word_of("1") or self.spec.words[0])

    @cached_property
    def gold_numbers(self) -> np.ndarray:
        """The gold ratings, (N,)."""
        return np.array([float(str(example.label)) for example in self.examples])

    @cached_property
    def numbers(self) -> np.ndarray:
        """The predicted ratings within their range, the middle where there is none, (N,)."""
        rating = self.spec.rating
        assert rating is not None
        given = [rating.middle if p is None else float(p) for p in self.predictions]
        return np.clip(given, rating.low, rating.high)


@dataclass(frozen=True)
class Metric:
    """A metric for answers of one kind: what it keeps of every unit, (U, D), and its values (R,)
    where unit u was drawn `times[r, u]` times, from times (R, U) and what was kept."""

    kind: str
    keep: Callable[[Rows], np.ndarray]
    value: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def of(self, rows: Rows) -> float:
        """The value on all rows."""
        kept = self.keep(rows)
        return float(self.value(np.ones((1, len(kept))), kept)[0])


def _metrics_of(spec: TaskSpec) -> dict[str, Metric]:
    for name in spec.metrics:
        if name not in METRICS or METRICS[name].kind != spec.kind:
            known = ", ".join(n for n, metric in METRICS.items() if metric.kind == spec.kind)
            raise UserError(f"metrics of {spec.name}: unknown metric {name!r}; use {known}")
    return {name: METRICS[name] for name in spec.metrics}


def _interval(
    rows: Rows, table: Sequence[Metric], resamples: int, seed: int, level: float = 0.95
) -> list[float] | None:
    """The percentile interval of the mean of the metrics over units drawn with replacement.

    Units of which the same is kept are one kind; how often each kind is drawn is multinomial.
    """
    if not resamples:
        return None
    kept = [metric.keep(rows) for metric in table]
    kinds, counts = np.unique(np.hstack(kept), axis=0, return_counts=True)
    parts = np.split(kinds, np.cumsum([part.shape[1] for part in kept])[:-1], axis=1)
    means = []
    for times in _draws(counts, resamples, np.random.default_rng(seed)):
        values = [m.value(times, part) for m, part in zip(table, parts, strict=True)]
        means.append(np.mean(values, axis=0))
    edges = [(1 - level) / 2, (1 + level) / 2]
    return [float(edge) for edge in np.quantile(np.concatenate(means), edges)]


def _draws(counts: np.ndarray, resamples: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each kind is drawn, (r, kinds), in pieces that need little memory."""
    size = max(1, 1_000_000 // len(counts))
    for start in range(0, resamples, size):
        some = min(size, resamples - start)
        yield draw.multinomial(counts.sum(), counts / counts.sum(), some).astype(float)


# ---- metrics of label words ------------------------------------------------------------------


def _share(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The first kept figure over the second, each summed; 0 where the second is."""
    sums = times @ kept
    return sums[:, 0] / np.maximum(sums[:, 1], 1e-300)


def _keep_right(rows: Rows) -> np.ndarray:
    """(right, 1) of every row."""
    return rows.summed(np.stack([rows.right, np.ones(len(rows.right))], axis=1))


def _keep_f1(rows: Rows) -> np.ndarray:
    """(2 true positives, predicted + actual positives) of every row."""
    gold, predicted = (codes == rows.positive for codes in rows.codes)
    return rows.summed(np.stack([2.0 * (gold & predicted), 1.0 * gold + predicted], axis=1))


def _keep_classes(rows: Rows) -> np.ndarray:
    """For every row K times right, K + 1 times predicted, K times gold, by class."""
    gold, predicted = rows.codes
    identity = np.eye(len(rows.spec.words) + 1)
    right = identity[gold] * rows.right[:, None]
    return rows.summed(np.hstack([right[:, :-1], identity[predicted], identity[gold][:, :-1]]))


def _class_sums(
    times: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right, predicted and gold counts (R, K) of each class, and how many are unparsed (R,)."""
    classes = kept.shape[1] // 3
    sums = times @ kept
    right, predicted = sums[:, :classes], sums[:, classes : 2 * classes]
    return right, predicted, sums[:, 2 * classes + 1 :], sums[:, 2 * classes]


def _macro_f1(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The mean of all classes' F1, 0 for one that neither occurs nor is predicted."""
    right, predicted, gold, _ = _class_sums(times, kept)
    return (2 * right / np.maximum(predicted + gold, 1)).mean(axis=1)


def _mcc(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Matthews' correlation for any number of classes (Gorodkin's R_K), 0 where undefined.

    (c·s - Σ pₖtₖ) / √((s² - Σ pₖ²)(s² - Σ tₖ²)), c right of s rows, pₖ predicted and tₖ gold
    counts. Unparsed is a class of its own that is predicted and never gold.
    """
    right, predicted, gold, unparsed = _class_sums(times, kept)
    rows = gold.sum(axis=1)
    above = right.sum(axis=1) * rows - (predicted * gold).sum(axis=1)
    spread_predicted = rows**2 - (predicted**2).sum(axis=1) - unparsed**2
    below = np.sqrt(spread_predicted * (rows**2 - (gold**2).sum(axis=1)))
    return np.where(below > 0, above / np.maximum(below, 0.5), 0.0)  # whole numbers: below >= 1


# ---- metrics of groups -----------------------------------------------------------------------


def _keep_all_right(rows: Rows) -> np.ndarray:
    """(every row right, 1) of every group: MultiRC's EM."""
    return np.array([[rows.right[unit].all(), 1.0] for unit in rows.members])


def _keep_question(rows: Rows) -> np.ndarray:
    """(precision, recall, 1) of every group. Nothing predicted, or nothing to find: 1, as in
    MultiRC's own scorer."""
    gold, predicted = (codes == rows.positive for codes in rows.codes)
    kept = []
    for unit in rows.members:
        both = (gold[unit] & predicted[unit]).sum()
        guessed, actual = predicted[unit].sum(), gold[unit].sum()
        kept.append([both / guessed if guessed else 1.0, both / actual if actual else 1.0, 1.0])
    return np.array(kept)


def _f1m(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The harmonic mean of the mean precision and the mean recall of all questions."""
    sums = times @ kept
    precision, recall = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    return 2 * precision * recall / np.maximum(precision + recall, 1e-300)


def _keep_parity(rows: Rows) -> np.ndarray:
    """(the same answer, 1) of every pair; unparsed equals nothing, and half a pair is left out."""
    kept = []
    for unit in rows.members:
        answers = {rows.predictions[row] for row in unit}
        kept.append([len(answers) == 1 and None not in answers, 1.0] if len(unit) > 1 else [0, 0])
    return np.array(kept, dtype=float)


def chosen_row(
    spec: TaskSpec,
    predictions: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float] | None] | None = None,
) -> int | None:
    """Which of a query's rows (ReCoRD's entities) is its answer, None: unanswered.

    With probabilities the largest P(Yes) - P(No), else the first that was answered Yes.
    """
    yes = spec.word_of("1") or spec.words[0]
    given = [row for row in probabilities or () if row is not None]
    if given and len(given) == len(predictions):
        margins = [2 * row[yes] - sum(row.values()) for row in given]
        return max(range(len(margins)), key=margins.__getitem__)
    return next((i for i, prediction in enumerate(predictions) if prediction == yes), None)


def _keep_query(match: Match) -> Callable[[Rows], np.ndarray]:
    """(match of the chosen entity with the nearest gold answer, 1) of every query."""

    def keep(rows: Rows) -> np.ndarray:
        kept = []
        for unit in rows.members:
            scored = rows.probabilities and [rows.probabilities[row] for row in unit]
            place = chosen_row(rows.spec, [rows.predictions[row] for row in unit], scored)
            chosen = None if place is None else rows.examples[unit[place]].extra["entity"]
            kept.append([best_match(match, chosen, rows.examples[unit[0]]), 1.0])
        return np.array(kept)

    return keep


# ---- metrics of free text --------------------------------------------------------------------

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


# ---- metrics of ratings ----------------------------------------------------------------------


def pearson(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation of two lists (N,); 0 and a warning where one of them is constant."""
    _warn_constant(gold, predicted)
    return float(_pearson(np.ones((1, len(gold))), np.stack([gold, predicted], axis=1))[0])


def spearman(gold: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson's correlation of the average ranks; 0 and a warning where one is constant."""
    _warn_constant(gold, predicted)
    return float(_spearman(np.ones((1, len(gold))), np.stack([gold, predicted], axis=1))[0])


def _warn_constant(gold: np.ndarray, predicted: np.ndarray) -> None:
    for name, column in (("gold", gold), ("predicted", predicted)):
        if np.ptp(column) == 0:
            warnings.warn(f"all {name} ratings are {column[0]:g}: correlation 0", stacklevel=3)


def _keep_numbers(rows: Rows) -> np.ndarray:
    """(gold, predicted) of every row: ratings are drawn by the row."""
    return np.stack([rows.gold_numbers, rows.numbers], axis=1)


def _pearson(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    gold, predicted = (np.broadcast_to(column, times.shape) for column in kept.T)
    return _correlation(times, gold, predicted)


def _spearman(times: np.ndarray, kept: np.ndarray) -> np.ndarray:
    gold, predicted = (_ranks(times, column) for column in kept.T)
    return _correlation(times, gold, predicted)


def _ranks(times: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The average rank of every row among all drawn, (R, U): those below + half of the equal."""
    values, places = np.unique(column, return_inverse=True)
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(values)))
    equal = np.add.reduceat(times[:, order], starts, axis=1)
    return (np.cumsum(equal, axis=1) - (equal - 1) / 2)[:, places]


def _correlation(times: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of x and y (R, U), each pair counted `times` (R, U); 0 if constant."""
    total = times.sum(axis=1, keepdims=True)
    dx, dy = (v - (times * v).sum(axis=1, keepdims=True) / total for v in (x, y))
    xx, yy, xy = ((times * product).sum(axis=1) for product in (dx * dx, dy * dy, dx * dy))
    # Rounding leaves a constant column a spread of about (1e-16 of its size)².
    least = [1e-24 * np.maximum((times * v * v).sum(axis=1), 1e-300) for v in (x, y)]
    defined = (xx > least[0]) & (yy > least[1])
    return np.where(defined, xy / np.sqrt(np.where(defined, xx * yy, 1.0)), 0.0)


METRICS = {
    "accuracy": Metric("choice", _keep_right, _share),
    "f1": Metric("choice", _keep_f1, _share),
    "macro_f1": Metric("choice", _keep_classes, _macro_f1),
    "mcc": Metric("choice", _keep_classes, _mcc),
    "f1a": Metric("choice", _keep_f1, _share),
    "em": Metric("choice", _keep_all_right, _share),
    "f1m": Metric("choice", _keep_question, _f1m),
    "record_f1": Metric("choice", _keep_query(token_f1), _share),
    "record_em": Metric("choice", _keep_query(exact), _share),
    "gender_parity": Metric("choice", _keep_parity, _share),
    "pearson": Metric("rating", _keep_numbers, _pearson),
    "spearman": Metric("rating", _keep_numbers, _spearman),
    "exact": Metric("text", _keep_text(exact), _share),
    "token_f1": Metric("text", _keep_text(token_f1), _share),
}

# ---- counts of label words -------------------------------------------------------------------


def encode(
    labels: Sequence[str], predictions: Sequence[str | None], words: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Gold and predicted labels as places in `words`; an unparsed prediction is len(words)."""
    if len(labels) != len(predictions) or not labels:
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions")
    codes: dict[str | None, int] = {word: place for place, word in enumerate(words)}
    unknown = (set(labels) | set(predictions)) - set(codes) - {None}
    if unknown or None in set(labels):
        raise ValueError(f"labels outside {list(words)}: {sorted(map(str, unknown)) or 'None'}")
    codes[None] = len(words)
    gold = np.array([codes[label] for label in labels])
    return gold, np.array([codes[prediction] for prediction in predictions])


def accuracy(gold: np.ndarray, predicted: np.ndarray) -> float:
    """The share of rows that are right."""
    return float(np.mean(gold == predicted))


def confusion(gold: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts (classes, classes + 1): row = gold, column = predicted, the last one unparsed."""
    table = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(table, (gold, predicted), 1)
    return table


def precision_recall_f1(table: np.ndarray) -> np.ndarray:
    """One row (precision, recall, F1) for each class of a confusion table; 0 where undefined."""
    classes = len(table)
    right = np.diag(table).astype(float)
    guessed, actual = table[:, :classes].sum(axis=0), table.sum(axis=1)
    precision = right / np.maximum(guessed, 1)
    recall = right / np.maximum(actual, 1)
    f1 = 2 * right / np.maximum(guessed + actual, 1)  # = 2PR / (P + R)
    return np.stack([precision, recall, f1], axis=1)


def bootstrap_interval(
    metric: Callable[[np.ndarray, np.ndarray], float],
    gold: np.ndarray,
    predicted: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of any metric of gold and predicted codes, (N,) each, over rows drawn
    with replacement."""
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = draw.integers(0, len(gold), len(gold))
        values.append(metric(gold[rows], predicted[rows]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def classification_report(
    labels: Sequence[str],
    predictions: Sequence[str | None],
    words: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about predicted labels, ready for JSON; `accuracy_interval` is the 95 % bootstrap
    interval, None with `resamples=0`."""
    gold, predicted = encode(labels, predictions, words)
    table = confusion(gold, predicted, len(words))
    scores = precision_recall_f1(table)
    columns = [*words, UNPARSED]
    interval = bootstrap_interval(accuracy, gold, predicted, resamples, seed) if resamples else None
    return {
        "count": len(gold),
        "accuracy": accuracy(gold, predicted),
        "accuracy_interval": list(interval) if interval else None,
        "unparsed": accuracy(predicted, np.full(len(gold), len(words))),
        "macro_f1": float(scores[:, 2].mean()),
        "per_class": {
            word: {
                "precision": float(scores[place, 0]),
                "recall": float(scores[place, 1]),
                "f1": float(scores[place, 2]),
                "support": int(table[place].sum()),
            }
            for place, word in enumerate(words)
        },
        "predicted": dict(zip(columns, table.sum(axis=0).tolist(), strict=True)),
        "confusion": {
            word: dict(zip(columns, table[place].tolist(), strict=True))
            for place, word in enumerate(words)
        },
    }

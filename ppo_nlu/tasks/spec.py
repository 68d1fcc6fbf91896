"""What a task is: texts, prompt, answers, reward, metrics, files and its place in a benchmark.

A task is a row in a table, and nothing else lists the tasks: what the data program, the averages,
the submission and the grid must know of a task stands in its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REWARD_KINDS = ("label", "rating", "exact", "f1")  # or package.module:function
AVERAGES = ("official", "paper")  # a benchmark's one number: the leaderboard's, and the paper's


@dataclass(frozen=True)
class Label:
    """A label word as the model writes it, and what stands for it in files."""

    word: str
    value: str  # in the data files
    submitted: str | int | None = None  # in a file for the leaderboard; None: the value too


@dataclass(frozen=True)
class Rating:
    """The range of a number that is asked for; label scoring takes its expectation over `grid`."""

    low: float = 0.0
    high: float = 5.0
    step: float = 0.2

    @property
    def grid(self) -> tuple[str, ...]:
        """The numbers low, low + step, ... high as the model writes them."""
        count = round((self.high - self.low) / self.step)
        return tuple(self.write(self.low + i * self.step) for i in range(count + 1))

    @property
    def middle(self) -> float:
        """Halfway between the ends: the guess that says nothing."""
        return (self.low + self.high) / 2

    def write(self, value: float) -> str:
        """A number as the model is taught to write it: one decimal."""
        return f"{value + 0.0:.1f}"

    def holds(self, value: float) -> bool:
        """Whether the number is in the range."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Example:
    """One row of a task: the text fields of its prompt and the gold label (None: none).

    `label` is a label word, a number as text, or a short free text, as the task has it. `task` is
    the task's name. Rows of one `group` are judged together (a question's proposed answers), and
    `extra` holds what only the metric or the test file needs, such as the official `idx`.
    """

    id: str
    fields: dict[str, str]
    label: str | None
    task: str = ""
    group: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSpec:
    """One task: everything that tells it apart from the others, and nothing that is a tensor.

    With `labels` the answer is one of their words, with `rating` a number, with neither a short
    free text. `files` lists for each split the file names in the order of preference: the first is
    the whole set, any other a part of it, which is reported.
    """

    name: str
    title: str
    benchmark: str
    folder: str
    description: str
    query: str
    fields: tuple[str, ...]
    labels: tuple[Label, ...] = ()
    rating: Rating | None = None
    label_column: str = "label"
    columns: Mapping[str, str] = field(default_factory=dict)  # field: its column, where it differs
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reader: str = "tsv"  # how a row of the files becomes examples: a name in `data.readers`
    header: tuple[str, ...] = ()  # the columns of train and dev where these have no header line
    divide_dev: bool = False  # without a train file, three quarters of dev serve as train
    metrics: tuple[str, ...] = ("accuracy",)  # what the leaderboard reports; names in `metrics`
    reward: str = "label"  # one of REWARD_KINDS, or package.module:function
    rationale: str = ""  # the column of a written-out reason, for the analysis form
    trained_with: str = ""  # the task whose training rows and run serve this one, which has none
    averages: tuple[str, ...] = AVERAGES  # those of its benchmark that count it
    paper_metrics: tuple[str, ...] = ()  # what the paper's tables show, where not all `metrics`
    leaderboard_file: str = ""  # its name in the zip that the benchmark's server takes
    leaderboard_rows: int = 0  # in that file (ReCoRD: queries)
    leaderboard_layout: str = "rows"  # of that file: a name in `leaderboard_files.LAYOUTS`

    @property
    def kind(self) -> str:
        """What an answer is: "choice" of a word, "rating" or "text"."""
        return "choice" if self.labels else "rating" if self.rating else "text"

    @property
    def diagnostic(self) -> bool:
        """Whether the set only shows what a model can do, and counts in no average."""
        return not self.averages

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics that the paper's tables show."""
        return self.paper_metrics or self.metrics

    @property
    def words(self) -> tuple[str, ...]:
        """The answers that can be listed: label words, the grid of a rating, or none."""
        if self.rating:
            return self.rating.grid
        return tuple(dict.fromkeys(label.word for label in self.labels))

    @property
    def allowed(self) -> str:
        """What the form asks to be inserted."""
        if self.rating:
            return f"a decimal number between {self.rating.low:g} and {self.rating.high:g}"
        return " or ".join(self.words) if self.labels else "a short answer"

    def word_of(self, value: str) -> str | None:
        """The label word for a value of the data files; None where the task has no such value."""
        return next((label.word for label in self.labels if label.value == value), None)

    def submitted_as(self, word: str) -> str | int:
        """What stands for a label word in a file for the leaderboard (of several, the first)."""
        label = next(label for label in self.labels if label.word == word)
        return label.value if label.submitted is None else label.submitted

    def written(self, label: str) -> str:
        """The gold label as the model should write it."""
        return self.rating.write(float(label)) if self.rating else label

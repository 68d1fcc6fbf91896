"""What a task is: its texts, prompt, label words, reward and files. A task is a row in a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Label:
    """A label word as the model writes it, and the value that stands for it in the data files."""

    word: str
    value: str


@dataclass(frozen=True)
class Example:
    """One row of a task: the text fields of its prompt and the gold label word (None: none)."""

    id: str
    fields: dict[str, str]
    label: str | None


@dataclass(frozen=True)
class TaskSpec:
    """One task: everything that tells it apart from the others, and nothing that is a tensor."""

    name: str
    title: str
    benchmark: str
    folder: str
    description: str
    query: str
    fields: tuple[str, ...]
    labels: tuple[Label, ...]
    label_column: str
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    metric: str = "accuracy"

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, in the order of the table."""
        return tuple(label.word for label in self.labels)

    def word_of(self, value: str) -> str | None:
        """The label word for a value of the data files; None where the task has no such value."""
        return next((label.word for label in self.labels if label.value == value), None)

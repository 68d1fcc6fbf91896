"""Tasks of the user's own: a config's `custom` section becomes a task like those of the tables.

Everything that can be wrong is reported here, before any file is read, under its key in the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import permutations
from string import Formatter
from typing import TYPE_CHECKING, TypeAlias

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import REWARD_KINDS, TASKS, Label, Rating, TaskSpec, get_task
from ppo_nlu.tasks.words import is_empty, same, unmarked

if TYPE_CHECKING:
    from ppo_nlu.config import Config, CustomConfig

METRICS = {
    "choice": ("accuracy", "f1", "macro_f1", "mcc"),
    "rating": ("pearson", "spearman"),
    "text": ("exact", "token_f1"),
}
DEFAULT_METRICS = {"choice": ("accuracy",), "rating": METRICS["rating"], "text": METRICS["text"]}
REWARDS = {"choice": ("label",), "rating": ("rating",), "text": ("f1", "exact")}  # auto: the first
DESCRIPTION = "You are given a text. The task is to answer a question about it."
Given: TypeAlias = "Sequence[str] | Mapping[str, str | Sequence[str]]"  # custom.labels


@dataclass(frozen=True)
class CustomSpec(TaskSpec):
    """A task of the user's own; without a dev file, a share of its training rows is dev."""

    dev_share: float = 0.1
    missing: str = "error"  # what becomes of a row without a label or a text


def specs_of(cfg: Config) -> dict[str, TaskSpec]:
    """All tasks of the config by name, in its order: those of the tables, and the user's own."""
    names = cfg.tasks or [str(cfg.task)]
    found = [_spec(cfg.custom, name) for name in names]
    specs = {spec.name: spec for spec in found}
    if len(specs) < len(found):
        raise UserError(f"tasks: {', '.join(names)} names a task twice; name each once")
    return specs


def _spec(custom: CustomConfig, name: str) -> TaskSpec:
    if custom.name is not None and name == custom.name:
        return spec_of(custom)
    try:
        return get_task(name)
    except UserError as error:
        if custom.name is None and (custom.fields or custom.query):
            raise UserError(
                f"custom.name: is missing; add `name: {name}` so that task {name!r} is found"
            ) from error
        if custom.name is not None and get_close_matches(name, [custom.name], n=1):
            raise UserError(
                f"task: unknown task {name!r}; did you mean {custom.name!r} (custom.name)?"
            ) from error
        raise


def spec_of(custom: CustomConfig) -> CustomSpec:
    """The task that the section describes; UserError (custom.key: what; mend) where it does not."""
    for key, problem in _problems(custom):
        raise UserError(f"custom.{key}: {problem}")
    labels = _labels(custom.labels)
    rating = None if custom.low is None else Rating(custom.low, float(custom.high), custom.step)  # type: ignore[arg-type]
    kind = "choice" if labels else "rating" if rating else "text"
    files = {"train": custom.train, "dev": custom.dev, "test": custom.test}
    return CustomSpec(
        name=str(custom.name),
        title=str(custom.name),
        benchmark="custom",
        folder="",
        description=custom.description or DESCRIPTION,
        query=str(custom.query),
        fields=tuple(custom.fields),
        labels=labels,
        rating=rating,
        label_column=custom.label_column,
        files={split: (path,) for split, path in files.items() if path},
        reader="custom",
        metrics=tuple(custom.metrics) or DEFAULT_METRICS[kind],
        reward=REWARDS[kind][0] if custom.reward == "auto" else custom.reward,
        rationale=custom.rationale or "",
        dev_share=custom.dev_share,
        missing=custom.missing,
    )


def _labels(given: Given) -> tuple[Label, ...]:
    """A label for each value that the map lists; in a list each word is its own value."""
    if not isinstance(given, Mapping):
        return tuple(Label(str(word), str(word)) for word in given)
    listed = {w: [v] if isinstance(v, str) else v for w, v in given.items()}
    return tuple(Label(str(word), str(v)) for word, values in listed.items() for v in values)


def _problems(custom: CustomConfig) -> Iterator[tuple[str, str]]:
    """(key, what is wrong and how to mend it), the most basic first."""
    yield from _of_names(custom)
    yield from _of_prompt(custom)
    kind = "text"
    if custom.labels:
        kind = "choice"
        yield from _of_labels(custom.labels)
    if custom.low is not None or custom.high is not None:
        if custom.labels:
            key = "low" if custom.low is not None else "high"
            yield key, "a task has labels or a range, not both; drop one"
        kind = "rating"
        yield from _of_range(custom)
    yield from _of_scores(custom, kind)


def _of_names(custom: CustomConfig) -> Iterator[tuple[str, str]]:
    if not custom.name or not re.fullmatch(r"[\w.-]+", unmarked(custom.name)):
        yield "name", f"{custom.name!r} is not a name; use letters, digits, - and _"
    if custom.name in TASKS:
        yield "name", f"{custom.name!r} is a task of the tables; choose another name"
    if not custom.fields:
        yield "fields", "is empty; name the text columns of your file"
    twice = next((name for name in custom.fields if custom.fields.count(name) > 1), None)
    if twice is not None:
        yield "fields", f"{twice!r} is there twice; name each column once"
    bare = {name: unmarked(name) for name in custom.fields}
    odd = next((n for n, text in bare.items() if not re.fullmatch(r"[^\W\d][\w -]*", text)), None)
    if odd is not None:
        yield "fields", f"{odd!r} cannot be a {{placeholder}}; rename the column, letters first"
    if custom.label_column in custom.fields:
        yield "label_column", f"{custom.label_column!r} is a field too, so prompts show the answer"


def _of_prompt(custom: CustomConfig) -> Iterator[tuple[str, str]]:
    if not custom.query:
        example = f'Now judge "{{{custom.fields[0] if custom.fields else "text"}}}".'
        yield "query", f"is missing; write what is asked of a row, such as {example}"
    used: set[str] = set()
    for key, text in (("query", custom.query), ("description", custom.description)):
        try:
            parts = list(Formatter().parse(text or ""))
        except ValueError as error:
            yield key, f"{error}; write {{{{ and }}}} for braces that are no placeholder"
            continue
        for _, name, form, conversion in parts:
            if name is None:
                continue
            if form or conversion:
                yield key, f"{{{name}}} cannot have a format; write {{{name}}} alone"
            if name not in custom.fields:
                yield (
                    key,
                    (
                        f"{{{name}}} is not in custom.fields ({', '.join(custom.fields)}); add it "
                        "there, or write {{ and }} for braces"
                    ),
                )
            used.add(name)
    if not used:
        yield "query", f"holds no text of the row; add {{{custom.fields[0]}}}"


def _of_labels(given: Given) -> Iterator[tuple[str, str]]:
    words = [str(word) for word in given]
    if len(words) < 2:
        yield "labels", f"has {len(words)} word; a choice needs two or more"
    for word in words:
        if is_empty(word) or word != word.strip() or re.search(r"[<>\n]", word):
            yield "labels", f"{word!r} cannot be a label word; use a plain word or phrase"
    # Answers are read in any case and in whole words, of which the longest counts.
    for one, other in permutations(words, 2):
        if same(one, other):
            yield "labels", f"{one!r} and {other!r} are the same word to a reader; rename one"
    for word, values in given.items() if isinstance(given, Mapping) else ():
        if not values:
            yield "labels", f"{word!r} has no value; list those of the file that it stands for"
    labels = _labels(given)
    for label in labels:
        if is_empty(label.value):
            yield "labels", f"{label.word!r} has an empty value; a row without a label has none"
    for label, twin in permutations(labels, 2):
        if label.value == twin.value:
            yield "labels", f"the value {label.value!r} is listed twice; keep it under one word"


def _of_range(custom: CustomConfig) -> Iterator[tuple[str, str]]:
    if custom.low is None or custom.high is None:
        given, missing = ("low", "high") if custom.high is None else ("high", "low")
        yield missing, f"is missing beside custom.{given}; give both ends of the range"
        return
    if not custom.low < custom.high:
        yield "low", f"{custom.low:g} is not below custom.high ({custom.high:g}); swap them"
    for key in ("low", "high", "step"):
        value = getattr(custom, key)
        if abs(10 * value - round(10 * value)) > 1e-6:
            yield key, f"{value:g} has more than one decimal, with which numbers are written"
    steps = (custom.high - custom.low) / custom.step
    if abs(steps - round(steps)) > 1e-6 or not 1 <= steps <= 1000:
        yield "step", f"{custom.step:g} does not divide the range in 1 to 1000 parts; change it"


def _of_scores(custom: CustomConfig, kind: str) -> Iterator[tuple[str, str]]:
    if custom.reward in REWARD_KINDS and custom.reward not in REWARDS[kind]:
        fitting = " or ".join(REWARDS[kind])
        yield "reward", f"{custom.reward} does not suit this task ({_KINDS[kind]}); use {fitting}"
    known = custom.reward in (*REWARD_KINDS, "auto")
    if not known and "." not in custom.reward and ":" not in custom.reward:
        near = get_close_matches(custom.reward, [*REWARD_KINDS, "auto"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "use auto or package.module:function"
        yield "reward", f"unknown reward {custom.reward!r}; {hint}"
    for name in custom.metrics:
        if name not in METRICS[kind]:
            every = {other for names in METRICS.values() for other in names}
            what = f"does not suit this task ({_KINDS[kind]})" if name in every else "is unknown"
            yield "metrics", f"{name!r} {what}; use {', '.join(METRICS[kind])}"
        if custom.metrics.count(name) > 1:
            yield "metrics", f"{name!r} is there twice; name each once"
    if kind == "choice" and "f1" in custom.metrics and len(custom.labels) != 2:
        yield "metrics", "'f1' is for two labels; use macro_f1"


_KINDS = {
    "choice": "it has custom.labels",
    "rating": "it has custom.low and custom.high",
    "text": "its answers are free text, without custom.labels or custom.low and custom.high",
}

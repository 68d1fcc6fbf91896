"""The score of an answer: one number for the whole response (arXiv 2410.11020, section 3).

Config and logs call it the answer's reward; what each token gets is in `losses.shaped_rewards`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from reprlib import repr as short
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import REWARD_KINDS, Example, TaskSpec
from ppo_nlu.tasks.metrics import best_match, exact, token_f1
from ppo_nlu.tasks.prompts import STOP

# (right, wrong, no answer): the paper's text, and its released code, which is 2 * paper - 1.
SCALES = {"paper": (1.0, 0.0, -1.0), "code": (1.0, -1.0, -3.0)}
LARGEST = 1e15  # a score whose square fp32 still holds
Reward = Callable[[str, Mapping[str, Any]], float]


def score(prediction: str | None, label: str, scale: str = "paper") -> float:
    """The score of a parsed answer (None: the response held no answer) given the gold label."""
    right, wrong, exceptional = SCALES[scale]
    if prediction is None:
        return exceptional
    return right if prediction == label else wrong


def rating_score(prediction: str | None, label: str, spec: TaskSpec) -> float:
    """Half the range minus the error; without a number in the range, minus half the range.

    For STS-B (0 to 5) this is the paper's 2.5 - |y' - y| and -2.5.
    """
    assert spec.rating is not None
    half = (spec.rating.high - spec.rating.low) / 2
    return -half if prediction is None else half - abs(float(prediction) - float(label))


def reward(
    spec: TaskSpec, example: Example, prediction: str | None, response: str, scale: str = "paper"
) -> float:
    """The score of a response to a labelled row, by the task's own rule."""
    gold = example.label
    assert gold is not None, f"{spec.name} {example.id} has no label to learn from"
    if spec.reward == "rating":
        return rating_score(prediction, gold, spec)
    if spec.reward == "label":
        return score(prediction, gold, scale)
    right, wrong, exceptional = SCALES[scale]
    if spec.reward in REWARD_KINDS:
        if prediction is None:
            return exceptional
        near = best_match(token_f1 if spec.reward == "f1" else exact, prediction, example)
        return wrong + (right - wrong) * near
    row = {**example.extra.get("row", {}), **example.fields, "id": example.id, "label": gold}
    function, where = load(spec.reward), f"custom.reward: {spec.reward}"
    try:
        value = function(response.partition(STOP)[0].strip(), row)
        if isinstance(value, Real) and abs(number := float(value)) <= LARGEST:  # NaN is not
            return number
    except OverflowError:
        pass  # a whole number beyond any float
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's function runs into, or what it returns
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{where} failed on row {example.id!r} ({_said(error)}, at "
            f"{last.filename}:{last.lineno}); mend it, or let it return a number there"
        ) from error
    raise UserError(
        f"{where} returned {_shown(value)} for row {example.id!r}; it must return a finite number "
        f"from -{LARGEST:.0e} to {LARGEST:.0e}"
    )


def _shown(value: Any) -> str:
    try:
        return short(value)
    except Exception:  # a whole number of thousands of digits, or a class that cannot be written
        return f"an odd {type(value).__name__}"


def _said(error: BaseException) -> str:
    """The kind of an error and what it says, if it can."""
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__


@lru_cache(maxsize=8)
def load(path: str) -> Reward:
    """The user's own scoring function `(text, row) -> float` from `package.module:function`.

    `text` is the response before the closing tag; `row` holds the columns of the file, `id` and
    `label`.
    """
    module, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        found = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's file makes of its import
        raise UserError(
            f"custom.reward: cannot import {path!r} ({_said(error)}); "
            f"give {' or '.join(REWARD_KINDS)}, "
            "or package.module:function of a file in the current directory or an installed package"
        ) from error
    if not callable(found):
        raise UserError(f"custom.reward: {path!r} is not a function (text, row) -> float")
    if not _takes_two(found) or inspect.iscoroutinefunction(found):
        raise UserError(f"custom.reward: {path!r} does not take (text, row); it must, -> float")
    reward: Reward = found
    return reward


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("", {})
    except TypeError:
        return False
    except ValueError:  # written in C: unknown
        return True
    return True


@dataclass
class RunningScale:
    """Mean and deviation of each task's scores so far (Welford), to put tasks on one scale."""

    seen: dict[str, list[float]] = field(default_factory=dict)  # task: count, mean, sum of squares

    def update(self, task: str, value: float) -> None:
        """Count one more score of a task."""
        count, mean, squares = self.seen.get(task, [0.0, 0.0, 0.0])
        count += 1
        gap = value - mean
        mean += gap / count
        self.seen[task] = [count, mean, squares + gap * (value - mean)]

    def apply(self, task: str, value: float) -> float:
        """(value - mean) / deviation; the deviation counts as 1 while it is 0."""
        count, mean, squares = self.seen[task]
        deviation = math.sqrt(squares / count)
        return (value - mean) / (deviation if deviation > 1e-8 else 1.0)

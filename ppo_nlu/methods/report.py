"""What a step of a method returns: metrics for the log, messages for the user, and a bad step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ppo_nlu.errors import UserError
from ppo_nlu.methods.minibatch import Epochs, Metrics
from ppo_nlu.methods.rollout import Rollout
from ppo_nlu.tasks import Example


@dataclass(frozen=True)
class BadStep:
    """A minibatch whose loss or gradient is not finite: its rows for a human, and its metrics."""

    rows: list[dict[str, Any]]
    metrics: Metrics


@dataclass(frozen=True)
class Report:
    """A step of a method. Of a bad step, `metrics` are those from before the update."""

    metrics: Metrics
    messages: list[str] = field(default_factory=list)  # for the user; warnings begin with `warning`
    truncated: int = 0  # prompts that were cut
    bad: BadStep | None = None


class Answered(Protocol):
    """A batch of sampled answers; its `metrics` are from before the update."""

    rollout: Rollout
    advantages: Tensor
    metrics: Metrics


def report_of(batch: Answered, epochs: Epochs, messages: Sequence[str]) -> Report:
    """The report of a step on sampled answers."""
    rollout = batch.rollout
    told = [*rollout.messages, *messages]
    if epochs.bad is None:
        return Report(batch.metrics | epochs.metrics(), told, rollout.truncated)
    index, metrics = epochs.bad
    bad = BadStep([answer_for_a_human(batch, j) for j in index], metrics)
    return Report(batch.metrics, told, rollout.truncated, bad)


def answer_for_a_human(batch: Answered, j: int) -> dict[str, Any]:
    """Answer j with all that its update is made of."""
    rollout = batch.rollout
    return row_for_a_human(rollout.examples[j]) | {
        "response": rollout.responses[j],
        "tokens": rollout.answers[j],
        "score": float(rollout.scores[j]),
        "logprobs": rollout.logprobs[j].tolist(),
        "advantages": batch.advantages[j].tolist(),
    }


def row_for_a_human(row: Example) -> dict[str, Any]:
    """A labelled row, as the file of a bad step shows it."""
    return {"id": row.id, "fields": row.fields, "label": row.label}


class FirstRatio:
    """Checks that the ratio of a step's first minibatch is 1, apart from rounding.

    Each kind of pass is checked once: an update's own pass at the first step, and a reused prompt
    pass at the first step that reuses one. `exact`: the model computes in fp32.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.checked = False  # on the kind of pass that is used from here on
        self.told = False  # of any pass

    def look(self, epochs: Epochs, rollout: Rollout, reuses: bool) -> list[str]:
        """What to tell the user after a step; `reuses`: updates may reuse a prompt pass."""
        if epochs.first_gap is None or epochs.bad is not None or self.checked:
            return []
        self.checked = rollout.used_prompt_pass or not reuses
        message = check_first_ratio(epochs.first_gap, self.exact)
        news = self.checked or not self.told  # the same kind of pass again is no news
        self.told = True
        return [message] if message and news else []

    def state(self) -> dict[str, bool]:
        """What a resumed run needs."""
        return {"checked": self.checked, "told": self.told}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Load the state again; checkpoints of earlier versions have none."""
        self.checked, self.told = state.get("checked", True), state.get("told", True)


def check_first_ratio(gap: float, exact: bool) -> str | None:
    """What to tell of the ratio's distance from 1 at the first minibatch; in fp32 a distance above
    1e-3 ends the run.

    The policy has not moved yet, so a distance means a mistake in dropout, padding or temperature,
    or a decode pass that differs from the training pass.
    """
    if not exact and gap == 0:  # a pass compared with itself
        return None
    if not exact:
        return f"largest distance of the first ratio from 1 in low precision: {gap:.1e}"
    if gap > 1e-3:
        raise UserError(
            f"model.name_or_path: the first ratio is {gap:.1e} away from 1 before any update; "
            "decode and training pass disagree for this model. Try model.path=plain, "
            "model.attention=eager or model.dtype=float32"
        )
    if gap > 1e-4:
        return f"warning: the first ratio is {gap:.1e} away from 1 (expected below 1e-4)"
    return None


def check_form(unparsed: float) -> list[str]:
    """A warning where the base rarely gives an allowed answer: there is little to learn from."""
    if unparsed < 0.9:
        return []
    return [
        f"warning: {100 * unparsed:.0f} % of the first answers name no allowed answer, so there "
        "is little to learn from; take an instruction-tuned model, start from an SFT run "
        "(init_from), or teach this one the form: python -m ppo_nlu.teach_form"
    ]

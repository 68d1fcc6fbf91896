"""The tasks, by name."""

from __future__ import annotations

from difflib import get_close_matches

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import glue
from ppo_nlu.tasks.spec import Example, Label, TaskSpec

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in glue.TASKS}

__all__ = ["TASKS", "Example", "Label", "TaskSpec", "get_task"]


def get_task(name: str) -> TaskSpec:
    """The task of that name; raises UserError with the nearest name where there is none."""
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
    raise UserError(f"task: unknown task {name!r}; {hint}")

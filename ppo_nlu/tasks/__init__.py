"""The tasks, by name."""

from __future__ import annotations

from difflib import get_close_matches

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import extra, glue, superglue
from ppo_nlu.tasks.spec import REWARD_KINDS, Example, Label, Rating, TaskSpec

TASKS: dict[str, TaskSpec] = {
    spec.name: spec for table in (glue, superglue, extra) for spec in table.TASKS
}

__all__ = ["REWARD_KINDS", "TASKS", "Example", "Label", "Rating", "TaskSpec", "get_task"]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_BY_PLAIN = {_plain(name): spec for name, spec in TASKS.items()} | {"mnlim": glue.MNLI}


def get_task(name: str) -> TaskSpec:
    """The task of that name, whatever its case and hyphens (`STS-B` is `stsb`); raises UserError
    with the nearest name where there is none, or where both benchmarks have one."""
    if _plain(name) in _BY_PLAIN:
        return _BY_PLAIN[_plain(name)]
    twins = [other for other in TASKS if _plain(other).endswith(f"/{_plain(name)}")]
    near = get_close_matches(name.lower(), TASKS, n=1)
    if twins:
        raise UserError(f"task: {name!r} is in both benchmarks; write {' or '.join(twins)}")
    hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
    raise UserError(f"task: unknown task {name!r}; {hint}")

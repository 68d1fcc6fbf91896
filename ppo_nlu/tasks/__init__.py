"""The tasks, by name. The rows of `glue`, `superglue` and `extra` are the one list of them."""

from __future__ import annotations

from difflib import get_close_matches

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import extra, glue, superglue
from ppo_nlu.tasks.spec import REWARD_KINDS, Example, Label, Rating, TaskSpec

TASKS: dict[str, TaskSpec] = {
    spec.name: spec for table in (glue, superglue, extra) for spec in table.TASKS
}

__all__ = [
    "REWARD_KINDS",
    "TASKS",
    "Example",
    "Label",
    "Rating",
    "TaskSpec",
    "benchmark_tasks",
    "get_task",
]
ALIASES = {"mnlim": "mnli"}


def benchmark_tasks(benchmark: str) -> list[TaskSpec]:
    """The tasks of "glue", "superglue" or "extra", in the order of the paper's tables."""
    return [spec for spec in TASKS.values() if spec.benchmark == benchmark]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> TaskSpec:
    """The task of that name, whatever its case and hyphens (`STS-B` is `stsb`); raises UserError
    with the nearest name where there is none, or where both benchmarks have one."""
    by_plain = {_plain(known): spec for known, spec in TASKS.items()}
    plain = ALIASES.get(_plain(name), _plain(name))
    if plain in by_plain:
        return by_plain[plain]
    twins = [other for other in TASKS if _plain(other).endswith(f"/{_plain(name)}")]
    near = get_close_matches(name.lower(), TASKS, n=1)
    if twins:
        raise UserError(f"task: {name!r} is in both benchmarks; write {' or '.join(twins)}")
    hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
    raise UserError(f"task: unknown task {name!r}; {hint}")

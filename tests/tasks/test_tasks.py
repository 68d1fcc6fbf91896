"""Every task of the tables: its parts fit together, and its name is found."""

from __future__ import annotations

from string import Formatter

import pytest

from ppo_nlu.data import readers
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, get_task
from ppo_nlu.tasks.custom import REWARDS


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_the_table_fits_together(name: str) -> None:
    spec = TASKS[name]
    used = {
        place
        for text in (spec.query, spec.description)
        for _, place, _, _ in Formatter().parse(text)
        if place is not None
    }
    assert used == set(spec.fields)
    assert set(spec.columns) <= set(spec.fields)
    assert spec.reader in readers.READERS and spec.reward in REWARDS[spec.kind]
    assert len({label.value for label in spec.labels}) == len(spec.labels) and spec.files
    assert get_task(name) is spec


def test_names_are_found_in_any_spelling() -> None:
    assert get_task("STS-B").name == "stsb" and get_task("MNLI-m").name == "mnli"
    assert get_task("AX_b").name == "ax-b" and get_task("superglue/RTE").benchmark == "superglue"
    with pytest.raises(UserError, match=r"'rte' is in both benchmarks.*glue/rte or superglue/rte"):
        get_task("rte")
    with pytest.raises(UserError, match="did you mean 'multirc'"):
        get_task("multrc")

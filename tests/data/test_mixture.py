"""Mixtures of tasks: what share each has, and that no state is needed to go on."""

from __future__ import annotations

from collections import Counter

import pytest

from ppo_nlu import data
from ppo_nlu.config import MixtureConfig
from ppo_nlu.data import mixture
from ppo_nlu.tasks import Example

SIZES = {"a": 40, "b": 10, "c": 5}


def rows(sizes: dict[str, int]) -> dict[str, list[Example]]:
    return {
        task: [Example(f"{task}{i}", {}, None, task) for i in range(size)]
        for task, size in sizes.items()
    }


@pytest.mark.parametrize(
    ("mixing", "cap", "expected"),
    [
        ("proportional", 20, {"a": 40, "b": 10, "c": 5}),
        ("capped", 20, {"a": 20, "b": 10, "c": 5}),
        ("equal", 20, {"a": 20, "b": 20, "c": 20}),
        ("equal", 30000, {"a": 40, "b": 40, "c": 40}),
    ],
)
def test_one_pass_holds_the_stated_share_of_each_task(
    mixing: str, cap: int, expected: dict[str, int]
) -> None:
    cfg, total = MixtureConfig(mixing, cap), sum(expected.values())
    assert mixture.shares(SIZES, cfg) == expected
    for epoch in range(3):
        drawn = [
            row
            for step in range(epoch * total, (epoch + 1) * total)
            for row in mixture.batch(rows(SIZES), cfg, 1, step, seed=3)
        ]
        assert Counter(row.task for row in drawn) == expected


def test_a_capped_task_sees_its_other_rows_in_the_next_pass() -> None:
    cfg = MixtureConfig("capped", 20)
    drawn = [
        row.id for step in range(2 * 35) for row in mixture.batch(rows(SIZES), cfg, 1, step, 0)
    ]
    seen = Counter(name for name in drawn if name.startswith("a"))
    assert seen == {f"a{i}": 1 for i in range(40)}  # 20 + 20 of 40, none twice


def test_a_small_task_comes_round_evenly() -> None:
    cfg = MixtureConfig("equal", 40)
    drawn = [row.id for row in mixture.batch(rows(SIZES), cfg, 120, 0, 1)]
    counts = Counter(name for name in drawn if name.startswith("c"))
    assert counts == {f"c{i}": 8 for i in range(5)}


def test_a_batch_depends_on_its_step_alone() -> None:
    cfg = MixtureConfig()
    whole = mixture.batch(rows(SIZES), cfg, 24, 0, 5)
    parts = [row for step in range(4) for row in mixture.batch(rows(SIZES), cfg, 6, step, 5)]
    assert whole == parts
    assert whole != mixture.batch(rows(SIZES), cfg, 24, 0, 6)


def test_one_task_alone_runs_as_it_always_did() -> None:
    found = rows({"a": 40})
    expected = [found["a"][i] for i in data.batch_indices(40, 16, 7, 2)]
    assert mixture.batch(found, MixtureConfig("capped", 3), 16, 7, 2) == expected

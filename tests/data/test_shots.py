"""Shots: which rows are drawn and read how often, that none leaks, and that none is ever cut."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import tiny

from ppo_nlu.config import Config, DataConfig, PromptConfig
from ppo_nlu.data.shots import SPARE, Shots, choose, shown_to
from ppo_nlu.methods.prompts import fit_prompt
from ppo_nlu.tasks import Example, get_task
from ppo_nlu.tasks.prompts import render

MNLI, STSB = get_task("mnli"), get_task("stsb")


def rows(count: int) -> list[Example]:
    """Nine Positive to one Negative."""
    return [
        Example(
            f"r{i}", {"sentence": f"film {i}"}, "Negative" if i % 10 == 9 else "Positive", "sst2"
        )
        for i in range(count)
    ]


def test_the_draw_is_seeded_and_holds_no_row_twice() -> None:
    pool = rows(100)
    first = choose(pool, 7, False, seed=1)
    assert first == choose(pool, 7, False, seed=1)
    assert first != choose(pool, 7, False, seed=2)
    assert len({row.id for row in first}) == 7


def test_balanced_takes_the_labels_in_turn() -> None:
    for seed in range(20):
        drawn = choose(rows(100), 5, True, seed)
        counts = Counter(row.label for row in drawn)
        assert sorted(counts.values()) == [2, 3], counts
    plain = Counter(row.label for seed in range(40) for row in choose(rows(100), 5, False, seed))
    assert plain["Positive"] > 150  # 9 in 10 of 200
    # With a label used up the others go on.
    assert len(choose(rows(10), 10, True, 0)) == 10


def test_ratings_are_balanced_by_their_whole_part() -> None:
    pool = [Example(str(i), {}, f"{(i % 30) / 6:.3f}") for i in range(300)]
    parts = Counter(row.label[0] for row in choose(pool, 10, True, 3) if row.label)
    assert set(parts) == set("01234") and set(parts.values()) == {2}


def test_the_row_itself_is_never_shown() -> None:
    pool = rows(7)
    # The same text under another id, case and spacing is the same row.
    twin = Example("dev-1", {"sentence": " FILM  2 "}, "Positive", "sst2")
    shown = shown_to(tiny.SST2, twin, pool, 5)
    assert [row.id for row in shown] == ["r0", "r1", "r3", "r4", "r5"]
    other = Example("dev-2", {"sentence": "film 99"}, None, "sst2")
    assert [row.id for row in shown_to(tiny.SST2, other, pool, 5)] == [f"r{i}" for i in range(5)]


def test_what_does_not_fit_is_dropped_whole_and_counted() -> None:
    policy, style = tiny.policy(), PromptConfig(shots=3)
    shots = [Example(str(i), {"sentence": "good film " * 6}, "Positive") for i in range(3)]
    row = Example("x", {"sentence": "a bad film"}, None)
    whole = fit_prompt(policy, tiny.SST2, row, 10_000, style, shots)
    assert whole.dropped == 0 and whole.text == render(tiny.SST2, row.fields, shots)
    one_less = fit_prompt(policy, tiny.SST2, row, len(whole.ids) - 1, style, shots)
    assert one_less.dropped == 1 and not one_less.cut
    assert one_less.text == render(tiny.SST2, row.fields, shots[:2])
    bare = render(tiny.SST2, row.fields)
    none = fit_prompt(policy, tiny.SST2, row, len(policy.encode(bare)), style, shots)
    assert (none.text, none.dropped, none.cut) == (bare, 3, False)


def test_the_shots_of_a_run_are_read_once_for_each_task(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"film {i}\t{i % 2}\n" for i in range(9))
    )
    cfg = Config(task="sst2", data=DataConfig(path=str(tmp_path)), prompt=PromptConfig(shots=2))
    shots = Shots(cfg)
    drawn = shots.pool(tiny.SST2)
    assert len(drawn) == 2 + SPARE and {row.label for row in drawn} == set(tiny.SST2.words)
    (tmp_path / "train.tsv").unlink()
    assert shots.pool(tiny.SST2) is drawn


def test_without_shots_nothing_is_read() -> None:
    assert Shots(Config(task="mnli")).pool(MNLI) == ()

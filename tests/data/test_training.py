"""Which rows train, and in which order training sees them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ppo_nlu import data
from ppo_nlu.config import DataConfig
from ppo_nlu.data import batch_indices, epoch_order, load_split, seen_labels, train_examples
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, get_task
from tests.data.files import ARTICLE, SPANS, SST2, fill, json_lines_of, load


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "seen_labels.txt"
    path.write_text("a fine film\nsomething else\n")
    monkeypatch.setattr(seen_labels, "SEEN_LABELS", path)
    return path


def _train(folder: Path, bundled_model: bool, **cfg: object) -> tuple[list[str], str]:
    settings = DataConfig(path=str(fill(folder)), **cfg)  # type: ignore[arg-type]
    dataset = data.train_examples(SST2, settings, bundled_model)
    return [example.id[len("train-") :] for example in dataset.examples], dataset.note


def test_rows_seen_in_pretraining_are_left_out_for_the_bundled_model_only(
    tmp_path: Path, seen: Path
) -> None:
    ids, note = _train(tmp_path / "a", True)
    assert ids == ["1", "2"] and "1 rows left out: seen with their labels" in note
    for bundled_model, exclude in ((False, True), (True, False)):
        ids, note = _train(tmp_path / "a", bundled_model, exclude_pretraining_labels=exclude)
        assert ids == ["0", "1", "2"] and "left out" not in note
    seen.write_text("A  FINE\tfilm\n\n")  # as a row would be normalised
    assert data.exclusions() == {"a fine film"}
    seen.unlink()
    with pytest.raises(UserError, match="exclude_pretraining_labels"):
        data.exclusions()


def test_the_dev_split_keeps_what_training_leaves_out(tmp_path: Path, seen: Path) -> None:
    fill(tmp_path / "a", dev="sentence\tlabel\na fine film \t1\n")
    cfg = DataConfig(path=str(tmp_path / "a"), min_words=9, limit=1)
    assert len(load_split(SST2, "dev", cfg).examples) == 1
    assert len(load_split(SST2, "train", cfg).examples) == 3


def test_short_rows_and_the_limit(tmp_path: Path, seen: Path) -> None:
    ids, note = _train(tmp_path / "a", False, min_words=3)
    assert ids == ["0", "1"] and "1 rows left out: under 3 words" in note
    ids, note = _train(tmp_path / "a", True, limit=1)  # the limit comes last
    assert ids == ["1"] and "the first 1 rows" in note
    assert _train(tmp_path / "a", False, limit=99)[0] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"data.min_words: no training row is left of 3"):
        _train(tmp_path / "a", False, min_words=9)


def test_record_trains_on_as_many_wrong_names_as_right_ones(tmp_path: Path) -> None:
    def query(index: int, *names: str) -> dict[str, object]:
        return {"query": "@placeholder", "idx": index, "answers": [{"text": n} for n in names]}

    entities = [{"start": start, "end": end} for start, end in SPANS]
    queries = [query(n, "Bo") for n in range(30)] + [query(30, "Ann", "Ann Lee"), query(31, "Zoe")]
    row = {"idx": 3, "qas": queries, "passage": {"text": ARTICLE, "entities": entities}}
    load(tmp_path, "record", "train", train=json_lines_of(row))
    cfg = DataConfig(path=str(tmp_path))
    found = train_examples(get_task("record"), cfg, False)
    kept = [
        [row.extra["entity"] for row in found.examples if row.group == str(n)] for n in range(32)
    ]
    assert all("Bo" in names and len(names) == 2 for names in kept[:30])
    wrong = Counter(name for names in kept[:30] for name in names if name != "Bo")
    assert set(wrong) == {"Ann Lee", "Rome", "Ann"} and max(wrong.values()) < 22
    assert sorted(kept[30]) == ["Ann", "Ann Lee", "Bo", "Rome"] and kept[31] == []
    assert "64 rows left out: as many No as Yes" in found.note  # 32 * 4 - 30 * 2 - 4
    again = train_examples(get_task("record"), cfg, True).examples
    assert again == found.examples


def test_the_first_rows_keep_groups_whole() -> None:
    rows = [Example(str(n), {}, None, group=group) for n, group in enumerate("aabbbc")]
    sizes = {limit: len(data.first(rows, limit)) for limit in range(8)}
    # A group that is longer than the limit is cut: nothing else could be given.
    assert sizes == {0: 6, 1: 1, 2: 2, 3: 2, 4: 2, 5: 5, 6: 6, 7: 6}
    alone = [replace(row, group="") for row in rows]
    assert [len(data.first(alone, limit)) for limit in (0, 3, 6, 9)] == [6, 3, 6, 6]
    assert data.first([], 3) == []
    assert data.first([rows[0], *alone], 3) == [rows[0], *alone[:2]]


@pytest.mark.parametrize(("n", "size"), [(7, 3), (12, 4), (5, 5), (3, 8), (1, 2), (100, 1)])
def test_steps_run_through_each_epoch_exactly(n: int, size: int) -> None:
    steps = -(-4 * n // size)
    flat = [index for step in range(steps) for index in batch_indices(n, size, step, seed=5)]
    assert all(len(batch_indices(n, size, step, seed=5)) == size for step in range(steps))
    for epoch in range(4):
        assert flat[epoch * n : (epoch + 1) * n] == epoch_order(n, 5, epoch)
        assert sorted(epoch_order(n, 5, epoch)) == list(range(n))


def test_a_step_is_a_function_of_its_number() -> None:
    later = batch_indices(50, 8, 33, seed=1)
    for step in range(40):
        batch_indices(50, 8, step, seed=2)
    assert batch_indices(50, 8, 33, seed=1) == later != batch_indices(50, 8, 33, seed=2)
    # The sequence is fixed for good: a resumed run may be on another machine or Python.
    assert epoch_order(10, 0, 0) == ORDER
    assert epoch_order(10, 0, 1) != ORDER


ORDER = [1, 8, 7, 6, 2, 3, 0, 5, 9, 4]


def test_every_place_is_equally_likely() -> None:
    # 4,000 orders of 5: each (row, place) pair is expected 800 times with deviation 25.3.
    orders = [epoch_order(5, seed, 0) for seed in range(4000)]
    counts = Counter((row, place) for order in orders for place, row in enumerate(order))
    assert len(counts) == 25 and all(abs(count - 800) < 5 * 25.3 for count in counts.values())


def test_what_has_no_order_is_refused() -> None:
    for n, size, step in ((0, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(ValueError):
            batch_indices(n, size, step, seed=0)

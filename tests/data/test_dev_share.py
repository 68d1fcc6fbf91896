"""Which rows of a file of one's own are dev."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from ppo_nlu.config import CustomConfig, DataConfig
from ppo_nlu.data import load_split
from ppo_nlu.data.__main__ import main as data_program
from ppo_nlu.data.dev_share import divide, one_sided
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example
from ppo_nlu.tasks.custom import CustomSpec, spec_of

LETTERS = CustomConfig(
    name="letters", fields=["text"], query="Judge {text}.", labels=["A", "B", "C"]
)
SPEC = spec_of(LETTERS)


def _rows(**counts: int) -> list[Example]:
    """So many rows of each label, no two of the same text."""
    return [
        Example(f"train-{n}", {"text": f"{label} {n}"}, label)
        for label, count in counts.items()
        for n in range(count)
    ]


def _sides(rows: list[Example], spec: CustomSpec = SPEC) -> tuple[set[str], set[str]]:
    """The texts of train and dev."""
    sides = divide(spec, rows, Path("x.csv"))
    assert sum(map(len, sides.values())) == len(rows)
    return {r.fields["text"] for r in sides["train"]}, {r.fields["text"] for r in sides["dev"]}


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_a_rare_class_is_on_both_sides(share: float, count: int) -> None:
    rows = _rows(A=500, B=count, C=2)
    train, dev = _sides(rows, replace(SPEC, dev_share=share))
    for label in "ABC":
        assert any(text[0] == label for text in train) and any(text[0] == label for text in dev)


def test_each_class_gives_its_share() -> None:
    """Within a fifth: of 100 rows 8 to 12, of 50 rows 4 to 6; by the hash alone deviations are 3.0
    and 2.1."""
    for trial in range(30):
        rows = [
            replace(row, fields={"text": f"{row.fields['text']} {trial}"})
            for row in _rows(A=100, B=50)
        ]
        dev = Counter(text[0] for text in _sides(rows)[1])
        assert 8 <= dev["A"] <= 12 and 4 <= dev["B"] <= 6


def test_a_text_falls_on_the_same_side_whatever_the_order() -> None:
    rows = _rows(A=400, B=30, C=7)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert _sides(shuffled) == _sides(rows)
    more, less = (_sides(rows, replace(SPEC, dev_share=share))[1] for share in (0.3, 0.1))
    assert less < more
    # Rows that are added to a class move nothing in the others.
    added = [Example("x", {"text": f"A {n} new"}, "A") for n in range(40)]
    assert less < _sides(rows + added)[1]  # of a common class not in itself either
    grown = _sides(rows + [Example("x", {"text": f"C new {n}"}, "C") for n in range(40)])[1]
    assert {text for text in less if text[0] != "C"} == {text for text in grown if text[0] != "C"}


def test_a_text_with_two_labels_is_on_one_side() -> None:
    rows = _rows(A=60, B=60)
    both = [Example("x", {"text": f" {row.fields['text'].lower()}"}, "C") for row in rows[::3]]
    train, dev = ({text.lower().strip() for text in side} for side in _sides(rows + both))
    assert not train & dev
    # The rarest label chooses first: C has two texts, each of which is A's or B's too.
    rows = [
        *_rows(A=40, B=40),
        Example("x", {"text": "A 3"}, "C"),
        Example("x", {"text": "B 3"}, "C"),
    ]
    train, dev = _sides(rows)
    assert len(train & {"A 3", "B 3"}) == 1
    for n in range(200):  # B, which comes later, takes nothing from A
        rows = [Example("x", {"text": f"{t} {n}"}, label) for label in "AB" for t in "pqrst"]
        rows = [
            row
            for row in rows
            if row.fields["text"][0] in {"A": "pq", "B": "prst"}[row.label or ""]
        ]
        assert len(_sides(rows)[1] & {f"p {n}", f"q {n}"}) == 1


def test_a_class_that_cannot_be_on_both_sides_is_named(tmp_path: Path, capsys) -> None:
    rows = [*_rows(A=40, B=1), *_rows(C=1) * 3]
    sides = divide(SPEC, rows, tmp_path)
    assert one_sided(SPEC, sides) == [
        "dev has no row of 'B', 'C': too few distinct texts; add rows or give custom.dev"
    ]
    assert one_sided(SPEC, divide(SPEC, _rows(A=40, B=2), tmp_path)) == []
    path, config = tmp_path / "a.csv", tmp_path / "c.yaml"
    path.write_text("text,label\n" + "".join(f"{r.fields['text']},{r.label}\n" for r in rows))
    spec = spec_of(replace(LETTERS, train=str(path)))
    assert "dev has no row of 'B', 'C'" in load_split(spec, "train", DataConfig()).note
    assert "dev has no row of 'B', 'C'" in load_split(spec, "dev", DataConfig()).note
    config.write_text(
        "task: t\ncustom: {name: t, fields: [text], query: 'Judge {text}.', labels: [A, B, C],\n"
        f"  train: {path}}}\n"
    )
    assert data_program(["check", str(config)]) == 0
    assert capsys.readouterr().out.count("dev has no row of 'B', 'C': too few distinct texts") == 1


def test_classes_of_one_text_each_are_divided_all_the_same() -> None:
    train, dev = _sides(_rows(A=1, B=1))
    assert len(train) == len(dev) == 1
    with pytest.raises(UserError, match="all rows have the same text"):
        divide(SPEC, _rows(A=1) * 4, Path("x.csv"))


def test_rows_without_classes_are_divided_by_the_hash_alone() -> None:
    """Whatever is added, no row changes its side."""
    free = spec_of(replace(LETTERS, labels=[]))
    rows = [replace(row, label=str(n // 2)) for n, row in enumerate(_rows(A=200))]
    few, many = _sides(rows[:40], free)[1], _sides(rows, free)[1]
    assert few == {row.fields["text"] for row in rows[:40]} & many
    assert len(many) < 20 + 5 * 4.3  # binomial: 20 of 200 with deviation sqrt(200 * 0.1 * 0.9)

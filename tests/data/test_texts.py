"""What the texts of rows say about the rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ppo_nlu.data import about_too_long, few_rows
from ppo_nlu.data.__main__ import main as data_program
from ppo_nlu.model import BUNDLED
from ppo_nlu.tasks import Example, get_task

SST2 = get_task("sst2")


def _rows(**counts: int) -> list[Example]:
    return [Example("", {"sentence": "x"}, word) for word, n in counts.items() for _ in range(n)]


def test_labels_with_few_rows_are_named() -> None:
    assert few_rows(SST2, _rows(Positive=10, Negative=10)) == ""
    said = few_rows(SST2, _rows(Positive=9, Negative=10))
    assert said == "labels with few rows (under 10, or under 1 %): 'Positive' 9"
    assert few_rows(SST2, _rows(Positive=20, Negative=1980)) == ""  # 1 % of 2,000 rows
    assert few_rows(SST2, _rows(Positive=19, Negative=1981)).endswith(": 'Positive' 19")
    assert few_rows(SST2, _rows(Negative=30)).endswith(": 'Positive' 0")


def test_rows_that_are_too_long_are_counted_by_a_few_looks() -> None:
    rows = [Example("", {"a": "x" * (n * 7 % 1000), "b": "y"}, None) for n in range(1000)]
    looks = []

    def over(row: Example) -> bool:
        looks.append(row)
        return len(row.fields["a"]) >= 930

    assert about_too_long(rows, over) == 70 and len(looks) <= 10  # 2**10 > 1000
    assert about_too_long(rows, lambda _: False) == 0
    assert about_too_long(rows, lambda _: True) == 1000


@pytest.mark.skipif(not (BUNDLED / "config.json").is_file(), reason="no bundled model")
def test_check_tells_shares_and_prompts_that_are_cut(tmp_path: Path, capsys) -> None:
    path, config = tmp_path / "a.csv", tmp_path / "c.yaml"
    texts = ["word " * n for n in (1, 5, 100, 1500, 3000)] * 4
    path.write_text(
        "text,label\n" + "".join(f"{t},{'AB'[i % 4 > 2]}\n" for i, t in enumerate(texts))
    )
    config.write_text(
        "task: t\ncustom: {name: t, fields: [text], query: 'Judge {text}.', labels: [A, B],\n"
        f"  train: {path}, dev: {path}}}\n"
    )
    assert data_program(["check", str(config)]) == 0
    out = capsys.readouterr().out
    # 3,000 words alone have more tokens than the context of 2,048; 1,500 fit with their form.
    tokenizer = AutoTokenizer.from_pretrained(str(BUNDLED))
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert sum(n > 2048 for n in lengths) == 4 and sorted(lengths)[-5] < 2048 - 300
    train = next(line for line in out.splitlines() if line.startswith("t     train"))
    assert train.split()[2:6] == ["a.csv", "20", "2", "labels"] and train.split()[-1] == "4"
    assert "t train: A 15 (75.0%), B 5 (25.0%)" in out and "'B' 5" in out
    assert "\ncut: about how many prompts are longer" in out
    assert data_program(["check", str(config), "data.max_prompt_tokens=1000"]) == 0
    train = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("t     train"))
    assert train.split()[-1] == "8"
    assert data_program(["check", str(config), "model.name_or_path=nowhere"]) == 0
    assert "cut: " not in capsys.readouterr().out  # its context is not known

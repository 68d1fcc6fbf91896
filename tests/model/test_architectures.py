"""Each architecture gives what plain transformers gives, or is refused, as the document says.

A few rows run by default; `pytest -m architectures` runs the others.
"""

from __future__ import annotations

import pytest
import transformers
from architecture_table import TABLE, Row
from architectures import BOUND, DOCUMENT, Outcome, examine, line_of, main, render

QUICK = "llama|qwen2|gemma2|gpt2|opt-350m|bloom|phi3, longrope|jamba".split("|")
WHOLE = (pytest.mark.architectures, pytest.mark.slow)
ROWS = [pytest.param(row, id=row.name, marks=[] if row.name in QUICK else WHOLE) for row in TABLE]


def document() -> list[str]:
    return DOCUMENT.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("row", ROWS)
def test_an_architecture_is_as_the_document_says(row: Row) -> None:
    found = examine(row)
    if found.path == "skipped":
        pytest.skip(found.line)
    assert not found.wrong, str(found)
    if any(f"transformers {transformers.__version__} " in line for line in document()):
        assert line_of(found) in document()


def test_the_document_has_the_rows_of_the_table() -> None:
    names = [line.split(" | ")[0].removeprefix("| ") for line in document() if "| " in line[:2]]
    assert names == ["architecture", *(row.name for row in TABLE)]
    assert set(QUICK) <= set(names) and len(set(names)) == len(names)


def test_what_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A gap over the bound or a traceback makes the program fail; a refusal does not."""
    outcomes = {
        "llama": Outcome("llama", "tree", gaps={"score": BOUND / 2, "long": 2 * BOUND}),
        "qwen2": Outcome("qwen2", "plain", failed={"generate": "TRACEBACK: TypeError"}),
        "bert": Outcome("bert", "refused", "model.name_or_path: a head | of its own"),
    }
    monkeypatch.setattr("architectures.examine", lambda row: outcomes[row.name])
    assert main(["llama", "bert"]) == 1 and main(["qwen2"]) == 1 and main(["bert"]) == 0
    told = capsys.readouterr().out
    assert "WRONG: long: gap 2.0e-04" in told and "generate: TRACEBACK: TypeError" in told
    assert "reference" not in told and "WRONG: score" not in told
    lines = render(list(outcomes.values())).splitlines()[-3:]
    assert lines == [
        "| llama | tree | wrong |  |",
        "| qwen2 | plain | wrong |  |",
        "| bert | refused |  | model.name_or_path: a head \\| of its own |",
    ]
    with pytest.raises(SystemExit):
        main(["no such"])

"""Metrics of free text by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ppo_nlu.tasks.metrics import evaluate, exact, report, token_f1
from ppo_nlu.tasks.metrics.text import normalise
from tests.tasks.metrics.judged import TEXT, rows


def test_squad_normalisation_and_matches() -> None:
    assert normalise("  The Cat's  (an) A-frame, theatre ") == "cats aframe theatre"
    assert exact("the U.S.", "US") == 1 and exact("US dollar", "US") == 0
    # common: new, york (once): P 2/3, R 2/2
    assert token_f1("new york york", "York, the new") == pytest.approx(0.8)
    assert token_f1("x", "y") == 0
    assert token_f1("The", "a") == 1 and token_f1("The", "cat") == 0


def test_free_text_by_hand() -> None:
    examples = rows(["Paris", "new york", "Rome"])
    examples[2] = replace(examples[2], extra={"answers": ["Roma", "the city of Rome"]})
    given = ["paris.", None, "city of Rome"]
    assert evaluate(TEXT, examples, given) == {
        "exact": pytest.approx(2 / 3),
        "token_f1": pytest.approx(2 / 3),
    }
    figures = report(TEXT, examples, given, resamples=20)
    assert figures["predicted"] == {} and figures["unparsed"] == pytest.approx(1 / 3)
    assert json.loads(json.dumps(figures)) == figures and "confusion" not in figures

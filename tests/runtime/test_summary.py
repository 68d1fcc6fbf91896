"""The table of results and the peak of memory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from ppo_nlu.runtime.summary import class_table, peak_memory_mb, results_table


def test_results_table() -> None:
    before = {"sample": 0.5012, "greedy": 0.6, "score": None, "unparsed": 0.0306}
    after = {"sample": 0.91649, "greedy": 0.92, "score": 1.0, "unparsed": 0.0}
    assert results_table({"base": before, "tuned": after}).splitlines() == [
        "(%)      sample T=1      greedy       score    unparsed",
        "base           50.1        60.0           -         3.1",
        "tuned          91.6        92.0       100.0         0.0",
    ]
    assert len(results_table({"base": None, "tuned": after}).splitlines()) == 2
    assert "-" in results_table({"tuned": {"sample": math.nan}})


def test_peak_memory_is_in_mebibytes() -> None:
    """Against the operating system's own count, and it never falls."""
    before = peak_memory_mb("cpu")
    block = torch.ones(2**26)  # 256 MiB
    after = peak_memory_mb(torch.device("cpu"))
    del block
    assert peak_memory_mb("cpu") >= after >= before
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert peak is not None and after == pytest.approx(int(peak[1]) / 1024, rel=0.05)


def test_baselines_stand_below_the_tuned_model() -> None:
    tuned = {"sample": 0.5, "greedy": 0.6, "score": 0.7, "unparsed": 0.0, "macro_f1": 0.25}
    baselines = {"constant": {"greedy": 0.421, "macro_f1": 0.118}, "TF-IDF": {"greedy": 0.88}}
    assert results_table({"tuned": tuned} | baselines, macro_f1=True).splitlines() == [
        "(%)      sample T=1      greedy       score    unparsed    macro-F1",
        "tuned          50.0        60.0        70.0         0.0        25.0",
        "constant          -        42.1           -           -        11.8",
        "TF-IDF            -        88.0           -           -           -",
    ]


def figures(f1: float, rows: int) -> dict[str, float]:
    return {"precision": 0.5, "recall": 1.0, "f1": f1, "support": rows}


def test_class_table() -> None:
    long = "a class of very many words that goes on and on and on"
    lines = class_table({"Praise": figures(2 / 3, 1234), long: figures(0, 1)}).splitlines()
    width = 40
    assert lines[0] == f"{'greedy answers':<{width}}  precision   recall      F1    rows"
    assert lines[1] == f"{'Praise':<{width}}       50.0    100.0    66.7   1,234"
    assert lines[2].startswith("a class of") and " ... " in lines[2]
    assert len(lines[2]) == len(lines[0])


def test_of_many_classes_the_worst_are_shown() -> None:
    classes = {f"c{i:02}": figures(1 - i / 100, i) for i in range(21)}
    lines = class_table(classes).splitlines()
    assert lines[0].startswith("the worst 10 of 21  ")
    assert [line[:3] for line in lines[1:]] == [f"c{i}" for i in range(20, 10, -1)]
    del classes["c20"]
    assert len(class_table(classes).splitlines()) == 21
    empty = {f"c{i:02}": figures(0, 0) for i in range(30)} | {"c07": figures(0, 1)}
    assert [line[:3] for line in class_table(empty).splitlines()[1:]] == ["c07"]

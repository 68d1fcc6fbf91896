"""The table of results and the peak of memory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from ppo_nlu.runtime.summary import peak_memory_mb, results_table


def test_results_table() -> None:
    before = {"sample": 0.5012, "greedy": 0.6, "score": None, "unparsed": 0.0306}
    after = {"sample": 0.91649, "greedy": 0.92, "score": 1.0, "unparsed": 0.0}
    assert results_table(before, after).splitlines() == [
        "(%)      sample T=1      greedy       score    unparsed",
        "base           50.1        60.0           -         3.1",
        "tuned          91.6        92.0       100.0         0.0",
    ]
    begun = results_table(before, after, "start", after).splitlines()
    assert [line.split()[:2] for line in begun[1:]] == [
        ["base", "91.6"], ["start", "50.1"], ["tuned", "91.6"],
    ]  # fmt: skip
    assert len(results_table(None, after).splitlines()) == 2
    assert "-" in results_table(None, {"sample": math.nan})


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

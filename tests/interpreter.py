"""For tests of kernels: whether this process interprets them, and how to run a file that way.

Triton's interpreter must be chosen before Triton is imported, so on a machine without CUDA a test
file runs itself once more in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
RUNS_KERNELS = INTERPRETED or DEVICE == "cuda"


def run_interpreted(file: str, only: str) -> None:
    """Run the tests of a file whose names hold `only`, with TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", only, file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

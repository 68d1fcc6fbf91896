"""What every shipped launch compiles to for A100 and H100, with no GPU: limits, spills, MMA.

The launches themselves come from the kernel modules, `ppo_nlu.kernels.compile_report` records them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ppo_nlu.kernels import compile_report  # noqa: E402

LAUNCHES = compile_report.shipped()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda x: f"{x.label}-{x.kernel.__name__}")
def test_every_shipped_launch_fits_and_uses_the_tensor_cores(launch, arch: int) -> None:
    read = compile_report.read_out(launch, arch)
    assert not read.faults()
    multiplies = "tl.dot" in launch.kernel.src or "_dot(" in launch.kernel.src
    low_precision = any(kind in ("*bf16", "*fp16") for kind in launch.signature.values())
    if multiplies and low_precision:
        assert read.hgmma + read.hmma > 0, "no tensor-core instruction"


def test_every_kernel_of_every_module_is_among_the_shipped() -> None:
    import importlib

    from triton.runtime.jit import JITFunction

    launched = {launch.kernel.__name__ for launch in LAUNCHES}
    called = "".join(launch.kernel.src for launch in LAUNCHES)
    for name in compile_report.MODULES:
        module = importlib.import_module(f"ppo_nlu.kernels.{name}")
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                name = kernel.__name__
                assert name in launched or f"{name}(" in called or name in called, name


def test_recording_runs_nothing_and_knows_what_triton_specialises() -> None:
    from ppo_nlu.kernels import gae

    rewards = torch.full((3, 5), torch.nan)
    mask = torch.ones(3, 5, dtype=torch.bool)
    (launch,) = compile_report.record("x", lambda: gae.gae(rewards, rewards, mask, 0.9, 0.8))
    assert launch.grid == (3,) and launch.warps == 4
    assert launch.signature["rewards"] == "*fp32" and launch.signature["mask"] == "*u8"
    assert launch.signature["gamma"] == "fp32"
    assert launch.signature["reward_row"] == "i32" and launch.constants["reward_column"] == 1
    names = launch.kernel.arg_names
    assert names.index("rewards") in launch.divisible
    assert names.index("reward_row") not in launch.divisible, "5 is not divisible by 16"


def test_the_limits_are_those_that_a_launch_would_meet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = compile_report.Readout("a", "k", 80, 8, 3, 256, 166913, 2, 0, 0)
    assert len(read.faults()) == 2
    assert len(compile_report.Readout("a", "k", 90, 16, 3, 255, 1, 0, 0, 0).faults()) == 1
    assert not compile_report.Readout("a", "k", 90, 8, 3, 255, 166913, 0, 0, 0).faults()
    monkeypatch.setattr(compile_report, "MODULES", ("gae",))
    path = tmp_path / "x.csv"
    assert compile_report.main(["--arch", "90", "--csv", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0].startswith("triton,label,kernel,arch") and len(lines) == 3
    assert "sm_90" in capsys.readouterr().out

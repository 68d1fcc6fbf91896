"""The profile of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from short_run import QUICK, adapter, run, steps

from ppo_nlu.model import BUNDLED

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


def test_a_profile_tells_the_phases_and_changes_nothing(
    config: Path, tmp_path: Path, capsys, whole: Path
) -> None:
    folder = tmp_path / "run"
    assert run(config, *QUICK, "--profile", "--output", folder) == 0
    out = capsys.readouterr().out
    report = json.loads((folder / "profile.json").read_text())
    phases = report["phases"]
    assert {"prefill", "decode", "update", "evaluation", "io", "other"} <= phases.keys()
    assert report["steps"] == 4 and report["traced_steps"] == [3, 4]
    assert sum(row["share"] for row in phases.values()) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in phases.values())
    # Two of four steps are timed. Each runs 8 prompts, up to three more tokens behind each, and the
    # answers in two epochs.
    assert phases["prefill"]["tokens_saved"] > phases["prefill"]["tokens_run"] > 0
    assert phases["update"]["tokens_run"] > phases["prefill"]["tokens_run"]
    assert 2 * 8 * 3 >= phases["decode"]["tokens_run"] > 0
    assert all(0 < phases[name]["gemm_share"] < 1 for name in ("prefill", "decode", "update"))
    table = out[out.index("phase ") :].splitlines()
    assert table[-1] == f"profile: {folder}/profile.json and trace.json"
    names = {
        event.get("name")
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
    }
    assert {"prefill", "decode", "update", "aten::mm"} <= names
    wanted, found = adapter(whole), adapter(folder)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert steps(folder) == steps(whole)

"""The files beside the code: what they link to is there, and the workflow runs the whole check."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from ppo_nlu import __version__

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"


def test_the_workflow_calls_the_check() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert workflow["permissions"] == {"contents": "read"}
    assert job["timeout-minutes"] == 40
    assert job["strategy"]["matrix"]["python-version"] == ["3.10", "3.12"]  # 3.10 is 3.1 unquoted


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    text = (GITHUB / name).read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    for link in links:
        assert link.startswith("https://") or (GITHUB / link).exists(), link


def test_the_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (GITHUB / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[0] == "Unreleased"
    assert __version__ in headings

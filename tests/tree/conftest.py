"""What the tests of the tree share."""

from __future__ import annotations

import pytest

from ppo_nlu.tree import prefixes


@pytest.fixture
def every_prefix_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes are small: let even a few shared tokens be worth a run of their own."""
    monkeypatch.setattr(prefixes, "PREFIX_COST", 0)

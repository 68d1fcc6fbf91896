"""A small part of the campaigns; the whole ones are programs, see tests/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaigns import damage, kill, runs

from ppo_nlu.model import BUNDLED

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> runs.Place:
    return runs.Place(tmp_path_factory.mktemp("campaign"))


def test_killed_runs_end_as_if_they_never_were(place: runs.Place) -> None:
    campaign = kill.Campaign(place, seed=3, kinds=["sft"])
    campaign.go(2)
    assert campaign.failures == [] and sum(campaign.kills.values()) == 2


def test_damage_is_a_line_or_changes_nothing(place: runs.Place) -> None:
    campaign = damage.Campaign(place, seed=2, kinds=["sft"])
    campaign.go(4)
    assert campaign.failures == [] and sum(campaign.outcomes.values()) == 4


def test_the_campaigns_notice_a_difference(place: runs.Place, tmp_path: Path) -> None:
    """A run that ends otherwise, and a file that is left, do not pass."""
    whole = runs.result(place.reference("sft"))
    assert runs.difference(whole, whole) == ""
    assert runs.difference(whole, whole | {"step 2": {}}) == "step 2"
    assert runs.difference(whole, {**whole, "more": b""}) == "more"
    (tmp_path / ".tmp-x").write_text("")
    assert runs.leftovers(tmp_path) and not runs.leftovers(place.reference("sft"))

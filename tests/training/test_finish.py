"""How a run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from short_run import run

from ppo_nlu.model import BUNDLED
from ppo_nlu.training import finish

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "config.json").is_file(), reason="the bundled model is not in ppo_nlu/assets"
)


@pytest.mark.parametrize(("method", "title"), [("ppo", "PPO"), ("encoder", "Encoder")])
def test_the_curves_title_names_method_and_task(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, title: str
) -> None:
    titles = []
    monkeypatch.setattr(finish, "draw_curves", lambda _, title, before: titles.append(title))
    more = (f"method={method}", "train.steps=1", "eval.before=false", "log.progress=false")
    assert run(config, *more, "--output", tmp_path / "run") == 0
    assert titles == [f"{title} on bundled data, not SST-2, seed 0"]

"""Relative paths in a config are meant from the current folder, and are kept as absolute ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_nlu.config import dump, load_config
from ppo_nlu.config.paths import PATHS, absolute
from ppo_nlu.errors import UserError


def test_a_loaded_config_holds_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file and from the command line; its dump means the same from any folder."""
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("c.yaml").write_text(
        "task: t\nmodel: {name_or_path: ./base/}\n"
        "custom: {name: t, train: ../t.csv, fields: [text], query: '{text}', labels: [a, b]}\n"
    )
    cfg = load_config("c.yaml", ["data.path=data", "custom.dev=/other/d.csv"])
    assert cfg.model.name_or_path == str(tmp_path / "here" / "base")
    assert cfg.custom.train == str(tmp_path / "t.csv")
    assert (cfg.data.path, cfg.custom.dev) == (str(tmp_path / "here" / "data"), "/other/d.csv")
    Path("../stored.yaml").write_text(dump(cfg))
    monkeypatch.chdir(tmp_path)
    assert load_config("stored.yaml") == cfg


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name_or_path", "bundled"),
        ("model.name_or_path", "owner/model"),  # of the hub
        ("data.path", "~/data"),
        ("data.path", None),
        ("task", "sst2"),
    ],
)
def test_what_is_no_path_stays(
    key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundled").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute(key, value) == value


@pytest.mark.parametrize("key", PATHS)
def test_a_wrong_value_is_told_as_ever(key: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: sst2\n")
    with pytest.raises(UserError, match=f"command line: {key}: expected a text"):
        load_config(tmp_path / "c.yaml", [f"{key}=''"])


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert absolute("data.path", "data") == "data"

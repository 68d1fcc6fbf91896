"""A folder appears whole under its name, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_nlu.errors import UserError
from ppo_nlu.storage import files, locks
from ppo_nlu.storage.atomic_folder import atomic_folder


def test_the_name_comes_with_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
    assert [p.name for p in path.parent.iterdir()] == ["folder"]
    assert [p.name for p in path.iterdir()] == ["a"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("a")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_replaced_and_a_full_one_is_kept(tmp_path: Path) -> None:
    """Two makers found the name free: the second gets a line, and the work of the first stays."""
    path = tmp_path / "folder"
    path.mkdir()
    with atomic_folder(path) as folder:
        (folder / "first").write_text("")
    refused = pytest.raises(UserError, match="folder: cannot be written")
    with refused as error, atomic_folder(path) as folder:
        (folder / "second").write_text("")
    assert "\n" not in str(error.value)
    assert [p.name for p in path.iterdir()] == ["first"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_maker_left_is_deleted(tmp_path: Path) -> None:
    """Of the same folder; one that is at work keeps its own."""
    path = tmp_path / "folder"
    left, busy, other = (files.temporary_name(path), files.temporary_name(path), tmp_path / "x")
    for folder in (left, busy, other):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    with locks.FolderLock(busy), atomic_folder(path) as made:
        assert made.is_dir()
    assert not left.exists() and busy.exists() and other.exists()


def test_two_makers_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "folder") as first:
        with pytest.raises(UserError), atomic_folder(tmp_path / "folder"):
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "other").write_text("")
        assert first.is_dir()
        (tmp_path / "folder" / "other").unlink()


def test_a_place_that_takes_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"), atomic_folder(tmp_path / "file" / "new"):
        pass

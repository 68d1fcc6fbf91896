"""Folders with checksums: under kills, and with damage that is noticed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers import on_call

from ppo_nlu.storage import folders, sealed

CALLS = ("replace", "fsync", "unlink", "open")


class Killed(BaseException):
    """Stands in for the end of the process."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_shows_its_damage(tmp_path: Path) -> None:
    contents = {"weights": bytes(range(256)) * 4, "config.json": b"{}"}
    folders.write_folder(tmp_path, contents)
    assert folders.read_checked(tmp_path / "weights") == contents["weights"]
    (tmp_path / "added later").write_bytes(b"x")
    assert folders.read_checked(tmp_path / "added later") == b"x"
    draw = random.Random(1)
    for name in ("weights", "config.json", folders.CHECKSUMS):
        whole = (tmp_path / name).read_bytes()
        for _ in range(30):
            spoilt = bytearray(whole)
            spoilt[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            (tmp_path / name).write_bytes(spoilt)
            with pytest.raises(sealed.Damaged, match="damaged"):
                folders.check_folder(tmp_path, but="")
        (tmp_path / name).write_bytes(whole)
    folders.check_folder(tmp_path, but="")
    (tmp_path / "weights").unlink()
    with pytest.raises(sealed.Damaged, match="weights"):
        folders.check_folder(tmp_path, but="")
    (tmp_path / folders.CHECKSUMS).unlink()  # a folder of another tool
    folders.check_folder(tmp_path, but="")


def test_a_folder_is_never_complete_before_its_last_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any call: a folder with the config has all files, and no checksum is wrong."""

    def die() -> None:
        raise Killed

    whole = 0
    for kill_at in range(60):
        folder = tmp_path / str(kill_at)
        for number in range(2):  # the first, and one that replaces it
            contents = {n: f"{n}{number}".encode() for n in ("a", "b", "config.json")}
            with monkeypatch.context() as patch:
                on_call(patch, kill_at if number else 1000, die, CALLS)
                try:
                    folders.write_folder(folder, contents)
                    whole += number
                except Killed:
                    pass
        folders.check_folder(folder, but="")
        folders.write_folder(folder, contents)
        assert {n: (folder / n).read_bytes() for n in contents} == contents
        assert names(folder) == ["a", "b", folders.CHECKSUMS, "config.json"]
    assert whole

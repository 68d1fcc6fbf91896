"""The atomic write of a folder: it appears whole under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.files import sync_file, sync_folder, temporaries, temporary_name
from ppo_nlu.storage.locks import FolderLock


@contextmanager
def staged_folder(path: Path, give_name: Callable[[Path, Path], object]) -> Iterator[Path]:
    """A new folder to fill beside `path`; `give_name(folder, path)` renames it at the end.

    Before that all of it is forced to the disk. Where the block ends with an error, the folder is
    deleted. What a killed process left behind has a name of `temporary_name`.
    """
    temp = temporary_name(path)
    with write_errors(path):
        temp.mkdir(parents=True)
    try:
        yield temp
        with write_errors(path):
            _sync_tree(temp)
            give_name(temp, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which gets its name when the block ends well and is deleted otherwise.

    An empty folder of that name is replaced; a full one is left alone, and a UserError says so.
    What an earlier maker of the same folder left behind, because it was killed, is deleted.
    """
    path = Path(path).absolute()
    _sweep(path)
    # The lock tells the sweep of another maker that this one is still at work.
    with staged_folder(path, _name_new) as temp, FolderLock(temp):
        yield temp


def _sync_tree(folder: Path) -> None:
    """Force a folder with all that is in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def _name_new(folder: Path, path: Path) -> None:
    """Give a folder its name, unless a folder with something in it has the name."""
    if path.is_dir():
        path.rmdir()  # fails where it is not empty; not every system renames over a folder
    os.rename(folder, path)


def _sweep(path: Path) -> None:
    """Delete the temporary folders of `path` that nobody fills any more: their locks are free."""
    for left in temporaries(path):
        if left.is_dir() and not left.is_symlink():
            with suppress(UserError), FolderLock(left):
                shutil.rmtree(left, ignore_errors=True)

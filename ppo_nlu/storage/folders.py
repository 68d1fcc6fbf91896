"""Folders of files that belong together: written with their checksums, read with damage noticed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import read_bytes, write_errors
from ppo_nlu.storage.files import (
    atomic_write_bytes,
    make_folder,
    sync_file,
    sync_folder,
    temporaries,
    temporary_name,
)
from ppo_nlu.storage.locks import FolderLock
from ppo_nlu.storage.sealed import Damaged, seal, unseal

CHECKSUMS = "checksums.json"  # of a folder: the sha256 of the files that were written with it


def write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files, in this order, and at last their checksums beside them.

    Each file appears whole or not at all. A kill in between leaves a folder without checksums, none
    with wrong ones; where all is there already, nothing is written.
    """
    make_folder(folder)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    whole = contents | {CHECKSUMS: seal(sums).encode()}
    with suppress(OSError):
        if all(read_bytes(folder / name) == data for name, data in whole.items()):
            return
    with write_errors(folder / CHECKSUMS):
        (folder / CHECKSUMS).unlink(missing_ok=True)  # those of what is now replaced
    for name, data in whole.items():
        atomic_write_bytes(folder / name, data)


def read_checked(path: Path) -> bytes:
    """The content of a file; `Damaged` where it is not what the checksums beside it say.

    Without checksums, as in the folders of other tools, and where they do not name the file, the
    content is taken as it is.
    """
    data = read_bytes(path)
    wanted = _checksums(path.parent / CHECKSUMS).get(path.name)
    if wanted is not None and wanted != hashlib.sha256(data).hexdigest():
        raise Damaged(
            f"{path}: is damaged, its content is not what was written (sha256); copy it again, or "
            f"delete {CHECKSUMS} beside it if it was changed on purpose"
        )
    return data


def check_folder(folder: Path, but: str) -> None:
    """`Damaged` where a file that has a checksum is missing or another, apart from one."""
    for name in _checksums(folder / CHECKSUMS):
        try:
            if name != but:
                read_checked(folder / name)
        except OSError as error:
            raise Damaged(f"{folder / name}: cannot be read ({error.strerror})") from error


def _checksums(path: Path) -> dict[str, Any]:
    try:
        return unseal(read_bytes(path).decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: is damaged ({error}); copy the folder again") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, checked like all of `read_checked`; else a UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_checked(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, or no safetensors file ({error})") from error


def sync_tree(folder: Path) -> None:
    """Force a folder with all that is in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def sweep_folders(path: Path) -> None:
    """Delete the temporary folders of `path` whose makers are no more: who is at work locks his."""
    for left in temporaries(path):
        if left.is_dir() and not left.is_symlink():
            with suppress(UserError), FolderLock(left):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which gets its name when the block ends well and is deleted otherwise.

    An empty folder that bears the name is replaced; a full one is left alone, and a UserError says
    so. What an earlier maker of the same folder left behind, because it was killed, is deleted.
    """
    path = Path(path).absolute()
    temp = temporary_name(path)
    sweep_folders(path)
    make_folder(temp)
    try:
        with FolderLock(temp):  # by which a sweep knows that this one is at work
            yield temp
        with write_errors(path):
            sync_tree(temp)
            if path.is_dir():
                path.rmdir()  # empty, or this fails; not every system renames over a folder
            os.rename(temp, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)

"""Folders of files that belong together: written with their checksums, read with damage noticed."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import read_bytes, write_errors
from ppo_nlu.storage.files import atomic_write_bytes, make_folder
from ppo_nlu.storage.sealed import Damaged, seal, unseal

CHECKSUMS = "checksums.json"  # of a folder: the sha256 of the files that were written with it


def write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files, in this order, and last their checksums beside them.

    Each file appears whole or not at all. A kill in between leaves a folder without checksums, not
    one with wrong checksums. If all is there already, nothing is written.
    """
    make_folder(folder)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    whole = contents | {CHECKSUMS: seal(sums).encode()}
    with suppress(OSError):
        if all(read_bytes(folder / name) == data for name, data in whole.items()):
            return
    with write_errors(folder / CHECKSUMS):
        (folder / CHECKSUMS).unlink(missing_ok=True)  # of the files that are now replaced
    for name, data in whole.items():
        atomic_write_bytes(folder / name, data)


def read_checked(path: Path) -> bytes:
    """The content of a file; `Damaged` where its checksum is not the one noted beside it.

    Without a noted checksum, as in the folders of other tools, the content is taken as it is.
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
    """`Damaged` where a file with a checksum is missing or damaged; `but` is not checked."""
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
    """The tensors of a safetensors file, read by `read_checked`; UserError where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_checked(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, or no safetensors file ({error})") from error

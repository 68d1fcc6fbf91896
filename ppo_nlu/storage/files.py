"""The atomic write of a file: a crash, a full disk or a second process cannot spoil it.

A file is written under a random temporary name, forced to the disk and renamed, so a reader finds
the old content or the new. What the operating system refuses becomes one line for the user.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import open_regular, write_errors
from ppo_nlu.storage.locks import try_lock
from ppo_nlu.storage.sealed import to_json

TEMP = ".tmp-"  # begins the name of what is incomplete; worthless once its writer is gone
_CREATE = (
    os.O_WRONLY | os.O_CREAT | os.O_EXCL
    | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)  # fmt: skip


class Output:
    """An open temporary file; errors name the final path."""

    def __init__(self, file: IO[Any], path: Path):
        self.file, self.path = file, path

    def write(self, data: Any) -> int:
        with write_errors(self.path):
            return self.file.write(data)


@contextmanager
def atomic_open(
    path: str | Path,
    binary: bool = False,
    newline: str | None = None,
    new: bool = False,
    errors: str = "strict",
) -> Iterator[Output]:
    """A new file to write into, UTF-8 or binary; it gets its name when the block ends well.

    A link of that name is replaced, not followed. If the file must be `new`, anything of that name
    is left alone, and a UserError says so. What an earlier writer of the same file left behind,
    because it was killed, is deleted.
    """
    path = Path(path)
    with write_errors(path):
        _sweep(path)
        temp, handle = _temporary(path)
    kind: dict[str, Any] = (
        {"mode": "wb"} if binary else {"mode": "w", "encoding": "utf-8", "errors": errors}
    )
    file = os.fdopen(handle, newline=newline, **kind)
    try:
        yield Output(file, path)
        with write_errors(path):
            file.flush()
            os.fsync(handle)
            if os.name == "nt":
                file.close()  # Windows renames no open file
            (_name_new if new else os.replace)(temp, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):  # a write that failed fails again; it was reported
            file.close()


def _name_new(temp: Path, path: Path) -> None:
    """Give a file its name, unless another has it: of two writers the first wins."""
    try:
        os.link(temp, path)
        temp.unlink()
    except FileExistsError:
        raise UserError(f"{path}: exists already; name a new file") from None
    except OSError:  # a file system without hard links
        os.replace(temp, path)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file; a reader, or a crash, finds the old content or the new, never half."""
    with atomic_open(path, binary=True) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Like `atomic_write_bytes`, for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Like `atomic_write_bytes`, for strict JSON: what is not a finite number becomes null."""
    atomic_write_text(path, to_json(value, indent=2) + "\n")


def write_new(path: str | Path, data: bytes) -> None:
    """Write a file that is not there yet, and force it to the disk; no link is followed."""
    with os.fdopen(os.open(path, _CREATE, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: str | Path) -> Path:
    """Make a folder with its parents, where it is not there yet."""
    with write_errors(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable; Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Force to the disk what any process has written to a file, if the file exists."""
    with write_errors(path), suppress(FileNotFoundError):
        handle = open_regular(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary_name(path: Path) -> Path:
    """An unpredictable name beside `path`."""
    return path.with_name(f"{_temp_prefix(path)}{secrets.token_hex(4)}")


def _temp_prefix(path: Path) -> str:
    return f"{TEMP}{path.name[:50]}-"  # short enough for a file system, in any script


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, open and locked; the lock tells `_sweep` that it is in use."""
    while True:
        temp = temporary_name(path)
        handle = os.open(temp, _CREATE, 0o666)
        free = try_lock(handle)
        with suppress(FileNotFoundError):
            if free is not False and os.path.samestat(os.lstat(temp), os.fstat(handle)):
                return temp, handle
        os.close(handle)  # a sweep came between the two calls


def _sweep(path: Path) -> None:
    """Delete the temporary files of writers of `path` that have ended."""
    for left in temporaries(path):
        _delete_unlocked(left)


def temporaries(path: Path) -> list[Path]:
    """Everything beside `path` that has a name of `temporary_name`."""
    pattern = re.escape(_temp_prefix(path)) + "[0-9a-f]{8}"
    with suppress(OSError):  # a folder that may be written but not listed, too
        return [path.with_name(n) for n in os.listdir(path.parent) if re.fullmatch(pattern, n)]
    return []


def _delete_unlocked(path: Path) -> None:
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if try_lock(handle):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)

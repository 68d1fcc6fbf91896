"""One process at a time: locks of open files and of folders."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import open_regular, write_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # of a folder: held by the process that works in it


def try_lock(handle: int) -> bool | None:
    """Lock an open file for this process: whether that worked, None where there are no locks.

    The system frees the lock when the process ends, however it ends.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


class InUse(UserError):
    """Another process works in the folder."""

    def __init__(self, folder: str | Path, holder: str):
        super().__init__(f"{folder}: {holder} is working in it; wait for its end, or stop it")
        self.holder = holder


def refuse_in_use(folder: str | Path) -> None:
    """`InUse` where another process holds the lock of the folder; nothing is made.

    This process must not hold it.
    """
    try:
        handle = open_regular(Path(folder) / LOCK, os.O_RDWR)
    except OSError:  # nobody holds what is not there
        return
    try:
        if try_lock(handle) is False:
            raise InUse(folder, _holder(handle))
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """Who has the lock of this open file."""
    return os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"


class FolderLock:
    """The right to work in a folder; one process has it at a time. A context manager."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        with write_errors(self.path):
            self.handle, self.locked = self._open()
        if self.locked is False:
            holder = _holder(self.handle)
            os.close(self.handle)
            raise InUse(folder, holder)
        if self.locked is None:
            print(
                f"warning: {folder}: its file system has no locks; start no second process on it",
                file=sys.stderr,
            )
        with suppress(OSError):  # the note is for people; a full disk is reported elsewhere
            os.ftruncate(self.handle, 0)
            os.write(self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _open(self) -> tuple[int, bool | None]:
        """The open file, and whether the lock is ours."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        while True:
            handle = open_regular(self.path, flags)
            locked = try_lock(handle)
            with suppress(FileNotFoundError):
                if not locked or os.path.samestat(os.lstat(self.path), os.fstat(handle)):
                    return handle, locked
            os.close(handle)  # its last holder deleted it between the two calls

    def release(self, keep: bool = False) -> None:
        """Let others work in the folder; `keep` the file if child processes still hold the lock."""
        if self.handle < 0:
            return
        if self.locked and not keep:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self.handle)
        self.handle = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

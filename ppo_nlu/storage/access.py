"""Opening files: only regular ones; and what the system refuses, as one line for the user."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppo_nlu.errors import UserError

_FREE = "what was complete before is untouched: free some space and go on (a run with --resume)"
_REASONS = {
    errno.ENOSPC: f"no space left on the disk; {_FREE}",
    errno.EDQUOT: f"no space left, the disk quota is used up; {_FREE}",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; check whose folder it is, or choose another",
    errno.EPERM: "not permitted; check whose folder it is, or choose another",
    errno.ENAMETOOLONG: "the name is too long for the file system; give a shorter one",
    errno.EIO: "the disk reports an input/output error; check the disk, or choose another folder",
    errno.EXDEV: "its folder is spread over file systems; choose a folder without mounts in it",
    errno.EBUSY: "the system is using it; end what uses it and try again",
    errno.ELOOP: "it is a symbolic link, which is not written through; remove the link",
}


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or f"{error.strerror or error}; check the folder"
        said = "" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written: "
        raise UserError(f"{path}: {said}{reason}") from error


def irregular(mode: int) -> str:
    """What is there instead of a regular file, by its `st_mode`; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    return "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"


def open_regular(path: str | Path, flags: int) -> int:
    """Open a regular file; also as the opener of `open`. OSError for a pipe or a device, on which
    the program would wait or read for ever."""
    try:
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EISDIR):  # as pipes, sockets and folders have it
            raise
        raise _no_file(path) from None
    if irregular(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_file(path)
    return handle


def _no_file(path: str | Path) -> OSError:
    return OSError(errno.EINVAL, "is not a regular file", str(path))


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; OSError for anything else of that name."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()

"""Files that a crash, a full disk or a second process cannot spoil, and damage that is noticed.

A file is written under a random temporary name, forced to the disk and renamed, so a reader finds
the old content or the new. What the operating system refuses becomes one line for the user.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ppo_nlu.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMP = ".tmp-"  # how the name of what is incomplete begins: worthless once its writer is gone
LOCK = ".lock"  # of a folder: held by the process that works in it
CHECKSUMS = "checksums.json"  # of a folder: the sha256 of the files that were written with it

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
_CREATE = (
    os.O_WRONLY | os.O_CREAT | os.O_EXCL
    | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)  # fmt: skip


class Damaged(UserError):
    """A file of ours whose content is not what was written."""


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line for the user."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or f"{error.strerror or error}; check the folder"
        said = "" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written: "
        raise UserError(f"{path}: {said}{reason}") from error


# --- one file ---------------------------------------------------------------------------------


def open_regular(path: str | Path, flags: int) -> int:
    """Open a file of ours, as the opener of `open` too; OSError where a pipe or a device has its
    place, which would let the program wait or read for ever."""
    try:
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EISDIR):  # as pipes, sockets and folders have it
            raise
        handle = -1
    if handle >= 0 and stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    if handle >= 0:
        os.close(handle)
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; OSError for whatever else bears the name."""
    with open(path, "rb", opener=open_regular) as file:
        return file.read()


class Output:
    """The file under its temporary name; an error of a write names the file that it will be."""

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

    A link that bears the name is replaced, not followed; where the file must be `new`, whatever
    bears the name is left alone, and a UserError says so. What an earlier writer of the same file
    left behind, because it was killed, is deleted.
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
            if fcntl is None:
                file.close()  # Windows renames no open file
            (_name_new if new else os.replace)(temp, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):  # a write that failed fails again; it was told
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
    """Write a file so that a reader, or a crash, finds the old content or the new, never half."""
    with atomic_open(path, binary=True) as file:
        file.write(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Like `atomic_write_bytes`, for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Like `atomic_write_bytes`, for strict JSON: what is not a finite number becomes null."""
    atomic_write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Strict JSON, in which what is not a finite number is null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def plain(value: Any) -> Any:
    """The same value in JSON types: one-element tensors as numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    """Make renames in a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force a folder with all that is in it to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place) / name)
        sync_folder(Path(place))


def sync_file(path: Path) -> None:
    """Force to the disk what any process has written to a file, if it is there."""
    with write_errors(path), suppress(FileNotFoundError):
        handle = open_regular(path, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody can foretell."""
    return path.with_name(f"{_temp_prefix(path)}{secrets.token_hex(4)}")


def _temp_prefix(path: Path) -> str:
    return f"{TEMP}{path.name[:50]}-"  # short enough for a file system, in any script


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, open and locked, by which `_sweep` knows that it is in use."""
    while True:
        temp = temporary_name(path)
        handle = os.open(temp, _CREATE, 0o666)
        free = try_lock(handle)
        with suppress(FileNotFoundError):
            if free is not False and os.path.samestat(os.lstat(temp), os.fstat(handle)):
                return temp, handle
        os.close(handle)  # a sweep came between the two calls


def _sweep(path: Path) -> None:
    """Delete the temporary files of writers of `path` that are no more."""
    for left in _temporaries(path):
        _delete_unlocked(left)


def sweep_folders(path: Path) -> None:
    """Delete the temporary folders of `path` whose makers are no more: who is at work locks his."""
    for left in _temporaries(path):
        if left.is_dir() and not left.is_symlink():
            with suppress(UserError), FolderLock(left):
                shutil.rmtree(left, ignore_errors=True)


def _temporaries(path: Path) -> list[Path]:
    """What stands beside `path` under a name of `temporary_name`."""
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


# --- content that shows its damage -------------------------------------------------------------


def seal(value: Mapping[str, Any]) -> str:
    """JSON with its own sha256; floats come back bit for bit, NaN included, tuples as lists."""
    try:
        body = json.dumps(value, allow_nan=False)
    except ValueError:  # a number that JSON cannot write
        body = json.dumps(_with_words(value), allow_nan=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-1]}{", " * (body != "{}")}"sha256": "{digest}"}}\n'


def unseal(text: str) -> dict[str, Any]:
    """What `seal` wrote; ValueError where a single byte is another."""
    found = parse_object(text)
    if "sha256" not in found:
        raise ValueError("it has no sha256")
    stated = found.pop("sha256")
    body = text[: text.rindex('"sha256"')].removesuffix(", ") + "}"
    if f'"sha256": "{stated}"}}\n' != text[text.rindex('"sha256"') :]:
        raise ValueError("its sha256 is not its last entry")
    if hashlib.sha256(body.encode()).hexdigest() != stated:
        raise ValueError("its sha256 is another")
    return json.loads(body, object_hook=_from_word) if '{"float": "' in body else found


def _decoded(text: str) -> Any:
    """JSON, with a ValueError for whatever is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _with_words(value: Any) -> Any:
    """The same with {"float": "nan"} and the like for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _with_words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _from_word(value: dict[str, Any]) -> Any:
    if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
        return float(value["float"])
    return value


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where it is none, OSError where it cannot be read."""
    return parse_object(read_bytes(path).decode())


def parse_object(text: str) -> dict[str, Any]:
    """The object that a JSON text is; ValueError for whatever else it is."""
    found = _decoded(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


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


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, checked like all of `read_checked`; else a UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_checked(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged, or no safetensors file ({error})") from error


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


# --- one process at a time -----------------------------------------------------------------------


def try_lock(handle: int) -> bool | None:
    """Lock an open file for this process: whether that worked, None where there are no locks.

    The system gives it back when the process ends, however that comes.
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

    For a folder that this process has not locked itself.
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
    """The right to work in a folder, which one process has at a time; a context manager."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / LOCK
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
        with suppress(OSError):  # the note is for people; a full disk is told elsewhere
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
        """Let others work in the folder; `keep` the file, for children that hold the lock too."""
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


# --- a whole folder ------------------------------------------------------------------------------


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

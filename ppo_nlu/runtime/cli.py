"""What every program shares: from how it ended to its exit code and the line on stderr.

Use: `if __name__ == "__main__": sys.exit(cli.run(main))`.

    0    the program did all that it was asked
    1    a fault of the program itself: the traceback lies in the file that the line names
    2    the user's mistake, or the machine's (a full disk, no memory): one line says how to mend it
    130  Ctrl-C

A reader of stdout or stderr that has gone, or a device that is full, ends no program: what cannot
be written is dropped, and the work goes on. Only what is printed by `result`, the product of a
program, may end it.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from ppo_nlu.config import Config
from ppo_nlu.config.mistakes import meant
from ppo_nlu.errors import UserError, first_line, one_line

FULL = (errno.ENOSPC, errno.EDQUOT)
NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror, ssl.SSLError)
NO_MEMORY = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|not enough memory"
    r"|unable to allocate|bad_alloc|memory allocation of \d+ bytes failed",
    re.IGNORECASE,
)
LESS_MEMORY = (
    "lower rollout.batch_size, eval.batch_size or the method's batch size, set "
    "train.micro_batch_tokens or model.checkpointing=true, or take a smaller model"
)


class ReaderLeft(Exception):
    """Whoever read the product of a program on stdout has seen enough."""


# --- arguments --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, as those of all other mistakes are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._hint(message)}; see {self.prog} --help")

    def _hint(self, message: str) -> str:
        """What an unknown flag probably meant: another flag, or a key of the config."""
        found = re.search(r"unrecognized arguments: (--?[\w.-]+)", message)
        if found is None:
            return ""
        key = found[1].lstrip("-").replace("-", "_")
        near = get_close_matches(found[1], list(self._option_string_actions), n=1)
        if near:
            return f"; did you mean {near[0]}?"
        text = meant(Config, key)
        return f"; keys of the config are given as section.key=value: {text}" if text else ""


def require_place(flag: str, path: Path) -> Path:
    """The path, where a file or folder can be made; told before minutes of work, not after."""
    above = path.absolute()
    try:
        while not os.path.lexists(above):
            above = above.parent
        if above != path.absolute() and not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is no folder")
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, f"{above} may not be written to")
        there = above if above.is_dir() else above.parent
        limit, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
    except OSError as error:
        reason = f"cannot be written ({error.strerror}, so it cannot be made); check the folder"
        raise UserError(f"{flag} {path}: {reason}") from error
    # What is left free is for temporary names, and for the files inside.
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > limit - 40 or len(os.fsencode(path.absolute())) > whole - 200:
        raise UserError(f"{flag} {path}: the name is too long; give a shorter one")
    return path


# --- output -----------------------------------------------------------------------------------


class Output:
    """A standard stream that outlives its reader: what it cannot write it drops, and tells once."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name
        self.error: Exception | None = None  # why nothing is written any more
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a letter that the terminal does not have ends no program
            with suppress(OSError, ValueError):
                reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.drop(error)
            if self.name == "stdout" and not isinstance(error, BrokenPipeError):
                reason = getattr(error, "strerror", None) or error
                tell(f"warning: stdout: {reason}; the program goes on without it")

    def drop(self, error: Exception) -> None:
        """Write nothing more; what still lies in buffers goes nowhere."""
        self.error = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def tell(text: str) -> None:
    """A line on stderr for the user, whatever the text holds."""
    print(one_line(text, 4000), file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Print a line of the program's product; ReaderLeft where its reader has gone.

    Raises UserError where it cannot be written for another reason.
    """
    output = sys.stdout if isinstance(sys.stdout, Output) else Output(sys.stdout, "stdout")
    if output.error is not None:
        raise UserError("stdout: is closed; name a file with --output")
    try:
        print(text, file=output.stream, flush=True)
    except BrokenPipeError as error:
        output.drop(error)
        raise ReaderLeft from None
    except OSError as error:
        output.drop(error)
        reason = error.strerror or error
        raise UserError(f"stdout: {reason}; make room, or name a file with --output") from error


@contextmanager
def _lasting() -> Iterator[Output]:
    """Inside, stdout and stderr outlive their readers; gives that of stdout."""
    before = sys.stdout, sys.stderr
    made = [_output(before[0], "stdout"), _output(before[1], "stderr")]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in made)
    try:
        yield made[0]
    finally:
        for stream in made:  # here, where a reader that has gone is still caught
            stream.flush()
        sys.stdout, sys.stderr = before


def _output(stream: TextIO | None, name: str) -> Output:
    if stream is not None:
        return Output(stream, name)
    closed = Output(open(os.devnull, "w", encoding="utf-8"), name)  # noqa: SIM115
    closed.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    return closed


# --- how a program ends -----------------------------------------------------------------------

CRASH = "crash.txt"  # of a run folder: the traceback of a fault of the program itself
_WORK = "ppo_nlu_work"  # what `works_in` writes on an error


@dataclass(frozen=True)
class Work:
    """The run folder that a program works in, and the command that goes on with the run."""

    folder: Path
    command: str


@contextmanager
def works_in(folder: Path, command: str) -> Iterator[None]:
    """The program's run folder, for crash.txt, and the command that goes on with the run.

    An error that leaves the block carries both to `run`, so nothing has to be kept elsewhere.
    """
    try:
        yield
    except BaseException as error:
        vars(error)[_WORK] = Work(folder, command)
        raise


def run(
    main: Callable[[list[str]], int | None],
    argv: list[str] | None = None,
    printed: bool = False,
) -> int:
    """The exit code of `main(argv)`: its own, or by how it ended.

    `printed`: what it prints is all that it makes, so that a full device is a failure.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        with suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    with _lasting() as stdout:
        code = _code(main, sys.argv[1:] if argv is None else argv)
    lost = stdout.error is not None and not isinstance(stdout.error, BrokenPipeError)
    return 2 if printed and lost and code == 0 else code


def _code(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        for text in argv:
            if "\0" in text:
                raise UserError(f"{text!r}: holds a NUL character; leave it out")
        return main(argv) or 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except ReaderLeft:
        return 0
    except SystemExit:
        raise
    except BaseException as error:  # panics of libraries in Rust are no Exception
        reason = fault(error)
        return _crash(error) if reason is None else _fail(reason, _go_on(_work(error)))


def _work(error: BaseException) -> Work | None:
    """Where the program worked when the error came; None outside of a run folder."""
    return vars(error).get(_WORK)


def _go_on(work: Work | None) -> str:
    return f"; the run is not complete, go on with: {work.command}" if work else ""


def fault(error: BaseException) -> str | None:
    """What to say of a fault of the machine, with the mend; None: the error is of another kind."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    ):
        return f"out of memory ({_first_line(error)}); {LESS_MEMORY}"
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or _first_line(error)
    else:
        found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))  # as Rust says it
        if found is None:
            return None
        number = int(found[1] or found[2])
        reason = os.strerror(number)
    if number == errno.ENOMEM:
        return f"out of memory ({reason}); {LESS_MEMORY}"
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    place = " -> ".join(os.fsdecode(name) for name in names if isinstance(name, str | bytes))
    if number in FULL:
        return f"disk full: {place or 'a file'} could not be written ({reason}); make room"
    if not place and isinstance(error, NETWORK):
        return f"{reason}; check the network"
    if not place and number is None:  # raised by some library, not by the system
        return None
    return f"{place + ': ' if place else ''}{reason}; check the path, its rights and its disk"


def _first_line(error: BaseException) -> str:
    return one_line(first_line(error, 10**6), 160) or type(error).__name__


def _crash(error: BaseException) -> int:
    """Keep the traceback in a file, and name it in one line."""
    text = "".join(traceback.format_exception(error))
    said = f"{type(error).__name__}: {_first_line(error)}"
    work = _work(error)
    named = () if work is None else ((work.folder, CRASH),)
    for folder, name in (*named, (Path(tempfile.gettempdir()), None)):
        try:
            kept = _keep(text, folder, name)
        except OSError:
            continue
        asked = f"please report it with the traceback in {kept}{_go_on(work)}"
        tell(f"error: unforeseen: {said}; {asked}")
        return 1
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {where[0].filename}:{where[0].lineno}" if where else ""
    tell(f"error: unforeseen: {said}{place}; the traceback could not be written to any file")
    return 1


def _keep(text: str, folder: Path, name: str | None) -> Path:
    """The file with the text, for its owner alone, under this name, or else a new one."""
    handle, made = tempfile.mkstemp(prefix="ppo_nlu-crash-", suffix=".txt", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        os.unlink(made)
        raise
    return Path(made) if name is None else Path(made).replace(folder / name)


def _fail(message: str, more: str = "") -> int:
    tell(f"error: {one_line(message)}{more}")
    return 2

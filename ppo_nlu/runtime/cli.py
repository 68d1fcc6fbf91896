"""Runs a program from the command line, to its exit code and the line on stderr.

Use: `if __name__ == "__main__": sys.exit(cli.run(main))`.

    0    the program did all that it was asked
    1    a fault of the program itself: the traceback lies in the file that the line names
    2    the user's mistake, or the machine's (a full disk, no memory): one line says how to mend it
    130  Ctrl-C
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ppo_nlu.errors import UserError, one_line
from ppo_nlu.runtime.faults import machine_fault, short_reason
from ppo_nlu.runtime.streams import ReaderLeft, lasting, tell

CRASH = "crash.txt"  # of a run folder: the traceback of a fault of the program itself
_WORK = "ppo_nlu_work"  # the attribute that `works_in` gives an error


@dataclass(frozen=True)
class Work:
    """The run folder that a program works in, and the command that goes on with the run."""

    folder: Path
    command: str


@contextmanager
def works_in(folder: Path, command: str) -> Iterator[None]:
    """Names the run folder, for crash.txt, and the command that goes on with the run.

    An error that leaves the block carries both to `run`, so neither has to be kept elsewhere.
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
    """The exit code of `main(argv)`: what it returned, or what the error that ended it means.

    `printed`: what it prints is all that it makes, so a device that is full is a failure.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        with suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGINT, signal.default_int_handler)
    with lasting() as stdout:
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
        reason = machine_fault(error)
        return _crash(error) if reason is None else _fail(reason, _go_on(_work(error)))


def _work(error: BaseException) -> Work | None:
    """Where the program worked when the error came; None outside of a run folder."""
    return vars(error).get(_WORK)


def _go_on(work: Work | None) -> str:
    return f"; the run is not complete, go on with: {work.command}" if work else ""


def _crash(error: BaseException) -> int:
    """Keep the traceback in a file, and name it in one line."""
    text = "".join(traceback.format_exception(error))
    said = f"{type(error).__name__}: {short_reason(error)}"
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

"""Standard streams that outlive their readers.

No program ends because the reader of its stdout or stderr has gone, or because the device is full:
what cannot be written is dropped, and the work goes on. There is one exception, the product of a
program, which `result` prints.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ppo_nlu.errors import UserError, one_line


class ReaderLeft(Exception):
    """The reader of stdout has closed it."""


class Output:
    """A standard stream that outlives its reader: what it cannot write it drops, and warns once."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name
        self.error: Exception | None = None  # why nothing is written any more
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # else a letter that the terminal does not have is an error
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
        """Stop writing; discard what is still buffered."""
        self.error = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def tell(text: str) -> None:
    """A line on stderr for the user, whatever the text holds."""
    print(one_line(text, 4000), file=sys.stderr, flush=True)


def result(text: str) -> None:
    """Print a line of the program's product.

    Raises ReaderLeft if its reader has gone, UserError if it cannot be written for another reason.
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
def lasting() -> Iterator[Output]:
    """Within the block stdout and stderr outlive their readers; yields the one of stdout."""
    before = sys.stdout, sys.stderr
    made = [_output(before[0], "stdout"), _output(before[1], "stderr")]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in made)
    try:
        yield made[0]
    finally:
        for stream in made:  # while a reader that has gone is still caught
            stream.flush()
        sys.stdout, sys.stderr = before


def _output(stream: TextIO | None, name: str) -> Output:
    if stream is not None:
        return Output(stream, name)
    closed = Output(open(os.devnull, "w", encoding="utf-8"), name)  # noqa: SIM115
    closed.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    return closed

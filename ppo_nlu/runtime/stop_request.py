"""Ctrl-C and SIGTERM set a flag, so that a run ends in good order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, Ctrl-C and SIGTERM only set a flag; a further Ctrl-C interrupts at once.

    The loop looks at `requested` between steps, saves, and exits with `exit_code` (130 or 143).
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the first signal; 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal = number
            # os.write: a handler may run inside a print, where a second print would fail.
            line = b"\nstopping after this step, with everything saved (Ctrl-C again: at once)\n"
            with suppress(OSError):  # the reader may have gone
                os.write(2, line)

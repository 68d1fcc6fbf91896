"""Faults of the machine, such as a full disk: what is wrong, and how to mend it."""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl

from ppo_nlu.errors import first_line, one_line

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


def machine_fault(error: BaseException) -> str | None:
    """What is wrong with the machine and how to mend it; None for an error of another kind."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    ):
        return f"out of memory ({short_reason(error)}); {LESS_MEMORY}"
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or short_reason(error)
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


def short_reason(error: BaseException) -> str:
    """The first line of an error's message, shortened; its type where it has none."""
    return one_line(first_line(error, 10**6), 160) or type(error).__name__

"""For tests of files and programs: a call of the system that goes wrong, a program that ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ppo_nlu.runtime import cli


def on_call(
    patch: pytest.MonkeyPatch, number: int, act: Callable[[], None], names: Sequence[str]
) -> None:
    """Do `act` before the `number`-th (from 0) of the named calls of os, and each later one."""
    seen = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > number:
                act()
            return real(*args, **kwargs)

        return call

    for name in names:
        patch.setattr(os, name, wrapped(getattr(os, name)))


def ends(act: Callable[[], int | None]) -> int:
    """The exit code of a program that does this."""
    return cli.run(lambda argv: act(), [])


def raiser(error: BaseException) -> Callable[[], int]:
    """A program that ends with this error."""

    def act() -> int:
        raise error

    return act


def in_a_child(work: Callable[[], None]) -> int:
    """The wait status of a child process that does `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]

"""For tests of files and programs: a call of the system that goes wrong, a program that ends."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ppo_nlu.runtime import cli

Stream = str | int | None  # a file, a file descriptor, or None: closed

# The config of a run of three quick steps.
THREE_STEPS = """\
task: sst2
data: {fallback: bundled}
rollout: {batch_size: 4, max_new_tokens: 4}
ppo: {epochs: 1}
train: {steps: 3, checkpoint_every: 1}
eval: {before: false, limit: 4, batch_size: 4, bootstrap: 0}
log: {plot: false}
"""

_FORK = multiprocessing.get_context("fork")
open_here: list[int] = []  # ends of pipes that the child of `forked` must not hold


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


def program(module: str, *words: object) -> list[str]:
    """The command that starts a program of the package."""
    return [sys.executable, "-m", f"ppo_nlu.{module}", *map(str, words)]


def forked(
    main: Any, arguments: list[object], out: Stream, err: Stream, printed: bool = False
) -> int | None:
    """The exit code of the program in a process with these standard streams."""
    process = _FORK.Process(target=_child, args=(main, arguments, out, err, printed))
    process.start()
    process.join(120)
    return process.exitcode


def _child(main: Any, arguments: list[object], out: Stream, err: Stream, printed: bool) -> None:
    import torch

    sys.stdin = None
    for number in open_here:
        os.close(number)
    for number, name, given in ((1, "stdout", out), (2, "stderr", err)):
        os.close(number)
        setattr(sys, name, None)
        if given is not None:
            found = os.open(given, os.O_WRONLY) if isinstance(given, str) else given
            os.dup2(found, number)
            setattr(sys, name, open(number, "w", closefd=False, encoding="utf-8"))  # noqa: SIM115
    torch.set_num_threads(1)
    code = cli.run(main, [str(argument) for argument in arguments], printed)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)

"""Kill runs with SIGKILL, resume them, and compare with runs that were never killed, bit for bit.

    python -m tests.campaigns.kill --kills 100 [--seed N]

Half of the kills come at a random moment from outside. The others come from inside, at a random one
of the calls by which files are made, before it, behind it, or with half of a file's bytes written.
Every run is killed one to four times. The last line has the counts; the exit code is 1 where a
resumed run failed or ended otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import runs

CALLS = ("open", "replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "ftruncate")
WAYS = ("before", "behind", "torn")


# --- inside the process ------------------------------------------------------------------------


def count_calls(target: str, total: str) -> None:
    """Write the number of calls that concern the folder to the file `total` at each one."""
    seen = 0

    def counted(act: Callable[[], Any], name: str, arguments: Sequence[Any]) -> Any:
        nonlocal seen
        seen += 1
        handle = real_open(total, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, str(seen).encode())
        os.close(handle)
        return act()

    real_open = os.open
    _wrap(target, counted)


def die_at(target: str, number: int, way: str) -> None:
    """Kill this process at the `number`-th call that concerns the folder."""
    seen = 0

    def deadly(act: Callable[[], Any], name: str, arguments: Sequence[Any]) -> Any:
        nonlocal seen
        seen += 1
        if seen < number:
            return act()
        if way == "behind":
            act()
        if way == "torn" and name == "fsync" and "/.tmp-" in _path(arguments[0]):
            size = os.fstat(arguments[0]).st_size
            real_truncate(_path(arguments[0]), size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    real_truncate = os.truncate
    _wrap(target, deadly)


def _wrap(target: str, around: Callable[..., Any]) -> None:
    """Let each file call on something in the folder go through `around`."""

    def wrapped(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not _path(arguments[0], options.get("dir_fd")).startswith(target):
                return real(*arguments, **options)
            return around(lambda: real(*arguments, **options), name, arguments)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name), name))


def _path(argument: Any, dir_fd: int | None = None) -> str:
    """What a call is about: a path, an open file, or a name in an open folder."""
    if isinstance(argument, int):
        try:
            return os.readlink(f"/proc/self/fd/{argument}")
        except OSError:
            return ""
    text = os.fsdecode(argument)
    return f"{_path(dir_fd)}/{text}" if dir_fd is not None else text


# --- outside -----------------------------------------------------------------------------------


class Campaign:
    """Kills until there are enough, and what came of them."""

    def __init__(self, place: runs.Place, seed: int, kinds: Sequence[str] = tuple(runs.KINDS)):
        self.place, self.draw, self.kinds = place, random.Random(seed), list(kinds)
        self.kills: Counter[str] = Counter()
        self.runs = 0
        self.failures: list[str] = []
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def go(self, kills: int) -> None:
        """One run after another, the kinds by turns."""
        while sum(self.kills.values()) < kills and len(self.failures) < 10:
            kind = self.kinds[self.runs % len(self.kinds)]
            self._measure(kind)
            self.one(kind, min(self.draw.randint(1, 4), kills - sum(self.kills.values())))
            self.runs += 1

    def _measure(self, kind: str) -> None:
        """How many calls and seconds a whole run of the kind takes."""
        if kind in self.calls:
            return
        wanted = runs.result(self.place.reference(kind))
        folder, total = self.place.new(kind), self.place.root / "total"
        began = time.monotonic()
        arguments = self.place.go_on(kind, folder)
        code, said = self.place.run("train", arguments, count_calls, str(folder), str(total))
        self.seconds[kind] = time.monotonic() - began
        if code or (said := runs.difference(wanted, runs.result(folder))):
            self.failures.append(f"{kind}: a second whole run is another: {said}")
        self.calls[kind] = int(total.read_text())
        shutil.rmtree(folder)

    def one(self, kind: str, kills: int) -> None:
        """A run that is killed so many times, or ends before, against the whole one."""
        folder, story, left = self.place.new(kind), "", kills
        while left:
            how, code, said = self._killed(kind, folder)
            story += f" {how};"
            if code not in (0, -signal.SIGKILL):
                self.failures.append(f"{kind}:{story} exit code {code}: {said[-1500:]}")
                return
            self.kills[kind] += code != 0
            left -= 1
            if code == 0:
                break
        code, said = self.place.run("train", self.place.go_on(kind, folder))
        if code or "Traceback" in said:
            self.failures.append(f"{kind}:{story} resumed: exit code {code}: {said[-1500:]}")
            return
        wanted = runs.result(self.place.reference(kind))
        other = runs.difference(wanted, runs.result(folder)) or " ".join(runs.leftovers(folder))
        if other:
            self.failures.append(f"{kind}:{story} another result: {other}")
        else:
            shutil.rmtree(folder)

    def _killed(self, kind: str, folder: Path) -> tuple[str, int | None, str]:
        """One kill: what was done, the exit code and what the program had said."""
        arguments = self.place.go_on(kind, folder)
        if self.draw.random() < 0.5:
            seconds = self.draw.random() * self.seconds[kind]
            process, log = self.place.start("train", arguments, None)
            process.join(seconds)
            process.kill()
            process.join()
            return f"after {seconds:.2f} s", process.exitcode, log.read_text()
        number, way = self.draw.randint(1, self.calls[kind]), self.draw.choice(WAYS)
        code, said = self.place.run("train", arguments, die_at, str(folder), number, way)
        return f"{way} call {number}", code, said


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser("python -m tests.campaigns.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the process that counts what killed ones leave
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(runs.Place(Path(root)), args.seed)
        campaign.go(args.kills)
    for failure in campaign.failures:
        print(f"FAILED {failure}")
    by_kind = ", ".join(f"{kind} {count}" for kind, count in campaign.kills.items())
    print(
        f"{sum(campaign.kills.values())} kills of {campaign.runs} runs ({by_kind}): "
        f"{len(campaign.failures)} failures"
    )
    return int(bool(campaign.failures))


if __name__ == "__main__":
    sys.exit(main())

"""Mutation tests: does a test notice when the engine is wrong?

    python -m tests.mutations [NAME ...] [--list] [--jobs N]

Each mutant of `tests.mutants` is one small change that makes the engine compute something else. It
is put into a copy of the tree, and the tests that must notice it run there. A mutant that survives
them is a missing test: the exit code is 1. Where no test can tell the difference, the mutant says
why, and must survive.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("ppo_nlu", "kernels", "tests", "configs", "pyproject.toml", "setup.py", "README.md")
LIMIT = 300  # seconds: a mutant that loops for ever is noticed too
# What all tests import is imported once, before the processes of the tests are forked.
HEAVY = ("pytest", "numpy", "torch", "transformers", "safetensors.torch", "tokenizers", "yaml")
MODELS = ("AutoModelForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel", "MptForCausalLM")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a mutant survives, or is noticed that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these mutants (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    asked = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in MUTANTS}
    assert len(known) == len(MUTANTS), "two mutants have one name"
    if unknown := [name for name in asked.names if name not in known]:
        parser.error(f"no such mutant: {', '.join(unknown)}")
    chosen = [known[name] for name in asked.names] or MUTANTS
    if asked.list:
        for mutant in chosen:
            print(f"{mutant.name}  {mutant.file}: {mutant.why}")
        return 0
    if wrong := [line for mutant in chosen if (line := misplaced(mutant))]:
        print("\n".join(wrong))
        return 1
    return run_all(chosen, max(asked.jobs, 1))


def misplaced(mutant: Mutant) -> str | None:
    """What is wrong with a mutant's place; None where its snippet is there just once."""
    count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    if count == 1 and mutant.old != mutant.new:
        return None
    return f"error: {mutant.name}: its snippet is {count} times in {mutant.file}, not once"


def run_all(mutants: Sequence[Mutant], jobs: int) -> int:
    """All of them, `jobs` at a time, each job in a copy of its own."""
    import_heavy()
    start = time.monotonic()
    counts = dict.fromkeys(("killed", "equivalent", "survived", "noticed"), 0)
    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        free = [copy_tree(Path(place) / str(job)) for job in range(jobs)]
        whole = Run(free[0], sorted({test for mutant in mutants for test in mutant.tests}), 3600)
        while whole.code is None:
            time.sleep(0.02)
        if whole.code:
            print(f"error: the tests fail without any change: {first_failure(whole.said)}")
            return 1
        print(f"without a change the tests pass ({time.monotonic() - start:.0f} s)", flush=True)
        waiting, running = list(reversed(mutants)), list[tuple[Mutant, Run]]()
        while waiting or running:
            while waiting and free:
                mutant = waiting.pop()
                running.append((mutant, started(mutant, free.pop())))
            for mutant, run in running:
                if run.code is not None:
                    found, line = judged(mutant, run)
                    counts[found] += 1
                    print(f"{mutant.name}: {line}", flush=True)
                    free.append(run.copy)
            running = [(mutant, run) for mutant, run in running if run.copy not in free]
            time.sleep(0.02)
    print(
        f"{len(mutants)} mutants: {counts['killed']} killed, {counts['equivalent']} equivalent, "
        f"{counts['survived']} survived, {counts['noticed']} noticed though listed as equivalent "
        f"({time.monotonic() - start:.0f} s)"
    )
    return int(counts["survived"] + counts["noticed"] > 0)


def started(mutant: Mutant, copy: Path) -> Run:
    """The tests of a mutant at work in a copy."""
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    (copy / "original").write_text(text, encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return Run(copy, mutant.tests)


def judged(mutant: Mutant, run: Run) -> tuple[str, str]:
    """Whether the tests have noticed a mutant, as a word and as a line; its copy is whole again."""
    shutil.copy(run.copy / "original", run.copy / mutant.file)
    if run.code and mutant.equivalent:
        return "noticed", f"NOTICED by {first_failure(run.said)}, though listed as equivalent"
    if run.code:
        return "killed", f"killed by {first_failure(run.said)}"
    if mutant.equivalent:
        return "equivalent", f"equivalent: {mutant.equivalent}"
    return "survived", f"SURVIVED {' '.join(mutant.tests)}: {mutant.why}"


def first_failure(said: str) -> str:
    """The first failing test that pytest names."""
    match = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, flags=re.MULTILINE)
    return match[1] if match else (said.strip().splitlines() or ["no output"])[-1]


# ---- a copy, and pytest in it ----------------------------------------------------------------


def copy_tree(place: Path) -> Path:
    """A copy of what the tests need."""
    place.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, place / name)
    return place


def import_heavy() -> None:
    """Import the libraries, and nothing of the package: that comes from a copy."""
    for name in HEAVY:
        importlib.import_module(name)
    for name in MODELS:
        getattr(sys.modules["transformers"], name)


class Run:
    """`python -m pytest -x -q` of files or nodes in a copy, in a forked process."""

    def __init__(self, copy: Path, tests: Sequence[str], limit: float = LIMIT):
        self.copy, self.log = copy, copy / "pytest.log"
        self.log.write_text("")
        self.end = time.monotonic() + limit
        self.ended: int | None = None
        sys.stdout.flush()
        self.child = os.fork()
        if self.child == 0:
            os._exit(_pytest(copy, tests, self.log))

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        if self.ended is None:
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                self.ended = abs(os.waitstatus_to_exitcode(status))
            elif time.monotonic() > self.end:
                os.killpg(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
                self.log.write_text("the limit of time\n")
                self.ended = 1
        return self.ended

    @property
    def said(self) -> str:
        """The output of pytest."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _pytest(copy: Path, tests: Sequence[str], log: Path) -> int:
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a cache goes by seconds: it would be taken
    sys.dont_write_bytecode = True
    kept = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, copy)]
    sys.path[:] = [str(copy), *kept]
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    import pytest

    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())

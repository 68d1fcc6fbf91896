"""Damage files of runs, go on with them, and require a line or the same result.

    python -m tests.campaigns.damage --cases 200 [--seed N]

Each case copies a run that was stopped before its end, or a finished one, spoils one of its files
at random and resumes it, or predicts with it. Right is: exit code 2, one line on stderr and nothing
changed; or exit code 0 and the result of the whole run, with a warning where the newest or the best
checkpoint was spoilt. Wrong is a traceback, another exit code, or another result. The last line has
the counts; the exit code is 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import runs

SHAPES = (
    "null", "[]", "{}", "3", '"text"', "1e999", '{"format": 2}', '{"sha256": "0"}',
    '{"program": "ppo_nlu"}', '{"format": 2, "step": "x", "files": [], "state": []}',
    '{"format": 1, "step": 1, "files": ["adapter"], "state": {}}', "[" * 50_000,
    '{"r": 1e999, "lora_alpha": NaN, "peft_type": "LORA"}', "{" * 1000,
)  # fmt: skip


def stop_in_step_4(folder: str) -> None:
    """End this process by SIGKILL in the last step of its run."""
    from ppo_nlu import train

    real = train._told

    def told(run: Any, *rest: Any) -> Any:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run, *rest)

    train._told = told


# --- what is done to a file ----------------------------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def other_shape(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(SHAPES))


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(1, 3000)))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dead_link(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["nowhere", path.name]))


def fifo(path: Path, draw: random.Random) -> None:
    """A pipe that nobody writes to: who opens it as a file waits for ever."""
    path.unlink()
    os.mkfifo(path)


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (
    flip, flip, flip, cut, other_shape, garbage, delete, folder_instead, dead_link, fifo,
)  # fmt: skip


# --- the cases -----------------------------------------------------------------------------------


class Campaign:
    """Cases until there are enough, and what came of them."""

    def __init__(self, place: runs.Place, seed: int, kinds: Sequence[str] = tuple(runs.KINDS)):
        self.place, self.draw, self.kinds = place, random.Random(seed), list(kinds)
        self.stopped: dict[str, Path] = {}
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def go(self, cases: int) -> None:
        """One case after another, the kinds by turns; every third is a finished run."""
        for number in range(cases):
            kind = self.kinds[number % len(self.kinds)]
            finished = self.draw.random() < 1 / 3
            source = self.place.reference(kind) if finished else self._stopped(kind)
            self.one(kind, source, finished)
            if len(self.failures) >= 10:
                return

    def _stopped(self, kind: str) -> Path:
        """A run with the checkpoints of steps 2 and 3, and a best one."""
        if kind not in self.stopped:
            folder = self.place.new(kind)
            arguments = [self.place.config(kind), "--output", folder]
            code, said = self.place.run("train", arguments, stop_in_step_4, str(folder))
            assert code == -signal.SIGKILL, said
            self.stopped[kind] = folder
        return self.stopped[kind]

    def one(self, kind: str, source: Path, finished: bool) -> None:
        """A copy of the run with one spoilt file."""
        folder = self.place.new(kind)
        shutil.copytree(source, folder, symlinks=True)
        spoilt = self._pick(folder, finished)
        way = self.draw.choice(WAYS)
        before = spoilt.read_bytes()
        way(spoilt, self.draw)
        same = spoilt.is_file() and spoilt.read_bytes() == before
        case = f"{kind}, {way.__name__} {spoilt.relative_to(folder)}"
        left = _snapshot(folder)
        check = self._predicts if finished else self._resumes
        wrong = check(kind, folder, spoilt, same, left)
        if wrong:
            self.failures.append(f"{case}: {wrong}")
        else:
            shutil.rmtree(folder)

    def _pick(self, folder: Path, finished: bool) -> Path:
        """A file that decides the result."""
        if finished:
            places = [*folder.glob("adapter/*"), *folder.glob("encoder/*"), folder / "run.json"]
        else:
            places = [p for p in folder.glob("checkpoints/*/*") if p.is_file()]
            places += [folder / "run.json", folder / "metrics.jsonl", folder / "config.yaml"]
        return self.draw.choice(sorted(places))

    def _resumes(self, kind: str, folder: Path, spoilt: Path, same: bool, left: Any) -> str:
        arguments = [folder / "config.yaml", "--resume", folder]
        code, said = self.place.run("train", arguments)
        if wrong := self._line_or_end(code, said, folder, left):
            return wrong
        if code == 2:
            return ""
        read = spoilt.parent.name in ("step_000003", "best")  # an older one is of no use
        if read and not same and str(spoilt) not in said:
            return f"was not told: {said[-800:]}"
        metrics, best = spoilt.name != "metrics.jsonl", spoilt.parent.name != "best"
        wanted, found = (
            {k: v for k, v in runs.result(each, metrics).items() if best or "best" not in k}
            for each in (self.place.reference(kind), folder)
        )
        return runs.difference(wanted, found)

    def _predicts(self, kind: str, folder: Path, spoilt: Path, same: bool, left: Any) -> str:
        text = self.place.root / "new.txt"
        text.write_text("a good film\na bad one\n")
        answers = []
        for run in (self.place.reference(kind), folder):
            output = self.place.root / "answers.jsonl"
            task = ["--task", "sst2"] if kind == "two tasks" else []
            arguments = [run, "--input", text, "--output", output, *task]
            code, said = self.place.run("predict", arguments)
            answers.append(output.read_bytes() if output.exists() else b"")
            output.unlink(missing_ok=True)
        if wrong := self._line_or_end(code, said, folder, left):
            return wrong
        return "" if code == 2 or answers[0] == answers[1] else f"other answers: {answers[1]!r}"

    def _line_or_end(self, code: int | None, said: str, folder: Path, left: Any) -> str:
        """What is wrong with how the program ended; counts what is right."""
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if "Traceback" in said or code not in (0, 2) or len(errors) != (code == 2):
            return f"exit code {code}: {said[-1500:]}"
        if code == 2 and _snapshot(folder) != left:
            return "refused, and yet the folder was changed"
        self.outcomes["refused" if code == 2 else "warned" if "warning" in said else "same"] += 1
        return ""


def _snapshot(folder: Path) -> dict[str, Any]:
    """All files with their content, a link with where it leads; but for a killed run's lock."""
    found: dict[str, Any] = {}
    for path in sorted(set(folder.rglob("*")) - {folder / ".lock"}):
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = os.readlink(path) if path.is_symlink() else content
    return found


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser("python -m tests.campaigns.damage", description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ["PYTHONWARNINGS"] = "ignore"  # of the process that counts what killed ones leave
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(runs.Place(Path(root)), args.seed)
        campaign.go(args.cases)
    for failure in campaign.failures:
        print(f"FAILED {failure}")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(campaign.outcomes.items()))
    print(f"{args.cases} damaged runs ({counts}): {len(campaign.failures)} failures")
    return int(bool(campaign.failures))


if __name__ == "__main__":
    sys.exit(main())

"""The zip that the GLUE or the SuperGLUE server takes, from finished runs.

    python -m ppo_nlu.submit RUN_DIR ... --benchmark glue --output glue.zip

Each run answers the test rows of its own tasks; a run of MNLI also those of MNLI-mm and AX, one of
SuperGLUE's RTE also those of AX-b and AX-g. Answers are kept in the run folder, so a second call
is quick. A test file needs an answer in every row: where the model gave none, the most frequent
training label stands in (`--fallback majority`), or a random one (`--fallback random`). Label
scoring always gives one (`--decode score`); ReCoRD is always scored, since its entity is chosen by
P(Yes) - P(No). A set that is not whole is refused. The same answers give the same zip to the byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ppo_nlu.answering.kept import answered
from ppo_nlu.answering.leaderboard import BENCHMARKS, Entry, FinishedRun, collect
from ppo_nlu.answering.leaderboard_files import Fallback, packed, write
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.storage.files import atomic_open


def main(argv: list[str] | None = None) -> int:
    """The program."""
    args = _arguments(argv)
    output = _new_file(args.output)
    overrides = [text for text in args.targets if _is_override(text)]
    runs = [FinishedRun.read(text, overrides) for text in args.targets if not _is_override(text)]
    if not runs:
        raise UserError("RUN_DIR: name at least one finished run")
    entries, missing = collect(args.benchmark, runs)
    if missing and not (args.allow_partial and entries):
        raise UserError(
            f"{args.benchmark}: the submission is not whole: {'; '.join(missing)}; give the runs "
            "and test files that are missing, or --allow-partial"
        )
    fallback = Fallback(args.fallback, args.seed)
    contents = {}
    for entry, given in answered(entries, args.decode):
        content, filled = write(entry, given, fallback)
        contents[entry.name] = content
        print(_line(entry, filled, args.fallback), flush=True)
    for line in missing:
        print(f"not whole: {line}")
    with atomic_open(output, binary=True, new=True) as file:
        file.write(packed(contents))
    print(f"written: {output}")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(
        "python -m ppo_nlu.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "targets", nargs="+", metavar="RUN_DIR|section.key=value", help="finished runs"
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="ZIP")
    parser.add_argument(
        "--decode",
        choices=("greedy", "score", "sample"),
        default="greedy",
        help="how answers are read off the model (default: greedy)",
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="write the files and rows that there are"
    )
    parser.add_argument(
        "--fallback",
        choices=("majority", "random"),
        default="majority",
        help="what stands in for an answer that could not be read (default: majority)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --fallback random")
    return parser.parse_intermixed_args(argv)


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _new_file(output: Path) -> Path:
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a new file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    return arguments.require_place("--output", output)


def _line(entry: Entry, filled: int, kind: str) -> str:
    line = f"{entry.name}: {entry.rows:,} rows"
    what = "unanswered queries" if entry.by_query else "unparsed answers"
    return f"{line}, {filled:,} {what} filled ({kind})" if filled else line


if __name__ == "__main__":
    sys.exit(cli.run(main))

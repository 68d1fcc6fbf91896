"""The programs of the package, the configs that come with it, and the keys of a config.

python -m ppo_nlu                                      what programs there are
python -m ppo_nlu configs [NAME [--output FILE]]       the configs; print or copy one
python -m ppo_nlu keys [SECTION]                       every key: meaning, default, allowed
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from ppo_nlu.config import key_table, shipped
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.files import write_new

PROGRAMS = {
    "train": "trains a model on the labels of a task",
    "evaluate": "measures a run, or the base of a config, on a split",
    "predict": "classifies new texts",
    "export": "writes a run's adapter for PEFT, or one merged model",
    "submit": "writes the files of a leaderboard",
    "report": "draws the curves of runs, and compares them",
    "data": "says what data is there, and downloads it",
    "teach_form": "teaches a raw base the form of answers, without labels",
    "reproduce": "runs the paper's tables, as one report",
    "pretrain": "trains the small model that comes with the package",
}


def main(argv: list[str] | None = None) -> int:
    """The program."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PROGRAMS:
        raise UserError(f"{argv[0]}: is a program of its own; type python -m ppo_nlu.{argv[0]}")
    args = _arguments(argv)
    if args.command == "configs":
        configs(args.name, args.output)
    else:
        lines = keys(args.section) if args.command == "keys" else programs()
        print("\n".join(lines))
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = arguments.Parser("python -m ppo_nlu", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="configs|keys")
    listed = commands.add_parser("configs", help="list the configs, or print or copy one")
    listed.add_argument("name", nargs="?", metavar="NAME", help="such as sst2")
    listed.add_argument("--output", type=Path, metavar="FILE", help="copy it to a new file")
    told = commands.add_parser("keys", help="every key with meaning, default and allowed values")
    told.add_argument("section", nargs="?", help="a section, such as optim, or one key")
    return parser.parse_args(argv)


def programs() -> Iterator[str]:
    """A line for each program."""
    for name, what in PROGRAMS.items():
        yield f"python -m ppo_nlu.{name:<11} {what}"
    yield f"python -m ppo_nlu {'configs':<11} lists the configs that come with the package"
    yield f"python -m ppo_nlu {'keys':<11} says what every key of a config means"
    yield "Each of them says more with --help."


def configs(name: str | None, output: Path | None) -> None:
    """List the configs; print the one that is named, or copy it to a new file."""
    if name is None:
        if output is not None:
            raise UserError("--output: name the config to copy, as in: configs sst2 --output FILE")
        for each in shipped.names():
            print(f"{each}\n    {shipped.purpose(each)}")
        return
    found = shipped.find(name) or shipped.find(f"{name}.yaml")
    if found is None:
        raise UserError(f"{name}: no such config; there are {', '.join(shipped.names())}")
    if output is None:
        print(found.read_text(encoding="utf-8"), end="")
        return
    if output.exists():
        raise UserError(f"--output {output}: exists already; name a new file")
    with write_errors(output):
        write_new(arguments.require_place("--output", output), found.read_bytes())
    print(f"written: {output}")


def keys(section: str | None) -> Iterator[str]:
    """The keys of a section, one key, or all of them."""
    table = key_table.sections()
    known = [*filter(None, table), *(key.name for _, own in table.values() for key in own)]
    if section is not None and section not in known:
        near = get_close_matches(section, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"sections: {', '.join(filter(None, table))}"
        raise UserError(f"{section}: no such section or key; {hint}")
    for name, (purpose, own) in table.items():
        wanted = [key for key in own if section in (None, name, key.name)]
        if wanted and purpose:
            yield f"{name}: {purpose}\n"
        for key in wanted:
            yield from _told(key)


def _told(key: key_table.Key) -> Iterator[str]:
    others = "".join(f"; {value} with method={method}" for method, value in key.by_method.items())
    yield f"{key.name}={key.default}{others}"
    for text in (key.meaning, f"({key.allowed.replace('`', '')})"):
        yield textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")
    yield ""


if __name__ == "__main__":
    sys.exit(cli.run(main, printed=True))

"""Prediction: `python -m ppo_nlu.predict RUN_DIR [--input FILE] [--output FILE]`.

Classifies new text with a trained adapter: .txt (one sentence a line), .csv, .tsv or .jsonl with
the task's fields, or sentences on stdin. Each row of the output holds the label word, and the
probability of every label by scoring the whole word behind the prompt.
"""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ppo_nlu import data
from ppo_nlu.config import Config
from ppo_nlu.data.readers import unreadable
from ppo_nlu.errors import UserError
from ppo_nlu.evaluate import Answer, answer_all, load_trained, require_fit, run_config, shown
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import cli
from ppo_nlu.storage.files import Output, atomic_open, to_json
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.custom import specs_of

FORMATS = (".jsonl", ".csv", ".tsv")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = cli.Parser("python -m ppo_nlu.predict", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a finished run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--task", help="which task, where the run was trained on several")
    parser.add_argument(
        "--input", type=Path, help=".txt, .csv, .tsv, .jsonl or .parquet (default: stdin)"
    )
    parser.add_argument("--output", type=Path, help=".jsonl, .csv or .tsv (default: stdout, jsonl)")
    args = parser.parse_intermixed_args(argv)
    cfg = run_config(args.run_dir, args.overrides)
    specs = specs_of(cfg)
    name = args.task or next(iter(specs))
    if name not in specs or (len(specs) > 1 and not args.task):
        raise UserError(f"--task {args.task or '(missing)'}: the run knows {', '.join(specs)}")
    spec = specs[name]
    _check_paths(args.input, args.output)
    rows = _started(data.read_inputs(args.input, spec)) if args.input else _stdin(spec)
    policy = load_trained(cfg, args.run_dir)
    require_fit(policy, spec, cfg)
    with _writer(args.output, spec) as write:
        visible = cfg.log.progress and args.output is not None
        # Rows of a file are sorted by length, many at a time; a line on stdin is answered at once.
        size = 16 * cfg.eval.batch_size if args.input else 1
        for answer in shown(predict(policy, spec, cfg, rows, size), "predict", None, visible):
            write(answer)
    if args.output:
        print(f"written: {args.output}", file=sys.stderr)
    return 0


def _started(rows: Iterator[Example]) -> Iterator[Example]:
    """The same rows, the first read now: a wrong file is told before the model is loaded."""
    return chain([next(rows)], rows)


def predict(
    policy: Policy | Encoder, spec: TaskSpec, cfg: Config, rows: Iterable[Example], size: int
) -> Iterator[Answer]:
    """Label-scored answers in the order of the rows, which are read `size` at a time; free text
    is decoded greedily."""
    rows = iter(rows)
    while window := list(islice(rows, size)):
        yield from answer_all(policy, spec, cfg, window, "score" if spec.words else "greedy")


def _check_paths(source: Path | None, target: Path | None) -> None:
    if source is not None and (reason := unreadable(source)):
        raise UserError(f"--input {source}: {reason}; name a file, or give sentences on stdin")
    if target is None:
        return
    if target.suffix not in FORMATS:
        raise UserError(f"--output {target}: unknown format; use {', '.join(FORMATS)}")
    if os.path.lexists(target):
        raise UserError(f"--output {target}: exists already; name a new file")
    if not os.path.isdir(target.parent):
        raise UserError(f"--output {target}: there is no folder {target.parent}; make it first")
    cli.require_place("--output", target)


def _stdin(spec: TaskSpec) -> Iterator[Example]:
    """One sentence a line, for a task with one text field."""
    if len(spec.fields) > 1:
        fields = ", ".join(spec.fields)
        raise UserError(f"--input: {spec.name} needs {fields}; give a .csv, .tsv or .jsonl file")
    if sys.stdin is None:
        raise UserError("--input: stdin is closed; give one sentence a line there, or --input FILE")
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the terminal's letters are
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    number = 0
    try:
        for line in sys.stdin:
            if line.strip():
                yield Example(f"stdin-{number}", {spec.fields[0]: line.strip()}, None)
                number += 1
    except UnicodeDecodeError as error:
        raise UserError("--input: what comes on stdin is not UTF-8; convert it") from error
    except OSError as error:
        raise UserError(f"--input: stdin cannot be read ({error.strerror})") from error
    if not number:
        raise UserError("--input: no sentence came on stdin; give one a line, or --input FILE")


def _record(answer: Answer) -> dict[str, Any]:
    example = answer.example
    row: dict[str, Any] = {"id": example.id, **example.fields, "prediction": answer.prediction}
    if example.label is not None:
        row["label"] = example.label
    return row


@contextmanager
def _writer(target: Path | None, spec: TaskSpec) -> Iterator[Any]:
    """A function that writes one answer; a file gets its name only when it is whole."""
    if target is None:
        utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
        yield lambda answer: cli.result(_json(answer, ascii_only=not utf8))
        return
    # Half of a character, which a .jsonl file may hold as an escape, stays an escape.
    with atomic_open(target, newline="", new=True, errors="backslashreplace") as file:
        yield _file_writer(file, target.suffix, spec)


def _json(answer: Answer, ascii_only: bool = False) -> str:
    row = _record(answer) | {"probabilities": answer.probabilities}
    return to_json(row, ascii_only=ascii_only)


def _file_writer(file: Output, suffix: str, spec: TaskSpec) -> Any:
    if suffix == ".jsonl":
        return lambda answer: file.write(_json(answer) + "\n")
    listed = spec.words if spec.kind == "choice" else ()
    columns = ["id", *spec.fields, "prediction", "label", *(f"p_{w}" for w in listed)]

    def cells(answer: Answer) -> list[str]:
        probabilities = {f"p_{w}": p for w, p in (answer.probabilities or {}).items()}
        row = _record(answer) | probabilities
        return [str(row.get(column, "")) for column in columns]

    if suffix == ".csv":
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)

        def write(answer: Answer) -> None:
            own_id, *rest = cells(answer)
            table.writerow([own_id, *map(_no_formula, rest)])

        return write
    # Without quoting, as the official .tsv files are; so a tab or line break becomes a space.
    file.write("\t".join(columns) + "\n")
    return lambda answer: file.write("\t".join(map(_flat, cells(answer))) + "\n")


def _no_formula(cell: str) -> str:
    """The cell, with `'` before a text that a spreadsheet would run as a formula.

    As OWASP advises for CSV; numbers such as -1.5 stay as they are. Ids are written as they came,
    so that answers find their rows again; .tsv and .jsonl files keep every text as it is.
    """
    return f"'{cell}" if cell.startswith(FORMULA) and not NUMBER.fullmatch(cell) else cell


def _flat(cell: str) -> str:
    return cell.replace("\t", " ").replace("\n", " ").replace("\r", " ")


if __name__ == "__main__":
    sys.exit(cli.run(main))

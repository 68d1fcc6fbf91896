"""Prediction: `python -m ppo_nlu.predict RUN_DIR [--input FILE] [--output FILE]`.

Classifies new text with a trained adapter: .txt (one sentence a line), .csv, .tsv or .jsonl with
the task's fields, or sentences on stdin. Each row of the output is the row of the input with all of
its columns, and behind them the label word and the probability of every label, by scoring the whole
word behind the prompt.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from ppo_nlu import data
from ppo_nlu.answering.answer import Answer, Answerer, shown
from ppo_nlu.answering.load_run import CHECKPOINT_HELP, load_trained, run_config
from ppo_nlu.answering.new_rows import FORMATS, writer
from ppo_nlu.data.lines import unreadable
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import arguments, cli, streams
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.custom import specs_of


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.Parser("python -m ppo_nlu.predict", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a finished run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--task", help="which task, where the run was trained on several")
    parser.add_argument(
        "--input", type=Path, help=".txt, .csv, .tsv, .jsonl or .parquet (default: stdin)"
    )
    parser.add_argument("--output", type=Path, help=".jsonl, .csv or .tsv (default: stdout, jsonl)")
    parser.add_argument("--checkpoint", metavar="best|last|step_N", help=CHECKPOINT_HELP)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The program."""
    args = _arguments(argv)
    cfg = run_config(args.run_dir, args.overrides, args.checkpoint)
    spec = _asked(specs_of(cfg), args.task)
    _check_paths(args.input, args.output)
    columns = data.input_columns(args.input, spec) if args.input else spec.fields
    rows = _started(data.read_inputs(args.input, spec)) if args.input else _stdin(spec)
    answerer = load_trained(cfg, args.run_dir, args.checkpoint)
    answerer.require_fit(spec)
    count = cut = 0
    with writer(args.output, spec, columns) as write:
        visible = cfg.log.progress and args.output is not None
        # Rows of a file are sorted by length, many at a time; a line on stdin is answered at once.
        size = 16 * cfg.eval.batch_size if args.input else 1
        for answer in shown(predict(answerer, spec, rows, size), "predict", None, visible):
            write(answer)
            count, cut = count + 1, cut + answer.cut
    if cut:
        streams.tell(f"{cut:,} of {count:,} texts were cut, since the model reads no longer ones")
    if args.output:
        print(f"written: {args.output}", file=sys.stderr)
    return 0


def _asked(specs: Mapping[str, TaskSpec], name: str | None) -> TaskSpec:
    """The task that is meant; a UserError where it must be named."""
    if name in specs or (len(specs) == 1 and name is None):
        return specs[name or next(iter(specs))]
    raise UserError(f"--task {name or '(missing)'}: the run knows {', '.join(specs)}")


def _started(rows: Iterator[Example]) -> Iterator[Example]:
    """The same rows, the first read now: a wrong file is found before the model is loaded."""
    return chain([next(rows)], rows)


def predict(
    answerer: Answerer, spec: TaskSpec, rows: Iterable[Example], size: int
) -> Iterator[Answer]:
    """Label-scored answers in the order of the rows, which are read `size` at a time; free text
    is decoded greedily."""
    rows = iter(rows)
    while window := list(islice(rows, size)):
        yield from answerer.answer(spec, window, "score" if spec.words else "greedy")


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
    arguments.require_place("--output", target)


def _stdin(spec: TaskSpec) -> Iterator[Example]:
    """One sentence a line, for a task with one text field."""
    if len(spec.fields) > 1:
        fields = ", ".join(spec.fields)
        raise UserError(f"--input: {spec.name} needs {fields}; give a .csv, .tsv or .jsonl file")
    if sys.stdin is None:
        raise UserError("--input: stdin is closed; give one sentence a line there, or --input FILE")
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the terminal's encoding is
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


if __name__ == "__main__":
    sys.exit(cli.run(main))

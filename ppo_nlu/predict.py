"""Prediction: `python -m ppo_nlu.predict RUN_DIR [--input FILE] [--output FILE]`.

Classifies new text with a trained adapter: .txt (one sentence a line), .csv, .tsv or .jsonl with
the task's fields, or sentences on stdin. Each row of the output holds the label word, and the
probability of every label by scoring the whole word behind the prompt.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ppo_nlu import cli, data
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.evaluate import Answer, answer_all, load_run
from ppo_nlu.model import Policy, check_words
from ppo_nlu.tasks import Example, TaskSpec, get_task

FORMATS = (".jsonl", ".csv", ".tsv")


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser("python -m ppo_nlu.predict", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a finished run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--input", type=Path, help=".txt, .csv, .tsv or .jsonl (default: stdin)")
    parser.add_argument("--output", type=Path, help=".jsonl, .csv or .tsv (default: stdout, jsonl)")
    args = parser.parse_intermixed_args(argv)
    _check_paths(args.input, args.output)
    cfg, policy = load_run(args.run_dir, args.overrides)
    spec = get_task(cfg.task)
    check_words(policy, spec)
    rows = data.read_inputs(args.input, spec) if args.input else _stdin(spec)
    with _writer(args.output, spec) as write:
        shown = cfg.log.progress and args.output is not None
        for answer in tqdm(predict(policy, spec, cfg, rows), "predict", disable=not shown):
            write(answer)
    if args.output:
        print(f"written: {args.output}", file=sys.stderr)
    return 0


def predict(
    policy: Policy, spec: TaskSpec, cfg: Config, rows: Iterable[Example]
) -> Iterator[Answer]:
    """Label-scored answers in the order of the rows, which are read a window at a time."""
    rows = iter(rows)
    while window := list(islice(rows, 16 * cfg.eval.batch_size)):
        yield from answer_all(policy, spec, cfg, window, "score")


def _check_paths(source: Path | None, target: Path | None) -> None:
    if source is not None and not source.is_file():
        raise UserError(f"--input {source}: no such file")
    if target is None:
        return
    if target.suffix not in FORMATS:
        raise UserError(f"--output {target}: unknown format; use {', '.join(FORMATS)}")
    if target.exists():
        raise UserError(f"--output {target}: exists already; name a new file")
    if not target.parent.is_dir():
        raise UserError(f"--output {target}: there is no folder {target.parent}; make it first")


def _stdin(spec: TaskSpec) -> Iterator[Example]:
    """One sentence a line, for a task with one text field."""
    if len(spec.fields) > 1:
        fields = ", ".join(spec.fields)
        raise UserError(f"--input: {spec.name} needs {fields}; give a .csv, .tsv or .jsonl file")
    lines = (line.strip() for line in sys.stdin)
    for number, line in enumerate(line for line in lines if line):
        yield Example(f"stdin-{number}", {spec.fields[0]: line}, None)


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
        yield lambda answer: print(_json(answer), flush=True)
        return
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield _file_writer(file, target.suffix, spec)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _json(answer: Answer) -> str:
    row = _record(answer) | {"probabilities": answer.probabilities}
    return json.dumps(row, ensure_ascii=False)


def _file_writer(file: TextIO, suffix: str, spec: TaskSpec) -> Any:
    if suffix == ".jsonl":
        return lambda answer: file.write(_json(answer) + "\n")
    columns = ["id", *spec.fields, "prediction", "label", *(f"p_{w}" for w in spec.words)]
    table = csv.DictWriter(file, columns, delimiter="," if suffix == ".csv" else "\t")
    table.writeheader()

    def write(answer: Answer) -> None:
        probabilities = {f"p_{w}": p for w, p in (answer.probabilities or {}).items()}
        table.writerow(_record(answer) | probabilities)

    return write


if __name__ == "__main__":
    sys.exit(cli.run(main))

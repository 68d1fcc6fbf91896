"""Evaluation: `python -m ppo_nlu.evaluate RUN_DIR|CONFIG [--decode DECODE] [--split dev|test]`.

Three ways to read an answer off a model, reported side by side because they differ: one sample at
T=1, greedy decoding, and scoring each label word whole behind the prompt (never unparsed). Results
are never overwritten: a run's go to RUN_DIR/eval-TASK-SPLIT-METHOD-SHOTS, a base's to
./eval-TASK-SPLIT-base-SHOTS, and where these exist, to the same name with -2, -3, ...
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from ppo_nlu import data
from ppo_nlu.answering.aggregate import Measured, summarise
from ppo_nlu.answering.answer import (
    DECODES,
    Answer,
    Answerer,
    decodes_of,
    held_out,
    joined,
    shown,
)
from ppo_nlu.answering.load_run import CHECKPOINT_HELP, load_base, load_trained, run_config
from ppo_nlu.answering.predictions import recorded, write_predictions
from ppo_nlu.answering.stored_config import read_config
from ppo_nlu.config import Config
from ppo_nlu.config.idle_keys import reads
from ppo_nlu.errors import UserError
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.runtime.summary import peak_memory_mb
from ppo_nlu.storage.files import TEMP, atomic_write_json, make_folder
from ppo_nlu.storage.locks import LOCK, FolderLock
from ppo_nlu.tasks import TASKS, Example, TaskSpec
from ppo_nlu.tasks.custom import specs_of


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.Parser("python -m ppo_nlu.evaluate", description=__doc__)
    parser.add_argument(
        "target",
        type=arguments.config_file,
        metavar="RUN_DIR|CONFIG",
        help="a run, or a config: its base",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--decode", choices=DECODES, help="one way of decoding (default: all three)"
    )
    parser.add_argument("--checkpoint", metavar="best|last|step_N", help=CHECKPOINT_HELP)
    parser.add_argument("--split", help="train, dev or test (default: eval.split)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for predictions, report.json and summary.json; refused where it holds results",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The program."""
    started = time.perf_counter()
    args = _arguments(argv)
    target = Path(args.target)
    is_run = target.is_dir()
    if args.checkpoint and not is_run:
        raise UserError(f"--checkpoint: {target} is no run folder; name the run that kept it")
    if is_run:
        cfg = run_config(target, args.overrides, args.checkpoint)
    else:
        cfg = read_config(target, args.overrides)
    cfg = replace(cfg, eval=replace(cfg.eval, split=args.split or cfg.eval.split))
    specs, split = specs_of(cfg), cfg.eval.split
    name = folder_name(cfg, is_run, args.checkpoint)
    default = unused(target / name if is_run else Path(name))
    output = require_unused(arguments.require_place("--output", args.output or default), specs)
    held = {name: held_out(spec, cfg) for name, spec in specs.items()}
    for found in held.values():
        print(f"data: {found.note}; {split}: {len(found.examples):,} rows", flush=True)
    answerer = load_trained(cfg, target, args.checkpoint) if is_run else load_base(cfg)
    for spec in specs.values():
        answerer.require_fit(spec)
    with FolderLock(make_folder(output)):
        require_unused(output, specs)  # again, now that nobody else writes there
        measured = list(_measured(answerer, specs, cfg, held, decode=args.decode, output=output))
    if all(row.label is not None for found in held.values() for row in found.examples):
        method = "few-shot" if cfg.prompt.shots else "zero-shot"
        summary = summarise(cfg, measured) | {
            "method": cfg.method if is_run else method,
            "wall_s": time.perf_counter() - started,
            "peak_memory_mb": peak_memory_mb(answerer.device),
        }
        atomic_write_json(output / "summary.json", summary)
    rows = [row for one in measured for row in next(iter(one.after.values()))]
    if cut := sum(row.cut for row in rows):
        print(f"{cut:,} prompts were cut to fit the model's context")
    if lost := sum(row.dropped for row in rows):
        print(f"{lost:,} shots were left out, whole, where a prompt did not fit")
    print(f"written: {output}")
    return 0


def _measured(
    answerer: Answerer,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    held: Mapping[str, data.Dataset],
    decode: str | None,
    output: Path,
) -> Iterator[Measured]:
    """Answer each task, write the answers to files and print its report."""
    for name, spec in specs.items():
        folder = make_folder(output / name.replace("/", "-") if len(specs) > 1 else output)
        decodes = (decode,) if decode else decodes_of(spec)
        bars = cfg.log.progress
        found = _answered(answerer, spec, held[name].examples, decodes, folder, progress=bars)
        one = Measured(spec, held[name], found, resamples=cfg.eval.bootstrap, seed=cfg.seed)
        _tell(one, cfg, folder)
        yield one


def _answered(
    answerer: Answerer,
    spec: TaskSpec,
    examples: Sequence[Example],
    decodes: Sequence[str],
    folder: Path,
    progress: bool,
) -> dict[str, list[Answer]]:
    """The answers of one task, written to files as they come."""
    found = {}
    for decode in decodes:
        answers = answerer.answer(spec, examples, decode)
        written = recorded(folder / f"predictions-{decode}.jsonl", answers)
        title = f"{spec.title}: {decode}"
        found[decode] = list(shown(written, title, len(examples), progress))
    write_predictions(folder / "predictions.jsonl", joined(found))
    return found


def _tell(one: Measured, cfg: Config, folder: Path) -> None:
    """Print the reports of one task and write them to report.json; without labels, say so."""
    if any(row.label is None for row in one.rows.examples):
        print(f"{one.spec.title}: no scores, since {cfg.eval.split} has rows without a label")
        return
    place = {"data": one.rows.source, "split": cfg.eval.split}
    atomic_write_json(folder / "report.json", place | one.reports)
    for decode, row in one.reports.items():
        print_report(f"{one.spec.title}, {decode}", row)


def folder_name(cfg: Config, is_run: bool, kept: str | None = None) -> str:
    """The name of the default folder: task, split, method, shots and kept checkpoint; an encoder
    has no shots."""
    tasks = "+".join(name.replace("/", "-") for name in cfg.names)
    how = cfg.method if is_run else "base"
    shots = [f"{cfg.prompt.shots}shot"] if reads(cfg, "prompt") else []
    return "-".join(["eval", tasks, cfg.eval.split, how, *shots, *([kept] if kept else [])])


def unused(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that is not there yet."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not os.path.lexists(path))


def require_unused(output: Path, tasks: Iterable[str] = ()) -> Path:
    """The folder for the results: new, or with nothing in it but what a killed evaluation left."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    found = [name for name in names if not name.startswith((TEMP, LOCK))]
    results = ("predictions", "report.json", "summary.json")
    plain = {name.replace("/", "-") for name in (*TASKS, *tasks)}
    if any(not name.startswith(results) and name not in plain for name in found):
        raise UserError(f"--output {output}: holds files of other kinds; name a new folder")
    if found:
        raise UserError(f"--output {output}: holds results already; name a new folder")
    return output


def print_report(title: str, row: dict[str, Any]) -> None:
    """A report as a few lines of text."""
    interval = row["interval"]
    spread = f" (95 % {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    values = row["metrics"]
    figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())
    mean = f"; mean {100 * row['score']:.1f} %" if len(values) > 1 else ""
    classes = row.get("per_class", {})
    if classes and "macro_f1" not in values:
        spread += f", macro-F1 {100 * row['macro_f1']:.1f} %"
    print(f"\n{title}: {figures}{mean}{spread}, unparsed {100 * row['unparsed']:.1f} %")
    width = max((14, *map(len, classes)))
    for word, per_class in classes.items():
        shown = "  ".join(
            f"{title} {100 * per_class[key]:5.1f}"
            for title, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
        )
        print(f"  {word:<{width}} {shown}  of {per_class['support']}")
    if row["predicted"]:
        counts = ", ".join(f"{word} {count}" for word, count in row["predicted"].items())
        print(f"  predicted: {counts}")
    if classes:
        largest = max(classes, key=lambda word: classes[word]["support"])
        share = classes[largest]["support"] / row["count"]
        print(f"  largest class: {largest}, {100 * share:.1f} % of the rows")


if __name__ == "__main__":
    sys.exit(cli.run(main))

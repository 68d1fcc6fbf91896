"""The official file formats: from a file of a task to its examples.

A table's reader is named by `TaskSpec.reader`. The official files have their quirks, and each is
met here, in the reader of its task. Rows that are left out or mended are counted, and the counts
come back with the rows: nothing here prints.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ppo_nlu.data.readers import json_lines, tables
from ppo_nlu.data.readers.split import Split
from ppo_nlu.data.userfiles import custom_examples
from ppo_nlu.tasks import TaskSpec

READERS: dict[str, Callable[[TaskSpec, str, Path], Split]] = {
    "tsv": tables.tsv,
    "csv": tables.csv,
    "jsonl": json_lines.jsonl,
    "multirc": json_lines.multirc,
    "record": json_lines.record,
    "wsc": json_lines.wsc,
    "ax": tables.ax,
    "axg": json_lines.axg,
    "custom": lambda spec, split, path: Split(*custom_examples(spec, split, path)),
}


def read_split(spec: TaskSpec, split: str, path: Path) -> Split:
    """All rows of a file of the task; UserError (file:line: what) where it cannot be read."""
    with _uncollected():
        found = READERS[spec.reader](spec, split, path)
    named = [e if e.task == spec.name else replace(e, task=spec.name) for e in found.examples]
    return replace(found, examples=named)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch the garbage collector off; rows have no cycles. It would scan all of them again and
    again, which takes a quarter of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()

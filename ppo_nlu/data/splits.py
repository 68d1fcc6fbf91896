"""The rows of a task's splits, with notes for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_nlu.data import bundled
from ppo_nlu.data.dev_share import divide, one_sided
from ppo_nlu.data.lines import unreadable
from ppo_nlu.data.readers import read_split
from ppo_nlu.data.readers.split import MALFORMED
from ppo_nlu.data.sources import Source, expand, locate, split_file
from ppo_nlu.data.texts import join, left_out
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.custom import CustomSpec

if TYPE_CHECKING:
    from ppo_nlu.config import DataConfig

WHOLE = ("AX.tsv", "msr_paraphrase_test.txt")  # other names of whole official files


@dataclass(frozen=True)
class Dataset:
    """The rows of one split, their source ("bundled" or a folder), and a note for the user.

    `partial` is True where they are only a part of the official split. `file` is the name of the
    file, and `malformed` counts its rows that could not be read, or that lack a label or a text.
    `odd` are the parts of the note that `data check` tells too.
    """

    examples: list[Example]
    source: str
    note: str
    partial: bool = False
    file: str = ""
    malformed: int = 0
    odd: tuple[str, ...] = ()


def load_split(spec: TaskSpec, split: str, data_cfg: DataConfig) -> Dataset:
    """The rows of a split ("train", "dev", "test", or what else the task has) from the place that
    `locate` finds. UserError where it has no such split, or where the file is not there."""
    if isinstance(spec, CustomSpec):
        return _load_custom(spec, split)
    if split not in spec.files:
        if split == "train" and spec.trained_with:
            raise UserError(
                f"task: {spec.title} has no training rows; train on {spec.trained_with} instead"
            )
        raise UserError(f"eval.split: {spec.title} has no split {split!r}; {', '.join(spec.files)}")
    source = locate(spec, data_cfg)
    if source.folder is None:
        return Dataset(_bundled_examples(spec, split), "bundled", source.note)
    divided = split != "test" and _is_divided(spec, source.folder)
    found = "dev" if divided else split
    path = split_file(spec, found, source.folder)
    if path is None:
        raise UserError(f"{source.folder}: no {split} split; {spec.files[split][0]} is not there")
    rows = read_split(spec, found, path)
    examples = _quarter(rows.examples, split) if divided else rows.examples
    named = path.name.removesuffix(".gz")
    partial = divided or (named != spec.files[split][0] and named not in WHOLE)
    told = f"{split} is only a part of the official set: {path.name}, {len(examples):,} rows"
    if divided:
        told = (
            f"{spec.files['train'][0]} is not there, so {split} is a part of {path.name}: "
            f"{len(examples):,} of its {len(rows.examples):,} rows (every fourth is dev)"
        )
    note = join(
        source.note,
        told if partial else "",
        *(left_out(count, why) for why, count in rows.left_out.items()),
        rows.mended,
    )
    malformed = rows.left_out.get(MALFORMED, 0)
    return Dataset(examples, str(source.folder), note, partial, path.name, malformed)


def _is_divided(spec: TaskSpec, folder: Path) -> bool:
    """Whether the dev file must serve as train too, because there is no train file."""
    return spec.divide_dev and not split_file(spec, "train", folder)


def has_split(spec: TaskSpec, split: str, source: Source) -> bool:
    """Whether the place has the split's rows, so that `load_split` will read them."""
    if isinstance(spec, CustomSpec):
        return split in spec.files or (split == "dev" and "train" in spec.files)
    if source.folder is None:
        return split in spec.files
    divided = split != "test" and _is_divided(spec, source.folder)
    return split_file(spec, "dev" if divided else split, source.folder) is not None


def _quarter(rows: Sequence[Example], split: str) -> list[Example]:
    """Every fourth row of the dev file as dev, the others as train; the file's row numbers stay."""
    return [
        replace(row, id=f"{split}-{place}")
        for place, row in enumerate(rows)
        if (place % 4 == 0) == (split == "dev")
    ]


def _bundled_examples(spec: TaskSpec, split: str) -> list[Example]:
    rows = bundled.splits()[split]
    examples = []
    for number, (sentence, value) in enumerate(rows):
        id_ = str(number) if split == "test" else f"{split}-{number}"
        extra = {"idx": number} if split == "test" else {}
        label = None if value is None else spec.word_of(value)
        examples.append(Example(id_, {spec.fields[0]: sentence}, label, spec.name, extra=extra))
    return examples


def _load_custom(spec: CustomSpec, split: str) -> Dataset:
    """A split of the user's own files; without a dev file, a share of train is dev."""
    shared = "dev" not in spec.files and "train" in spec.files and split in ("train", "dev")
    name = "train" if shared else split
    if name not in spec.files:
        key = split if split in ("train", "dev", "test") else "test"
        raise UserError(f"custom.{key}: {spec.name} has no {split} split; give a file")
    path = expand(spec.files[name][0])
    if reason := unreadable(path):
        raise UserError(f"custom.{name}: {path}: {reason}; give the path of a file")
    found = read_split(spec, name, path)
    rows, share = found.examples, ""
    odd = [left_out(count, why) for why, count in found.left_out.items()]
    if shared:
        sides = divide(spec, rows, path)
        rows, odd = sides[split], [*odd, *one_sided(spec, sides)]
        share = f"{split} is {len(rows):,} rows of it (custom.dev_share)"
    note = join(f"{spec.title} from {path}", *odd, share)
    own = name == split  # of a share of train all is told there
    dropped = sum(found.left_out.values()) if own else 0
    return Dataset(rows, str(path), note, False, path.name, dropped, tuple(odd) if own else ())

"""Where a task's rows come from, which of them are used, and in which order training sees them.

Strings and numbers only, no tensors. Nothing here prints: the place that was taken and what was
left out are in the notes that come back, and the programs print those. How files are read is in
`readers`, how archives are fetched in `download`.

Look at the data, or fetch it:  python -m ppo_nlu.data check|get [TASK...]
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_nlu.data import bundled, download
from ppo_nlu.data.download import DownloadError
from ppo_nlu.data.readers import MALFORMED, gold, input_rows, numbered_lines, read_split, unreadable
from ppo_nlu.errors import UserError, printable, quoted
from ppo_nlu.tasks import TASKS, Example, TaskSpec
from ppo_nlu.tasks.custom import CustomSpec
from ppo_nlu.tasks.words import is_empty

if TYPE_CHECKING:
    from ppo_nlu.config import DataConfig

SEEN_LABELS = Path(__file__).parents[1] / "assets" / "tiny" / "seen_labels.txt"


@dataclass(frozen=True)
class Source:
    """The place that a task's rows come from: its kind (data.path, $PPO_NLU_DATA, cache, download,
    bundled or custom), its folder (None for bundled), and a sentence on how it was chosen."""

    kind: str
    folder: Path | None
    note: str


@dataclass(frozen=True)
class Dataset:
    """The rows of one split, "bundled" or the folder they came from, and what to say about them.

    `partial` is True where they are only a part of the official split. `file` is the name of the
    file, and `malformed` counts its rows that could not be read.
    """

    examples: list[Example]
    source: str
    note: str
    partial: bool = False
    file: str = ""
    malformed: int = 0


# ---- finding the files


def locate(spec: TaskSpec, data_cfg: DataConfig) -> Source:
    """The first place that holds the task: data.path, $PPO_NLU_DATA, the cache, a download, and
    only with `data.fallback: bundled` the stand-in. A place that was named must hold the task."""
    found = local(spec, data_cfg)
    if found is not None:
        return found
    cache = cache_root(data_cfg)
    try:
        fresh = download.once(spec, data_cfg.url, cache)
        return Source("download", fresh, f"{spec.title} downloaded to {fresh}")
    except DownloadError as error:
        why = f"not in the cache {cache}; download failed: {error}"
    if data_cfg.fallback == "bundled" and spec.name == bundled.TASK:
        note = f"bundled stand-in reviews, not {spec.title} ({why})"
        return Source("bundled", None, note)
    also = " or data.fallback=bundled" if spec.name == bundled.TASK else ""
    raise UserError(
        f"data.path: no {spec.title} data: data.path and $PPO_NLU_DATA are not set; {why}; "
        f"give a folder that holds {spec.benchmark}/{spec.folder}/{also}"
    )


def local(spec: TaskSpec, data_cfg: DataConfig) -> Source | None:
    """The place on this machine that holds the task; None where none is named and the cache does
    not have it."""
    if isinstance(spec, CustomSpec):
        files = ", ".join(names[0] for names in spec.files.values())
        return Source("custom", Path("."), f"{spec.title} from {files or 'no file'} (custom)")
    environment = os.environ.get("PPO_NLU_DATA")
    for kind, named in (("data.path", data_cfg.path), ("$PPO_NLU_DATA", environment)):
        if named:
            folder = _named_folder(spec, kind, named)
            return Source(kind, folder, f"{spec.title} from {folder} ({kind})")
    kept = task_folder(spec, cache_root(data_cfg))
    return Source("cache", kept, f"{spec.title} from {kept} (cache)") if kept else None


def _named_folder(spec: TaskSpec, kind: str, named: str) -> Path:
    root = expand(named)
    if folder := task_folder(spec, root):
        return folder
    state = "does not hold" if root.is_dir() else "is no folder with"
    names = ", ".join(names[0] for names in spec.files.values())
    raise UserError(
        f"{kind}: {root} {state} {spec.title}; give the folder of {names}, "
        f"or one that holds {spec.folder}/ or {spec.benchmark}/{spec.folder}/"
    )


def task_folder(spec: TaskSpec, root: Path) -> Path | None:
    """The task's own folder in a root: its glue/SST-2/, its SST-2/, or the root itself."""
    inner = (root / spec.benchmark / spec.folder, root / spec.folder)
    for folder in inner if _is_of_another(spec, root) else (*inner, root):
        if any(_split_file(spec, split, folder) for split in spec.files):
            return folder
    return None


def _is_of_another(spec: TaskSpec, root: Path) -> bool:
    """Whether the root is another task's folder in a benchmark, such as glue/RTE/ for SST-2: its
    files may have the same names."""
    folder = Path(os.path.abspath(root))
    place = (folder.parent.name, folder.name)
    known = {(other.benchmark, other.folder) for other in TASKS.values()}
    return place in known and place != (spec.benchmark, spec.folder)


def _split_file(spec: TaskSpec, split: str, folder: Path) -> Path | None:
    for name in spec.files[split]:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def expand(text: str) -> Path:
    """The path, with `~` as the user's home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~someone" that the system does not know
        return Path(text)


def cache_root(data_cfg: DataConfig) -> Path:
    """Where downloads are kept."""
    if data_cfg.cache:
        return expand(data_cfg.cache)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rules: a path that is not absolute counts as unset.
    return (base if base.is_absolute() else expand("~/.cache")) / "ppo_nlu"


# ---- reading splits


WHOLE = ("AX.tsv", "msr_paraphrase_test.txt")  # other names of whole official files


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
    path = _split_file(spec, found, source.folder)
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
    note = _join(
        source.note,
        told if partial else "",
        *(_left_out(count, why) for why, count in rows.left_out.items()),
        rows.mended,
    )
    malformed = rows.left_out.get(MALFORMED, 0)
    return Dataset(examples, str(source.folder), note, partial, path.name, malformed)


def _is_divided(spec: TaskSpec, folder: Path) -> bool:
    """Whether the dev file must serve as train too, because there is no train file."""
    return spec.divide_dev and not _split_file(spec, "train", folder)


def has_split(spec: TaskSpec, split: str, source: Source) -> bool:
    """Whether the place has the split's rows, so that `load_split` will read them."""
    if isinstance(spec, CustomSpec):
        return split in spec.files or (split == "dev" and "train" in spec.files)
    if source.folder is None:
        return split in spec.files
    divided = split != "test" and _is_divided(spec, source.folder)
    return _split_file(spec, "dev" if divided else split, source.folder) is not None


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
    rows = read_split(spec, name, path).examples
    note = _join(f"{spec.title} from {path}")
    if shared:
        rows = _side(spec, rows, split, path)
        note = _join(note, f"{split} is {len(rows):,} rows of it (custom.dev_share)")
    return Dataset(rows, str(path), note, file=path.name)


def _side(spec: CustomSpec, rows: Sequence[Example], split: str, path: Path) -> list[Example]:
    """The rows on the split's side of `dev_share`, by a hash of their text: a row falls on the
    same side in every run, and so do all rows of the same text."""
    places = [_place(joined(spec, row)) for row in rows]
    lowest, highest = min(places), max(places)
    if lowest == highest:
        raise UserError(
            f"{path}: all rows have the same text, so none can be kept apart for dev; "
            "give custom.dev"
        )
    edge = min(max(spec.dev_share, lowest), max(p for p in places if p < highest))
    kept = [row for row, p in zip(rows, places, strict=True) if (p <= edge) == (split == "dev")]
    return [replace(row, id=f"{split}-{row.id.partition('-')[2]}") for row in kept]


def _place(text: str) -> float:
    """A number in [0, 1) that is as good as drawn, and always the same for the text."""
    digest = hashlib.sha256(f"ppo_nlu dev\n{normalise(text)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


# ---- the training rows


def normalise(text: str) -> str:
    """The form in which two sentences count as the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def joined(spec: TaskSpec, example: Example) -> str:
    """All texts of a row as one."""
    return " ".join(example.fields[name] for name in spec.fields)


def saw_labels(model: str) -> bool:
    """Whether a model is the bundled one, or was made from it and says so by the list beside it."""
    return model == "bundled" or (expand(model) / SEEN_LABELS.name).is_file()


def exclusions() -> set[str]:
    """The sentences, normalised, whose labels the bundled model saw before any run of ours."""
    if not SEEN_LABELS.is_file():
        raise UserError(
            f"data.exclude_pretraining_labels: {SEEN_LABELS} is missing, so what the bundled model "
            "has seen cannot be left out; install the package again"
        )
    return {normalise(line) for _, line in numbered_lines(SEEN_LABELS)} - {""}


def train_examples(spec: TaskSpec, data_cfg: DataConfig, bundled_model: bool) -> Dataset:
    """The training rows: without what the bundled model has seen with its label (if it is the one
    that trains), without short ones (data.min_words), of ReCoRD as many wrong names as right ones,
    and of these the first data.limit in the order of the file, so that a limit means the same rows
    for every seed."""
    whole = load_split(spec, "train", data_cfg)
    seen = exclusions() if bundled_model and data_cfg.exclude_pretraining_labels else set()
    rows = whole.examples
    fresh = [row for row in rows if normalise(joined(spec, row)) not in seen] if seen else rows
    least = data_cfg.min_words
    kept = [row for row in fresh if len(joined(spec, row).split()) >= least] if least else fresh
    if not kept:
        raise UserError(
            f"data.min_words: no training row is left of {len(rows)} ({len(fresh)} after "
            f"the exclusion of pretraining labels); lower data.min_words ({least}) "
            "or set data.exclude_pretraining_labels=false"
        )
    note = _join(
        whole.note,
        _left_out(len(rows) - len(fresh), "seen with their labels in pretraining"),
        _left_out(len(fresh) - len(kept), f"under {least} words"),
    )
    if spec.reader == "record":
        even = _balanced(spec, kept)
        note = _join(note, _left_out(len(kept) - len(even), "as many No as Yes for each query"))
        kept = even
    if data_cfg.limit:
        kept = kept[: data_cfg.limit]
        note = _join(note, f"the first {len(kept):,} rows")
    return replace(whole, examples=kept, note=_join(note, *oddities(kept), one_label(kept)))


def oddities(rows: Sequence[Example]) -> list[str]:
    """What is allowed in rows and still looks like a mistake: texts in which nothing is seen."""
    empty = sum(any(map(is_empty, row.fields.values())) for row in rows)
    return [f"{empty:,} rows have an empty text"] if empty else []


def one_label(rows: Sequence[Example]) -> str:
    """A word on rows that cannot teach which answer is right, because it is always the same."""
    labels = {row.label for row in rows}
    if len(rows) < 2 or len(labels) > 1:
        return ""
    return f"every row has the label {quoted(rows[0].label)}, so there is nothing to tell apart"


def _balanced(spec: TaskSpec, rows: Sequence[Example]) -> list[Example]:
    """For each group all rows that are right and as many that are wrong, drawn by the group's name,
    in the order of the file. A group without a right row leaves none."""
    yes, kept = spec.words[0], []
    for group, members in groupby(rows, key=lambda row: row.group):
        found = list(members)
        wrong = [place for place, row in enumerate(found) if row.label != yes]
        uniform = random.Random(f"ppo_nlu balance {group}").random
        drawn = sorted(wrong, key=lambda _: uniform())[: len(found) - len(wrong)]
        chosen = set(drawn) | (set(range(len(found))) - set(wrong))
        kept += [row for place, row in enumerate(found) if place in chosen]
    return kept


def first(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first rows up to a limit (0 = all) that leave no group in two; a single group that is
    longer than the limit is cut."""
    kept = list(examples[:limit] if limit else examples)
    if len(kept) == len(examples):
        return kept
    cut = examples[len(kept)].group
    whole = [row for row in kept if not cut or row.group != cut]
    return whole or kept


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), the same on every machine and Python version.

    Fisher-Yates on `random()` alone, the one method whose sequence Python promises to keep.
    """
    uniform = random.Random(f"ppo_nlu order {seed} {epoch}").random
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(uniform() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


_cached_order = lru_cache(maxsize=64)(epoch_order)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of a step (from 0): a window that slides over epoch after epoch, each in its own
    order. A function of the step alone, so a resumed run needs no state to go on where it was."""
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"batch_indices: n {n}, batch_size {batch_size}, step {step}")
    places = (divmod(place, n) for place in range(step * batch_size, (step + 1) * batch_size))
    return [_cached_order(n, seed, epoch)[offset] for epoch, offset in places]


# ---- rows to predict


def read_inputs(path: str | Path, spec: TaskSpec) -> Iterator[Example]:
    """Stream the rows of a .txt (a sentence a line), .csv, .tsv, .jsonl (or such a .gz) or .parquet
    file; its columns are the task's fields, or the official columns of them.

    The label may be absent or empty, and may be a data value or a label word. The id is the row's
    own (`id`, `index` or `idx`) or its number from 0. Unlike in training files, a row that cannot
    be read is an error: each input must have its prediction.
    """
    path = Path(path)
    return _inputs(path, spec, input_rows(path, spec))


def _inputs(
    path: Path, spec: TaskSpec, rows: Iterator[tuple[int, dict[str, str]]]
) -> Iterator[Example]:
    count = 0
    for count, (number, row) in enumerate(rows, start=1):
        where = f"{path}:{number}"
        own = next((row[name] for name in ("id", "index", "idx") if row.get(name)), None)
        fields = {name: row[name] for name in spec.fields}
        value = row.get(spec.label_column, "")
        label = None if is_empty(value) else gold(spec, value, where, words=True)
        yield Example(own or str(count - 1), fields, label, spec.name)
    if not count:
        raise UserError(f"{path}: there are no rows")


def _left_out(count: int, why: str) -> str:
    return f"{count:,} rows left out: {why}" if count else ""


def _join(*parts: str) -> str:
    return printable("; ".join(part for part in parts if part))

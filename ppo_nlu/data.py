"""Where a task's rows come from, how its files are read, and in which order training sees them.

Strings and numbers only, no tensors. Nothing here prints: the place that was taken and what was
left out are in the notes that come back, and the programs print those.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import http.client
import json
import os
import queue
import random
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ppo_nlu.errors import UserError
from ppo_nlu.tasks import Example, TaskSpec, bundled

if TYPE_CHECKING:
    from ppo_nlu.config import DataConfig

OPEN_SECONDS = 3.0  # for the name look-up, the connection and the first answer together
STALL_SECONDS = 10.0  # for each read after that
MAX_BYTES = 64 * 2**20  # no archive and no unpacked file of ours is near this
SEEN_LABELS = Path(__file__).parent / "assets" / "tiny" / "seen_labels.txt"


@dataclass(frozen=True)
class Archive:
    """An official archive and, for each of its files that we take, the row count and sha256."""

    name: str
    files: dict[str, tuple[int, str]]


ARCHIVES = {
    "sst2": Archive(
        "SST-2.zip",
        {
            "train.tsv": (
                67349,
                "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
            ),
            "dev.tsv": (872, "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0"),
            "test.tsv": (1821, "69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13"),
        },
    )
}


@dataclass(frozen=True)
class Source:
    """The place that a task's rows come from: its kind (data.path, $PPO_NLU_DATA, cache, download
    or bundled), its folder (None for bundled), and a sentence on how it was chosen."""

    kind: str
    folder: Path | None
    note: str


@dataclass(frozen=True)
class Dataset:
    """The rows of one split, "bundled" or the folder they came from, and what to say about them."""

    examples: list[Example]
    source: str
    note: str


class DownloadError(Exception):
    """Why an archive could not be had, in a few words; the search goes on."""


# ---- finding the files


def locate(spec: TaskSpec, data_cfg: DataConfig) -> Source:
    """The first place that holds the task: data.path, $PPO_NLU_DATA, the cache, a download, and
    only with `data.fallback: bundled` the stand-in. A place that was named must hold the task."""
    environment = os.environ.get("PPO_NLU_DATA")
    for kind, named in (("data.path", data_cfg.path), ("$PPO_NLU_DATA", environment)):
        if named:
            folder = _named_folder(spec, kind, named)
            return Source(kind, folder, f"{spec.title} from {folder} ({kind})")
    cache = _cache_root(data_cfg)
    if kept := _task_folder(spec, cache):
        return Source("cache", kept, f"{spec.title} from {kept} (cache)")
    try:
        fresh = _download_once(spec, data_cfg, cache)
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


def _named_folder(spec: TaskSpec, kind: str, named: str) -> Path:
    root = _expand(named)
    if folder := _task_folder(spec, root):
        return folder
    state = "does not hold" if root.is_dir() else "is no folder with"
    names = ", ".join(names[0] for names in spec.files.values())
    raise UserError(
        f"{kind}: {root} {state} {spec.title}; give the folder of {names}, "
        f"or one that holds {spec.folder}/ or {spec.benchmark}/{spec.folder}/"
    )


def _task_folder(spec: TaskSpec, root: Path) -> Path | None:
    """The task's own folder in a root: the root itself, its SST-2/ or its glue/SST-2/."""
    for folder in (root, root / spec.folder, root / spec.benchmark / spec.folder):
        if any(_split_file(spec, split, folder) for split in spec.files):
            return folder
    return None


def _split_file(spec: TaskSpec, split: str, folder: Path) -> Path | None:
    for name in spec.files[split]:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~someone" that the system does not know
        return Path(text)


def _cache_root(data_cfg: DataConfig) -> Path:
    if data_cfg.cache:
        return _expand(data_cfg.cache)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rules: a path that is not absolute counts as unset.
    return (base if base.is_absolute() else _expand("~/.cache")) / "ppo_nlu"


# ---- downloading

_EXPECTED = (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile)
_failures: dict[tuple[str, str, Path], str] = {}


def _download_once(spec: TaskSpec, data_cfg: DataConfig, cache: Path) -> Path:
    """One try per process: a run reads several splits and need not wait for each in turn."""
    key = (spec.name, data_cfg.url, cache)
    if key in _failures:
        raise DownloadError(_failures[key])
    try:
        return download(spec, data_cfg, cache)
    except DownloadError as error:
        _failures[key] = str(error)
        raise


def download(spec: TaskSpec, data_cfg: DataConfig, cache: Path) -> Path:
    """Fetch, check and unpack the task's official archive into the cache; returns its folder.

    The folder appears by one rename, complete and checked, or not at all. DownloadError says why.
    """
    archive = ARCHIVES.get(spec.name)
    if archive is None:
        raise DownloadError(f"no archive of {spec.title} is known")
    url = data_cfg.url
    if not url.endswith(".zip"):
        url = f"{url.rstrip('/')}/{archive.name}"
    target = cache / spec.benchmark / spec.folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            packed, unpacked = Path(scratch) / archive.name, Path(scratch) / spec.folder
            _fetch(url, packed)
            unpacked.mkdir()
            _unpack(packed, unpacked, spec.folder, archive)
            _move(unpacked, target, spec)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: {error}") from error
    except (*_EXPECTED, DownloadError) as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', None) or error}") from error
    return target


def _move(folder: Path, target: Path, spec: TaskSpec) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if not _task_folder(spec, target):  # else another process was first
            raise DownloadError(f"{target} is in the way: {error.strerror}") from error


def _fetch(url: str, path: Path) -> None:
    with _open_url(url) as response, path.open("wb") as file:
        announced = response.headers.get("Content-Length")
        size = _copy(response, file)
    if announced is not None and size != int(announced):
        raise DownloadError(f"cut off after {size} of {announced} bytes")


def _open_url(url: str) -> Any:
    """The response to a GET, given up after OPEN_SECONDS. In a thread of its own, because no
    socket time-out covers the look-up of a name, and one of several addresses may hang each."""
    answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=STALL_SECONDS))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        result = answer.get(timeout=OPEN_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {OPEN_SECONDS:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def _copy(source: Any, sink: IO[bytes]) -> int:
    size = 0
    while block := source.read(1 << 16):
        size += len(block)
        if size > MAX_BYTES:
            raise DownloadError(f"more than {MAX_BYTES >> 20} MiB, which cannot be right")
        sink.write(block)
    return size


def _unpack(packed: Path, folder: Path, prefix: str, archive: Archive) -> None:
    """Take the expected members and no others, each to a path of ours, and check them."""
    with zipfile.ZipFile(packed) as bundle:
        for name, (rows, digest) in archive.files.items():
            member, path = f"{prefix}/{name}", folder / name
            try:
                with bundle.open(member) as source, path.open("wb") as sink:
                    _copy(source, sink)
            except KeyError:
                raise DownloadError(f"it holds no {member}") from None
            except (EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
                raise DownloadError(f"{member}: {error}") from error
            content = path.read_bytes()
            found = content.count(b"\n") - 1
            if found != rows:
                raise DownloadError(f"{member} has {found} rows, not {rows}")
            if hashlib.sha256(content).hexdigest() != digest:
                raise DownloadError(f"{member} is not the official file (sha256)")


# ---- reading splits


@dataclass(frozen=True)
class Table:
    """The rows of a tab-separated file with their line numbers, and how many were malformed."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    malformed: int


def read_tsv(path: Path, wanted: Sequence[str]) -> Table:
    """Read a tab-separated file by its header, without quoting (GLUE's fields hold quote marks).

    Rows whose number of columns is off are left out and counted.
    """
    lines = _lines(path)
    columns = next(lines, (1, ""))[1].rstrip("\r\n").split("\t")
    _check_columns(path, columns, wanted)
    rows, malformed = [], 0
    for number, line in lines:
        cells = _bare(line).split("\t")
        if len(cells) == len(columns):
            rows.append((number, dict(zip(columns, cells, strict=True))))
        else:
            malformed += 1
    if not rows:
        what = f"all {malformed} rows are malformed" if malformed else "there are no rows"
        raise UserError(f"{path}: {what}; every row needs the columns {', '.join(columns)}")
    return Table(columns, rows, malformed)


def load_split(spec: TaskSpec, split: str, data_cfg: DataConfig) -> Dataset:
    """The rows of "train", "dev" or "test" from the place that `locate` finds."""
    if split not in spec.files:
        raise UserError(f"eval.split: {spec.title} has no split {split!r}; {', '.join(spec.files)}")
    source = locate(spec, data_cfg)
    if source.folder is None:
        return Dataset(_bundled_examples(spec, split), "bundled", source.note)
    path = _split_file(spec, split, source.folder)
    if path is None:
        raise UserError(f"{source.folder}: no {split} split; {spec.files[split][0]} is not there")
    labelled = split != "test"
    wanted = (*spec.fields, spec.label_column) if labelled else spec.fields
    table = read_tsv(path, wanted)
    examples = [_split_example(spec, split, path, number, row) for number, row in table.rows]
    return Dataset(
        examples, str(source.folder), _join(source.note, _left_out(table.malformed, "malformed"))
    )


def _split_example(
    spec: TaskSpec, split: str, path: Path, number: int, row: Mapping[str, str]
) -> Example:
    """A row of a split; its id is its place in the file, or in the test split its own index."""
    place = str(number - 2)
    id_ = row.get("index", place) if split == "test" else f"{split}-{place}"
    fields = {name: row[name] for name in spec.fields}
    return Example(id_, fields, _gold(spec, row.get(spec.label_column), f"{path}:{number}"))


def _bundled_examples(spec: TaskSpec, split: str) -> list[Example]:
    rows = bundled.splits()[split]
    examples = []
    for number, (sentence, value) in enumerate(rows):
        id_ = str(number) if split == "test" else f"{split}-{number}"
        label = None if value is None else spec.word_of(value)
        examples.append(Example(id_, {spec.fields[0]: sentence}, label))
    return examples


# ---- the training rows


def normalise(text: str) -> str:
    """The form in which two sentences count as the same: lower case, single spaces."""
    return " ".join(text.lower().split())


def exclusions() -> set[str]:
    """The sentences, normalised, whose labels the bundled model saw before any run of ours."""
    if not SEEN_LABELS.is_file():
        raise UserError(
            f"data.exclude_pretraining_labels: {SEEN_LABELS} is missing, so what the bundled model "
            "has seen cannot be left out; install the package again"
        )
    return {normalise(line) for _, line in _lines(SEEN_LABELS)} - {""}


def train_examples(spec: TaskSpec, data_cfg: DataConfig, bundled_model: bool) -> Dataset:
    """The training rows: without what the bundled model has seen with its label (if it is the one
    that trains), without short ones (data.min_words), and of these the first data.limit in the
    order of the file, so that a limit means the same rows for every seed."""
    whole = load_split(spec, "train", data_cfg)
    seen = exclusions() if bundled_model and data_cfg.exclude_pretraining_labels else set()

    def text(example: Example) -> str:
        return " ".join(example.fields[name] for name in spec.fields)

    fresh = [example for example in whole.examples if normalise(text(example)) not in seen]
    kept = [example for example in fresh if len(text(example).split()) >= data_cfg.min_words]
    if not kept:
        raise UserError(
            f"data.min_words: no training row is left of {len(whole.examples)} ({len(fresh)} after "
            f"the exclusion of pretraining labels); lower data.min_words ({data_cfg.min_words}) "
            "or set data.exclude_pretraining_labels=false"
        )
    note = _join(
        whole.note,
        _left_out(len(whole.examples) - len(fresh), "seen with their labels in pretraining"),
        _left_out(len(fresh) - len(kept), f"under {data_cfg.min_words} words"),
    )
    if data_cfg.limit:
        kept = kept[: data_cfg.limit]
        note = _join(note, f"the first {len(kept):,} rows")
    return Dataset(kept, whole.source, note)


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


_cached_order = lru_cache(maxsize=4)(epoch_order)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of a step (from 0): a window that slides over epoch after epoch, each in its own
    order. A function of the step alone, so a resumed run needs no state to go on where it was."""
    if n < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"batch_indices: n {n}, batch_size {batch_size}, step {step}")
    places = (divmod(place, n) for place in range(step * batch_size, (step + 1) * batch_size))
    return [_cached_order(n, seed, epoch)[offset] for epoch, offset in places]


# ---- rows to predict


def read_inputs(path: str | Path, spec: TaskSpec) -> Iterator[Example]:
    """Stream the rows of a .txt (a sentence a line), .csv, .tsv or .jsonl file, or such a .gz.

    The label may be absent or empty, and may be a data value or a label word. The id is the row's
    own (`id`, `index` or `idx`) or its number from 0. Unlike in training files, a row that cannot
    be read is an error: each input must have its prediction.
    """
    path = Path(path)
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in _READERS:
        raise UserError(f"{path}: unknown kind of file; give one of {', '.join(_READERS)}")
    if kind == ".txt" and len(spec.fields) != 1:
        raise UserError(f"{path}: {spec.title} has the fields {', '.join(spec.fields)}; give .tsv")
    return _inputs(path, spec, _READERS[kind])


def _inputs(path: Path, spec: TaskSpec, reader: _Reader) -> Iterator[Example]:
    count = 0
    for count, (number, row) in enumerate(reader(path, spec), start=1):
        where = f"{path}:{number}"
        own = next((row[name] for name in ("id", "index", "idx") if row.get(name)), None)
        fields = {name: row[name] for name in spec.fields}
        label = row.get(spec.label_column) or None
        yield Example(own or str(count - 1), fields, _gold(spec, label, where, words=True))
    if not count:
        raise UserError(f"{path}: there are no rows")


_Reader = Callable[[Path, TaskSpec], Iterator[tuple[int, dict[str, str]]]]


def _txt_rows(path: Path, spec: TaskSpec) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in _lines(path):
        if not line.strip():
            raise UserError(f"{path}:{number}: an empty line; every line must be a sentence")
        yield number, {spec.fields[0]: _bare(line)}


def _tsv_rows(path: Path, spec: TaskSpec) -> Iterator[tuple[int, dict[str, str]]]:
    rows = ((number, _bare(line).split("\t")) for number, line in _lines(path))
    return _named_rows(path, spec, rows)


def _csv_rows(path: Path, spec: TaskSpec) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader((line for _, line in _lines(path)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error

    return _named_rows(path, spec, rows())


def _named_rows(
    path: Path, spec: TaskSpec, rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    columns = next(rows, (1, [""]))[1]
    _check_columns(path, columns, spec.fields)
    for number, cells in rows:
        if len(cells) != len(columns):
            raise UserError(f"{path}:{number}: {len(cells)} columns; the header has {len(columns)}")
        yield number, dict(zip(columns, cells, strict=True))


def _jsonl_rows(path: Path, spec: TaskSpec) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}; give one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; give one object a line")
        for name in spec.fields:
            if not isinstance(row.get(name), str):
                raise UserError(f"{where}: {name!r} must be there and be a string")
        yield number, {key: _json_text(value, where) for key, value in row.items()}


def _json_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{where}: half of a surrogate pair, which is no character")
    return text


_READERS: dict[str, _Reader] = {
    ".txt": _txt_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".jsonl": _jsonl_rows,
}


# ---- shared by the readers


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, plain or .gz, ends kept. Only \\n ends a line: sentences
    may hold the other separators that Unicode knows."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8; save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if [name for name in wanted if name not in columns]:
        raise UserError(
            f"{path}:1: the header has the columns {', '.join(columns) or '(none)'}; "
            f"wanted are {', '.join(wanted)}"
        )


def _gold(spec: TaskSpec, value: str | None, where: str, words: bool = False) -> str | None:
    """The label word for a cell (None: unlabelled); with `words` the cell may be the word."""
    if value is None:
        return None
    known = {label.value: label.word for label in spec.labels}
    if words:
        known = {word.lower(): word for word in spec.words} | known
    word = known.get(value.strip(), known.get(value.strip().lower()) if words else None)
    if word is None:
        allowed = ", ".join(label.value for label in spec.labels)
        raise UserError(f"{where}: {spec.title} has no label {value!r}; it has {allowed}")
    return word


def _left_out(count: int, why: str) -> str:
    return f"{count:,} rows left out: {why}" if count else ""


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)

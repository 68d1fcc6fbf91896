"""How the official archives are fetched, checked and unpacked.

A folder appears by one rename, complete and checked, or not at all. Where the sha256 of an official
file is known it must agree; elsewhere the number of rows must, and that is noted ("not verified by
checksum"). Nothing here prints.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import queue
import re
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

from ppo_nlu.data.archives import Archive, archive_of
from ppo_nlu.errors import UserError, printable
from ppo_nlu.storage.atomic_folder import staged_folder
from ppo_nlu.tasks import TaskSpec

OPEN_SECONDS = 3.0  # for the name look-up, the connection and the first answer together
STALL_SECONDS = 10.0  # for each read after that
MEBIBYTE = 2**20
UNPACKED = 4  # no file is larger than so many times the bound on its archive


class DownloadError(Exception):
    """Why an archive could not be fetched; the search for the data goes on."""


@dataclass(frozen=True)
class Fetched:
    """The folder that a download made, and those of its files whose rows alone were compared."""

    folder: Path
    unverified: tuple[str, ...] = ()


_EXPECTED = (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile)
# Module state on purpose: all splits of a run must come from one place. A second try that succeeds
# would set rows of the stand-in beside official ones. (An object would pass through every caller.)
_failures: dict[tuple[str, str, Path], str] = {}


def once(spec: TaskSpec, url: str, cache: Path) -> Path:
    """The folder of an automatic download, tried once per process: after a failure
    the next split of the run fails at once."""
    key = (spec.name, url, cache)
    if key in _failures:
        raise DownloadError(_failures[key])
    archive = archive_of(spec)
    try:
        if archive and not archive.automatic:
            raise DownloadError(
                f"{archive.name} is large, so it is only fetched when asked for: "
                f"python -m ppo_nlu.data get {spec.name}"
            )
        return fetch(spec, url, cache).folder
    except DownloadError as error:
        _failures[key] = str(error)
        raise


def address_of(archive: Archive, url: str) -> str:
    """The archive's address: `url` itself if it names a .zip, else the archive's place by it."""
    return url if url.endswith(".zip") else urljoin(f"{url.rstrip('/')}/", archive.name)


def fetch(spec: TaskSpec, url: str, root: Path, check_sums: bool = True) -> Fetched:
    """Fetch, check and unpack the task's official archive into root/glue/SST-2/ or the like.

    The folder appears by one rename, complete and checked, or not at all. DownloadError says why.
    """
    archive = archive_of(spec)
    if archive is None:
        raise DownloadError(f"no archive of {spec.title} is known")
    target = root / spec.benchmark / spec.folder
    _require_web(url)
    address = url
    try:
        address = address_of(archive, url)
        with staged_folder(target, partial(_name, spec=spec)) as folder:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _take(archive, spec.folder, address, Path(scratch), folder)
            unverified = _checked(folder, archive, spec, check_sums)
    except urllib.error.HTTPError as error:
        raise DownloadError(without_password(f"{address}: {error}", url)) from error
    except (*_EXPECTED, DownloadError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(without_password(f"{address}: {reason}", url)) from error
    return Fetched(target, unverified)


def _require_web(url: str) -> None:
    """Only web addresses are fetched: file:// would read whatever lies on this machine."""
    if re.match(r"https?://", url, re.IGNORECASE):
        return
    if ":" in url:
        shown = without_password(url, url)
        raise UserError(f"data.url: {shown} is not a web address; give http:// or https://")
    raise DownloadError(without_password(f"{url}: not a web address", url))


def without_password(message: str, url: str) -> str:
    """The message with `***` for the password of the address, and fit for a terminal."""
    found = re.match(r"[^/]*//([^/?#]*)@", url) or re.match(r"[^/]*//([^/?#]*:(?!\d*/).*)@", url)
    if found:
        user, colon, secret = found[1].partition(":")
        hidden = f"{user}:***@" if colon else "***@"
        message = message.replace(f"{found[1]}@", hidden)
        # The library may quote only a part of it.
        message = message.replace(f"{secret or user}@", "***@")
        if len(secret) > 3:
            message = message.replace(secret, "***")
    return printable(message)


def _take(archive: Archive, folder: str, address: str, scratch: Path, target: Path) -> None:
    packed = scratch / "archive"
    if address.endswith(".zip"):
        _get(address, packed, archive.mebibytes)
        _unpack(packed, target, folder, archive)
    elif folder == "MRPC":
        test, ids = scratch / "test", scratch / "ids"
        _get(address, packed, archive.mebibytes)
        _get(address.replace("_train", "_test"), test, archive.mebibytes)
        known = True
        try:
            _get(urljoin(address, MRPC_DEV_IDS), ids, archive.mebibytes)
        except urllib.error.HTTPError:  # not kept there any more
            known = False
        divide_mrpc(packed, test, ids if known else None, target)
    else:
        _get(address, target / next(iter(archive.files)), archive.mebibytes)


def _name(folder: Path, target: Path, spec: TaskSpec) -> None:
    """Rename the folder, unless another process has put the data there first."""
    try:
        folder.rename(target)
    except OSError as error:
        names = {name for names in spec.files.values() for name in names}
        if not any((target / name).is_file() for name in names):
            raise DownloadError(f"{target} is in the way: {error.strerror}") from error


def _get(url: str, path: Path, mebibytes: float) -> None:
    with _open_url(url) as response, path.open("wb") as file:
        announced = response.headers.get("Content-Length")
        size = _copy(response, file, mebibytes * MEBIBYTE)
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


def _copy(source: Any, sink: IO[bytes], most: float) -> int:
    size = 0
    while block := source.read(1 << 16):
        size += len(block)
        if size > most:
            raise DownloadError(f"more than {most / MEBIBYTE:g} MiB, which cannot be right")
        sink.write(block)
    return size


def _unpack(packed: Path, folder: Path, prefix: str, archive: Archive) -> None:
    """Take the expected members and no others, each to a path of ours."""
    with zipfile.ZipFile(packed) as bundle:
        for name in archive.files:
            member = f"{prefix}/{name}"
            try:
                with bundle.open(member) as source, (folder / name).open("wb") as sink:
                    _copy(source, sink, UNPACKED * archive.mebibytes * MEBIBYTE)
            except KeyError:
                raise DownloadError(f"it holds no {member}") from None
            except (EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
                raise DownloadError(f"{member}: {error}") from error


def _checked(folder: Path, archive: Archive, spec: TaskSpec, sums: bool) -> tuple[str, ...]:
    """The names of the files without a known sum; DownloadError where one is not as it must be."""
    unverified = []
    for name, (rows, digest) in archive.files.items():
        path, member = folder / name, f"{spec.folder}/{name}"
        found = _count(path, spec)
        if rows and found != rows:
            raise DownloadError(f"{member} has {found} rows, not {rows}")
        if not digest or not sums:
            unverified.append(name)
        elif _digest(path) != digest:
            raise DownloadError(f"{member} is not the official file (sha256)")
    return tuple(unverified)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _count(path: Path, spec: TaskSpec) -> int:
    """The rows of a file: tab-separated ones of as many columns as the first line, or objects."""
    with path.open("rb") as file:
        if path.suffix == ".jsonl":
            return sum(_units(line, spec) for line in file if line.strip())
        columns = file.readline().count(b"\t")
        rows = sum(line.count(b"\t") == columns for line in file)
    headless = spec.header and path.name != "test.tsv"
    return rows + 1 if headless else rows


def _units(line: bytes, spec: TaskSpec) -> int:
    """Count queries in ReCoRD, lines elsewhere."""
    return len(json.loads(line)["qas"]) if spec.reader == "record" else 1


# ---- MRPC has no archive of GLUE's own

MRPC_DEV_IDS = "../../glue/data/mrpc_dev_ids.tsv"


def divide_mrpc(train: Path, test: Path, dev_ids: Path | None, folder: Path) -> None:
    """Make GLUE's train.tsv, dev.tsv and test.tsv of the original two files.

    GLUE's dev rows are the pairs of ids in its dev_ids.tsv. Where that file cannot be had every
    tenth row is dev, which is not GLUE's split, and the names of the two files say so.
    """
    lines = train.read_text("utf-8-sig").splitlines()
    rows = [line for line in lines[1:] if line.strip()]
    if dev_ids is None:
        dev = {place for place in range(len(rows)) if place % 10 == 9}
    else:
        pairs = {tuple(line.split("\t")[:2]) for line in dev_ids.read_text("utf-8").splitlines()}
        dev = {place for place, row in enumerate(rows) if tuple(row.split("\t")[1:3]) in pairs}
    ending = "tsv" if dev_ids else "own_split.tsv"
    for name, chosen in (("dev", True), ("train", False)):
        kept = [row for place, row in enumerate(rows) if (place in dev) == chosen]
        (folder / f"{name}.{ending}").write_text("\n".join([lines[0], *kept]) + "\n", "utf-8")
    cells = [line.split("\t")[1:] for line in test.read_text("utf-8-sig").splitlines()]
    numbered = ["\t".join(["index", *cells[0]])]
    numbered += ["\t".join([str(n), *row]) for n, row in enumerate(cells[1:])]
    (folder / "test.tsv").write_text("\n".join(numbered) + "\n", "utf-8")

"""Where a task's files are: data.path, $PPO_NLU_DATA, the cache, a download, or the stand-in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_nlu.data import bundled, download
from ppo_nlu.data.download import DownloadError
from ppo_nlu.errors import UserError
from ppo_nlu.tasks import TASKS, TaskSpec
from ppo_nlu.tasks.custom import CustomSpec

if TYPE_CHECKING:
    from ppo_nlu.config import DataConfig


@dataclass(frozen=True)
class Source:
    """The place that a task's rows come from: its kind (data.path, $PPO_NLU_DATA, cache, download,
    bundled or custom), its folder (None for bundled), and a sentence on how it was chosen."""

    kind: str
    folder: Path | None
    note: str


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
    state = "does not hold" if root.is_dir() else "is not a folder with"
    names = ", ".join(names[0] for names in spec.files.values())
    raise UserError(
        f"{kind}: {root} {state} {spec.title}; give the folder of {names}, "
        f"or one that holds {spec.folder}/ or {spec.benchmark}/{spec.folder}/"
    )


def task_folder(spec: TaskSpec, root: Path) -> Path | None:
    """The task's own folder in a root: its glue/SST-2/, its SST-2/, or the root itself."""
    inner = (root / spec.benchmark / spec.folder, root / spec.folder)
    for folder in inner if _is_of_another(spec, root) else (*inner, root):
        if any(split_file(spec, split, folder) for split in spec.files):
            return folder
    return None


def _is_of_another(spec: TaskSpec, root: Path) -> bool:
    """Whether the root is another task's folder in a benchmark, such as glue/RTE/ for SST-2: its
    files may have the same names."""
    folder = Path(os.path.abspath(root))
    place = (folder.parent.name, folder.name)
    known = {(other.benchmark, other.folder) for other in TASKS.values()}
    return place in known and place != (spec.benchmark, spec.folder)


def split_file(spec: TaskSpec, split: str, folder: Path) -> Path | None:
    """The file of a split in the task's own folder, the preferred name first; None: not there."""
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

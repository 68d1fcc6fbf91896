"""The folder of a run: numbered, marked as a run, and taken by one process."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.files import TEMP, atomic_write_text, make_folder, write_new
from ppo_nlu.storage.locks import LOCK, FolderLock, refuse_in_use
from ppo_nlu.storage.sealed import read_object, to_json

RUN_FORMAT = 1  # of run.json


def new_run_dir(root: str | Path = "runs") -> Path:
    """Make and return the next numbered folder under `root`; two programs never get the same."""
    root = Path(root)
    with write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name) for path in root.iterdir() if path.name.isdecimal()]
        number = max(taken, default=0) + 1
        while True:
            try:
                (root / f"{number:04d}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return root / f"{number:04d}"


def claim(output: str | Path, config: str | None = None) -> FolderLock:
    """Make `output` the folder of a new run, with `config` (YAML text) as its config.yaml.

    A folder that holds anything is refused, be it another's or an earlier run. Of several processes
    that claim a folder at once one succeeds; the folder is its own until it releases the lock that
    this returns.
    """
    output = Path(output)
    require_free(output)
    make_folder(output)
    lock = FolderLock(output)
    try:
        require_free(output, held=True)  # again, now that nobody else can take it
        text = to_json({"program": "ppo_nlu", "format": RUN_FORMAT}, indent=2) + "\n"
        if lock.locked:
            atomic_write_text(output / "run.json", text)
        else:  # only the first can make this file
            with write_errors(output / "run.json"):
                write_new(output / "run.json", text.encode())
        if config is not None:
            atomic_write_text(output / "config.yaml", config)
    except BaseException:  # nobody else has the lock to release it
        lock.release()
        raise
    return lock


def require_free(output: str | Path, held: bool = False) -> None:
    """A `UserError` where `claim` would refuse this folder; nothing is made. `held`: the caller
    holds its lock."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    names: set[str] = set()
    if output.exists():
        with write_errors(output):  # read now, since another process may make it a run
            names = {p.name for p in output.iterdir() if not p.name.startswith(TEMP)} - {LOCK}
    if is_run_dir(output):
        if not held:
            refuse_in_use(output)
        what = "a finished" if (output / "summary.json").exists() else "an unfinished"
        raise UserError(
            f"{output}: holds {what} run; continue it with --resume {shlex.quote(str(output))}, or "
            f"name a new folder with --output"
        )
    if names and not (names == {"run.json"} and _marker(output)):  # a claim that was cut short
        raise UserError(
            f"{output}: is not empty and no run of ppo_nlu; name a new folder with --output"
        )


def is_run_dir(path: str | Path) -> bool:
    """Whether a folder is a run of this package: run.json says so, and config.yaml is there."""
    path = Path(path)
    return (path / "config.yaml").is_file() and _marker(path) is not None


def require_run_dir(path: str | Path) -> Path:
    """The path of a run folder, or a `UserError` that says what it is instead."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; runs are kept under runs/ or --output")
    marker = _marker(path)
    if marker is None or not (path / "config.yaml").is_file():
        raise UserError(
            f"{path}: not a run folder (config.yaml and run.json are missing); "
            f"name the folder that ppo_nlu.train wrote"
        )
    if marker.get("format") != RUN_FORMAT:
        raise UserError(
            f"{path}: run format {marker.get('format')}, this version reads {RUN_FORMAT}; "
            f"use the ppo_nlu that wrote it"
        )
    return path


def _marker(path: Path) -> dict[str, Any] | None:
    try:
        marker = read_object(path / "run.json")
    except (OSError, ValueError):
        return None
    return marker if marker.get("program") == "ppo_nlu" else None

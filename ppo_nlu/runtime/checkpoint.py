"""Checkpoints that survive a kill at any moment.

Nothing here is pickled: tensors are safetensors files, everything else is JSON. A folder under
`checkpoints/` gets its final name only when every byte of it is on disk, so a name is a promise.
Its state.json holds the sha256 of every file, its own included: damage is noticed, not loaded.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import read_bytes, write_errors
from ppo_nlu.storage.atomic_folder import staged_folder
from ppo_nlu.storage.files import TEMP, temporary_name, write_new
from ppo_nlu.storage.sealed import Damaged, parse_object, seal, unseal

FORMAT = 2  # of a checkpoint
Tensors = dict[str, dict[str, Tensor]]
_STEP = re.compile(r"step_(\d{6,18})")
_MOVED = ".old-"  # a complete checkpoint, moved away while its successor takes the name
_ASIDE = "damaged-"  # a checkpoint that a resumed run could not read
_WRITTEN = ("adapter", "encoder", "bad_steps")  # folders of a run that only its training writes
_BEFORE = "--resume takes the one before it"


def save(run_dir: str | Path, step: int, tensors: Tensors, state: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step_000123`: one safetensors file per entry of `tensors`, state.json.

    `state` holds JSON values; floats come back bit for bit, NaN included, tuples come back as
    lists, and keys must be strings. A step that is already there is replaced.
    """
    final = _folder(run_dir) / f"step_{step:06d}"
    _write(final, tensors, {"format": FORMAT, "step": step, "state": dict(state)})
    return final


def save_best(
    run_dir: str | Path, step: int, metric: float, tensors: Tensors, state: Mapping[str, Any]
) -> Path | None:
    """Write `checkpoints/best` if `metric` beats the one stored there; None where it does not.

    `metric` is compared with the one on the disk, so a resumed run that repeats steps ends with the
    same folder. At any moment the old checkpoint or the new one is readable.
    """
    stored = best_metric(run_dir)
    if math.isnan(metric) or (stored is not None and metric <= stored):
        return None
    final = _folder(run_dir) / "best"
    head = {"format": FORMAT, "step": step, "metric": metric, "state": dict(state)}
    _write(final, tensors, head)
    return final


def load(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint; after an interrupted replacement, read the previous one.

    `Damaged` where any byte of it is not what was written.
    """
    path = _readable(Path(path))
    head = _read_head(path)
    tensors = {name: _read_tensors(path, name, sha256) for name, sha256 in head["files"].items()}
    return tensors, head["state"]


def _read_tensors(folder: Path, name: str, sha256: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        data = read_bytes(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Damaged(f"{path}: the checkpoint is damaged (its sha256 is another); {_BEFORE}")
        return parse_tensors(data)
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path}: the checkpoint is damaged ({error}); {_BEFORE}") from error


def latest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    steps = _steps(run_dir)
    return steps[-1] if steps else None


def best(run_dir: str | Path) -> Path | None:
    """The folder of the best checkpoint, or None."""
    path = _readable(_folder(run_dir) / "best")
    return path if path.is_dir() else None


def named(run_dir: str | Path, which: str) -> Path:
    """The folder of the checkpoint `best`, `last` or `step_N`; a UserError where none was kept."""
    if which == "best":
        mend = "train with train.eval_every=N, which keeps the best"
        return _there(best(run_dir), run_dir, which, mend)
    kept = _steps(run_dir)
    names = ", ".join(path.name.removeprefix(_MOVED) for path in kept)
    mend = "train.checkpoint_every and train.keep_checkpoints say which stay"
    mend = f"there are {names} ({mend})" if kept else mend
    if which == "last":
        return _there(kept[-1] if kept else None, run_dir, which, mend)
    step = re.fullmatch(r"step_(\d{1,18})", which)
    if step is None:
        raise UserError(f"--checkpoint {which}: is no checkpoint; give best, last or step_N")
    found = [path for path in kept if int(path.name.rpartition("_")[2]) == int(step[1])]
    return _there(next(iter(found), None), run_dir, which, mend)


def _there(path: Path | None, run_dir: str | Path, which: str, mend: str) -> Path:
    if path is None:
        raise UserError(f"--checkpoint: {run_dir} has no {which} checkpoint; {mend}")
    return path


def best_metric(run_dir: str | Path) -> float | None:
    """The dev metric of the best checkpoint, or None where there is none that can be read."""
    path = best(run_dir)
    if path is None:
        return None
    try:
        return float(_read_head(path)["metric"])
    except (Damaged, KeyError, TypeError, ValueError) as error:
        print(f"warning: {error}: the next evaluation replaces it", file=sys.stderr)
        return None


def candidates(run_dir: str | Path) -> list[Path]:
    """Everything with the name of a step checkpoint, the newest first; also a file or a dead link,
    which `load` calls damaged."""
    named = [path for path in _folder(run_dir).glob("step_*") if _STEP.fullmatch(path.name)]
    found = {*_steps(run_dir), *(_readable(path) for path in named)}
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]), reverse=True)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged checkpoint, so that it is not read or counted again; its new name."""
    path = _readable(path)
    for number in range(1, 100):
        aside = path.with_name(f"{_ASIDE}{path.name.removeprefix(_MOVED)}-{number}")
        if not os.path.lexists(aside):
            with suppress(OSError):
                os.rename(path, aside)
                return aside
    return None


def step_of(path: str | Path) -> int:
    """The step at which a checkpoint was written."""
    return int(_read_head(_readable(Path(path)))["step"])


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the last `keep` step checkpoints; one always stays, and so does the best."""
    for path in _steps(run_dir)[: -max(keep, 1)]:
        with write_errors(path):
            _remove(path)


def require_readable(run_dir: str | Path) -> None:
    """A `UserError` where the folder of the checkpoints exists but cannot be listed: they would
    seem to be lost."""
    folder = _folder(run_dir)
    try:
        if os.path.lexists(folder):
            os.listdir(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the checkpoints cannot be read ({error.strerror}); put the folder back, or "
            "start a new run with --output"
        ) from error


def clean(run_dir: str | Path) -> None:
    """Before a run writes: finish a replacement that was cut short, delete half-written files.

    The caller holds the lock of the run folder, so nobody else is writing there.
    """
    folder, run_dir = _folder(run_dir), Path(run_dir)
    with write_errors(folder):
        for moved in sorted(folder.glob(f"{_MOVED}*")):
            _settle(folder / moved.name.removeprefix(_MOVED))
        places = [run_dir, folder, *(run_dir / name for name in _WRITTEN)]
        for place in places:
            for path in sorted(place.glob(f"{TEMP}*")):
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, a folder, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def _steps(run_dir: str | Path) -> list[Path]:
    """Complete step checkpoints in the order of their steps."""
    found = {}
    for path in _folder(run_dir).glob("*step_*"):
        match = _STEP.fullmatch(path.name.removeprefix(_MOVED))
        if match and path.is_dir() and int(match[1]) not in found:
            found[int(match[1])] = _readable(path.with_name(match[0]))
    return [found[step] for step in sorted(found)]


def _readable(path: Path) -> Path:
    """The folder itself, or the predecessor that was moved away and has no successor yet."""
    moved = path.with_name(_MOVED + path.name)
    return moved if not path.is_dir() and moved.is_dir() else path


def _read_head(path: Path) -> dict[str, Any]:
    if not path.is_dir() and os.path.lexists(path):
        raise Damaged(f"{path}: is not a folder with a checkpoint; {_BEFORE}")
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; a run folder keeps them in checkpoints/")
    file = path / "state.json"
    try:
        head = _opened(read_bytes(file).decode())
    except (OSError, ValueError) as error:
        raise Damaged(f"{file}: not a checkpoint, or damaged ({error}); {_BEFORE}") from error
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {head.get('format')}, this version reads {FORMAT}; "
            f"use the ppo_nlu that wrote it"
        )
    kinds = {"step": int, "files": dict, "state": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(head.get(key), kind)]:
        raise Damaged(f"{file}: not a checkpoint, it has no {wrong[0]}; {_BEFORE}")
    step = _STEP.fullmatch(path.name.removeprefix(_MOVED))
    if step and int(step[1]) != head["step"]:
        raise Damaged(f"{path}: holds the checkpoint of step {head['step']}; {_BEFORE}")
    return head


def _opened(text: str) -> dict[str, Any]:
    """What a state.json holds; ValueError where it is damaged, unless another version wrote it."""
    head = parse_object(text)
    older = "sha256" not in head and isinstance(head.get("format"), int)
    return head if older and head["format"] != FORMAT else unseal(text)


def _write(final: Path, tensors: Tensors, head: dict[str, Any]) -> None:
    """Write a checkpoint; it takes the place of one that has its name."""
    with write_errors(final):
        try:
            with staged_folder(final, _replace_folder) as folder:
                _fill(folder, tensors, head)
        finally:
            _settle(final)


def _fill(folder: Path, tensors: Tensors, head: dict[str, Any]) -> None:
    sums = {}
    for name in sorted(tensors):
        # Not save_file: it makes files that nobody else may read, whatever the umask.
        data = dump_tensors(_separate(tensors[name]))
        sums[name] = hashlib.sha256(data).hexdigest()
        write_new(folder / f"{name}.safetensors", data)
    write_new(folder / "state.json", seal({**head, "files": sums}).encode())


def _separate(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory: what safetensors can write."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in group.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _replace_folder(temp: Path, final: Path) -> None:
    """Give `temp` the name `final`, by two renames: a folder cannot be replaced in one call.

    The old folder stays under its other name until `_settle` deletes it.
    """
    _settle(final)
    if os.path.lexists(final):
        os.rename(final, final.with_name(_MOVED + final.name))
    os.rename(temp, final)


def _settle(final: Path) -> None:
    """Finish a replacement, or undo one that was cut short before the new folder had the name."""
    moved = final.with_name(_MOVED + final.name)
    if not os.path.lexists(moved):
        return
    if os.path.lexists(final):
        _remove(moved)
    else:
        os.rename(moved, final)


def _remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that no half-deleted folder has it."""
    trash = temporary_name(path)
    os.rename(path, trash)
    _delete(trash)

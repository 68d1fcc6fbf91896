"""Run folders and checkpoints that survive a kill at any moment, and the flag that ends a run well.

Nothing here is pickled: tensors are safetensors files, everything else is JSON. A folder under
`checkpoints/` gets its final name only when every byte of it is on disk, so a name is a promise.
Its state.json holds the sha256 of every file, its own included: damage is noticed, not loaded.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from ppo_nlu.errors import UserError
from ppo_nlu.storage.access import read_bytes, write_errors
from ppo_nlu.storage.files import (
    TEMP,
    atomic_write_text,
    make_folder,
    sync_folder,
    temporary_name,
    write_new,
)
from ppo_nlu.storage.locks import LOCK, FolderLock, refuse_in_use
from ppo_nlu.storage.sealed import (
    Damaged,
    parse_object,
    read_object,
    seal,
    to_json,
    unseal,
)

RUN_FORMAT = 1  # of run.json
FORMAT = 2  # of a checkpoint
Tensors = dict[str, dict[str, Tensor]]

_STEP = re.compile(r"step_(\d{6,18})")
_MOVED = ".old-"  # complete, moved away while its successor takes the name
_ASIDE = "damaged-"  # what a resumed run could not read
_WRITTEN = ("adapter", "encoder", "bad_steps")  # folders of a run that only its training writes
_BEFORE = "--resume takes the one before it"


# --- checkpoints ------------------------------------------------------------------------------


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

    The comparison is with the disk, so a resumed run that passes the same steps again ends with
    the same folder. At any moment the old or the new one is readable.
    """
    stored = best_metric(run_dir)
    if math.isnan(metric) or (stored is not None and metric <= stored):
        return None
    final = _folder(run_dir) / "best"
    head = {"format": FORMAT, "step": step, "metric": metric, "state": dict(state)}
    _write(final, tensors, head)
    return final


def load(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a checkpoint folder, or, where a kill fell into its replacement, the one before it.

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
    """What bears the name of a step checkpoint, the newest first: also a file or a dead link, which
    `load` calls damaged."""
    named = [path for path in _folder(run_dir).glob("step_*") if _STEP.fullmatch(path.name)]
    found = {*_steps(run_dir), *(_readable(path) for path in named)}
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]), reverse=True)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged checkpoint, so that it is neither read nor counted again; its new name."""
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
    """A `UserError` where the folder of the checkpoints is there and cannot be listed: what it
    holds would seem to be lost."""
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

    Whoever calls this holds the lock of the run folder: nobody is still writing there.
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
    """Delete a file, a folder, or a link (not what it leads to)."""
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
        raise Damaged(f"{path}: is no folder with a checkpoint; {_BEFORE}")
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
    """Fill a folder under a temporary name, force it to disk, give it its name."""
    with write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temp = temporary_name(final)
        try:
            temp.mkdir()
            sums = {}
            for name in sorted(tensors):
                # Not save_file: it makes files that nobody else may read, whatever the umask.
                data = dump_tensors(_separate(tensors[name]))
                sums[name] = hashlib.sha256(data).hexdigest()
                write_new(temp / f"{name}.safetensors", data)
            write_new(temp / "state.json", seal({**head, "files": sums}).encode())
            sync_folder(temp)
            _replace_folder(temp, final)
        except Exception:
            shutil.rmtree(temp, ignore_errors=True)
            _settle(final)
            raise


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
    """Give `temp` the name `final`: a folder cannot be replaced in one call, so in two renames."""
    moved = final.with_name(_MOVED + final.name)
    _settle(final)
    if os.path.lexists(final):
        os.rename(final, moved)
    os.rename(temp, final)
    sync_folder(final.parent)
    if os.path.lexists(moved):
        _remove(moved)


def _settle(final: Path) -> None:
    """Undo or finish a replacement that was cut short: whoever holds the name has won."""
    moved = final.with_name(_MOVED + final.name)
    if not os.path.lexists(moved):
        return
    if os.path.lexists(final):
        _remove(moved)
    else:
        os.rename(moved, final)


def _remove(path: Path) -> None:
    """Delete a folder that has a name; first the name, so that half a folder never bears it."""
    trash = temporary_name(path)
    os.rename(path, trash)
    _delete(trash)


# --- optimizer state without pickle -----------------------------------------------------------


def flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as (tensors by "<parameter index>.<key>", JSON for the rest)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    params = _params(optimizer)
    for index, param in enumerate(params):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().to("cpu", copy=True)
            else:
                assert value is None or isinstance(value, bool | int | float), (key, type(value))
                scalars.setdefault(str(index), {})[key] = value
    shapes = [list(param.shape) for param in params]
    return tensors, {"name": type(optimizer).__name__, "shapes": shapes, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Put back what `flatten_optimizer` took, without the casts of torch's `load_state_dict`.

    The options (learning rate, betas) stay those of `optimizer`: they belong to the config, and
    an override given with --resume has to count.
    """
    try:
        name, shapes, scalars = state["name"], state["shapes"], dict(state["scalars"])
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"the checkpoint's optimizer state is not whole ({error!r})") from error
    if name != type(optimizer).__name__:
        raise UserError(
            f"optim.name: the checkpoint holds the state of {name}, the config asks for "
            f"{type(optimizer).__name__}; resume with the optimizer the run began with"
        )
    params = _params(optimizer)
    if shapes != [list(param.shape) for param in params]:
        raise UserError(
            f"the checkpoint holds {len(shapes)} trained tensors of other shapes than "
            f"the {len(params)} of this config; resume with the model and lora.* of the run"
        )
    on_device = _step_on_device(optimizer)
    optimizer.state.clear()
    for name, tensor in tensors.items():
        index, key = _owner(name, params)
        param = params[index]
        if tuple(tensor.shape) not in _state_shapes(tuple(param.shape)):
            raise Damaged(f"the checkpoint's optimizer state {name} has no shape of its tensor")
        device = param.device if key != "step" or on_device[index] else "cpu"
        optimizer.state[param][key] = tensor.to(device, copy=True)
    for name, values in scalars.items():
        index, _ = _owner(f"{name}.", params)
        optimizer.state[params[index]].update(values)


def _owner(name: str, params: list[Tensor]) -> tuple[int, str]:
    """The tensor's number and the key in a name of `flatten_optimizer`."""
    index, _, key = name.partition(".")
    if not re.fullmatch(r"[0-9]{1,9}", index) or int(index) >= len(params):
        raise Damaged(f"the checkpoint's optimizer state {name!r} belongs to no trained tensor")
    return int(index), key


def _state_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """What an optimizer keeps of a tensor: a number, as many numbers, or factors of a matrix."""
    return {(), shape, shape[:-1], shape[:-2] + shape[-1:]}


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _step_on_device(optimizer: torch.optim.Optimizer) -> list[bool]:
    """For each parameter, whether torch keeps its step count beside it (else on the CPU)."""
    return [
        bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for _ in group["params"]
    ]


# --- the run folder ---------------------------------------------------------------------------


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


_held: dict[str, FolderLock] = {}  # the folders that this process works in, by their real path


def hold(folder: str | Path) -> FolderLock:
    """Lock a run folder until `release`; a `UserError` where another process works in it."""
    real = os.path.realpath(folder)
    if real not in _held:
        _held[real] = FolderLock(folder)
    return _held[real]


def release(folder: str | Path) -> None:
    """Let other processes work in a folder; the end of a process does so too."""
    if lock := _held.pop(os.path.realpath(folder), None):
        lock.release()


def release_all() -> None:
    """Release whatever folder a program came to hold."""
    for folder in list(_held):
        release(folder)


def claim(output: str | Path, config: str | None = None) -> Path:
    """Make `output` the folder of a new run, with `config` (YAML text) as its config.yaml.

    A folder that holds anything is never written into: not a stranger's, and not an earlier run.
    Of several processes that claim one folder at once one succeeds, and has it until `release`.
    """
    output = Path(output)
    require_free(output)
    make_folder(output)
    lock = hold(output)
    try:
        require_free(output)  # again, now that nobody else can take it
        text = to_json({"program": "ppo_nlu", "format": RUN_FORMAT}, indent=2) + "\n"
        if lock.locked:
            atomic_write_text(output / "run.json", text)
        else:  # only the first can make this file
            with write_errors(output / "run.json"):
                write_new(output / "run.json", text.encode())
        if config is not None:
            atomic_write_text(output / "config.yaml", config)
    except Exception:
        release(output)
        raise
    return output


def require_free(output: str | Path) -> None:
    """A `UserError` where `claim` would refuse this folder; nothing is made."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    names: set[str] = set()
    if output.exists():
        with write_errors(output):  # read first: meanwhile another process may make it a run
            names = {p.name for p in output.iterdir() if not p.name.startswith(TEMP)} - {LOCK}
    if is_run_dir(output):
        if os.path.realpath(output) not in _held:
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
    """Whether a folder is marked as a run of ours: run.json says so and config.yaml is there."""
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


# --- being asked to stop ----------------------------------------------------------------------


class StopRequest:
    """While entered, Ctrl-C and SIGTERM only set a flag; a further Ctrl-C interrupts at once.

    The loop looks at `requested` between steps, saves, and exits with `exit_code` (130 or 143).
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What the program returns: 128 + the first signal, or 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __bool__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.signal = number
            # os.write: a handler may run inside a print, where a second print would fail.
            line = b"\nstopping after this step, with everything saved (Ctrl-C again: at once)\n"
            with suppress(OSError):  # nobody may read it any more
                os.write(2, line)

"""Run folders and checkpoints that survive a kill at any moment, and the flag that ends a run well.

Nothing here is pickled: tensors are safetensors files, everything else is JSON. A folder under
`checkpoints/` gets its final name only when every byte of it is on disk, so a name is a promise.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as dump_tensors
from torch import Tensor

from ppo_nlu.errors import UserError

FORMAT = 1
Tensors = dict[str, dict[str, Tensor]]

_STEP = re.compile(r"step_(\d{6,})")
_TEMP = ".tmp-"  # incomplete, or on its way out: worthless
_MOVED = ".old-"  # complete, moved away while its successor takes the name
_FULL = {errno.ENOSPC, errno.EDQUOT}


# --- files ------------------------------------------------------------------------------------


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never half."""
    path = Path(path)
    temp = path.with_name(f"{_TEMP}{path.name}-{os.getpid()}")
    with _write_errors(path):
        try:
            _write_synced(temp, data)
            os.replace(temp, path)
            _sync_folder(path.parent)
        except Exception:
            temp.unlink(missing_ok=True)
            raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Like `atomic_write_bytes`, for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Like `atomic_write_bytes`, for strict JSON: what is not a finite number becomes null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def plain(value: Any) -> Any:
    """The same value in JSON types: one-element tensors as numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{path}: no space left on the disk; what was complete before is untouched: "
                f"free some space and go on with --resume"
            ) from error
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); check the folder") from error


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    """Read a checkpoint folder, or, where a kill fell into its replacement, the one before it."""
    path = _readable(Path(path))
    head = _read_head(path)
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in head["files"]}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the checkpoint is damaged ({error}); delete this folder to use the one before"
        ) from error
    return tensors, head["state"]


def latest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    steps = _steps(run_dir)
    return steps[-1] if steps else None


def best(run_dir: str | Path) -> Path | None:
    """The folder of the best checkpoint, or None."""
    path = _readable(_folder(run_dir) / "best")
    return path if path.is_dir() else None


def best_metric(run_dir: str | Path) -> float | None:
    """The dev metric of the best checkpoint, or None where there is none."""
    path = best(run_dir)
    return None if path is None else float(_read_head(path)["metric"])


def step_of(path: str | Path) -> int:
    """The step at which a checkpoint was written."""
    return int(_read_head(_readable(Path(path)))["step"])


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the last `keep` step checkpoints; one always stays, and so does the best."""
    for path in _steps(run_dir)[: -max(keep, 1)]:
        _remove(path)


def clean(run_dir: str | Path) -> None:
    """Before a run writes: finish a replacement that was cut short, delete half-written files."""
    folder = _folder(run_dir)
    for moved in sorted(folder.glob(f"{_MOVED}*")):
        _settle(folder / moved.name.removeprefix(_MOVED))
    for place in (Path(run_dir), folder):
        for path in sorted(place.glob(f"{_TEMP}*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint; a run folder keeps them in checkpoints/")
    try:
        head = json.loads((path / "state.json").read_text(encoding="utf-8"))
        head["files"], head["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint (state.json cannot be read)") from error
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {head.get('format')}, this version reads {FORMAT}; "
            f"use the ppo_nlu that wrote it"
        )
    return head


def _write(final: Path, tensors: Tensors, head: dict[str, Any]) -> None:
    """Fill a folder under a temporary name, force it to disk, give it its name."""
    temp = final.with_name(_TEMP + final.name)
    text = json.dumps({**head, "files": sorted(tensors)}, indent=1)
    with _write_errors(final):
        try:
            temp.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir()
            for name, group in tensors.items():
                # Not save_file: it makes files that nobody else may read, whatever the umask.
                _write_synced(temp / f"{name}.safetensors", dump_tensors(_separate(group)))
            _write_synced(temp / "state.json", text.encode())
            _sync_folder(temp)
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
    if final.exists():
        os.rename(final, moved)
    os.rename(temp, final)
    _sync_folder(final.parent)
    if moved.exists():
        _remove(moved)


def _settle(final: Path) -> None:
    """Undo or finish a replacement that was cut short: whoever holds the name has won."""
    moved = final.with_name(_MOVED + final.name)
    if not moved.exists():
        return
    if final.exists():
        _remove(moved)
    else:
        os.rename(moved, final)


def _remove(path: Path) -> None:
    """Delete a folder that has a name; first the name, so that half a folder never bears it."""
    trash = path.with_name(f"{_TEMP}trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


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
    if state["name"] != type(optimizer).__name__:
        raise UserError(
            f"optim.name: the checkpoint holds the state of {state['name']}, the config asks for "
            f"{type(optimizer).__name__}; resume with the optimizer the run began with"
        )
    params = _params(optimizer)
    shapes = [list(param.shape) for param in params]
    if state["shapes"] != shapes:
        raise UserError(
            f"the checkpoint holds {len(state['shapes'])} trained tensors of other shapes than "
            f"the {len(shapes)} of this config; resume with the model and lora.* of the run"
        )
    on_device = _step_on_device(optimizer)
    optimizer.state.clear()
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        param = params[int(index)]
        device = param.device if key != "step" or on_device[int(index)] else "cpu"
        optimizer.state[param][key] = tensor.to(device, copy=True)
    for index, values in state["scalars"].items():
        optimizer.state[params[int(index)]].update(values)


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
    with _write_errors(root):
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


def claim(output: str | Path, config: str | None = None) -> Path:
    """Make `output` the folder of a new run, with `config` (YAML text) as its config.yaml.

    A folder that holds anything is never written into: not a stranger's, and not an earlier run.
    """
    output = Path(output)
    require_free(output)
    with _write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    atomic_write_json(output / "run.json", {"program": "ppo_nlu", "format": FORMAT})
    if config is not None:
        atomic_write_text(output / "config.yaml", config)
    return output


def require_free(output: str | Path) -> None:
    """A `UserError` where `claim` would refuse this folder; nothing is made."""
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder with --output")
    if is_run_dir(output):
        what = "a finished" if (output / "summary.json").exists() else "an unfinished"
        raise UserError(
            f"{output}: holds {what} run; continue it with --resume {output}, or name a new folder "
            f"with --output"
        )
    if not output.exists():
        return
    with _write_errors(output):
        held = {p.name for p in output.iterdir() if not p.name.startswith(_TEMP)}
    if held and not (held == {"run.json"} and _marker(output)):  # a claim that was cut short
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
    if marker.get("format") != FORMAT:
        raise UserError(
            f"{path}: run format {marker.get('format')}, this version reads {FORMAT}; "
            f"use the ppo_nlu that wrote it"
        )
    return path


def _marker(path: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(marker, dict) and marker.get("program") == "ppo_nlu"
    return marker if ours else None


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

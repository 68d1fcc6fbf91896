"""Fingerprints of a run's inputs, compared on --resume.

Rows, base weights, the start and a reward of the user's own must be the same: with others the run
would become a mixture of two. Another machine, thread count or version only rounds differently: it
is reported.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

import ppo_nlu
from ppo_nlu.answering.load_run import start_folder
from ppo_nlu.config import Config, defaults
from ppo_nlu.config.paths import absolute
from ppo_nlu.config.strict_config import values
from ppo_nlu.errors import UserError
from ppo_nlu.model.base_model import resolve
from ppo_nlu.tasks import Example

# What a resumed run may change: how it is shown and kept, not what is computed.
MAY_CHANGE = (
    "log",
    "eval.batch_size",
    "eval.before",
    "eval.base",
    "eval.bootstrap",
    "eval.baselines",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "model.device",
    "data.path",
    "custom.train",
    "custom.dev",
    "custom.test",
)
# What must be the same, and how to mend it where it is not.
REFUSED = {
    "config": "put its config.yaml back as it was",
    "training rows": "give the same data with data.path",
    "evaluation rows": "give the same data with data.path",
    "base model": "give the weights and the tokenizer that it was started with",
    "init_from": "give the adapter that it was started from",
    "reward": "give the source that it was started with",
}
# What is reported: the results may differ in the last bits.
TOLD = ("threads", "device", "backend", "machine", "torch", "transformers", "tokenizers", "ppo_nlu")

_MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "adapter_model*.safetensors",
    "model*.safetensors*", "pytorch_model*", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.model", "*.py",
)  # fmt: skip
_WHOLE = 16 * 2**20  # files up to so many bytes are hashed whole
_BLOCK = 1024  # of longer ones, so many bytes at the start, middle and end of each tensor


# --- what is recorded -----------------------------------------------------------------------------


def of_run(
    cfg: Config,
    train_rows: Mapping[str, Sequence[Example]],
    held: Mapping[str, Sequence[Example]],
    device: torch.device,
    rewards: Iterable[str],
) -> dict[str, Any]:
    """The fingerprints of a run's parts, by the names in `REFUSED` and `TOLD`.

    The config is among them, but for `MAY_CHANGE`: its file in the run folder can be edited.
    """
    cuda = device.type == "cuda"
    return {
        "config": {
            key: value
            for key, value in values(cfg).items()
            if key not in MAY_CHANGE and key.partition(".")[0] not in MAY_CHANGE
        },
        "training rows": {name: rows_hash(rows) for name, rows in train_rows.items()},
        "evaluation rows": {name: rows_hash(rows) for name, rows in held.items()},
        "base model": stamp(model_folder(cfg.model.name_or_path)),
        "init_from": stamp(start_folder(cfg)) if cfg.init_from else {},
        "reward": {path: source_hash(path) for path in rewards},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "backend": os.environ.get("PPO_NLU_BACKEND", "default"),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "tokenizers": _version("tokenizers"),
        "ppo_nlu": f"{ppo_nlu.__version__} ({own_source()})",
    }


def rows_hash(rows: Iterable[Example]) -> str:
    """A hash of all that a row holds, wherever it was read from."""
    digest = hashlib.sha256()
    for row in rows:
        extra = json.dumps(row.extra, sort_keys=True, default=str)
        parts = (row.id, row.task, sorted(row.fields.items()), row.label, row.group, extra)
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


@lru_cache(maxsize=1)
def own_source() -> str:
    """A hash of this package's own source, which changes in a checkout while the version stays."""
    own = set(Path(ppo_nlu.__file__).parent.rglob("*.py"))
    kernels = {path for place in ppo_nlu.__path__ for path in Path(place, "kernels").glob("*.py")}
    return _hash_of(sorted(own | kernels))[:12]


def _hash_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def source_hash(reward: str) -> str:
    """A hash of the module of a reward that has been imported, and of the modules beside it or
    below it that it imports."""
    name = reward.rpartition(":" if ":" in reward else ".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return "unknown"
    top = sys.modules.get(name.partition(".")[0])
    package = getattr(top, "__path__", None)
    place = Path(next(iter(package))) if package else Path(file).parent
    installed = not package and place.name in ("site-packages", "dist-packages")
    loaded = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    beside = {Path(text) for text in loaded if text and text.endswith(".py")}
    own = Path(ppo_nlu.__file__).parent
    found = {p for p in beside if p.is_relative_to(place) and not p.is_relative_to(own)}
    return _hash_of(sorted({Path(file)} if installed else found | {Path(file)}))


# --- models ---------------------------------------------------------------------------------------


def model_folder(name: str) -> Path | None:
    """The folder of a model: a local one, or that of the hub's cache; None where there is none."""
    folder = Path(resolve(name)).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def stamp(folder: Path | None) -> dict[str, str]:
    """A hash of each file that decides what a model or an adapter computes.

    Of a large file the size, the header and a sample of every tensor are hashed: other weights are
    noticed, and gigabytes are not read.
    """
    if folder is None:
        return {}
    found = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: _file_hash(path) for path in sorted(found)}


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for start, length in _sample(file, size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _sample(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(place, bytes) to read of a large file: its header and samples of every tensor; where it is
    no safetensors file, samples of each of 256 parts."""
    try:
        header = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(min(header, 100 * 2**20)))
        spans = [entry["data_offsets"] for name, entry in table.items() if name != "__metadata__"]
        start = 8 + header
        yield 0, start
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        start, spans = 0, [(size * k // 256, size * (k + 1) // 256) for k in range(256)]
    for first, end in spans:
        for place in (first, (first + end) // 2, max(first, end - _BLOCK)):
            yield start + place, min(_BLOCK, end - place)


# --- what is compared -----------------------------------------------------------------------------


def compare(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Warnings about what has changed since a checkpoint; a UserError where it must not have."""
    config = before.get("config")
    if isinstance(config, Mapping):  # earlier versions had relative paths, and fewer keys
        noted = {key: absolute(key, config[key]) for key in config}
        newer = {key: value for key, value in defaults().items() if key in now["config"]}
        before = {**before, "config": newer | noted}
    for name, mend in REFUSED.items():
        if before.get(name) != now[name]:
            raise UserError(
                f"--resume {run_dir}: the run was started on other inputs than are found now: "
                f"{name} ({_changed(before.get(name), now[name])}); {mend}, or start a new run "
                "with --output"
            )
    changed = [
        f"{name} {before.get(name)} before, {now[name]} now"
        for name in TOLD
        if before.get(name) != now[name]
    ]
    if not changed:
        return []
    return [f"changed since the last checkpoint: {'; '.join(changed)}; the last bits may differ"]


def _changed(before: Any, now: Mapping[str, Any]) -> str:
    """Which parts differ: the names of tasks or files."""
    if not isinstance(before, Mapping):
        return "nothing is noted of it"
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

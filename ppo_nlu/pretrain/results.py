"""What the stages leave in the output folder: weights, facts, and the finished model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppo_nlu.errors import UserError
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.corpus import Split, seen_keys
from ppo_nlu.storage.files import atomic_write_bytes, atomic_write_text
from ppo_nlu.storage.folders import read_tensors
from ppo_nlu.storage.sealed import read_object, to_json

TIED = "lm_head.weight"  # the head is the embedding and is not stored twice


class Facts:
    """What the stages measured, kept in a file, with the settings that they were made with."""

    def __init__(self, path: Path, cfg: TinyConfig) -> None:
        self.path = path
        self.all = self._kept()
        self.settings = asdict(cfg)

    def _kept(self) -> dict[str, Any]:
        """The facts of an earlier call."""
        try:
            return read_object(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: is damaged ({error}); delete it") from error

    def put(self, name: str, value: Any) -> None:
        """Add one fact, and write all of them."""
        self.all[name] = value
        self.all.setdefault("settings", {})[name] = self.settings
        atomic_write_text(self.path, to_json(self.all, indent=1) + "\n")


def save_stage(model: Any, path: Path) -> None:
    """A stage's weights in full precision; the head is the embedding."""
    from safetensors.torch import save

    state = {name: v.clone() for name, v in model.state_dict().items() if name != TIED}
    atomic_write_bytes(path, save(state))


def load_stage(model: Any, path: Path) -> None:
    """A stage's weights back into the model."""
    state = read_tensors(path)
    try:
        missing = model.load_state_dict(state, strict=False)
    except RuntimeError:
        missing = None
    if missing is None or missing.unexpected_keys or set(missing.missing_keys) - {TIED}:
        raise UserError(f"{path}: made with another model section; add --again pretrain")


def save_model(model: Any, folder: Path) -> None:
    """The weights as float16; the configuration asks for float32, in which they are to be used."""
    from safetensors.torch import save

    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k != TIED}
    atomic_write_bytes(folder / "model.safetensors", save(state, metadata={"format": "pt"}))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float32"
    atomic_write_text(folder / "config.json", model.config.to_json_string())


def write_seen(split: Split, path: Path) -> None:
    """The phrases whose label was seen, normalised, one a line."""
    atomic_write_text(path, "".join(key + "\n" for key in sorted(seen_keys(split))))

"""An adapter as a folder in PEFT's layout: written and read. Unsupported variants are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ppo_nlu.errors import UserError
from ppo_nlu.model.lora import (
    PREFIX,
    SUFFIXES,
    LoraSettings,
    load_state_dict,
    lora_layers,
    matches,
    state_dict,
)
from ppo_nlu.storage.folders import read_checked, read_tensors, write_folder
from ppo_nlu.storage.sealed import Damaged, parse_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Keys of a PEFT config that say nothing about the function that the adapter computes, or that are
# read below. Any other key that is set means a variant (DoRA, rank patterns, trained biases, ...)
# that would load without an error and compute something else; it is refused.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout megatron_core peft_type peft_version "
    "qalora_group_size r revision target_modules task_type use_rslora".split()
)
# Initialisations that leave the base weights alone; the others (pissa, olora, loftq, ...) save an
# adapter that belongs to a changed base.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA settings of an adapter folder; the fields are those of `config.LoraConfig`."""

    r: int
    alpha: float
    rslora: bool
    dropout: float
    targets: list[str]


def portable_name(name: str) -> str:
    """What an adapter calls its base: the name that the user gave, or the last part of a full path.

    Nobody else has that path, and it may tell more of its machine than is meant to be shared.
    """
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith("~") else name


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    cfg: LoraSettings,
    base_name: str,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write the adapter in the PEFT layout, its checksums, and the files that belong `beside` it.

    Each file appears whole or not at all. The config comes last: with it the adapter is complete.
    """
    config = {
        "base_model_name_or_path": portable_name(base_name),
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in lora_layers(model).values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "peft_type": "LORA",
        "r": cfg.r,
        "target_modules": _shortest_suffixes(model),
        "task_type": "CAUSAL_LM",
        "use_rslora": cfg.rslora,
    }
    weights = save(state_dict(model), {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    contents = {**(beside or {}), WEIGHTS_FILE: weights, CONFIG_FILE: text.encode()}
    write_folder(Path(folder), contents)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load a PEFT adapter, ours or peft's, into an attached model; anything amiss is refused."""
    config = read_adapter_config(folder)
    for name, layer in lora_layers(model).items():
        here = {"r": layer.lora_a.shape[0], "alpha": layer.alpha, "rslora": layer.rslora}
        for field, value in here.items():
            if getattr(config, field) != value:
                raise UserError(
                    f"{Path(folder) / CONFIG_FILE}: {field} is {getattr(config, field)}, "
                    f"but the model was given lora.{field}={value} ({name}); make them agree"
                )
    path = Path(folder) / WEIGHTS_FILE
    load_state_dict(model, _read_weights(path), str(path))


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The settings that a model must be attached with to load this adapter folder.

    The targets are the names of the layers that have weights, since `target_modules` may be a
    pattern, or be narrowed by other keys.
    """
    path = Path(folder) / CONFIG_FILE
    config = _read_config(path)
    variants = [k for k, v in config.items() if k not in _HARMLESS and v and v != "none"]
    if config.get("init_lora_weights") not in _HARMLESS_INITS:
        variants.append("init_lora_weights")
    if variants:
        shown = ", ".join(f"{key}={short(config[key])}" for key in sorted(variants))
        raise UserError(f"{path}: {shown} is not supported; give a plain LoRA adapter")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'")
    weights = path.with_name(WEIGHTS_FILE)
    tensors = _read_weights(weights)
    targets = targets_of(tensors)
    if not targets:
        raise UserError(f"{weights} holds no LoRA weights ({PREFIX}...{SUFFIXES[0]})")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise UserError(f"{path}: use_rslora is {short(config['use_rslora'])}, not true or false")
    found = AdapterConfig(
        r=_number(path, config, "r", lambda r: r >= 1 and r == int(r)),
        alpha=float(_number(path, config, "lora_alpha", lambda alpha: alpha != 0)),
        rslora=bool(config.get("use_rslora")),
        dropout=float(_number(path, {"lora_dropout": 0.0} | config, "lora_dropout", _is_share)),
        targets=targets,
    )
    for key in (f"{PREFIX}{name}{SUFFIXES[0]}" for name in targets):
        rows = tensors[key].shape[:1]
        if rows != (found.r,):
            raise UserError(f"{path}: r is {found.r}, but {key} has {rows[0] if rows else 0} rows")
    return found


def _is_share(value: float) -> bool:
    return 0 <= value < 1


def _number(
    path: Path, config: Mapping[str, Any], key: str, allowed: Callable[[float], bool]
) -> Any:
    """A finite number of an adapter's config."""
    value: Any = config.get(key)
    finite = type(value) in (int, float) and abs(value) < 1e9 and value == value
    if not finite or not allowed(value):
        raise UserError(f"{path}: {key} is {short(value)}, which is not a possible value")
    return int(value) if key == "r" else value


def targets_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that an adapter's tensors belong to."""
    ours = (k for k in tensors if k.startswith(PREFIX) and k.endswith(SUFFIXES[0]))
    return sorted(k.removeprefix(PREFIX).removesuffix(SUFFIXES[0]) for k in ours)


def _shortest_suffixes(model: nn.Module) -> list[str]:
    """The shortest `target_modules` from which peft, matching suffixes, finds just our layers.

    GPT-2 has a `c_proj` in the attention and one in the MLP: `attn.c_proj` tells them apart.
    """
    wrapped = lora_layers(model)
    others = [n for n, _ in model.named_modules() if n not in wrapped]
    suffixes = set()
    for name in wrapped:
        parts = name.split(".")
        tails = (".".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
        suffixes.add(next(t for t in tails if not any(matches(other, t) for other in others)))
    return sorted(suffixes)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_checked(path).decode())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not an adapter folder: it has no {path.name}") from None
    except Damaged:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a JSON object ({error})") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = (path.parent / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, save it again as safetensors" if pickled else ""
        raise UserError(f"{path.parent} has no {path.name}{hint}")
    return read_tensors(path)

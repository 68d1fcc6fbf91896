"""LoRA layers (arXiv 2106.09685): attach, switch off, save and load in the PEFT layout, merge.

The reference policy is the same model with LoRA switched off, by a flag that the forward reads;
weights are never merged and un-merged in place, which drifts in bf16. `merge` returns a new model.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ppo_nlu import ops
from ppo_nlu.errors import UserError
from ppo_nlu.storage.folders import read_checked, read_tensors, write_folder
from ppo_nlu.storage.sealed import Damaged, parse_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
Model = TypeVar("Model", bound=nn.Module)

# PEFT's name of a weight: the prefix, the module's dotted name, a suffix for A and one for B.
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

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


class LoraSettings(Protocol):
    """What attaching needs to know; `config.LoraConfig` is one, `AdapterConfig` another."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> str | Sequence[str]: ...


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA settings of an adapter folder; the fields are those of `config.LoraConfig`."""

    r: int
    alpha: float
    rslora: bool
    dropout: float
    targets: list[str]


def lora_scaling(r: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


class LoraLinear(nn.Module):
    """y = base(x) + scaling · B A dropout(x), the base frozen, A and B fp32 whatever its dtype.

    The base is an `nn.Linear` or a transformers `Conv1D`, whose weight is stored transposed.
    """

    ref_a: Tensor | None
    ref_b: Tensor | None

    def __init__(
        self, base: nn.Module, cfg: LoraSettings, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.transposed = not isinstance(base, nn.Linear)
        out_features, in_features = self.weight.shape
        # A is drawn on the CPU, so that one seed means one adapter on every device.
        lora_a = torch.empty(cfg.r, in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        device = self.weight.device
        self.lora_a = nn.Parameter(lora_a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(out_features, cfg.r, device=device))
        self.alpha, self.rslora = cfg.alpha, cfg.rslora
        self.scaling = lora_scaling(cfg.r, cfg.alpha, cfg.rslora)
        self.dropout_p = cfg.dropout
        self.disabled = False
        self.register_buffer("ref_a", None, persistent=False)
        self.register_buffer("ref_b", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's weight as (out, in), a view where the base stores it transposed."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight.t() if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled and self.ref_a is None:
            return self.base(x)
        lora_a: Tensor = self.lora_a
        lora_b: Tensor = self.lora_b
        dropout_p = self.dropout_p if self.training else 0.0
        if self.disabled:
            assert self.ref_a is not None and self.ref_b is not None
            lora_a, lora_b, dropout_p = self.ref_a, self.ref_b, 0.0
        return ops.lora_linear(x, self.weight, self.bias, lora_a, lora_b, self.scaling, dropout_p)

    def delta(self) -> Tensor:
        """scaling · B A in fp32, shaped as the base stores its weight."""
        delta = self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())
        return delta.t() if self.transposed else delta

    def extra_repr(self) -> str:
        return f"r={self.lora_a.shape[0]}, scaling={self.scaling:g}, dropout_p={self.dropout_p:g}"


# ---- attach and switch ----------------------------------------------------------------------


def attach(
    model: nn.Module,
    cfg: LoraSettings,
    generator: torch.Generator | None = None,
    idle: Collection[str] = (),
) -> list[str]:
    """Wrap the target layers in place, freeze every other parameter, return the wrapped names.

    The `idle` layers are left out: the model never calls them, so LoRA would have no effect there.
    """
    assert not lora_layers(model), "this model has LoRA layers already"
    names = _select(model, cfg.targets, idle)
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = LoraLinear(model.get_submodule(name), cfg, generator)
        layer.train(model.training)
        setattr(model.get_submodule(parent), child, layer)
    return names


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The wrapped layers by their dotted name, in the order of the model's modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer, in the order of the model's modules."""
    return [p for layer in lora_layers(model).values() for p in (layer.lora_a, layer.lora_b)]


def lora_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model is the reference: the base, or the copy that `freeze_reference` made."""
    return _flagged(model, "disabled")


def dropout_on(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, LoRA's dropout is on where it was asked for; the base stays in eval mode."""
    return _flagged(model, "training")


@contextmanager
def _flagged(model: nn.Module, flag: str) -> Iterator[None]:
    layers = list(lora_layers(model).values())
    before = [getattr(layer, flag) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, flag, True)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            setattr(layer, flag, value)


def freeze_reference(model: nn.Module) -> None:
    """Make today's A and B the reference (PPO after SFT); the base alone is it otherwise."""
    for layer in lora_layers(model).values():
        layer.ref_a = layer.lora_a.detach().clone()
        layer.ref_b = layer.lora_b.detach().clone()


def _linear_types() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b. Those with a forward of their own (routers, bit layers,
    Falcon's linears) are tried."""
    types = _linear_types()
    if not isinstance(module, types) or type(module).forward in {kind.forward for kind in types}:
        return isinstance(module, types)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        with torch.no_grad():
            given, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # one that is called in another way
        return False
    near = isinstance(given, Tensor) and given.shape == plain.shape and given.dtype == plain.dtype
    bound = 1e-5 if plain.dtype == torch.float32 else 1e-2
    return near and bool(torch.allclose(given, plain, bound, bound * float(plain.abs().max())))


def _block_linears(model: nn.Module, idle: Collection[str] = ()) -> dict[str, list[str]]:
    """The linear layers inside the decoder's blocks: dotted name -> its parts inside the block.

    The blocks are the items of the outermost module lists. The LM head and the embeddings lie
    outside, and must: the head runs through a fused op that never calls the module.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    linears = [n for n, module in model.named_modules() if n not in idle and _is_linear(module)]
    return {
        name: name.removeprefix(f"{block}.").split(".")[1:]  # [0] is the index in the list
        for name in linears
        for block in outer
        if name.startswith(f"{block}.")
    }


def _in_attention(parts: Sequence[str]) -> bool:
    """By the modules around the layer; its own name says nothing."""
    return any("attn" in part or "attention" in part for part in parts[:-1])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _select(
    model: nn.Module, targets: str | Sequence[str], idle: Collection[str] = ()
) -> list[str]:
    linears = _block_linears(model, idle)
    if targets == "all-linear":
        wanted = list(linears)
    elif targets == "attention":
        wanted = [n for n, parts in linears.items() if _in_attention(parts)]
    elif isinstance(targets, str):
        raise UserError(
            f"lora.targets: {targets!r} is neither all-linear nor attention; "
            f"to name layers give a list, [{targets}]"
        )
    else:
        unmatched = [t for t in targets if not any(_matches(n, t) for n in linears)]
        if unmatched:
            raise _no_match(", ".join(unmatched), linears)
        wanted = [n for n in linears if any(_matches(n, t) for t in targets)]
    if not wanted:
        raise _no_match(str(targets), linears)
    return wanted


def _no_match(targets: str, linears: Mapping[str, list[str]]) -> UserError:
    there = ", ".join(dict.fromkeys(".".join(parts) for parts in linears.values())) or "none"
    return UserError(
        f"lora.targets: {targets} matches no linear layer in the model's blocks; there are: {there}"
    )


# ---- the PEFT layout ------------------------------------------------------------------------


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of A and B on the CPU under PEFT's keys, in the order of the model's modules."""
    return {key: p.detach().to("cpu", copy=True) for key, p in _named(model).items()}


def load_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a whole adapter into the attached layers; `source` names it in the errors."""
    take(_named(model), tensors, source)


def take(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into those of the same names; a UserError where any does not fit or is no
    number, before the first is copied."""
    for word, keys in (("lacks", own.keys() - tensors), ("has unexpected", tensors.keys() - own)):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(
                f"{source} {word} {len(keys)} tensors: {shown}; "
                "was it made for this base model and these lora.targets?"
            )
    for key, parameter in own.items():
        if tensors[key].shape != parameter.shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(tensors[key].shape)}, "
                f"the model needs {tuple(parameter.shape)}; was it made for this base model?"
            )
        require_numbers(tensors[key], parameter.dtype, f"{source}: {key}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def require_numbers(tensor: Tensor, dtype: torch.dtype, source: str) -> None:
    """A UserError where a weight is not made of finite floating-point numbers, as `dtype` asks."""
    if not dtype.is_floating_point:
        return  # a buffer of positions, say
    if not tensor.is_floating_point():
        raise UserError(f"{source} holds {tensor.dtype}, not floating-point numbers; save it again")
    if not tensor.to(dtype).isfinite().all():
        raise UserError(
            f"{source} holds NaN or infinity; take the weights of an earlier step or of another run"
        )


def portable_name(name: str) -> str:
    """What an adapter calls its base: the name that the user gave, of a full path the last part.

    Nobody else has the path, and it may say more of its machine than is meant to be shared.
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
    """Write the adapter in the PEFT layout, its checksums, and what else belongs to it.

    Each file appears whole or not at all, the config last: with it the adapter is complete.
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
        raise UserError(f"{weights} holds no LoRA weights ({_PREFIX}...{_SUFFIXES[0]})")
    if not isinstance(config.get("use_rslora"), bool | None):
        raise UserError(f"{path}: use_rslora is {short(config['use_rslora'])}, not true or false")
    found = AdapterConfig(
        r=_number(path, config, "r", lambda r: r >= 1 and r == int(r)),
        alpha=float(_number(path, config, "lora_alpha", lambda alpha: alpha != 0)),
        rslora=bool(config.get("use_rslora")),
        dropout=float(_number(path, {"lora_dropout": 0.0} | config, "lora_dropout", _is_share)),
        targets=targets,
    )
    for key in (f"{_PREFIX}{name}{_SUFFIXES[0]}" for name in targets):
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
        raise UserError(f"{path}: {key} is {short(value)}, which is no number that it can be")
    return int(value) if key == "r" else value


def targets_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that an adapter's tensors belong to."""
    ours = (k for k in tensors if k.startswith(_PREFIX) and k.endswith(_SUFFIXES[0]))
    return sorted(k.removeprefix(_PREFIX).removesuffix(_SUFFIXES[0]) for k in ours)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{_PREFIX}{name}{suffix}": parameter
        for name, layer in lora_layers(model).items()
        for suffix, parameter in zip(_SUFFIXES, (layer.lora_a, layer.lora_b), strict=True)
    }


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
        suffixes.add(next(t for t in tails if not any(_matches(other, t) for other in others)))
    return sorted(suffixes)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_checked(path).decode())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no adapter folder: it has no {path.name}") from None
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


# ---- merge ----------------------------------------------------------------------------------


def merge(model: Model) -> Model:
    """A new model without LoRA layers: W + scaling · B A, in fp32, then cast to the base's dtype.

    The original stays as it is; tied weights stay tied.
    """
    weights = [layer.weight.data_ptr() for layer in lora_layers(model).values()]
    if len(set(weights)) < len(weights):
        raise UserError(
            "--merge: layers of this model share one weight, and each has an adapter of its own: "
            "there is no merged model; export without --merge"
        )
    merged = copy.deepcopy(model)
    for name, layer in lora_layers(merged).items():
        base = layer.base
        weight: Tensor = base.weight  # type: ignore[assignment]
        with torch.no_grad():
            weight.copy_(weight.float() + layer.delta())
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, base)
    return merged.requires_grad_(True)

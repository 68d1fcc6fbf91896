"""LoRA layers (arXiv 2106.09685): attach, switch off, their tensors, merge.

The reference policy is the same model with LoRA switched off by a flag that the forward reads.
Weights are never merged and unmerged in place, which would drift in bf16. `merge` returns a new
model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ppo_nlu import ops
from ppo_nlu.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

# PEFT's name of a weight: the prefix, the module's dotted name, a suffix for A and one for B.
PREFIX = "base_model.model."
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


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


def lora_scaling(r: int, alpha: float, rslora: bool) -> float:
    """alpha / r, or alpha / √r for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


class LoraLinear(nn.Module):
    """y = base(x) + scaling · B A dropout(x). The base is frozen; A and B are always in fp32.

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
        return ops.lora_linear(
            x,
            self.weight,
            self.bias,
            lora_a=lora_a,
            lora_b=lora_b,
            scaling=self.scaling,
            dropout_p=dropout_p,
        )

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


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base alone, whatever adapter it began from."""
    references = [(layer, layer.ref_a, layer.ref_b) for layer in lora_layers(model).values()]
    try:
        for layer, *_ in references:
            layer.ref_a = layer.ref_b = None
        with lora_disabled(model):
            yield
    finally:
        for layer, ref_a, ref_b in references:
            layer.ref_a, layer.ref_b = ref_a, ref_b


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
    """Make the present A and B the reference (PPO after SFT), in place of the base alone."""
    for layer in lora_layers(model).values():
        layer.ref_a = layer.lora_a.detach().clone()
        layer.ref_b = layer.lora_b.detach().clone()


def _linear_types() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b. Subclasses with a forward of their own (routers, bit
    layers, Falcon's linears) are run once to see."""
    types = _linear_types()
    if not isinstance(module, types) or type(module).forward in {kind.forward for kind in types}:
        return isinstance(module, types)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        with torch.no_grad():
            given, plain = module(x), nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # it is called in another way
        return False
    near = isinstance(given, Tensor) and given.shape == plain.shape and given.dtype == plain.dtype
    bound = 1e-5 if plain.dtype == torch.float32 else 1e-2
    return near and bool(torch.allclose(given, plain, bound, bound * float(plain.abs().max())))


def _block_linears(model: nn.Module, idle: Collection[str] = ()) -> dict[str, list[str]]:
    """The linear layers inside the decoder's blocks: dotted name -> its parts inside the block.

    The blocks are the items of the outermost module lists. The LM head lies outside, as it must: it
    runs through a fused op that never calls the module.
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
    """Whether a layer is in an attention, by the names of the modules around it."""
    return any("attn" in part or "attention" in part for part in parts[:-1])


def matches(name: str, target: str) -> bool:
    """Whether a target names this layer, in full or by the end of its dotted name."""
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
        unmatched = [t for t in targets if not any(matches(n, t) for n in linears)]
        if unmatched:
            raise _no_match(", ".join(unmatched), linears)
        wanted = [n for n in linears if any(matches(n, t) for t in targets)]
    if not wanted:
        raise _no_match(str(targets), linears)
    return wanted


def _no_match(targets: str, linears: Mapping[str, list[str]]) -> UserError:
    there = ", ".join(dict.fromkeys(".".join(parts) for parts in linears.values())) or "none"
    return UserError(
        f"lora.targets: {targets} matches no linear layer in the model's blocks; there are: {there}"
    )


# ---- the tensors ------------------------------------------------------------------------------


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of A and B on the CPU under PEFT's keys, in the order of the model's modules."""
    return {key: p.detach().to("cpu", copy=True) for key, p in _named(model).items()}


def load_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy a whole adapter into the attached layers; `source` names it in the errors."""
    take(_named(model), tensors, source)


def take(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into those of the same names. A UserError where one does not fit or holds NaN or
    infinity; nothing is copied then."""
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
    """A UserError where a weight is not made of floating-point numbers that are finite in `dtype`;
    with any other `dtype` nothing is asked."""
    if not dtype.is_floating_point:
        return  # such as a buffer of positions
    if not tensor.is_floating_point():
        raise UserError(f"{source} holds {tensor.dtype}, not floating-point numbers; save it again")
    if not tensor.to(dtype).isfinite().all():
        raise UserError(
            f"{source} holds NaN or infinity; take the weights of an earlier step or of another run"
        )


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of every layer under PEFT's keys."""
    return {
        f"{PREFIX}{name}{suffix}": parameter
        for name, layer in lora_layers(model).items()
        for suffix, parameter in zip(SUFFIXES, (layer.lora_a, layer.lora_b), strict=True)
    }


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

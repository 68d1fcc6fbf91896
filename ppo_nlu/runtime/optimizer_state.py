"""The state of an optimizer as tensors and JSON, so that nothing is pickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ppo_nlu.errors import UserError
from ppo_nlu.storage.sealed import Damaged


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
            raise Damaged(
                f"optimizer state {name} of the checkpoint does not fit its tensor's shape"
            )
        device = param.device if key != "step" or on_device[index] else "cpu"
        optimizer.state[param][key] = tensor.to(device, copy=True)
    for name, values in scalars.items():
        index, _ = _owner(f"{name}.", params)
        optimizer.state[params[index]].update(values)


def _owner(name: str, params: list[Tensor]) -> tuple[int, str]:
    """Split a name of `flatten_optimizer` into the parameter's index and the key."""
    index, _, key = name.partition(".")
    if not re.fullmatch(r"[0-9]{1,9}", index) or int(index) >= len(params):
        raise Damaged(f"the checkpoint's optimizer state {name!r} belongs to no trained tensor")
    return int(index), key


def _state_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shapes an optimizer may keep for a parameter: a number, its own, its row or column."""
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

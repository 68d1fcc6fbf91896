"""The state of an optimizer: to the last bit, and what is not of this optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from ppo_nlu.errors import UserError
from ppo_nlu.runtime import checkpoint, optimizer_state
from ppo_nlu.storage.sealed import Damaged


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, second = model[0].parameters(), model[2].parameters()  # type: ignore[index]
    groups = [{"params": [*first], "lr": 1e-2}, {"params": [*second], "lr": 1e-3}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.01)


def adafactor(model: torch.nn.Module, beta1: float | None = None) -> torch.optim.Optimizer:
    return Adafactor(
        model.parameters(), lr=1e-2, scale_parameter=False, relative_step=False, beta1=beta1
    )


def scaled_adafactor(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The state is used to the full: first moment, parameter scale (RMS), relative steps."""
    return Adafactor(model.parameters(), beta1=0.9)


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        if number == 2:  # one parameter has no gradient for once
            model[0].bias.grad = None  # type: ignore[index, union-attr]
        optimizer.step()


@pytest.mark.parametrize("build", [adamw, adafactor, scaled_adafactor])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_optimizer_goes_on_to_the_last_bit(
    tmp_path: Path, build: Callable[[torch.nn.Module], torch.optim.Optimizer], cut: int
) -> None:
    whole = small_model()
    optimizer = build(whole)
    steps(whole, optimizer, range(8))

    half = small_model()
    optimizer = build(half)
    steps(half, optimizer, range(cut))
    tensors, state = optimizer_state.flatten_optimizer(optimizer)
    groups = {"model": dict(half.state_dict()), "optimizer": tensors}
    path = checkpoint.save(tmp_path, cut, groups, {"optimizer": state})

    resumed = small_model()
    optimizer = build(resumed)
    steps(resumed, optimizer, range(50, 53))  # the state of other steps, to be replaced
    groups, loaded = checkpoint.load(path)
    resumed.load_state_dict(groups["model"])
    optimizer_state.restore_optimizer(optimizer, groups["optimizer"], loaded["optimizer"])
    steps(resumed, optimizer, range(cut, 8))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_flattened_state_is_a_copy() -> None:
    model = small_model()
    optimizer = adamw(model)
    steps(model, optimizer, range(1))
    tensors, state = optimizer_state.flatten_optimizer(optimizer)
    taken = {name: tensor.clone() for name, tensor in tensors.items()}
    other = adamw(model)
    optimizer_state.restore_optimizer(other, tensors, state)
    steps(model, optimizer, range(1, 3))
    steps(model, other, range(1, 3))
    assert all(torch.equal(tensors[name], value) for name, value in taken.items())


def test_half_precision_parameters_keep_their_fp32_state() -> None:
    """torch's load_state_dict would cast Adafactor's fp32 state to the parameter's bf16."""
    param = torch.nn.Parameter(torch.randn(4, 3).bfloat16())
    optimizer = Adafactor([param], lr=1e-2, scale_parameter=False, relative_step=False)
    param.grad = torch.randn(4, 3).bfloat16()
    optimizer.step()
    wanted = optimizer.state[param]["exp_avg_sq_row"].clone()
    fresh = Adafactor([param], lr=1e-2, scale_parameter=False, relative_step=False)
    optimizer_state.restore_optimizer(fresh, *optimizer_state.flatten_optimizer(optimizer))
    found = fresh.state[param]["exp_avg_sq_row"]
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_options_stay_those_of_the_config() -> None:
    model = small_model()
    tensors, state = optimizer_state.flatten_optimizer(adamw(model))
    fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
    optimizer_state.restore_optimizer(fresh, tensors, state)
    assert fresh.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.exp_avg": torch.zeros(5)},
        {"99.exp_avg": torch.zeros(5)},
        {"-1.exp_avg": torch.zeros(5)},
        {"exp_avg": torch.zeros(5)},
        {"9" * 5000 + ".exp_avg": torch.zeros(5)},
        {"0.exp_avg": torch.zeros(4, 6)},
    ],
)
def test_odd_optimizer_tensors_are_damage(tensors: dict[str, torch.Tensor]) -> None:
    optimizer = adamw(small_model())
    _, state = optimizer_state.flatten_optimizer(optimizer)
    with pytest.raises(Damaged) as error:
        optimizer_state.restore_optimizer(optimizer, tensors, state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"scalars": {"x": {}}}, {"scalars": []}, {"scalars": {"7": {"step": 1}}}, {"scalars": None}],
)
def test_an_odd_optimizer_state_is_damage(change: dict[str, Any]) -> None:
    optimizer = adamw(small_model())
    tensors, state = optimizer_state.flatten_optimizer(optimizer)
    for odd in (state | change, {}, None, [1]):
        if odd != state | {"scalars": []}:  # an empty list says what an empty mapping says
            with pytest.raises(Damaged):
                optimizer_state.restore_optimizer(optimizer, tensors, odd)  # type: ignore[arg-type]


def test_another_optimizer_or_other_shapes_are_the_users_mistake() -> None:
    model = small_model()
    tensors, state = optimizer_state.flatten_optimizer(adamw(model))
    with pytest.raises(UserError, match=r"AdamW.*Adafactor"):
        optimizer_state.restore_optimizer(adafactor(model), tensors, state)
    with pytest.raises(UserError, match="shapes"):
        fresh = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
        optimizer_state.restore_optimizer(fresh, tensors, state)

"""The optimizers against a pencil, the schedule at given steps, and clipping that clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ppo_nlu.config import OptimConfig
from ppo_nlu.errors import UserError
from ppo_nlu.runtime.optim import build_optimizer, clip_gradients, learning_rate, set_lr


def parameter(values: Any, grad: Any = None) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.tensor(values))
    if grad is not None:
        made.grad = torch.tensor(grad)
    return made


# --- the two optimizers by hand ---------------------------------------------------------------


def test_adamw_by_hand() -> None:
    """Step 1: m^ = g and v^ = g^2, so w <- w (1 - lr wd) - lr g / (|g| + eps).

    Step 2, beta1 = 0.9, beta2 = 0.95: m = 0.9 0.1 g1 + 0.1 g2, m^ = m / (1 - 0.81);
    v = 0.95 0.05 g1^2 + 0.05 g2^2, v^ = v / (1 - 0.9025).
    """
    param = parameter([1.0, -2.0], [0.5, -0.25])
    cfg = OptimConfig(name="adamw", lr=0.1, weight_decay=0.01, eps=1e-5)
    optimizer = build_optimizer(cfg, [param])
    optimizer.step()
    first = [
        1.0 * (1 - 0.1 * 0.01) - 0.1 * 0.5 / (0.5 + 1e-5),
        -2.0 * (1 - 0.1 * 0.01) + 0.1 * 0.25 / (0.25 + 1e-5),
    ]
    assert param.tolist() == pytest.approx(first, abs=1e-6)

    param.grad = torch.tensor([1.0, 0.5])
    optimizer.step()
    second = []
    for weight, g1, g2 in zip(first, (0.5, -0.25), (1.0, 0.5), strict=True):
        mean = (0.09 * g1 + 0.1 * g2) / 0.19
        square = (0.0475 * g1**2 + 0.05 * g2**2) / 0.0975
        second.append(weight * (1 - 0.001) - 0.1 * mean / (math.sqrt(square) + 1e-5))
    assert param.tolist() == pytest.approx(second, abs=1e-6)


def test_adafactor_matrix_by_hand() -> None:
    """Adafactor (arXiv 1804.04235, algorithm 4), second moment of a matrix in factored form.

    beta2(t) = 1 - t^-0.8, so beta2(1) = 0: after the first step the moments are those of g alone.
    For g = [[1, 2], [3, 4]] (eps 1e-30 is nothing beside g^2 = [[1, 4], [9, 16]]):
      row means R = [2.5, 12.5], their mean 7.5; column means C = [5, 10]
      v = R C^T / mean(R) = [[1.6667, 3.3333], [8.3333, 16.6667]]
      u = g / sqrt(v) = [[0.774597, 1.095445], [1.039230, 0.979796]]
      RMS(u) = sqrt((0.6 + 1.2 + 1.08 + 0.96) / 4) = sqrt(0.96) < 1: clip_threshold 1 stays away
      w <- w - lr u, since no scale by the parameter's RMS, no relative step, no first moment.
    """
    param = parameter([[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [3.0, 4.0]])
    optimizer = build_optimizer(OptimConfig(name="adafactor", lr=0.01), [param])
    optimizer.step()
    update = torch.tensor([[0.6, 1.2], [1.08, 0.96]]).sqrt()
    assert torch.allclose(param.detach(), 1 - 0.01 * update, atol=1e-7, rtol=0)

    # Step 2 with g = 10 everywhere: beta2(2) = 1 - 2^-0.8 = b; R and C move by (1 - b) towards 100.
    # u is over 1 everywhere, so clip_threshold = 1 divides it by its RMS.
    before = param.detach().clone()
    param.grad = torch.full((2, 2), 10.0)
    optimizer.step()
    b = 1 - 2**-0.8
    rows = [b * 2.5 + (1 - b) * 100, b * 12.5 + (1 - b) * 100]
    columns = [b * 5 + (1 - b) * 100, b * 10 + (1 - b) * 100]
    mean = sum(rows) / 2
    raw = [[10 / math.sqrt(r * c / mean) for c in columns] for r in rows]
    rms = math.sqrt(sum(u * u for row in raw for u in row) / 4)
    assert rms > 1
    wanted = before - 0.01 * torch.tensor(raw) / rms
    assert torch.allclose(param.detach(), wanted, atol=1e-6, rtol=0)


def test_adafactor_vector_by_hand() -> None:
    """A vector keeps the whole second moment: step 1 gives v = g^2, so u = sign(g), RMS 1.

    Step 2: v = b g1^2 + (1 - b) g2^2 with b = 1 - 2^-0.8 = 0.425651; for g1 = (3, 4), g2 = (3, -8)
    u = (1, -8 / sqrt(0.425651 16 + 0.574349 64)) = (1, -1.211999), RMS = 1.111068, u / RMS.
    """
    param = parameter([0.0, 0.0], [3.0, 4.0])
    optimizer = build_optimizer(OptimConfig(name="adafactor", lr=0.1), [param])
    optimizer.step()
    assert param.tolist() == pytest.approx([-0.1, -0.1], abs=1e-7)
    param.grad = torch.tensor([3.0, -8.0])
    optimizer.step()
    wanted = [-0.1 - 0.1 / 1.111068, -0.1 + 0.1 * 1.211999 / 1.111068]
    assert param.tolist() == pytest.approx(wanted, abs=1e-6)


def test_adafactor_weight_decay_and_a_gradient_of_zero() -> None:
    """LoRA's A has no gradient while B is 0: the weight must stay finite, and only decay."""
    param = parameter([[2.0, 2.0]], [[0.0, 0.0]])
    optimizer = build_optimizer(OptimConfig(name="adafactor", lr=0.1, weight_decay=0.5), [param])
    for _ in range(2):
        optimizer.step()
    assert param.tolist()[0] == pytest.approx([2 * 0.95**2] * 2)


def test_adafactor_takes_its_rate_from_the_config_alone() -> None:
    """Neither the size of the weights nor the count of steps changes the length of a step."""
    cfg = OptimConfig(name="adafactor", lr=0.1)
    for size in (1e-6, 1.0, 1e3):
        param = parameter([size, size], [1.0, 1.0])
        build_optimizer(cfg, [param]).step()
        assert (size - param).tolist() == pytest.approx([0.1, 0.1], abs=1e-4)
    optimizer = build_optimizer(cfg, [parameter([1.0])])
    options = optimizer.param_groups[0]
    off = ("scale_parameter", "relative_step", "warmup_init")
    assert [options[name] for name in off] == [False] * 3
    assert options["beta1"] is None and options["clip_threshold"] == 1.0


def test_an_unknown_name_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"optim.name: 'sgd'.*adafactor or adamw"):
        build_optimizer(OptimConfig(name="sgd"), [parameter([1.0])])


# --- groups and schedule ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_value_head_has_its_own_rate(name: str) -> None:
    """Both optimizers move a lone weight by its learning rate in the first step."""

    def moved(value_lr: float | None, factor: float) -> tuple[float, float]:
        lora, head = parameter([1.0], [2.0]), parameter([1.0], [2.0])
        cfg = OptimConfig(name=name, lr=0.01, value_lr=value_lr, eps=1e-9)
        optimizer = build_optimizer(cfg, iter([lora]), iter([head]))  # generators will do
        set_lr(optimizer, 0.123)  # factors do not pile up
        set_lr(optimizer, factor)
        optimizer.step()
        return 1 - lora.item(), 1 - head.item()

    assert moved(None, 1.0) == pytest.approx((0.01, 0.01), rel=1e-4)
    assert moved(0.1, 1.0) == pytest.approx((0.01, 0.1), rel=1e-4)
    assert moved(0.1, 0.5) == pytest.approx((0.005, 0.05), rel=1e-4)


def test_set_lr_works_on_any_optimizer() -> None:
    optimizer = torch.optim.SGD([parameter([1.0])], lr=0.4)
    for factor in (0.5, 0.25, 1.0):
        set_lr(optimizer, factor)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * factor)


def test_warm_up_and_cosine_by_hand() -> None:
    """21 steps, warm-up 10 % = 2: 1/2, 1, then the cosine from 1 (step 2) to 0.1 (step 20).

    Half-way, step 11: 0.1 + 0.9 / 2 = 0.55; a third, step 8: cos 60 deg = 1/2, so
    0.1 + 0.9 (1 + 0.5) / 2 = 0.775; two thirds, step 14: 0.1 + 0.9 (1 - 0.5) / 2 = 0.325.
    """
    cfg = OptimConfig(warmup=0.1, min_lr_ratio=0.1)
    wanted = {0: 0.5, 1: 1.0, 2: 1.0, 8: 0.775, 11: 0.55, 14: 0.325, 20: 0.1, 21: 0.1, 99: 0.1}
    for step, factor in wanted.items():
        assert learning_rate(cfg, step, 21) == pytest.approx(factor), step
    factors = [learning_rate(cfg, step, 21) for step in range(1, 21)]
    assert factors == sorted(factors, reverse=True)


def test_ends_of_the_schedule() -> None:
    assert learning_rate(OptimConfig(), 0, 1) == 1.0  # a single step is a whole one
    whole = OptimConfig(warmup=1.0)
    assert [learning_rate(whole, step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    none = OptimConfig(warmup=0.0, min_lr_ratio=0.0)
    assert [learning_rate(none, step, 3) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    # 0.29 * 100 = 28.999999999999996: 29 steps of warm-up, not 28
    assert learning_rate(OptimConfig(warmup=0.29), 27, 100) == pytest.approx(28 / 29)


def test_linear_falls_evenly_to_its_end() -> None:
    """12 steps, warm-up 2: 1/2, 1, then from 1 (step 2) evenly to 0.1 (step 11), 0.1 a step."""
    cfg = OptimConfig(schedule="linear", warmup=2 / 12, min_lr_ratio=0.1)
    found = [learning_rate(cfg, step, 12) for step in range(12)]
    assert found == pytest.approx([0.5, 1.0, *(1 - 0.1 * i for i in range(10))])


def test_constant_is_constant_after_the_warm_up() -> None:
    cfg = OptimConfig(schedule="constant", warmup=0.2)
    assert [learning_rate(cfg, step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate(OptimConfig(schedule="constant", warmup=0.0), 0, 10) == 1.0


# --- clipping ---------------------------------------------------------------------------------


def test_clipping_by_hand() -> None:
    """The joint norm of (3, 0), (0, 4) is 5: for a bound of 1 everything is divided by 5."""
    first, second = parameter([0.0, 0.0], [3.0, 0.0]), parameter([[0.0], [0.0]], [[0.0], [4.0]])
    idle = parameter([1.0])

    def every() -> Iterator[torch.nn.Parameter]:  # a generator runs out after one pass
        yield from (first, idle, second)

    norm = clip_gradients(every(), 1.0)
    assert norm.item() == pytest.approx(5.0) and norm.dtype == torch.float32
    assert first.grad is not None and second.grad is not None and idle.grad is None
    assert first.grad.tolist() == pytest.approx([0.6, 0.0])
    assert second.grad.flatten().tolist() == pytest.approx([0.0, 0.8])
    assert clip_gradients(every(), 10.0).item() == pytest.approx(1.0)  # below the bound: untouched
    assert first.grad.tolist() == pytest.approx([0.6, 0.0])


def test_zero_measures_only() -> None:
    param = parameter([0.0, 0.0], [30.0, 40.0])
    assert clip_gradients([param], 0.0).item() == pytest.approx(50.0)
    assert param.grad is not None and param.grad.tolist() == [30.0, 40.0]
    assert clip_gradients([parameter([1.0])], 1.0).item() == 0.0
    still = parameter([1.0], [0.0])
    assert clip_gradients([still], 1.0).item() == 0.0
    assert still.grad is not None and still.grad.tolist() == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_touched(bad: float) -> None:
    good, spoilt = parameter([0.0], [7.0]), parameter([0.0], [bad])
    assert not clip_gradients([good, spoilt], 1.0).isfinite()
    assert good.grad is not None and good.grad.tolist() == [7.0]


def test_half_precision_gradients_are_measured_in_fp32() -> None:
    """The norm of 1024 times 3000 is 32 * 3000 = 96000, over fp16's largest number 65504."""
    param = torch.nn.Parameter(torch.zeros(1024, dtype=torch.float16))
    param.grad = torch.full((1024,), 3000.0, dtype=torch.float16)
    assert clip_gradients([param], 960.0).item() == pytest.approx(96000.0)
    assert param.grad.tolist() == pytest.approx([30.0] * 1024, rel=1e-3)


def test_a_tiny_bound_really_holds_the_weights() -> None:
    """Published PPO code accepted max_grad_norm and never applied it; here a bound of 1e-9 moves
    the weights of SGD by at most lr 1e-9 in all, those of AdamW by lr 1e-9 / eps each.

    Adafactor divides by the gradient's own size and would not show it: there, clipping changes
    only how much a step weighs in the second moment.
    """
    for name in ("sgd", "adamw"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8).double()
        before = [param.detach().clone() for param in layer.parameters()]
        lr, eps = 0.5, 1e-5
        if name == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
            bound = lr * 1e-9
        else:
            cfg = OptimConfig(name="adamw", lr=lr, eps=eps)
            optimizer, bound = build_optimizer(cfg, layer.parameters()), lr * 1e-9 / eps * 9
        layer(torch.randn(4, 8).double()).square().sum().backward()
        assert clip_gradients(layer.parameters(), 1e-9).item() > 1
        optimizer.step()
        pairs = zip(layer.parameters(), before, strict=True)
        moved = torch.cat([(param - old).flatten() for param, old in pairs]).norm().item()
        assert 0.5 * lr * 1e-9 <= moved <= bound * (1 + 1e-4), name

"""The fused PPO loss: its torch form against its parts, its kernel against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, RUNS_KERNELS, run_interpreted
from torch import Tensor

from ppo_nlu import losses, ops

TRAINED = ("logprobs", "values", "entropy")
FIXED = ("old_logprobs", "advantages", "old_values", "returns")


def inputs(rows: int, width: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded rows with NaN in the padding; ratios on both sides of the clipping range."""
    generator = torch.Generator().manual_seed(seed)
    data = {n: torch.randn(rows, width, generator=generator) for n in (*TRAINED, *FIXED)}
    data["old_logprobs"] = data["logprobs"] + 0.4 * data["old_logprobs"]
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    padded = {n: t.masked_fill(~mask, torch.nan).to(DEVICE) for n, t in data.items()}
    return padded, mask.to(DEVICE)


def without(data: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: t for name, t in data.items() if name not in names}


def of_the_policy(data: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """What the loss takes where there is no critic."""
    return without(data, "entropy") | dict.fromkeys(("values", "old_values", "returns"))


def run(function, data: dict[str, Tensor], mask: Tensor, dtype: torch.dtype, **settings):
    """Loss, metrics and the gradients of what trains, of 0.7 times the loss."""
    data = {name: t.to(dtype) for name, t in data.items()}
    leaves = [data[name].requires_grad_() for name in TRAINED]
    loss, metrics = function(mask=mask, **data, **settings)
    return loss, metrics, torch.autograd.grad(0.7 * loss, leaves)


SETTINGS = (
    {},
    {"clip": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "entropy_coef": 0.02},
    {"value_clip": None, "value_coef": 0.25, "denominator": 37.0, "entropy_coef": -0.1},
)


def test_the_torch_form_is_the_sum_of_its_parts() -> None:
    data, mask = inputs(5, 7)
    data = {name: t.cpu() for name, t in data.items()}
    mask = mask.cpu()
    surrogate = (data[name] for name in ("logprobs", "old_logprobs", "advantages"))
    policy, _ = losses.policy_loss(*surrogate, mask, 0.1)
    critic, _ = losses.value_loss(data["values"], data["old_values"], data["returns"], mask, 0.3)
    bonus = losses.masked_mean(data["entropy"], mask)
    loss, metrics = losses.ppo_loss(
        **data, mask=mask, clip=0.1, value_clip=0.3, value_coef=0.8, entropy_coef=0.05
    )
    torch.testing.assert_close(loss, policy + 0.8 * critic - 0.05 * bonus)
    ratio = (data["logprobs"] - data["old_logprobs"])[mask].exp()
    torch.testing.assert_close(metrics["policy/ratio_gap"], (ratio - 1).abs().max())
    alone, metrics = losses.ppo_loss(**of_the_policy(data), mask=mask, clip=0.1)
    torch.testing.assert_close(alone, policy)
    assert not any(name.startswith("value/") for name in metrics)


@pytest.mark.parametrize("function", [losses.ppo_loss, ops.ppo_loss])
def test_tensors_go_by_name_so_that_no_two_change_places(function) -> None:
    data, mask = inputs(2, 3)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    with pytest.raises(TypeError, match="positional"):
        function(*(data[name] for name in names), mask)


class KernelCases:
    """Collected as a test class where kernels can run in this process."""

    @pytest.fixture(autouse=True)
    def _triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PPO_NLU_BACKEND", "triton")

    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 9)])
    def test_loss_metrics_and_gradients(self, shape: tuple[int, int], settings: dict) -> None:
        data, mask = inputs(*shape)
        ours = run(ops.ppo_loss, data, mask, torch.float32, **settings)
        exact = run(losses.ppo_loss, data, mask, torch.float64, **settings)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=1e-6)
        assert ours[1].keys() == exact[1].keys()
        for name, value in exact[1].items():
            torch.testing.assert_close(ours[1][name].double(), value.double(), rtol=2e-6, atol=1e-6)
        for a, b in zip(ours[2], exact[2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)
            assert (a[~mask] == 0).all()

    def test_ties_take_the_subgradients_of_torch(self) -> None:
        """Values at old ± ε, and ratios at both bounds: with ε = 0 these and ρ are 1 exactly."""
        zero = torch.zeros(1, 6, device=DEVICE)
        data = {
            "logprobs": zero,
            "old_logprobs": zero,
            "entropy": zero,
            "advantages": torch.tensor([[1.0, -1.0, 2.0, 0.0, -0.5, 1.0]], device=DEVICE),
            "values": torch.tensor([[0.5, -0.5, 1.0, 0.0, -1.0, 0.25]], device=DEVICE),
            "old_values": zero,
            "returns": torch.tensor([[1.0, 1.0, 0.75, 0.0, -0.75, 0.5]], device=DEVICE),
        }
        mask = torch.ones_like(zero, dtype=torch.bool)
        for clip, dual_clip in ((0.0, None), (0.25, None), (0.0, 1.25)):
            settings = {"clip": clip, "value_clip": 0.5, "dual_clip": dual_clip}
            ours = run(ops.ppo_loss, data, mask, torch.float32, **settings)
            exact = run(losses.ppo_loss, data, mask, torch.float32, **settings)
            for a, b in zip(ours[2], exact[2], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=0.0)

    def test_nan_in_a_counted_token_reaches_the_loss(self) -> None:
        for name in ("logprobs", "values"):
            data, mask = inputs(3, 4, seed=1)
            data[name][mask] = torch.nan
            loss, _ = ops.ppo_loss(**without(data, "entropy"), mask=mask)
            assert loss.isnan()

    def test_a_huge_log_ratio_is_bounded(self) -> None:
        data, mask = inputs(2, 3)
        mask[:] = True
        data = {name: torch.ones_like(t) for name, t in data.items()}
        data["logprobs"] = data["old_logprobs"] + 90.0
        data["advantages"] = -data["advantages"]  # the unclipped term is the larger one
        ours = run(ops.ppo_loss, data, mask, torch.float32)
        exact = run(losses.ppo_loss, data, mask, torch.float32)
        torch.testing.assert_close(ours[0], exact[0])
        for a, b in zip(ours[2], exact[2], strict=True):
            torch.testing.assert_close(a, b)

    def test_no_tokens(self) -> None:
        empty = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
        nothing = dict.fromkeys(without(inputs(1, 1)[0], "entropy"), empty)
        loss, _ = ops.ppo_loss(**nothing, mask=empty.bool())
        assert loss == 0
        data, mask = inputs(2, 3)
        loss, _ = ops.ppo_loss(**without(data, "entropy"), mask=torch.zeros_like(mask))
        assert loss == 0

    @pytest.mark.parametrize("denominator", [None, 50.0, "tensor"])
    def test_many_programs_add_up(self, denominator, monkeypatch: pytest.MonkeyPatch) -> None:
        from ppo_nlu.kernels import ppo_loss

        monkeypatch.setattr(ppo_loss, "ONE_PROGRAM", 16)
        monkeypatch.setattr(ppo_loss, "SPAN", 16)
        data, mask = inputs(9, 7)
        if denominator == "tensor":
            denominator = torch.tensor(50, device=DEVICE)
        settings = {"denominator": denominator, "entropy_coef": 0.1}
        ours = run(ops.ppo_loss, data, mask, torch.float32, **settings)
        exact = run(losses.ppo_loss, data, mask, torch.float64, **settings)
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-6, atol=1e-6)
        for name, value in exact[1].items():
            torch.testing.assert_close(ours[1][name].double(), value.double(), rtol=2e-6, atol=1e-6)
        for a, b in zip(ours[2], exact[2], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)

    def test_without_a_critic(self) -> None:
        data, mask = inputs(4, 5)
        ours, metrics = ops.ppo_loss(**of_the_policy(data), mask=mask)
        exact, names = losses.ppo_loss(**of_the_policy(data), mask=mask)
        torch.testing.assert_close(ours, exact, rtol=2e-6, atol=1e-6)
        assert metrics.keys() == names.keys()

    def test_strided_inputs_and_two_equal_runs(self) -> None:
        data, mask = inputs(6, 4)
        turned = {name: t.T.contiguous().T for name, t in data.items()}
        first = run(ops.ppo_loss, data, mask, torch.float32)
        second = run(ops.ppo_loss, turned, mask.T.contiguous().T, torch.float32)
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


if RUNS_KERNELS:
    Test_ppo_loss = KernelCases
else:

    @pytest.mark.slow
    def test_ppo_loss_in_the_interpreter() -> None:
        run_interpreted(__file__, "Test_ppo_loss")

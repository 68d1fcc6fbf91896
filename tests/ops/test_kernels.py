"""The GAE kernel against its formula, and that every operation launches Triton where it should.

On a machine without CUDA the kernels run in Triton's interpreter, which must be chosen before
Triton is imported: there this file runs itself once more in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE, RUNS_KERNELS, run_interpreted

from ppo_nlu import losses, ops

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if RUNS_KERNELS:
        monkeypatch.setenv("PPO_NLU_BACKEND", "triton")


class KernelCases:
    """Collected as a test class where kernels can run in this process."""

    @pytest.mark.parametrize("length", [1, 7, 1500])
    @pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
    def test_gae(self, lam: float, length: int) -> None:
        rewards, values = torch.randn(2, 3, length, dtype=torch.float64)
        lengths = torch.tensor([length, (length + 1) // 2, 0])
        mask = torch.arange(length) < lengths[:, None]
        expected = losses.gae(rewards, values, mask, 0.99, lam)
        rewards, values = (t.float().masked_fill(~mask, torch.nan) for t in (rewards, values))
        ours = ops.gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE), 0.99, lam)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.double().cpu(), b.double(), atol=3e-5, rtol=1e-5)

    def test_gae_without_rows_and_with_strides(self) -> None:
        empty = torch.zeros(0, 4, device=DEVICE)
        assert ops.gae(empty, empty, empty.bool())[0].shape == (0, 4)
        rewards, values = torch.randn(5, 3).T, torch.randn(3, 10)[:, ::2]
        mask = torch.ones(1, 1, dtype=torch.bool).expand(3, 5)
        ours = ops.gae(rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE))
        for a, b in zip(ours, losses.gae(rewards, values, mask), strict=True):
            torch.testing.assert_close(a.cpu(), b)

    def test_each_operation_launches_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ppo_nlu.kernels import gae

        launched: list[str] = []
        kind = type(gae._gae)
        original = kind.__getitem__

        def spy(kernel, grid):
            launched.append(kernel.__name__)
            return original(kernel, grid)

        monkeypatch.setattr(kind, "__getitem__", spy)

        def new() -> set[str]:
            names = set(launched)
            launched.clear()
            return names

        x = torch.randn(2, 4, device=DEVICE, requires_grad=True)
        weight = torch.randn(5, 4, device=DEVICE)
        targets = torch.tensor([0, 4], device=DEVICE)
        lora = weight[:1], weight[:, :1]
        ops.lora_linear(x, weight, None, *lora, 1.0).sum().backward()
        assert "_decode" in new()
        long = torch.randn(65, 4, device=DEVICE, requires_grad=True)
        group = [weight] * 2, [None] * 2, [lora[0]] * 2, [lora[1].requires_grad_()] * 2, [1.0] * 2
        sum(y.sum() for y in ops.lora_linear_grouped(long, *group)).backward()
        assert {"_shrink", "_reduce"} <= new()
        ops.linear_logprobs(x, weight, targets)[0].sum().backward()
        assert {"_directions", "_combine"} <= new()
        with torch.no_grad():
            ops.linear_logprobs(x, weight, targets)
        assert new() & {"_partial", "_forward"}
        ops.token_logprobs(x @ weight.T, targets)[0].sum().backward()
        assert {"_forward", "_backward"} <= new()
        mask = torch.ones_like(x, dtype=torch.bool)
        ops.gae(x, x, mask)
        assert new() == {"_gae"}
        fixed = dict.fromkeys(("old_logprobs", "advantages", "old_values", "returns"), x.detach())
        ops.ppo_loss(logprobs=x, values=x, mask=mask, **fixed)[0].backward()
        assert new() == {"_forward"}


if RUNS_KERNELS:
    TestKernels = KernelCases
else:

    @pytest.mark.slow
    @pytest.mark.parametrize("only", ["gae", "launches"])
    def test_in_the_interpreter(only: str) -> None:
        run_interpreted(__file__, f"TestKernels and {only}")

"""The attention of a packed tree: its two forms, low precision, autocast."""

from __future__ import annotations

import pytest
import tiny
import torch

from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.tree import attention
from ppo_nlu.tree.pack import build
from tests.tree.shapes import SHAPES

pytestmark = pytest.mark.usefixtures("every_prefix_counts")


@pytest.mark.parametrize("name", SHAPES)
def test_the_products_of_a_gpu_are_those_of_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products on any device, the fused kernel on the CPU: output and gradients agree."""
    tree = build(*SHAPES[name])
    assert tree.plan is not None
    draw = torch.Generator().manual_seed(1)
    size = (len(tree.ids), 4, 8)
    q, k, v = (torch.randn(size, generator=draw, requires_grad=True) for _ in range(3))
    weights = torch.randn(size, generator=draw)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(attention, "FUSED_ON", "cpu" if fused else "none")
        out = attention.TreeAttention.apply(tree.plan, 0.3, q, k, v)
        found.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        tiny.close(a, b, 1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_in_bf16_sums_and_normalises_in_fp32(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further from the truth than softmax in float64 that is rounded to bf16 at its end, but for
    the weights, which a fused kernel may round: one bit more. Scores near 40, of which bf16 would
    keep steps of a quarter."""
    monkeypatch.setattr(attention, "FUSED_ON", "cpu" if fused else "none")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 50, 32).bfloat16() for _ in range(3))
    q, k = q * 4, k * 2
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    later = torch.ones(50, 50, dtype=torch.bool).triu_(1)
    scores = (wide[0] @ wide[1].transpose(-1, -2)).masked_fill(later, -torch.inf)
    exact = scores.softmax(-1) @ wide[2]
    out, lse = attention.partial_attention(q, k, v, True, None, 1.0)
    assert lse.dtype == torch.float32
    assert float((lse - scores.detach().logsumexp(-1)).abs().max()) < 1e-4
    rounding = float((exact.bfloat16().double() - exact).detach().abs().max())
    assert float((out - exact).detach().abs().max()) <= 2 * rounding
    grad = torch.randn(out.shape).bfloat16()
    expected = torch.autograd.grad(exact, wide, grad.double())
    found = attention.partial_backward(grad, attention.Attended(q, k, v, out, lse), True, None, 1.0)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) < 0.02 * float(other.abs().max())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pass_under_autocast(kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward (inside and outside of the region) and decoding, as in bf16."""
    monkeypatch.setattr(attention, "FUSED_ON", "cpu" if fused else "none")
    policy = tiny.policy(kind)
    prompts, answers, prompt_of = SHAPES["several answers a prompt"]
    expected = policy.score(prompts, answers, prompt_of).logprobs.detach()
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scored = policy.score(prompts, answers, prompt_of)
            if inside:
                scored.logprobs.sum().backward()
        if not inside:
            scored.logprobs.sum().backward()
        assert float((scored.logprobs - expected).detach().abs().max()) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = generate(policy, prompts, Sampling(4, greedy=True))
    assert drawn.logprobs.dtype == torch.float32

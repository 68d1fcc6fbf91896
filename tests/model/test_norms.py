"""Norms with a backward of their own are the library's, value and gradient."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ppo_nlu.model import norms


def shaken(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
    return norm.requires_grad_(False)


def holder(norm: nn.Module) -> nn.Module:
    return nn.ModuleDict({"inner": nn.ModuleDict({"norm": norm})})


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_gradient_are_those_of_the_library(scale: float) -> None:
    theirs = shaken(LlamaRMSNorm(48, eps=1e-5))
    model = holder(theirs)
    assert norms.attach(model) == 1
    ours = model.inner.norm
    assert isinstance(ours, norms.FrozenRMSNorm) and ours.weight is theirs.weight
    draw = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(3, 5, 48, generator=draw) for _ in range(2))
    found = []
    for norm in (ours, theirs):
        given = (scale * x).requires_grad_()
        y = norm(given)
        y.backward(grad)
        found.append((y.detach(), given.grad))
    tiny.close(found[0][0], found[1][0])
    tiny.close(scale * found[0][1], scale * found[1][1])


def test_gradient_by_finite_differences() -> None:
    weight = torch.linspace(-1, 2, 7, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(
        lambda x: norms._Norm.apply(x, weight, 1e-6), (x.requires_grad_(),)
    )


def test_others_are_left_alone() -> None:
    """Gemma's adds 1 to its weight and calls its ε otherwise; a trained weight needs a gradient;
    in low precision the library rounds between the steps."""
    for norm in (
        shaken(GemmaRMSNorm(8)),
        LlamaRMSNorm(8),
        shaken(LlamaRMSNorm(8)).to(torch.bfloat16),
        shaken(nn.LayerNorm(8)),
    ):
        model = holder(norm)
        assert norms.attach(model) == 0 and model.inner.norm is norm


@pytest.mark.parametrize("what", ["a trained weight", "bf16 tokens"])
def test_otherwise_it_does_as_the_library_does(what: str) -> None:
    """As for the model that `lora.merge` returns, or under autocast."""
    theirs = shaken(LlamaRMSNorm(16))
    model = holder(theirs)
    norms.attach(model)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    if what == "bf16 tokens":
        x = x.bfloat16()
        assert torch.equal(model.inner.norm(x), theirs(x))
        return
    theirs.weight.requires_grad_(True)  # the same parameter
    found = [
        torch.autograd.grad(n(x).square().sum(), theirs.weight)[0]
        for n in (model.inner.norm, theirs)
    ]
    tiny.close(*found)
    assert float(found[0].abs().min()) > 0.0


def test_a_module_of_that_name_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.01

    class TwoRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

    for kind in (OddRMSNorm, TwoRMSNorm):
        assert norms.attach(holder(shaken(kind(8)))) == 0
    twice = holder(shaken(LlamaRMSNorm(8)))
    assert [norms.attach(twice), norms.attach(twice)] == [1, 0]


def test_a_policy_has_them_under_the_same_names() -> None:
    before = dict(tiny.causal_lm("llama").named_parameters())
    policy = tiny.policy("llama")
    assert sum(isinstance(m, norms.FrozenRMSNorm) for m in policy.model.modules()) == 5
    names = {n for n, _ in policy.model.named_parameters()}
    assert {n for n in before if "norm" in n} <= names

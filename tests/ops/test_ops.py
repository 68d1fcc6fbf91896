"""The operations in their torch form on the CPU, against plain float64 formulas written here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ppo_nlu import losses, ops
from ppo_nlu.ops import torch_capped, torch_logprobs


@pytest.fixture(autouse=True)
def _torch_forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PPO_NLU_BACKEND", "torch")
    torch.manual_seed(0)
    return


def plain(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log π and entropy in float64, the textbook way; 0 · -inf counts as 0."""
    log_p = F.log_softmax(logits.double() / temperature, dim=-1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0)
    return log_p.gather(1, targets[:, None])[:, 0], -terms.sum(-1)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return out


# ---- lora_linear


def lora_inputs(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (2, 5), rank: int = 3):
    x = torch.randn(*rows, 6, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(7, 6, dtype=dtype), torch.randn(7, dtype=dtype)
    lora_a = torch.randn(rank, 6, dtype=dtype, requires_grad=True)
    lora_b = torch.randn(7, rank, dtype=dtype, requires_grad=True)
    return x, weight, bias, lora_a, lora_b


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_linear_is_its_formula(rank: int, with_bias: bool) -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs(rank=rank)
    bias = bias if with_bias else None
    expected = F.linear(x, weight, bias) + 1.7 * (x @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.7), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear_gradients(p: float) -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs()
    assert torch.autograd.gradcheck(
        lambda x, b, a, c: ops.lora_linear(x, weight, b, a, c, 1.7, p, 5),
        (x, bias.requires_grad_(), lora_a, lora_b),
    )


def test_a_fresh_adapter_changes_no_bit() -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs(torch.float32)
    y = ops.lora_linear(x, weight, bias, lora_a, torch.zeros_like(lora_b), 2.0)
    assert torch.equal(y, F.linear(x, weight, bias))


def test_dropout_keeps_the_expectation_and_repeats_with_its_seed() -> None:
    x, weight = torch.ones(4000, 8), torch.zeros(1, 8)
    lora_a, lora_b = torch.ones(1, 8), torch.ones(1, 1)
    y = ops.lora_linear(x, weight, None, lora_a, lora_b, 1.0, 0.25, seed=3)
    # Mean of 8 · Bernoulli(0.75)/0.75 is 8; its deviation over 32000 draws is 0.026.
    assert abs(y.mean().item() - 8.0) < 0.15 and y.std() > 0.5
    again = ops.lora_linear(x, weight, None, lora_a, lora_b, 1.0, 0.25, seed=3)
    other = ops.lora_linear(x, weight, None, lora_a, lora_b, 1.0, 0.25, seed=4)
    assert torch.equal(y, again) and not torch.equal(y, other)


def test_dropout_without_a_seed_agrees_under_activation_checkpointing() -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs()

    def layer(x: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.0, 0.5).square()

    torch.manual_seed(1)
    (direct,) = torch.autograd.grad(layer(x).sum(), x)
    torch.manual_seed(1)
    (recomputed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(recomputed, direct)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs()
    weight.requires_grad_()
    ops.lora_linear(x.detach(), weight, bias, lora_a, lora_b, 1.0).sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad is None
    assert lora_a.grad is not None and lora_b.grad is not None
    with torch.no_grad():
        assert not ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.0).requires_grad


def test_no_gradient_as_large_as_the_weight_is_formed() -> None:
    x, weight = torch.randn(4, 50, requires_grad=True), torch.randn(60, 50)
    lora_a, lora_b = torch.randn(2, 50).requires_grad_(), torch.randn(60, 2).requires_grad_()
    y = ops.lora_linear(x, weight, None, lora_a, lora_b, 1.0).sum()
    with Sizes() as sizes:
        y.backward()
    assert sizes.largest < weight.numel()  # the gradients of y and x, and nothing larger


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "empty", "vector"])
def test_any_layout_of_x(layout: str) -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs()
    x = {
        "transposed": torch.randn(6, 5, 2, dtype=torch.float64).permute(2, 1, 0),
        "sliced": torch.randn(4, 5, 13, dtype=torch.float64)[::2, :, 1::2],
        "expanded": torch.randn(1, 1, 6, dtype=torch.float64).expand(2, 5, 6),
        "empty": torch.randn(0, 5, 6, dtype=torch.float64),
        "vector": torch.randn(6, dtype=torch.float64),
    }[layout].requires_grad_()
    y = ops.lora_linear(x, weight, bias, lora_a, lora_b, 0.5)
    expected = F.linear(x, weight, bias) + 0.5 * (x @ lora_a.T) @ lora_b.T
    torch.testing.assert_close(y, expected)
    upstream = torch.randn((), dtype=torch.float64).expand(y.shape)  # stride 0, as from .sum()
    ours = torch.autograd.grad(y, (x, lora_a, lora_b), upstream)
    theirs = torch.autograd.grad(expected, (x, lora_a, lora_b), upstream)
    torch.testing.assert_close(ours, theirs)


def test_a_bf16_base_with_fp32_adapters_is_no_worse_than_the_plain_form() -> None:
    x = torch.randn(40, 64, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    lora_a, lora_b = torch.randn(8, 64).requires_grad_(), torch.randn(48, 8).requires_grad_()
    low, high = lora_a.bfloat16(), lora_b.bfloat16()
    exact = x.double() @ weight.double().T + 2 * (x.double() @ low.double().T) @ high.double().T
    y = ops.lora_linear(x, weight, None, lora_a, lora_b, 2.0)
    simple = F.linear(x, weight) + 2 * F.linear(F.linear(x, low), high)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() <= 1.05 * (simple - exact).norm()
    y.sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_autocast_casts_as_a_linear_layer_does() -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(x, weight, bias, lora_a, lora_b, 1.0)
        logprobs, _ = ops.linear_logprobs(x[0], weight, torch.zeros(5, dtype=torch.long))
    assert y.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("change", ["x", "lora_b", "bias", "p"])
def test_lora_linear_refuses_what_does_not_fit(change: str) -> None:
    x, weight, bias, lora_a, lora_b = lora_inputs()
    args = {"x": x, "lora_b": lora_b, "bias": bias, "p": 0.0}
    args[change] = 1.0 if change == "p" else args[change][..., :-1]
    with pytest.raises(ValueError, match=r"expected|must both end"):
        ops.lora_linear(args["x"], weight, args["bias"], lora_a, args["lora_b"], 1.0, args["p"], 1)


# ---- linear_logprobs and token_logprobs


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_logprobs, "_block_shape", lambda rows, vocab, device: (7, 5))


def head(rows: int = 20, width: int = 6, vocab: int = 13, dtype: torch.dtype = torch.float64):
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    targets[:2] = torch.tensor([0, vocab - 1])
    return hidden, torch.randn(vocab, width, dtype=dtype), torch.randn(vocab, dtype=dtype), targets


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_linear_logprobs_is_its_formula_with_gradients(trainable: bool, temperature: float) -> None:
    hidden, weight, bias, targets = head()
    weight.requires_grad_(trainable), bias.requires_grad_(trainable)
    ours = ops.linear_logprobs(hidden, weight, targets, bias, temperature)
    theirs = plain(hidden @ weight.T + bias, targets, temperature)
    torch.testing.assert_close(ours, theirs)
    inputs = (hidden, weight, bias) if trainable else (hidden,)
    for loss in (lambda a, b: a.sum(), lambda a, b: b.sum(), lambda a, b: (a * b.cos()).sum()):
        torch.testing.assert_close(
            torch.autograd.grad(loss(*ours), inputs, retain_graph=True),
            torch.autograd.grad(loss(*theirs), inputs, retain_graph=True),
        )


@pytest.mark.usefixtures("small_blocks")
def test_linear_logprobs_gradcheck() -> None:
    hidden, weight, bias, targets = head(9)
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        assert torch.autograd.gradcheck(
            lambda h, w: ops.linear_logprobs(h, w, targets, bias, 0.7), (hidden, weight)
        )


@pytest.mark.parametrize("bias_only", [True, False])
def test_a_bias_or_a_weight_may_train_alone(bias_only: bool) -> None:
    hidden, weight, bias, targets = head()
    trained = (bias if bias_only else weight).requires_grad_()
    ours = ops.linear_logprobs(hidden.detach(), weight, targets, bias)[0].sum()
    theirs = plain(hidden.detach() @ weight.T + bias, targets, 1.0)[0].sum()
    torch.testing.assert_close(
        torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained)
    )


@pytest.mark.parametrize("kind", ["layer", "head", "head with LoRA", "entropy", "logits"])
def test_a_backward_inside_an_autocast_region_lowers_nothing(kind: str) -> None:
    """The forward ran in float32 outside it."""
    hidden, weight, bias, targets = head(dtype=torch.float32)
    lora_a, lora_b = torch.randn(3, 6, requires_grad=True), torch.randn(13, 3, requires_grad=True)
    inputs: tuple[Tensor, ...] = (hidden,)
    if kind == "layer":
        out = ops.lora_linear(hidden, weight, bias, lora_a, lora_b, 0.5)
        inputs = (hidden, lora_a, lora_b)
    elif kind == "head with LoRA":
        out = ops.linear_logprobs(hidden, weight, targets, lora_a=lora_a, lora_b=lora_b)[0]
        inputs = (hidden, lora_a, lora_b)
    elif kind == "logits":
        out = ops.token_logprobs(hidden, targets % 6)[0]
    else:
        out = ops.linear_logprobs(hidden, weight, targets)[int(kind == "entropy")]
    outside = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_a_weight_that_asks_for_a_gradient_gets_none() -> None:
    x, weight, _, lora_a, lora_b = lora_inputs()
    arguments = [t.detach() for t in (lora_a, lora_b)]
    weight = weight.detach().requires_grad_()
    assert not ops.lora_linear(x.detach(), weight, None, *arguments, 1.0).requires_grad
    a, b = ([t] for t in arguments)
    (y,) = ops.lora_linear_grouped(x.detach(), [weight], [None], a, b, [1.0])
    assert not y.requires_grad


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_a_lora_on_the_head_counts_and_trains(head_trains: bool) -> None:
    """TRL's fused loss left it out (its issue 4612)."""
    hidden, weight, bias, targets = head()
    lora_a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    lora_b = torch.randn(13, 3, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_(head_trains)
    lora = {"lora_a": lora_a, "lora_b": lora_b, "scaling": 0.5}
    ours = ops.linear_logprobs(hidden, weight, targets, bias, 0.7, **lora)
    full = weight + 0.5 * lora_b @ lora_a
    theirs = plain(hidden @ full.T + bias, targets, 0.7)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(
            ops.linear_logprobs(hidden, weight, targets, bias, 0.7, **lora), theirs
        )
    inputs = (hidden, lora_a, lora_b, *([weight] if head_trains else []))
    for loss in (lambda a, b: a.sum(), lambda a, b: (a * b.cos()).sum()):
        torch.testing.assert_close(
            torch.autograd.grad(loss(*ours), inputs, retain_graph=True),
            torch.autograd.grad(loss(*theirs), inputs, retain_graph=True),
        )
    with pytest.raises(ValueError, match="go together"):
        ops.linear_logprobs(hidden, weight, targets, lora_a=lora_a)
    with pytest.raises(ValueError, match="lora_b is"):
        ops.linear_logprobs(hidden, weight, targets, lora_a=lora_a, lora_b=lora_b[1:])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.usefixtures("small_blocks")
def test_the_entropy_gradient_formed_in_the_forward(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = head()
    ours = ops.linear_logprobs(hidden, weight, targets, bias, temperature, entropy_grad=True)
    theirs = plain(hidden @ weight.T + bias, targets, temperature)
    monkeypatch.setattr(torch_logprobs, "_recompute", None)  # nothing is computed again
    for loss in (lambda a, b: a.sum(), lambda a, b: b.sum(), lambda a, b: (a * b.cos()).sum()):
        torch.testing.assert_close(
            torch.autograd.grad(loss(*ours), hidden, retain_graph=True),
            torch.autograd.grad(loss(*theirs), hidden, retain_graph=True),
        )


def test_the_logits_are_never_whole() -> None:
    rows, vocab = 300, 1000
    hidden, weight, _, targets = head(rows, 8, vocab, torch.float32)
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        with Sizes() as sizes:
            logprobs, entropy = ops.linear_logprobs(hidden, weight, targets)
            (logprobs.sum() + entropy.sum()).backward()
        assert sizes.largest <= 128 * vocab


def test_a_peaked_policy_keeps_its_small_gradient() -> None:
    """p of the target is 1 − 1e-6: a gradient formed as a difference would be mostly rounding."""
    weight = torch.eye(8)
    hidden = torch.full((1, 8), 0.0).index_fill(1, torch.tensor([3]), 15.8).requires_grad_()
    logprobs, _ = ops.linear_logprobs(hidden, weight, torch.tensor([3]))
    logprobs.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    p = torch.softmax(exact @ weight.double().T, 1)
    expected = -p.detach().clone()
    expected[0, 3] = p[0, [0, 1, 2, 4, 5, 6, 7]].sum()
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(logprobs.double(), p[0, 3:4].log().detach(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_heads_lose_nothing_but_their_own_rounding(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(150, 32, 700, dtype)
    ours = ops.linear_logprobs(hidden, weight, targets, bias)
    exact = hidden.detach().double().requires_grad_()
    theirs = plain(exact @ weight.double().T + bias.double(), targets, 1.0)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=3e-5, rtol=1e-5)
    ours[0].sum().backward(), theirs[0].sum().backward()
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("vocab", [1, 2, 127, 129, 5000])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_token_logprobs_is_its_formula_with_gradients(vocab: int, temperature: float) -> None:
    logits = (3 * torch.randn(11, vocab, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, vocab, (11,))
    ours, theirs = (f(logits, targets, temperature) for f in (ops.token_logprobs, plain))
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(2, 11, dtype=torch.float64)
    (a,), (b,) = (
        torch.autograd.grad((weights[0] * out[0] + weights[1] * out[1]).sum(), logits)
        for out in (ours, theirs)
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", [-1e3, 0.0, 1e4])
def test_the_level_of_the_logits_does_not_matter(level: float) -> None:
    logits = (level + torch.randn(4, 300).round(decimals=1)).requires_grad_()
    targets = torch.randint(0, 300, (4,))
    ours, theirs = ops.token_logprobs(logits, targets), plain(logits, targets, 1.0)
    torch.testing.assert_close(ours[0].double(), theirs[0], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(ours[1].double(), theirs[1], atol=2e-5, rtol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_forbidden_tokens() -> None:
    """-inf at other tokens leaves all finite; -inf at the target is log 0, with a finite slope."""
    hidden, weight, bias, _ = head(3)
    bias[4:11] = -torch.inf  # a whole block and more
    targets = torch.tensor([0, 12, 5])
    logits = (hidden.detach() @ weight.T + bias).requires_grad_()
    for leaf, out in (
        (hidden, ops.linear_logprobs(hidden, weight, targets, bias)),
        (logits, ops.token_logprobs(logits, targets)),
    ):
        expected = plain(logits, targets, 1.0)
        torch.testing.assert_close(out[0], expected[0])
        torch.testing.assert_close(out[1], expected[1])
        assert out[0][2] == -torch.inf
        (grad,) = torch.autograd.grad(out[0][:2].sum() + out[1].sum(), leaf, retain_graph=True)
        assert grad.isfinite().all()
        (grad,) = torch.autograd.grad(out[0].sum(), leaf)
        assert grad.isfinite().all()


def test_fp16_logits_near_their_limit_are_widened_before_scaling() -> None:
    logits = torch.tensor([[60000.0, 59990.0, -60000.0]], dtype=torch.float16)
    ours = ops.token_logprobs(logits, torch.tensor([1]), 0.5)
    theirs = plain(logits, torch.tensor([1]), 0.5)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(rows: int) -> None:
    hidden, weight, bias, _ = head(2)
    hidden = hidden[:rows].detach().requires_grad_()
    targets = torch.full((rows,), 3)
    for out in (
        ops.linear_logprobs(hidden, weight, targets, bias),
        ops.token_logprobs(hidden @ weight.T, targets),
    ):
        assert out[0].shape == out[1].shape == (rows,)
        (out[0].sum() + out[1].sum()).backward()
    assert hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("small_blocks")
def test_any_layout_of_hidden_states_and_logits(dtype: torch.dtype) -> None:
    _, weight, bias, targets = head(6)
    targets = targets.to(dtype)
    for hidden in (
        torch.randn(6, 6, dtype=torch.float64).T,
        torch.randn(12, 6, dtype=torch.float64)[::2],
        torch.randn(1, 6, dtype=torch.float64).expand(6, 6),
    ):
        hidden = hidden.requires_grad_()
        ours = ops.linear_logprobs(hidden, weight, targets, bias)
        theirs = plain(hidden @ weight.T + bias, targets.long(), 1.0)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours[0].sum(), hidden), torch.autograd.grad(theirs[0].sum(), hidden)
        )
        transposed = torch.randn(13, 6, dtype=torch.float64).T
        torch.testing.assert_close(
            ops.token_logprobs(transposed, targets), plain(transposed, targets.long(), 1.0)
        )


@pytest.mark.parametrize("target", [-1, 13, -100])
def test_a_target_out_of_range_is_an_error(target: int) -> None:
    hidden, weight, _, targets = head()
    targets[7] = target
    with pytest.raises(IndexError, match="out of range"):
        ops.linear_logprobs(hidden, weight, targets)
    with pytest.raises(IndexError, match="out of range"):
        ops.token_logprobs(hidden @ weight.T, targets)


def test_logprobs_refuse_what_does_not_fit() -> None:
    hidden, weight, bias, targets = head()
    for args in (
        (hidden, weight, targets[:-1]),
        (hidden, weight, targets.double()),
        (hidden[:, :-1], weight, targets),
        (hidden, weight, targets, bias[:-1]),
        (hidden, weight, targets, None, 0.0),
        (hidden, weight, targets, None, float("nan")),
    ):
        with pytest.raises(ValueError):
            ops.linear_logprobs(*args)


def test_two_backwards_agree_and_a_double_one_is_refused() -> None:
    hidden, weight, _, targets = head()
    loss = ops.linear_logprobs(hidden, weight, targets)[0].square().sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_all_names_the_operations() -> None:
    """What a star brings: every public function that computes, and no helper of the engine."""
    helpers = {"choose_backend", "ppo_loss_form", "without_autocast"}
    own = {name for name, x in vars(ops).items() if getattr(x, "__module__", "") == ops.__name__}
    assert sorted(ops.__all__) == ops.__all__
    assert set(ops.__all__) == {name for name in own if not name.startswith("_")} - helpers


def test_gae_is_that_of_the_losses() -> None:
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    ours, theirs = (f(rewards, values, mask, 0.9, 0.8) for f in (ops.gae, losses.gae))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- which form runs


def test_the_backend_is_chosen_by_variable_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PPO_NLU_BACKEND")
    assert ops.choose_backend(x) == "torch"
    monkeypatch.setenv("PPO_NLU_BACKEND", "triton")
    if ops._has_triton():
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            ops.choose_backend(x)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert ops.choose_backend(x) == "triton"
        monkeypatch.setenv("PPO_NLU_BACKEND", "auto")
        assert ops.choose_backend(x) == "triton"
        monkeypatch.setenv("PPO_NLU_BACKEND", "torch")
        assert ops.choose_backend(x) == "torch"
    monkeypatch.setattr(ops, "_has_triton", lambda: False)
    monkeypatch.setenv("PPO_NLU_BACKEND", "triton")
    with pytest.raises(ValueError, match="pip install triton"):
        ops.choose_backend(x)
    monkeypatch.setenv("PPO_NLU_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda' is not known; use one of auto, triton, torch"):
        ops.lora_linear(*(t.detach() for t in lora_inputs()), 1.0)


def test_the_torch_forms_never_import_triton() -> None:
    code = (
        "import sys, torch; from ppo_nlu import ops; x = torch.ones(2, 3, requires_grad=True); "
        "ops.lora_linear(x, x.detach(), None, x[:1], x[:, :1], 1.0).sum().backward(); "
        "ops.linear_logprobs(x, x.detach(), torch.tensor([0, 1]))[0].sum().backward(); "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["layer", "head", "entropy", "logits"])
def test_operations_inside_a_compiled_graph(kind: str) -> None:
    """Traced by torch.compile, forward and backward; the graph itself is run as it is."""
    hidden, weight, bias, targets = head(dtype=torch.float32)
    lora_a, lora_b = torch.randn(3, 6), torch.randn(13, 3)

    def loss() -> Tensor:
        if kind == "layer":
            return ops.lora_linear(hidden, weight, bias, lora_a, lora_b, 0.5).square().sum()
        if kind == "logits":
            return ops.token_logprobs(hidden, targets % 6)[0].sum()
        both = ops.linear_logprobs(hidden, weight, targets, bias, entropy_grad=True)
        return both[int(kind == "entropy")].sum()

    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(), loss())
    torch.testing.assert_close(
        torch.autograd.grad(compiled(), hidden), torch.autograd.grad(loss(), hidden)
    )


# ---- what comes out may be worked on in place


def test_the_outputs_of_lora_are_no_views() -> None:
    """A block may add to its projection in place; the gradients are those of the sum."""
    x, weight, bias, lora_a, lora_b = lora_inputs()
    for change in (lambda y: y.mul_(2.0).add_(1.0), lambda y: y.clamp_(-1.0, 1.0)):
        y = change(ops.lora_linear(x, weight, bias, lora_a, lora_b, 0.5))
        ours = torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b))
        y = F.linear(x, weight, bias) + 0.5 * x @ lora_a.t() @ lora_b.t()
        theirs = torch.autograd.grad(change(y).square().sum(), (x, lora_a, lora_b))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    both = ops.lora_linear_grouped(
        x, [weight] * 2, [bias] * 2, [lora_a] * 2, [lora_b] * 2, [0.5] * 2
    )
    both[0].add_(1.0)
    both[1].mul_(3.0).sum().backward()


# ---- logits as they are sampled from, and with a soft cap


def test_logits_of_bf16_are_not_rounded() -> None:
    """A product in bf16 keeps 8 bits of a logit: of one near 20 a step of 0.125."""
    hidden, weight = torch.randn(5, 64).bfloat16() * 4, torch.randn(40_001, 64).bfloat16()
    bias = torch.randn(40_001).bfloat16()
    found = ops.linear_logits(hidden, weight, bias)
    exact = hidden.double() @ weight.double().t() + bias.double()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-4
    assert float((F.linear(hidden, weight, bias).double() - exact).abs().max()) > 0.1
    targets = torch.arange(5)
    scored, _ = ops.linear_logprobs(hidden, weight, targets, bias)
    drawn = found.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scored, drawn, rtol=0, atol=1e-5)
    hidden.requires_grad_()
    again = ops.linear_logits(hidden, weight, bias)
    torch.testing.assert_close(again.detach(), found)
    (grad,) = torch.autograd.grad(again[:, 7].sum(), hidden)
    assert torch.equal(grad, weight[7].expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_logprobs_behind_a_soft_cap(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c tanh(z/c) in float64 by autograd; a few rows at a time as with all of them."""
    monkeypatch.setattr(torch_capped, "_CAPPED", 3 * 33)
    for module in (torch_capped, torch_logprobs):
        monkeypatch.setattr(module, "WIDENED", 16 * 5)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    weight, bias = 3 * torch.randn(33, 16, dtype=dtype), torch.randn(33, dtype=dtype)
    targets = torch.randint(0, 33, (rows,))
    upstream = torch.randn(2, rows, dtype=torch.float64)
    found = ops.linear_logprobs(hidden, weight, targets, bias, 0.7, softcap=5.0, entropy_grad=True)
    (torch.stack(found).double() * upstream).sum().backward()
    assert hidden.grad is not None
    wide = hidden.detach().double().requires_grad_()
    logits = 5.0 * torch.tanh((wide @ weight.double().t() + bias.double()) / 5.0)
    expected = plain(logits, targets, 0.7)
    (torch.stack(expected) * upstream).sum().backward()
    assert wide.grad is not None
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).detach().abs().max()) < bound * 10
    gap = (hidden.grad.double() - wide.grad).abs().max()
    assert float(gap) < (1e-12 if dtype == torch.float64 else 0.02) * float(wide.grad.abs().max())


def test_a_soft_cap_wants_a_frozen_head() -> None:
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 4])
    for options in ({"softcap": 0.0}, {"softcap": 2.0, "bias": torch.ones(5, requires_grad=True)}):
        with pytest.raises(ValueError, match="softcap"):
            ops.linear_logprobs(hidden, weight, targets, **options)
    logprobs, entropy = ops.linear_logprobs(hidden.requires_grad_(), weight, targets, softcap=2.0)
    with pytest.raises(ValueError, match="entropy_grad"):
        (logprobs + entropy).sum().backward()

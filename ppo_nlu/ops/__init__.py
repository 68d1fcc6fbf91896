"""The operations that decide speed and memory, each in a torch form and a Triton form.

Which form runs is decided in each call: CUDA tensors take Triton, CPU and float64 tensors take
torch, and with TRITON_INTERPRET=1 CPU tensors take Triton in its interpreter.
PPO_NLU_BACKEND=triton|torch overrides this; `triton` never falls back silently. Triton is imported
only when a kernel is used.

Everything is computed in fp32 (float64 for float64 inputs). A gradient has the dtype of its tensor.
Double backward is refused by autograd, never wrong.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ppo_nlu import advantages, losses
from ppo_nlu.errors import UserError
from ppo_nlu.ops import torch_capped, torch_logprobs, torch_lora

__all__ = [
    "gae",
    "linear_logits",
    "linear_logprobs",
    "lora_linear",
    "lora_linear_grouped",
    "ppo_loss",
    "token_logprobs",
]

BACKENDS = ("auto", "triton", "torch")


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank addition: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ.

    Source: arXiv 2106.09685, equation 3; s = α/r is given by the caller.

    `weight` is a constant: it never gets a gradient and no (O, K) gradient is ever formed. Only x
    and S = s · drop(x) Aᵀ are kept for the backward; the dropout mask is drawn again from `seed`
    (by default taken from torch's CPU generator, so that checkpointed recomputation agrees).

    Args: x (..., K), weight (O, K), bias (O,) or None, lora_a (r, K), lora_b (O, r).
    Returns: y (..., O) in the dtype of x.
    """
    member = [weight], [bias], [lora_a], [lora_b], [scaling]
    return lora_linear_grouped(x, *member, dropout_p, seed)[0]


def lora_linear_grouped(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for layers that share x (q, k and v; gate and up): yᵢ for every layer i.

    The Aᵢ are stacked, so that x is read once for all Sᵢ, and the gradient of x is summed in one
    buffer. One dropout mask serves the whole group, where separate calls would draw one each.

    Args: x (..., K), weights (Oᵢ, K), biases (Oᵢ,) or None, lora_as (rᵢ, K), lora_bs (Oᵢ, rᵢ).
    Returns: yᵢ (..., Oᵢ) in the dtype of x.
    """
    members = list(zip(weights, biases, lora_as, lora_bs, scalings, strict=True))
    for weight, bias, lora_a, lora_b, _ in members:
        _check_lora(x, weight, bias, lora_a, lora_b, dropout_p)
    if not members:
        return ()
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    biases = [None if b is None else b.to(x.dtype) for b in biases]
    scalings = [float(s) for s in scalings]
    seed = _seed(dropout_p, seed)
    frozen = [w.detach() for w in weights]
    args = (frozen, biases, list(lora_as), list(lora_bs), scalings, float(dropout_p), seed)
    with without_autocast(x):
        if choose_backend(x) == "triton":
            return _launch("lora_linear", x, *args, function="lora_linear_grouped")
        return torch_lora.lora_linear_grouped(x, *args)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    entropy_grad: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy of softmax((h Wᵀ + b)/τ), without the (N, V) logits in memory.

    With a frozen head ∂log π/∂h = (W_y − Σᵥ pᵥ W_v)/τ does not depend on the upstream gradient. It
    is formed in the forward, while a block of probabilities is at hand, and the backward is one
    multiplication. `entropy_grad` does the same for the entropy, at the price of one more product;
    without it the entropy's gradient comes from recomputed blocks. With a trainable head (or bias,
    or a LoRA of the head) all gradients do.

    With a `softcap` c (Gemma 2, arXiv 2408.00118) the logits are c · tanh((h Wᵀ + b)/c) before τ.
    This runs in torch on every device and takes a frozen head without LoRA; the entropy has a
    gradient only with `entropy_grad`.

    Args: hidden (N, H), weight (V, H), targets (N,) integers in [0, V), bias (V,) or None;
        lora_a (r, H) and lora_b (V, r) add s · (h Aᵀ) Bᵀ to the logits, s being `scaling`.
    Returns: logprobs (N,), entropy (N,), fp32 (float64 for float64 inputs).
    """
    _check_rows(hidden, targets, temperature, "hidden")
    _check_head(hidden, weight, bias, lora_a, lora_b)
    _check_targets(targets, weight.shape[0])
    if softcap is not None:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or lora_a is not None or not softcap > 0:
            raise ValueError("softcap takes a number above 0 and a frozen head without LoRA")
        with without_autocast(hidden):
            return torch_capped.capped_logprobs(
                hidden, weight, targets.long(), bias, temperature, softcap, entropy_grad
            )
    named: dict[str, Any] = {
        "weight": weight,
        "targets": targets.long(),
        "bias": bias,
        "temperature": float(temperature),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scaling": float(scaling),
        "entropy_grad": entropy_grad,
    }
    with without_autocast(hidden):
        if choose_backend(hidden) == "triton":
            return _launch("linear_logprobs", hidden, **named)
        return torch_logprobs.linear_logprobs(hidden, **named)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h Wᵀ + b in fp32, not rounded to the dtype of h on the way.

    So what is sampled from these logits comes from the distribution that `linear_logprobs` scores.

    Args: hidden (N, H), weight (V, H), bias (V,) or None.
    Returns: (N, V), fp32 (float64 for float64 inputs).
    """
    _check_head(hidden, weight, bias, None, None)
    with without_autocast(hidden):
        return torch_logprobs.linear_logits(hidden, weight, bias)


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy of softmax(z/τ) for logits that already exist.

    Args: logits (N, V), targets (N,) integers in [0, V).
    Returns: logprobs (N,), entropy (N,), fp32 (float64 for float64 logits).
    """
    _check_rows(logits, targets, temperature, "logits")
    _check_targets(targets, logits.shape[1])
    targets = targets.long()
    with without_autocast(logits):
        if choose_backend(logits) == "triton":
            return _launch("token_logprobs", logits, targets, float(temperature))
        return torch_logprobs.token_logprobs(logits, targets, float(temperature))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, R) as in `ppo_nlu.losses.gae`; on CUDA in one launch, detached."""
    if choose_backend(values) == "triton":
        return _launch(
            "gae",
            rewards.detach(),
            values=values.detach(),
            mask=mask,
            gamma=float(gamma),
            lam=float(lam),
        )
    return advantages.gae(rewards=rewards, values=values, mask=mask, gamma=gamma, lam=lam)


def ppo_loss(*, logprobs: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss of PPO; on CUDA one launch each way.

    Arguments, loss and metrics are those of `ppo_nlu.losses.ppo_loss`, with its defaults.
    """
    return ppo_loss_form(logprobs)(logprobs=logprobs, **given)


def ppo_loss_form(logprobs: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The `ppo_loss` for log-probs on this device: the kernel, or `losses.ppo_loss` itself."""
    if choose_backend(logprobs) != "triton":
        return losses.ppo_loss

    def launched(*, logprobs: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found: tuple[Tensor, dict[str, Tensor]] = _launch("ppo_loss", logprobs, **given)
        return found

    return launched


# ---- which form runs


def choose_backend(tensor: Tensor) -> str:
    """'triton' or 'torch', from PPO_NLU_BACKEND, the tensor's device and TRITON_INTERPRET."""
    choice = os.environ.get("PPO_NLU_BACKEND", "").strip().lower() or "auto"
    if choice not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UserError(f"PPO_NLU_BACKEND={choice!r} is not known; use one of {known}")
    if choice == "torch":
        return "torch"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
    runnable = tensor.is_cuda or interpreted
    if choice == "auto":
        fits = tensor.dtype != torch.float64  # Triton takes scalars (1/τ, γ, s) in fp32
        return "triton" if runnable and fits and _has_triton() else "torch"
    if not _has_triton():
        raise UserError("PPO_NLU_BACKEND=triton, but triton is not installed: pip install triton")
    if not runnable:
        raise UserError(
            f"PPO_NLU_BACKEND=triton, but the tensor is on {tensor.device.type}: move it to CUDA, "
            "or set TRITON_INTERPRET=1 before Python starts"
        )
    return "triton"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launch(module: str, first: Tensor, *rest: Any, function: str = "", **named: Any) -> Any:
    """A kernel's function, on the device of its first argument (Triton takes the current one)."""
    with torch.cuda.device_of(first):
        return _kernel(module, function or module)(first, *rest, **named)


@cache
def _kernel(module: str, function: str) -> Callable[..., Any]:
    return getattr(import_module(f"ppo_nlu.kernels.{module}"), function)


# ---- checks


def _check_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, p: float
) -> None:
    (out, features), rank = weight.shape, lora_a.shape[0]
    if x.shape[-1:] != (features,) or lora_a.shape != (rank, features):
        raise ValueError(
            f"x {tuple(x.shape)} and lora_a {tuple(lora_a.shape)} must both end in K = {features}, "
            f"the columns of weight {tuple(weight.shape)}"
        )
    if lora_b.shape != (out, rank):
        raise ValueError(f"lora_b is {tuple(lora_b.shape)}, expected {(out, rank)}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected {(out,)}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p is {p}, expected 0 <= dropout_p < 1")


def _check_rows(rows: Tensor, targets: Tensor, temperature: float, name: str) -> None:
    if rows.dim() != 2 or targets.shape != rows.shape[:1]:
        raise ValueError(
            f"expected {name} (N, ·) and targets (N,), got {tuple(rows.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0")


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> None:
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} differ in H"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b go together: give both or neither")
    if lora_a is not None and lora_b is not None:
        _check_lora(hidden, weight, None, lora_a, lora_b, 0.0)


def _check_targets(targets: Tensor, vocab: int) -> None:
    """A target outside [0, V) raises IndexError.

    On CUDA this costs one small reduction and one copy of two numbers to the host. While a CUDA
    graph is captured no copy is possible and the check is left out; the kernels then give NaN for
    such a row and never read outside the logits.
    """
    if targets.numel() == 0 or torch.compiler.is_compiling():
        return
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = torch.stack(torch.aminmax(targets)).tolist()
    if low < 0 or high >= vocab:
        raise IndexError(
            f"a target is out of range: found {low}..{high}, the vocabulary is 0..{vocab - 1}; "
            "leave out padding and masked rows before the call"
        )


def _seed(dropout_p: float, seed: int | None) -> int:
    """The given seed, or one from torch's CPU generator: a recomputation then draws it again."""
    if seed is None and dropout_p > 0:
        return int(torch.randint(2**31 - 1, ()).item())
    return seed or 0


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off on the device of x. Entering a region costs 20 µs, so it is done only
    where autocast is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)

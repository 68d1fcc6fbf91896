"""Who is timed: our operations, plain torch, the published kernels that are installed, the limits.

A provider makes a callable without arguments from prepared inputs; what it sets up in doing so
(layers, copies, compilation) is not timed. All are asked for log-probabilities alone unless the
mode names the entropy; ours and PyTorch's row forms always return both. The head is frozen for
everyone, so rivals that can leave out its gradient do. It is one file because it is a list: one
short function for each provider.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import SCALING, Inputs, plain_gae, plain_logprobs, plain_ppo_loss, work
from benchmarks.timing import version
from ppo_nlu import advantages, losses, ops
from ppo_nlu.ops import torch_logprobs, torch_lora

Call = Callable[[], Any]
LOGPROBS = ("linear_logprobs", "token_logprobs")
LORA = ("lora_linear", "lora_linear_grouped")


@dataclass(frozen=True)
class Provider:
    """A name, what it can be timed on, and how to make its callable."""

    name: str
    kernels: tuple[str, ...]
    make: Callable[[Inputs], Call]
    package: str | None = None  # distribution that must be installed
    modes: tuple[str, ...] = ("forward", "forward+backward", "forward+backward+entropy")
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")

    def applies(self, inputs: Inputs) -> bool:
        """Whether it takes part in this case (a rival without entropy has no part in some)."""
        case = inputs.case
        return case.kernel in self.kernels and case.mode in self.modes and case.dtype in self.dtypes

    def missing(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.package and version(self.package) is None:
            return f"{self.package} is not installed"
        if device not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        return None


PROVIDERS: list[Provider] = []


def provider(name: str, *kernels: str, **limits: Any) -> Callable[..., Any]:
    """Register a function as the provider of this name for these kernels."""

    def register(make: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
        PROVIDERS.append(Provider(name, kernels, make, **limits))
        return make

    return register


def names() -> list[str]:
    return list(dict.fromkeys(p.name for p in PROVIDERS))


def differentiated(
    inputs: Inputs, forward: Callable[[], Sequence[Tensor]], leaves: Sequence[Tensor] | None = None
) -> Call:
    """A forward as it is timed: without autograd, or with the gradients of the leaves after it."""
    if inputs.case.mode == "forward":
        return torch.no_grad()(forward)
    wanted = inputs.leaves if leaves is None else leaves

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), wanted, inputs.upstream)

    return forward_backward


def wants_entropy(inputs: Inputs) -> bool:
    return inputs.case.mode.endswith("entropy")


# ---- ours


@provider("ours", "linear_logprobs")
def our_linear_logprobs(inputs: Inputs, module: Any = ops) -> Call:
    args = inputs["hidden"], inputs["weight"], inputs["targets"]
    extra = {"entropy_grad": True} if wants_entropy(inputs) else {}
    kept = len(inputs.upstream)
    return differentiated(inputs, lambda: module.linear_logprobs(*args, **extra)[:kept])


@provider("ours", "token_logprobs")
def our_token_logprobs(inputs: Inputs, module: Any = ops) -> Call:
    args, kept = (inputs["logits"], inputs["targets"]), len(inputs.upstream)
    return differentiated(inputs, lambda: module.token_logprobs(*args)[:kept])


@provider("ours", "lora_linear")
def our_lora_linear(inputs: Inputs, module: Any = ops) -> Call:
    args = inputs["x"], inputs["weights"][0], None, inputs["lora_as"][0], inputs["lora_bs"][0]
    return differentiated(inputs, lambda: (module.lora_linear(*args, SCALING),))


@provider("ours", "lora_linear_grouped")
def our_lora_linear_grouped(inputs: Inputs, module: Any = ops) -> Call:
    weights, count = inputs["weights"], len(inputs["weights"])
    args = inputs["x"], weights, [None] * count, inputs["lora_as"], inputs["lora_bs"]
    return differentiated(
        inputs, lambda: tuple(module.lora_linear_grouped(*args, [SCALING] * count))
    )


@provider("ours-one-by-one", "lora_linear_grouped")
def our_lora_linear_one_by_one(inputs: Inputs) -> Call:
    x, groups = inputs["x"], _groups(inputs)
    return differentiated(
        inputs, lambda: tuple(ops.lora_linear(x, w, None, a, b, SCALING) for w, a, b in groups)
    )


@provider("ours", "gae", modes=("forward",))
def our_gae(inputs: Inputs, module: Any = ops) -> Call:
    args = inputs["rewards"], inputs["values"], inputs["mask"]
    return differentiated(inputs, lambda: module.gae(*args, 1.0, 0.95))


_LOSS_ARGS = (
    "logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask",
)  # fmt: skip


@provider("ours", "ppo_loss")
def our_ppo_loss(inputs: Inputs, module: Any = ops) -> Call:
    named = {name: inputs[name] for name in _LOSS_ARGS}
    return differentiated(inputs, lambda: module.ppo_loss(**named)[:1])


@provider("ours-torch", *LOGPROBS, *LORA, "gae", "ppo_loss", devices=("cuda",))
def our_torch_form(inputs: Inputs) -> Call:
    """The torch form of ours, where `ops` would take Triton."""
    kernel = inputs.case.kernel
    makers: dict[str, tuple[Callable[..., Call], Any]] = {
        "linear_logprobs": (our_linear_logprobs, torch_logprobs),
        "token_logprobs": (our_token_logprobs, torch_logprobs),
        "lora_linear": (our_lora_linear, torch_lora),
        "lora_linear_grouped": (our_lora_linear_grouped, torch_lora),
        "gae": (our_gae, advantages),
        "ppo_loss": (our_ppo_loss, losses),
    }
    make, module = makers[kernel]
    return make(inputs, module)


# ---- plain torch


def _naive_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Any:
    return plain_logprobs((hidden @ weight.t()).float(), targets, entropy)


def _naive_token_logprobs(logits: Tensor, targets: Tensor, entropy: bool) -> Any:
    return plain_logprobs(logits.float(), targets, entropy)


def _naive_lora(x: Tensor, weights: Any, lora_as: Any, lora_bs: Any) -> tuple[Tensor, ...]:
    return tuple(
        F.linear(x, w) + F.linear(F.linear(x, a), b) * SCALING
        for w, a, b in zip(weights, lora_as, lora_bs, strict=True)
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _plain_forward(inputs: Inputs, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    """The naive form of a kernel as a callable; `wrap` may compile it."""
    kernel, entropy = inputs.case.kernel, wants_entropy(inputs)
    if kernel == "linear_logprobs":
        run, args = wrap(_naive_logprobs), (inputs["hidden"], inputs["weight"])
        return lambda: run(*args, inputs["targets"], entropy)
    if kernel == "token_logprobs":
        run = wrap(_naive_token_logprobs)
        return lambda: run(inputs["logits"], inputs["targets"], entropy)
    if kernel in LORA:
        run, groups = wrap(_naive_lora), [inputs[n] for n in ("weights", "lora_as", "lora_bs")]
        return lambda: run(inputs["x"], *groups)
    run, tensors = wrap(plain_ppo_loss), {n: t for n, t in inputs.tensors.items() if n != "mask"}
    return lambda: run(tensors, inputs["mask"])[:1]


@provider("naive", *LOGPROBS, *LORA, "ppo_loss")
def naive(inputs: Inputs) -> Call:
    return differentiated(inputs, _plain_forward(inputs, lambda f: f))


@provider("compile", *LOGPROBS, *LORA, "ppo_loss")
def compiled(inputs: Inputs) -> Call:
    return differentiated(inputs, _plain_forward(inputs, _compiled))


@provider("python-loop", "gae", modes=("forward",))
def python_loop(inputs: Inputs) -> Call:
    args = inputs["rewards"], inputs["values"], inputs["mask"]
    return differentiated(inputs, lambda: plain_gae(*args))


@provider("linear_cross_entropy", "linear_logprobs", modes=("forward", "forward+backward"))
def stock_linear_cross_entropy(inputs: Inputs) -> Call:
    """F.linear_cross_entropy of torch 2.13, in chunks of 256 rows: its own are slower."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    args = inputs["hidden"], inputs["weight"], inputs["targets"]
    return differentiated(
        inputs,
        lambda: (-F.linear_cross_entropy(*args, reduction="none", options=options).float(),),
    )


@provider("cross_entropy", "token_logprobs", modes=("forward", "forward+backward"))
def stock_cross_entropy(inputs: Inputs) -> Call:
    logits, targets = inputs["logits"], inputs["targets"]
    return differentiated(
        inputs, lambda: (-F.cross_entropy(logits.float(), targets, reduction="none"),)
    )


# ---- published kernels


@provider(
    "liger-ppo", "linear_logprobs", package="liger-kernel", modes=("forward", "forward+backward")
)
def liger_chunked_ppo(inputs: Inputs) -> Call:
    """The log-probabilities of LigerFusedLinearPPOBase: blocks of logits, recomputed."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    hidden, weight, targets = (inputs[n] for n in ("hidden", "weight", "targets"))
    run = LigerFusedLinearPPOBase.chunk_forward
    return differentiated(inputs, lambda: (run(hidden[None], weight, targets[None])[0],))


@provider("liger-flsce", "linear_logprobs", package="liger-kernel")
def liger_scaled_cross_entropy(inputs: Inputs) -> Call:
    """Liger's fused scaled cross entropy: CuTe on sm_90, a torch loop of 512 rows elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    args = inputs["hidden"], inputs["weight"], inputs["targets"], 1.0, -100, 1

    def forward() -> tuple[Tensor, ...]:
        if wants_entropy(inputs):
            nll, entropy = Function.apply(*args, True)
            return -nll.float(), entropy.float()
        return (-Function.apply(*args, False).float(),)

    return differentiated(inputs, forward)


@provider(
    "liger-row", "token_logprobs", package="liger-kernel", modes=("forward",), devices=("cuda",)
)
def liger_row_kernel(inputs: Inputs) -> Call:
    """The row kernel of Liger's GRPO loss; it leaves out the last row, so one more is given."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    logits = F.pad(inputs["logits"].detach(), (0, 0, 0, 1))[None]
    targets = inputs["targets"][None]
    return differentiated(
        inputs, lambda: (fused_selective_log_softmax(logits, targets, temperature=1.0)[0],)
    )


@provider("trl", "linear_logprobs", package="trl")
def trl_chunked(inputs: Inputs) -> Call:
    """TRL's chunked function as its trainers call it, without outputs that nobody reads."""
    from trl.trainer import utils

    outputs = ("entropy",) if wants_entropy(inputs) else ()
    args = inputs["hidden"], inputs["weight"], None, inputs["targets"], 1.0
    settings = utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    kept = len(inputs.upstream)
    return differentiated(
        inputs, lambda: utils._ChunkedLogProbFunction.apply(*args, *settings)[:kept]
    )


@provider("trl", "token_logprobs", package="trl")
def trl_row(inputs: Inputs) -> Call:
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    args = inputs["logits"][None], inputs["targets"][None]
    if not wants_entropy(inputs):
        return differentiated(inputs, lambda: (selective_log_softmax(*args)[0].float(),))
    return differentiated(
        inputs, lambda: tuple(out[0].float() for out in selective_log_softmax_and_entropy(*args))
    )


@provider("cce", "linear_logprobs", package="cut-cross-entropy", devices=("cuda",),
          modes=("forward", "forward+backward"))  # fmt: skip
def cut_cross_entropy(inputs: Inputs) -> Call:
    """Apple's cut cross entropy, which drops gradients below a threshold unless told otherwise."""
    from cut_cross_entropy import linear_cross_entropy

    args = inputs["hidden"], inputs["weight"], inputs["targets"]
    return differentiated(inputs, lambda: (-linear_cross_entropy(*args, reduction="none").float(),))


def _peft_layers(inputs: Inputs, fp32_adapters: bool) -> list[Any]:
    """PEFT's own LoRA layers around frozen linears, holding the weights of the inputs."""
    from peft import LoraConfig, get_peft_model

    layers = []
    for w, a, b in _groups(inputs):
        base = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(w, requires_grad=False)
        rank = a.shape[0]
        config = LoraConfig(
            target_modules=["base"], r=rank, lora_alpha=int(SCALING * rank), lora_dropout=0.0
        )
        holder = torch.nn.Sequential(OrderedDict(base=base))
        model = get_peft_model(holder, config, autocast_adapter_dtype=fp32_adapters)
        layer = model.base_model.model.base
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        layers.append(layer)
    return layers


def _peft(inputs: Inputs, fp32_adapters: bool) -> Call:
    layers, x = _peft_layers(inputs, fp32_adapters), inputs["x"]
    sides = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    leaves = (x, *(module["default"].weight for side in sides for module in side))
    return differentiated(inputs, lambda: tuple(layer(x) for layer in layers), leaves)


@provider("peft", *LORA, package="peft")
def peft_same_dtype(inputs: Inputs) -> Call:
    """PEFT with adapters in the dtype of the model."""
    return _peft(inputs, fp32_adapters=False)


@provider("peft-fp32-adapters", *LORA, package="peft", dtypes=("bf16", "fp16"))
def peft_default(inputs: Inputs) -> Call:
    """PEFT as it comes: adapters in fp32 beside a model in low precision."""
    return _peft(inputs, fp32_adapters=True)


class _AddmmLora(torch.autograd.Function):
    """Unsloth's LoRA products, written anew: the low-rank term is added by the GEMM itself.

    y = x Wᵀ, y += (x Aᵀ)(s Bᵀ); backward dx = dy W, dx += (dy s B) A, dA = (dy s B)ᵀ x and
    dB = s dyᵀ (x Aᵀ), where x Aᵀ and dy B are formed where they are used.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight, a, b)
        return torch.mm(x, weight.t()).addmm_(x @ a.t(), b.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x, weight, a, b = ctx.saved_tensors
        db = (dy.t() @ (x @ a.t())).mul_(SCALING)
        da = ((dy @ b).t() @ x).mul_(SCALING)
        dx = torch.mm(dy, weight).addmm_(dy @ b, a, alpha=SCALING)
        return dx, None, da, db


@provider("addmm", *LORA)
def unsloth_form(inputs: Inputs) -> Call:
    x, groups = inputs["x"], _groups(inputs)
    return differentiated(inputs, lambda: tuple(_AddmmLora.apply(x, *group) for group in groups))


def _groups(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    return list(zip(inputs["weights"], inputs["lora_as"], inputs["lora_bs"], strict=True))


# ---- the limits


@provider("limit", "linear_logprobs", *LORA)
def bare_products(inputs: Inputs) -> Call:
    """The large matrix products alone, in the inputs' dtype: one forward, one more a gradient."""
    if inputs.case.kernel == "linear_logprobs":
        x, weight = inputs["hidden"].detach(), inputs["weight"]
    else:
        x, weights = inputs["x"].detach(), inputs["weights"]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    y = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    back = torch.empty_like(x)
    gradients = inputs.case.mode.count("+")  # of log π, and of the entropy
    # The second product reads what stands for dy: real numbers, since zeros are faster on a GPU.
    torch.mm(x, weight.t(), out=y)

    def run() -> None:
        torch.mm(x, weight.t(), out=y)
        for _ in range(gradients):
            torch.mm(y, weight, out=back)

    return run


@provider("limit", "token_logprobs", "gae", "ppo_loss")
def copy_of_as_many_bytes(inputs: Inputs) -> Call:
    """A copy that reads and writes, in all, the bytes that the kernel must move."""
    half = max(1, int(work(inputs.case).bytes) // 2)
    source = torch.randint(256, (half,), dtype=torch.uint8, device=inputs.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)

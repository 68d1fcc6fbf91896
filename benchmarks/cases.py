"""What is measured: kernels at shapes, their inputs, their work by formula, their exact results.

Shapes are written in the letters of `LETTERS`, joined by x: `512x896x32000` is T=512, H=896,
V=32000 for linear_logprobs; the outputs of a group are joined by +: `512x896x896+128+128x16`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LETTERS = {
    "linear_logprobs": "THV",
    "token_logprobs": "TV",
    "lora_linear": "TKOr",
    "lora_linear_grouped": "TKOr",
    "gae": "BR",
    "ppo_loss": "BR",
}
KERNELS = tuple(LETTERS)
MODES = ("forward", "forward+backward", "forward+backward+entropy")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_SHAPES = {
    "linear_logprobs": ["512x896x32000", "128x256x8000"],
    "token_logprobs": ["512x32000"],
    "lora_linear": ["512x896x896x16", "512x896x4864x16", "512x256x256x16", "512x256x704x16"],
    "lora_linear_grouped": ["512x896x896+128+128x16", "512x896x4864+4864x16"],
    "gae": ["512x1024"],
    "ppo_loss": ["64x16", "512x16"],
}
_LORA = ("4096x4096", "4096x11008", "11008x4096")
CUDA_SHAPES = {
    "linear_logprobs": [
        "8192x3584x152064", "8192x4096x32000", "1024x3584x152064", "256x3584x152064",
        "256x4096x32000", "2048x768x50257",
    ],
    "token_logprobs": ["8192x151936", "8192x32000"],
    "lora_linear": [f"{t}x{s}x16" for t in (8192, 2048, 64, 16) for s in _LORA]
    + [f"8192x{s}x64" for s in _LORA],
    "lora_linear_grouped": ["8192x4096x4096+4096+4096x16", "8192x4096x11008+11008x16",
                            "16x4096x4096+4096+4096x16"],
    "gae": ["512x1024", "64x16"],
    "ppo_loss": ["64x16", "512x16", "512x1024"],
}  # fmt: skip
SCALING = 2.0  # s = α/r of every LoRA case
REFERENCE_ROWS = 128  # rows that are compared with float64


@dataclass(frozen=True)
class Case:
    """One kernel at one shape; a value of the shape is a number, or a tuple for a group."""

    kernel: str
    sizes: tuple[int | tuple[int, ...], ...]
    dtype: str
    mode: str

    @property
    def shape(self) -> dict[str, Any]:
        sizes = (list(n) if isinstance(n, tuple) else n for n in self.sizes)
        return dict(zip(LETTERS[self.kernel], sizes, strict=True))

    @property
    def label(self) -> str:
        sizes = ("+".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in self.sizes)
        return f"{self.kernel} {'x'.join(sizes)} {self.dtype} {self.mode}"


@dataclass
class Inputs:
    """The tensors of a case on its device: those in `leaves` get gradients from `upstream`."""

    case: Case
    device: str
    tensors: dict[str, Any]
    leaves: tuple[Tensor, ...] = ()
    upstream: tuple[Tensor, ...] = ()
    exact: Tensor | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]


def parse_sizes(text: str) -> tuple[int | tuple[int, ...], ...]:
    """'512x896x896+128x16' → (512, 896, (896, 128), 16)."""
    try:
        parts = [tuple(map(int, part.split("+"))) for part in text.split("x")]
    except ValueError:
        raise ValueError(f"{text!r} is not a shape such as 512x896x32000") from None
    return tuple(part[0] if len(part) == 1 else part for part in parts)


def fits(kernel: str, sizes: Sequence[object]) -> bool:
    """Whether a shape has the letters of this kernel."""
    grouped = any(isinstance(n, tuple) for n in sizes)
    return len(sizes) == len(LETTERS[kernel]) and grouped == (kernel == "lora_linear_grouped")


def modes_of(kernel: str) -> tuple[str, ...]:
    if kernel == "gae":
        return MODES[:1]
    return MODES if kernel.endswith("_logprobs") else MODES[:2]


# ---- work by formula


@dataclass(frozen=True)
class Work:
    """The floating-point operations and the fewest bytes that a case needs."""

    flops: float
    bytes: float


def work(case: Case) -> Work:
    """FLOPs of the matrix products and bytes with each input read once, each output written once.

    linear_logprobs: forward 2TVH; with a frozen head the gradient adds D W, so 4TVH in all, and the
    entropy's gradient a third product, 6TVH. Bytes: h, W, targets (8 B), both outputs (4 B each);
    with gradients the upstream vector and ∂h.
    token_logprobs: no products. Forward reads the logits; the backward reads them again (the
    upstream gradient is not known before) and writes as much.
    lora_linear: 2TKO + 2Tr(K+O) forward, then dy W (2TKO) and four low-rank products for dS, dB,
    dA and dx, 4Tr(K+O). Bytes: x, W, A, B, y; backward dy, x, W, A, B read, dx, dA, dB written.
    A group reads x once and writes one dx.
    gae: rewards, values, mask (1 B) read, advantages and returns written.
    ppo_loss: six fp32 inputs and the mask read; the gradients of log π and V written.
    """
    size = DTYPES[case.dtype].itemsize
    backward, entropy = case.mode != "forward", case.mode.endswith("entropy")
    s = case.shape
    if case.kernel == "linear_logprobs":
        t, h, v = s["T"], s["H"], s["V"]
        vectors = (16 + (4 + 4 * entropy) * backward) * t
        return Work(
            2.0 * t * v * h * (1 + backward + entropy),
            size * (v * h + t * h * (1 + backward)) + vectors,
        )
    if case.kernel == "token_logprobs":
        t, v = s["T"], s["V"]
        vectors = (16 + (4 + 4 * entropy) * backward) * t
        return Work(0.0, size * t * v * (3 if backward else 1) + vectors)
    if case.kernel.startswith("lora_linear"):
        t, k, r = s["T"], s["K"], s["r"]
        outputs = s["O"] if isinstance(s["O"], list) else [s["O"]]
        o, low_rank = sum(outputs), r * (k * len(outputs) + sum(outputs))
        if not backward:
            return Work(2.0 * t * (k * o + low_rank), size * (t * (k + o) + k * o + low_rank))
        moved = t * (3 * k + 2 * o) + 2 * k * o + 3 * low_rank
        return Work(2.0 * t * (2 * k * o + 3 * low_rank), size * moved)
    tokens = s["B"] * s["R"]
    if case.kernel == "gae":
        return Work(0.0, 17.0 * tokens)
    return Work(0.0, (25.0 + 8.0 * backward) * tokens)


# ---- inputs


def prepare(case: Case, device: str, seed: int = 0) -> Inputs:
    """Fresh random inputs of a case; logits reach about ±20 so that accuracy is put to the test."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = DTYPES[case.dtype] if dtype is None else dtype
        drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return drawn.mul_(scale)

    if case.kernel.endswith("_logprobs"):
        return _logprob_inputs(case, device, generator, normal)
    if case.kernel.startswith("lora_linear"):
        return _lora_inputs(case, device, normal)
    return _rollout_inputs(case, device, normal)


def _logprob_inputs(case: Case, device: str, generator: torch.Generator, normal: Any) -> Inputs:
    s = case.shape
    targets = torch.randint(s["V"], (s["T"],), generator=generator, device=device)
    if case.kernel == "linear_logprobs":
        leaf = normal(s["T"], s["H"], scale=4.0)
        tensors = {"hidden": leaf, "weight": normal(s["V"], s["H"], scale=s["H"] ** -0.5)}
    else:
        leaf = normal(s["T"], s["V"], scale=4.0)
        tensors = {"logits": leaf}
    count = 2 if case.mode.endswith("entropy") else 1
    upstream = tuple(normal(s["T"], dtype=torch.float32) for _ in range(count))
    return Inputs(case, device, tensors | {"targets": targets}, (leaf.requires_grad_(),), upstream)


def _lora_inputs(case: Case, device: str, normal: Any) -> Inputs:
    s = case.shape
    outputs = s["O"] if isinstance(s["O"], list) else [s["O"]]
    x = normal(s["T"], s["K"]).requires_grad_()
    tensors = {
        "x": x,
        "weights": [normal(o, s["K"], scale=s["K"] ** -0.5) for o in outputs],
        "lora_as": [normal(s["r"], s["K"], scale=s["K"] ** -0.5).requires_grad_() for _ in outputs],
        "lora_bs": [normal(o, s["r"], scale=0.1).requires_grad_() for o in outputs],
    }
    upstream = tuple(normal(s["T"], o) for o in outputs)
    return Inputs(case, device, tensors, (x, *tensors["lora_as"], *tensors["lora_bs"]), upstream)


def _rollout_inputs(case: Case, device: str, normal: Any) -> Inputs:
    """(B, R) tensors of a rollout in fp32, right-padded: row b counts a varying first part."""
    rows, length = case.shape["B"], case.shape["R"]
    lengths = 1 + (torch.arange(rows, device=device) * 7919) % length
    mask = torch.arange(length, device=device)[None, :] < lengths[:, None]
    names = ("rewards", "values", "old_values", "returns", "advantages", "old_logprobs")
    tensors = {name: normal(rows, length, dtype=torch.float32) for name in names}
    tensors["logprobs"] = tensors["old_logprobs"] + normal(
        rows, length, scale=0.2, dtype=torch.float32
    )
    leaves: tuple[Tensor, ...] = ()
    if case.kernel == "ppo_loss":
        leaves = tensors["logprobs"].requires_grad_(), tensors["values"].requires_grad_()
    upstream = (torch.ones((), device=device),)
    return Inputs(case, device, tensors | {"mask": mask}, leaves, upstream)


def input_bytes(inputs: Inputs) -> int:
    flat = [t for v in inputs.tensors.values() for t in (v if isinstance(v, list) else [v])]
    return sum(t.nbytes for t in flat)


# ---- accuracy


def error_kind(case: Case) -> str:
    if case.mode == "forward" and case.kernel.endswith("_logprobs"):
        return "max abs of logp"
    if case.mode == "forward":
        return "relative Frobenius of the output"
    return "relative Frobenius of the first gradient"


def error(inputs: Inputs, result: Sequence[Tensor]) -> float:
    """The distance of a result (outputs of a forward, else gradients) from float64."""
    if inputs.exact is None:
        inputs.exact = reference(inputs)
    ours = _compared(inputs, result).double()
    if error_kind(inputs.case).startswith("max abs"):
        return float((ours - inputs.exact).abs().max())
    return float((ours - inputs.exact).norm() / inputs.exact.norm().clamp(min=1e-300))


def _compared(inputs: Inputs, result: Sequence[Tensor]) -> Tensor:
    """The part of a result that the reference has: the first tensor's rows, or the group's."""
    kernel = inputs.case.kernel
    if kernel == "lora_linear_grouped" and inputs.case.mode == "forward":
        return torch.cat([y.detach()[_rows(inputs)] for y in result], dim=1)
    first = result[0].detach()
    return first if kernel in ("gae", "ppo_loss") else first[_rows(inputs)]


def _rows(inputs: Inputs) -> slice:
    """The rows that are compared, spread over all tokens."""
    return slice(None, None, math.ceil(inputs.case.shape["T"] / REFERENCE_ROWS))


def reference(inputs: Inputs) -> Tensor:
    """The exact outputs or gradients of the compared rows, in float64 from the same inputs."""
    kernel, backward = inputs.case.kernel, inputs.case.mode != "forward"
    if kernel == "gae":
        return plain_gae(*(inputs[n].double() for n in ("rewards", "values")), inputs["mask"])[0]
    if kernel == "ppo_loss":
        wide = {n: t.detach().double() for n, t in inputs.tensors.items() if n != "mask"}
        leaf = wide["logprobs"] = wide["logprobs"].requires_grad_(backward)
        out: tuple[Tensor, ...] = (plain_ppo_loss(wide, inputs["mask"])[0],)
    else:
        rows = _rows(inputs)
        first = {"linear_logprobs": "hidden", "token_logprobs": "logits"}.get(kernel, "x")
        leaf = inputs[first].detach()[rows].double().requires_grad_(backward)
        out = _exact_rows(inputs, leaf, rows)
    if not backward:
        return torch.cat(out, dim=1) if kernel == "lora_linear_grouped" else out[0]
    taken = inputs.upstream if kernel == "ppo_loss" else [u[rows] for u in inputs.upstream]
    return torch.autograd.grad(out, leaf, [u.double() for u in taken])[0]


def _exact_rows(inputs: Inputs, leaf: Tensor, rows: slice) -> tuple[Tensor, ...]:
    if inputs.case.kernel.startswith("lora_linear"):
        groups = zip(inputs["weights"], inputs["lora_as"], inputs["lora_bs"], strict=True)
        wide = ([t.detach().double() for t in group] for group in groups)
        return tuple(leaf @ w.t() + SCALING * (leaf @ a.t()) @ b.t() for w, a, b in wide)
    z = leaf if "logits" in inputs.tensors else leaf @ inputs["weight"].double().t()
    return plain_logprobs(z, inputs["targets"][rows], entropy=len(inputs.upstream) == 2)


# ---- plain formulas, in the dtype of their arguments


def plain_logprobs(z: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """log softmax(z) at the targets, and the entropy on request."""
    log_p = F.log_softmax(z, dim=-1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    return (logprobs, -(log_p.exp() * log_p).sum(-1)) if entropy else (logprobs,)


def plain_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The loop over time that trainers run: A_t = δ_t + γλ A_{t+1}, 0 outside the mask."""
    counts = mask.to(values.dtype)
    rewards, values = rewards * counts, values * counts
    carry = after = torch.zeros_like(values[:, 0])
    columns = []
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * after - values[:, t]
        carry = (delta + gamma * lam * carry) * counts[:, t]
        after = values[:, t]
        columns.append(carry)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, (advantages + values) * counts


def plain_ppo_loss(
    t: dict[str, Tensor], mask: Tensor, clip: float = 0.2, value_coef: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped PPO loss with clipped values, and three of its metrics, as trainers write it."""
    count = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, 0.0).sum() / count

    log_ratio = t["logprobs"] - t["old_logprobs"]
    ratio = log_ratio.exp()
    free, clipped = -t["advantages"] * ratio, -t["advantages"] * ratio.clamp(1 - clip, 1 + clip)
    old = t["old_values"]
    bounded = torch.clamp(t["values"], old - clip, old + clip)
    squared = torch.maximum(
        (t["values"] - t["returns"]).square(), (bounded - t["returns"]).square()
    )
    loss = mean(torch.maximum(free, clipped)) + value_coef * 0.5 * mean(squared)
    with torch.no_grad():
        metrics = {
            "clip_fraction": mean((clipped > free).to(ratio.dtype)),
            "approx_kl": 0.5 * mean(log_ratio.square()),
            "ratio_mean": mean(ratio),
        }
    return loss, metrics

"""How much memory the parts of a run take: by their shapes, or counted on a pass.

Activations are counted: a pass over a few prompts of the run, with the longest answers, shows how
many bytes autograd keeps for each token. While a layer is run backward it is taken to need half as
much again as it keeps. With checkpointing each layer keeps only its input, and one layer at a time
all the rest. On a GPU the attention scores of one layer are added: four fp32 numbers for each head
and each key of the longest run of tokens in the tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ppo_nlu.model.policy import Policy, trainable
from ppo_nlu.tree import prefixes
from ppo_nlu.tree.trim import whole

PROBE = 4  # prompts of the pass that is counted


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder: `item` bytes a number, `keys_values` bytes a token in all layers."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    item: int
    keys_values: int

    @classmethod
    def of(cls, policy: Policy) -> Sizes:
        shape, weight = policy.shape, policy.head.weight
        item = weight.element_size()
        each = 2 * shape.layers * shape.keys * shape.size * item
        return cls(shape.layers, shape.hidden, weight.shape[0], shape.heads, item, each)


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts in tokens: what all share, run once, and what each has beside it."""

    shared: int
    mean: float  # of their own
    longest: int  # of their own

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], packed: bool) -> Lengths:
        """As they are run: in the prefix tree if `packed`, else padded and without sharing."""
        if not packed:
            longest = max(map(len, prompts))
            return cls(0, longest, longest)
        first, *others = prompts
        shared = min((prefixes.common(first, prompt) for prompt in others), default=0)
        own = [len(prompt) - shared for prompt in prompts]
        return cls(shared, sum(own) / len(own), max(own))

    def tokens(self, prompts: int) -> int:
        """Tokens run for this many prompts."""
        return self.shared + round(prompts * self.mean)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of activations for each token of a pass with gradients."""

    kept: int  # by autograd, in all layers
    layer: int  # by one layer in the middle, without checkpointing
    backward: int  # needed besides, while a layer is run backward

    @property
    def total(self) -> int:
        return self.kept + self.backward

    @classmethod
    def of(
        cls,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        lengths: Lengths,
        longest: int,
        values: bool,
    ) -> TokenBytes:
        """Count the bytes on a few of the prompts, with answers of the `longest` length."""
        sizes = Sizes.of(policy)
        kept = saved_bytes(policy, prompts[:PROBE], longest, values=values)
        with whole(policy.decoder):
            layer = saved_bytes(policy, prompts[:PROBE], longest, values=values) // sizes.layers
        if policy.checkpointing:
            kept = sizes.layers * sizes.hidden * sizes.item + layer
        backward = layer // 2
        if policy.device.type != "cpu":  # the attention forms the scores of a layer there
            backward += 16 * sizes.heads * max(lengths.shared, lengths.longest + longest)
        return cls(kept, layer, backward)


def saved_bytes(
    policy: Policy, prompts: Sequence[Sequence[int]], longest: int, values: bool = True
) -> int:
    """Bytes that autograd keeps for a token of a pass over these prompts, each with an answer of
    the `longest` length.

    Parameters are not counted. Blocks keep what they keep without checkpointing.
    """
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*frozen(policy), *trainable(policy))}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()

    answers = [[list(prompt)[-1]] * longest for prompt in prompts]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with torch.enable_grad(), hooks, _unwrapped(policy.decoder):
        scored = policy.score(prompts, answers, values=values)
    total = sum(kept.values())  # before the graph and its storages go
    del scored
    return total // policy.last_pass.tokens_run


@contextmanager
def _unwrapped(decoder: nn.Module) -> Iterator[None]:
    """Inside, modules run their class's own forward, not one that was put around it."""
    wrapped = {module: vars(module) for module in decoder.modules() if "forward" in vars(module)}
    forwards = {module: own.pop("forward") for module, own in wrapped.items()}
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward


def optimizer_bytes(name: str, parameter: Tensor) -> int:
    """What `optim.name` keeps of a parameter, fp32."""
    count = parameter.numel()
    if name == "adamw":
        return 8 * count
    if parameter.dim() < 2:
        return 4 * count
    return 4 * (count // parameter.shape[-1] + count // parameter.shape[-2])


def logprob_bytes(rows: int, sizes: Sizes, device: torch.device) -> int:
    """Workspace of `ops.linear_logprobs`, by the blocks of `torch_logprobs`; a bound for Triton."""
    block = min(min(rows, 512) * sizes.vocab // 2, 1 << (23 if device.type == "cuda" else 20))
    columns = block // max(min(rows, 512), 1)
    return 8 * block + (4 * columns * sizes.hidden if sizes.item < 4 else 0)


def free_bytes(device: torch.device) -> int | None:
    """What is free on a GPU, torch's own reserve included; None on another device."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resident_bytes() -> int | None:
    """Memory of this process, files that it has mapped (weights, libraries) included."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def frozen(policy: Policy) -> Iterable[Tensor]:
    """Parameters that do not train, and buffers."""
    named = (p for p in policy.model.parameters() if not p.requires_grad)
    return [*named, *policy.model.buffers()]


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor."""
    return x.numel() * x.element_size()

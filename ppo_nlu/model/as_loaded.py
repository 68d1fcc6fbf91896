"""What a model gives for a few rows, each alone, as transformers loaded it.

`path_check` compares the prefix tree and the plain path with this. It is measured before LoRA and
norms are put in. Some rows are longer than each window that a row of the run can grow beyond.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu.errors import UserError
from ppo_nlu.model.refusal import refused
from ppo_nlu.model.shape import FAR, blocks_of, decoder_of, embedding_of, is_odd, windows

TEXT = "The film is good, and long. Now judge the opinion of the sentence."


@dataclass(frozen=True)
class Probe:
    """A few prompts and answers; answer j belongs to prompt `prompt_of[j]`."""

    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]

    @property
    def longest(self) -> int:
        """The tokens of the longest row."""
        pairs = zip(self.answers, self.prompt_of, strict=True)
        return max(len(self.prompts[p]) + len(answer) for answer, p in pairs)


@dataclass(frozen=True)
class Trial:
    """A probe, and what the model as loaded gives for its answers' tokens, one row at a time.

    `expected` are logits (N, V), or with `first_layers` the states (N, H) behind the first layers
    in fp32, whatever the model's dtype. `exact`: they were computed in fp32.
    """

    probe: Probe
    expected: Tensor
    exact: bool = True
    first_layers: bool = True


@dataclass(frozen=True)
class AsLoaded:
    """What the model gives as it was loaded.

    The `near` trials have short prompts that share a prefix. They run the first layers, and the
    whole model, where low precision may hide small mistakes. Each of the `far` trials has rows
    longer than a window, and runs the first layers. `idle` are the linear layers that the model
    never calls.
    """

    near: list[Trial]
    far: list[Trial]
    idle: frozenset[str]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokenizer: Any, longest: int) -> AsLoaded:
        """Run the trials of a model; `longest` row that the run can have, in tokens."""
        with refused(model, "cannot be run"):
            return cls._of(model, tokenizer, longest)

    @classmethod
    def _of(cls, model: Any, tokenizer: Any, longest: int) -> AsLoaded:
        decoder = decoder_of(model)
        weight = embedding_of(decoder).weight
        size = len(weight)
        ids = [i % size for i in tokenizer(TEXT)["input_ids"]] or [0]
        exact = weight.dtype == torch.float32
        length = min(longest, 60)
        short, whole = _short(ids, size, length, 12), _short(ids, size, length, 5)
        if not exact:  # the whole model is compared roughly: one row is enough
            whole = Probe(whole.prompts[:1], [whole.answers[0][:3]], [0])
        with _watched(model) as idle:
            near = [Trial(whole, _logits_alone(model, whole), exact, first_layers=False)]
        behind = [w for w in windows(decoder.config) if short.longest < w < longest]
        with first_layers(decoder):
            near.insert(0, Trial(short, _states_alone(decoder, short)))
            if is_odd(model, decoder) and longest > length:
                top = min([longest, FAR, *windows(decoder.config)])
                long = _behind(ids, size, max(top - 40, 1), top)
                near.append(Trial(long, _states_alone(decoder, long)))
            probes = [_behind(ids, size, window, longest) for window in behind]
            far = [Trial(probe, _states_alone(decoder, probe)) for probe in probes]
        if not all(bool(trial.expected.isfinite().all()) for trial in (*near, *far)):
            raise UserError(
                "model.name_or_path: the model's logits are NaN or infinite; its weights are "
                "damaged, or model.dtype is too narrow for them"
            )
        return cls(near, far, frozenset(idle))


@contextmanager
def first_layers(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder has only its first layers, at least one of every kind, and computes in
    fp32.

    The layers and tensors are put aside and put back, not changed. Embeddings, which are large,
    stay as they are; what they give is widened.
    """
    name, blocks = blocks_of(decoder)
    parent, _, own = name.rpartition(".")
    holder = decoder.get_submodule(parent)
    setattr(holder, own, nn.ModuleList(list(blocks)[: _enough(decoder.config, blocks)]))
    tables = [m for m in decoder.modules() if isinstance(m, nn.Embedding)]
    large = {id(table.weight) for table in tables}
    tensors = {id(t): t for t in (*decoder.parameters(), *decoder.buffers()) if id(t) not in large}
    low = [(t, t.data) for t in tensors.values() if t.dtype in (torch.bfloat16, torch.float16)]
    hooks = [table.register_forward_hook(_widen) for table in tables]
    try:
        for tensor, data in low:
            tensor.data = data.float()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, data in low:
            tensor.data = data
        setattr(holder, own, blocks)


def _widen(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.float()


def _enough(config: Any, blocks: nn.ModuleList) -> int:
    """How many layers hold one of every kind, and two at least."""
    types = getattr(config, "layer_types", None) or [None] * len(blocks)
    kinds = [
        (kind, *(type(module).__name__ for module in block.modules()))
        for kind, block in zip(types, blocks, strict=False)
    ]
    return max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[str]]:
    """Inside, linear layers are watched; the set then holds the names of those not called.

    Layers whose names differ only in a number, such as experts, all count as called when one is.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kind = {name: re.sub(r"\d+", "#", name) for name in linears}
    called, idle = set[str](), set[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(kind[name])

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
    try:
        yield idle
    finally:
        for handle in handles:
            handle.remove()
    idle |= {name for name in linears if kind[name] not in called}


def _short(ids: Sequence[int], size: int, length: int, answer: int) -> Probe:
    """Two prompts of unequal length that share a prefix, and three answers, the longest of `answer`
    tokens; rows of up to `length` tokens."""
    row = (list(ids) * 40)[:length]
    other = [(i * 7 + 3) % size for i in range(9)]
    prompt = max(length - 16, 2)
    shared = max(prompt - 6, 1)
    answers = [row[-answer:] if length > 20 else row[:1], other[:3], other[3:7]]
    return Probe([row[:prompt], [*row[:shared], *other]], answers, [0, 0, 1])


def _behind(ids: Sequence[int], size: int, window: int, longest: int) -> Probe:
    """Rows longer than a window, by a little and by more, and one that grows beyond it."""
    body = [(i * 31 + ids[i % len(ids)]) % size for i in range(min(window + 40, longest))]
    lengths = [len(body) - 5, max(len(body) - 33, 1), max(window - 2, 1)]
    answers = [body[3:8], body[9:12], body[5:9]]
    return Probe([body[-n:] for n in lengths], answers, [0, 1, 2])


def _logits_alone(model: Any, probe: Probe) -> Tensor:
    """The model's own logits (N, V) of the answers' tokens in fp32, one row at a time."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters  # the head is large
    found = []
    for row, count in _rows(model, probe):
        named = {"logits_to_keep": count} if few else {}
        found.append(model(input_ids=row, use_cache=False, **named).logits[0, -count:].float())
    return torch.cat(found)


def _states_alone(decoder: Any, probe: Probe) -> Tensor:
    """The states (N, H) that predict the answers' tokens in fp32, one row at a time."""
    return torch.cat(
        [
            decoder(input_ids=row, use_cache=False, return_dict=True).last_hidden_state[0, -count:]
            for row, count in _rows(decoder, probe)
        ]
    ).float()


def _rows(model: nn.Module, probe: Probe) -> Iterator[tuple[Tensor, int]]:
    """The token ids (1, T) of each answer behind its prompt, and how many of them it has."""
    device = next(model.parameters()).device
    for answer, p in zip(probe.answers, probe.prompt_of, strict=True):
        yield torch.tensor([[*probe.prompts[p], *answer[:-1]]], device=device), len(answer)

"""An encoder with a head for one task: how it reads rows and how it answers them.

Any Hugging Face encoder. The head is a classifier over the label words, or one number for a rating.
A row is read without a prompt, as a sentence or a pair: the first field, and the other fields
joined by a space (COPA: the premise, then "choice1 choice2 question"). The longer part is cut to
fit.

Weights are fp32; `model.dtype=bfloat16` computes in bf16 under autocast. `encoder` trains it,
`encoder_load` loads it, `encoder_save` saves it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.methods.minibatch import chunks
from ppo_nlu.methods.rollout import seeded
from ppo_nlu.tasks import Example, TaskSpec

SPAN = 5.0  # the range of a rating in the head's own unit

Given = tuple[str | None, dict[str, float] | None]  # an answer, and its probabilities by word


class Encoder(nn.Module):
    """A Hugging Face sequence classifier with its tokenizer and the task of its head."""

    def __init__(self, model: Any, tokenizer: Any, spec: TaskSpec, dtype: torch.dtype):
        super().__init__()
        self.model, self.tokenizer, self.spec, self.dtype = model, tokenizer, spec, dtype
        backend = getattr(tokenizer, "backend_tokenizer", None)  # of a fast one
        self.cutting = None if backend is None else (backend.truncation, backend.padding)
        self.takes = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Token ids of B rows to the head's (B, K), fp32; K is 1 for a rating."""
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low):
            return self.model(**batch).logits.float()

    def read(self, examples: Sequence[Example], max_length: int) -> dict[str, Tensor]:
        """The rows as padded token ids (B, T) and what goes with them, on the device."""
        texts, pairs = zip(*(as_pair(self.spec, row.fields) for row in examples), strict=True)
        batch = self.tokenizer(
            list(texts),
            list(pairs) if len(self.spec.fields) > 1 else None,
            truncation="longest_first",
            max_length=max_length,
            padding=True,
            return_tensors="pt",
            split_special_tokens=True,  # "[SEP]" in the text of a row is text
        )
        return {name: ids.to(self.device) for name, ids in batch.items() if name in self.takes}

    def length(self, example: Example) -> int:
        """The tokens of a row that is not cut."""
        text, pair = as_pair(self.spec, example.fields)
        pairs = (pair,) if len(self.spec.fields) > 1 else ()
        ids = self.tokenizer(text, *pairs, truncation=False, split_special_tokens=True)
        return len(ids["input_ids"])

    def reset_tokenizer(self) -> None:
        """Let the tokenizer cut and pad as when it was loaded; each `read` changes both."""
        if self.cutting is None:
            return
        backend, (truncation, padding) = self.tokenizer.backend_tokenizer, self.cutting
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)


def as_pair(spec: TaskSpec, fields: Mapping[str, str]) -> tuple[str, str]:
    """The first field, and the others joined by a space ("" where there is one field only)."""
    first, *others = (fields[name].strip() for name in spec.fields)
    return first, " ".join(others)


def answers_of(spec: TaskSpec) -> list[str]:
    """What the outputs of the head stand for, in their order; UserError for a free text."""
    if spec.kind == "text":
        raise UserError(
            f"task: {spec.name} asks for a free text, which an encoder cannot write; "
            "use method: ppo or method: sft"
        )
    if spec.rating:
        return [f"rating from {spec.rating.low:g} to {spec.rating.high:g}"]
    return list(spec.words)


def rating_of(spec: TaskSpec, output: float) -> float:
    """The number that an output of the head stands for, within the range."""
    assert spec.rating is not None
    low, high = spec.rating.low, spec.rating.high
    return min(max(low + output / SPAN * (high - low), low), high)


@contextmanager
def drawing_from(device: torch.device, *parts: object) -> Iterator[None]:
    """Inside, torch's random numbers come from these parts; its own state is restored after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(*parts).initial_seed())
        yield


# ---- answers ---------------------------------------------------------------------------------


def answer_all(
    encoder: Encoder,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decode: str,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Given]:
    """(answer, probability of each label word) in the order of the examples.

    `greedy` and `score` take the most probable word, `sample` draws one. A rating is its number
    with three decimals under every decoding, without probabilities. Where the outputs are not
    finite there is no answer. Rows of similar length run together, within windows of 16 batches.
    It ends early where `stop` says so.
    """
    size = cfg.eval.batch_size
    encoder.eval()
    for start in range(0, len(examples), 16 * size):
        window = examples[start : start + 16 * size]
        order = sorted(range(len(window)), key=lambda i: -sum(map(len, window[i].fields.values())))
        outputs: dict[int, Tensor] = {}
        for index in chunks(order, size):
            if stop():
                return
            rows = [window[i] for i in index]
            with torch.no_grad():
                table = encoder(encoder.read(rows, cfg.encoder.max_length)).cpu()
            outputs |= dict(zip(index, table, strict=True))
        for i in range(len(window)):
            yield _given(spec, outputs[i], decode, ("encoder answer", cfg.seed, start + i))


def _given(spec: TaskSpec, output: Tensor, decode: str, place: tuple[object, ...]) -> Given:
    """The answer that belongs to a row's outputs (K,)."""
    if not output.isfinite().all():
        return None, None
    if spec.rating:
        return f"{rating_of(spec, float(output)) + 0.0:.3f}", None
    probabilities = output.softmax(-1)
    best = int(probabilities.argmax())
    if decode == "sample":
        best = int(torch.multinomial(probabilities, 1, generator=seeded(*place)))
    return spec.words[best], dict(zip(spec.words, probabilities.tolist(), strict=True))

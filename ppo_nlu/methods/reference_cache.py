"""The reference's log-probabilities of answers seen before.

The reference never changes, and in language understanding one example gets the same few answers
again and again. The cache keeps what was computed when an answer was first seen. The same row in
another batch rounds differently in the last bits; so a checkpoint holds the cache (`state`), and a
resumed run is equal to the last bit.
"""

from __future__ import annotations

import base64
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_nlu.model.lora import lora_disabled
from ppo_nlu.model.policy import Policy
from ppo_nlu.tree.prefixes import Tokens

LIMIT = 100_000  # answers; the oldest are dropped first
KEY = 16  # bytes of a hash


class ReferenceCache:
    """Log-probs of the model with LoRA off, by the token ids of prompt and answer.

    All calls must have the same temperature. `hits` and `misses` count the rows asked for.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.kept: dict[bytes, array[float]] = {}  # in the order in which they came
        self.hits = self.misses = 0

    @torch.no_grad()
    def logprobs(
        self,
        policy: Policy,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        prompt_of: Sequence[int],
        temperature: float,
    ) -> Tensor:
        """(B, R) log-probs of the answers. The reference runs only answers that are new, each
        once."""
        hashes = [hashlib.sha256(array("q", prompt)) for prompt in prompts]
        keys = [_key(hashes[p], answer) for p, answer in zip(prompt_of, answers, strict=True)]
        new: dict[bytes, int] = {}  # key: first row with it
        for j, key in enumerate(keys):
            if key not in self.kept:
                new.setdefault(key, j)
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        fresh = self._run(policy, prompts, answers, prompt_of, new, temperature)
        found = dict(zip(new, fresh, strict=True))
        found |= {key: self.kept[key] for key in keys if key not in found}
        self._keep(found, new)
        width = max(map(len, answers))
        table = [[*found[key], *[0.0] * (width - len(found[key]))] for key in keys]
        return torch.tensor(table, dtype=torch.float32, device=policy.device)

    def _run(
        self,
        policy: Policy,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        prompt_of: Sequence[int],
        new: Mapping[bytes, int],
        temperature: float,
    ) -> list[array[float]]:
        if not new:
            return []
        asked = dict.fromkeys(prompt_of[j] for j in new.values())
        used = {p: place for place, p in enumerate(asked)}
        with lora_disabled(policy.model):
            scored = policy.score(
                [prompts[p] for p in used],
                [answers[j] for j in new.values()],
                [used[prompt_of[j]] for j in new.values()],
                temperature,
            )
        rows = zip(scored.logprobs.tolist(), new.values(), strict=True)
        return [array("f", row[: len(answers[j])]) for row, j in rows]

    def _keep(self, found: Mapping[bytes, array[float]], new: Mapping[bytes, int]) -> None:
        for key in new:
            self.kept[key] = found[key]
        for key in list(self.kept)[: max(len(self.kept) - self.limit, 0)]:
            del self.kept[key]

    def state(self) -> dict[str, Any]:
        """The cache for a checkpoint: base64 of keys, lengths and fp32 values."""
        values = array("f", [x for row in self.kept.values() for x in row])
        return {
            "keys": _text(b"".join(self.kept)),
            "lengths": _text(array("I", map(len, self.kept.values())).tobytes()),
            "values": _text(values.tobytes()),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Load the state again."""
        keys = base64.b64decode(state["keys"])
        lengths, values = array("I"), array("f")
        lengths.frombytes(base64.b64decode(state["lengths"]))
        values.frombytes(base64.b64decode(state["values"]))
        self.kept, start = {}, 0
        for row, length in enumerate(lengths):
            self.kept[keys[row * KEY : (row + 1) * KEY]] = values[start : start + length]
            start += length


def _key(prompt_hash: Any, answer: Tokens) -> bytes:
    whole = prompt_hash.copy()
    whole.update(b"/" + array("q", answer).tobytes())
    return whole.digest()[:KEY]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")

"""An encoder answers: it has a head for its own task and reads no prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from ppo_nlu.answering.answer import Answer, never
from ppo_nlu.config import Config
from ppo_nlu.data.shots import Shots
from ppo_nlu.methods.encoder_model import Encoder, answer_all
from ppo_nlu.tasks import Example, TaskSpec


class EncoderAnswerer:
    """An encoder as an `Answerer`; it shows no shots."""

    def __init__(self, encoder: Encoder, cfg: Config, shots: Shots | None = None):
        self.encoder, self.cfg = encoder, cfg

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return self.encoder.device

    def require_fit(self, spec: TaskSpec) -> None:
        """Nothing: its head was made for the task, and longer rows are cut."""

    def answer(
        self,
        spec: TaskSpec,
        examples: Sequence[Example],
        decode: str,
        stop: Callable[[], bool] = never,
    ) -> Iterator[Answer]:
        """Answers in the order of the examples; ends early where `stop` says so."""
        found = answer_all(self.encoder, spec, self.cfg, examples, decode, stop)
        for example, (prediction, probabilities) in zip(examples, found, strict=False):
            yield Answer(example, prediction, prediction or "", probabilities)

"""The encoder baseline: BERT fine-tuned whole with a head on top (Devlin et al., 2019).

With `init_from` training starts from another task's run (STILTs, arXiv 1811.01088). Weights and
optimizer are fp32. Ratings are learned by squared error in fifths of their range; for STS-B (0 to
5) that is its own scale. Two departures from BERT's own code: weight decay acts on all parameters,
and the gradient is clipped at the config's `max_grad_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppo_nlu.config import Config
from ppo_nlu.methods.base import Groups, Method
from ppo_nlu.methods.encoder_load import load
from ppo_nlu.methods.encoder_model import SPAN, Encoder, drawing_from, rating_of
from ppo_nlu.methods.encoder_save import FOLDER, load_weights, save, weights
from ppo_nlu.methods.minibatch import OptimizerStep
from ppo_nlu.methods.report import BadStep, Report, row_for_a_human
from ppo_nlu.runtime import flops
from ppo_nlu.tasks import Example, TaskSpec


class EncoderTuning(Method):
    """Fine-tuning of an encoder."""

    model: Encoder
    title = "Encoder"

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec], model: Encoder | None = None):
        (spec,) = specs.values()
        super().__init__(cfg, specs, model or load(cfg, spec))
        self.batch_size = cfg.encoder.batch_size

    def collect(self, rows: Sequence[Example], step: int) -> Sequence[Example]:
        """The rows themselves: there is nothing to run before learning."""
        assert rows, "nothing to learn from"
        return rows

    def update(self, batch: Sequence[Example], step: int) -> Report:
        """One optimizer step on these rows.

        Dropout depends on the seed and the step only. The accuracy is that of the training pass,
        with dropout. A rating is right where it rounds to the same decimal as the gold rating.
        """
        encoder, cfg = self.model, self.cfg
        minibatch = OptimizerStep(self.optimizer, cfg.optim.max_grad_norm)
        encoder.train()
        with drawing_from(encoder.device, "encoder", cfg.seed, step):
            # 1. the head's outputs, (B, K)
            outputs = encoder(encoder.read(batch, cfg.encoder.max_length))
            # 2. their distance to the labels
            loss, right = self.loss(outputs, batch)
            minibatch.backward(loss, {})
        encoder.eval()
        minibatch.metrics["answer/accuracy"] = right
        if minibatch.take():
            return Report(minibatch.metrics)
        return Report({}, bad=BadStep([row_for_a_human(row) for row in batch], minibatch.metrics))

    def loss(self, outputs: Tensor, examples: Sequence[Example]) -> tuple[Tensor, float]:
        """Mean cross-entropy, or mean squared error in fifths of the range; and the share of right
        rows."""
        spec, labels = self.model.spec, [_label(row) for row in examples]
        if spec.rating is None:
            gold = torch.tensor([spec.words.index(word) for word in labels], device=outputs.device)
            right = (outputs.detach().argmax(-1) == gold).float().mean()
            return F.cross_entropy(outputs, gold), float(right)
        low, width = spec.rating.low, spec.rating.high - spec.rating.low
        targets = [(float(label) - low) / width * SPAN for label in labels]
        loss = F.mse_loss(outputs.squeeze(-1), torch.tensor(targets, device=outputs.device))
        pairs = zip(outputs.detach().flatten().tolist(), labels, strict=True)
        hits = [spec.rating.write(rating_of(spec, x)) == spec.written(label) for x, label in pairs]
        return loss, sum(hits) / len(hits)

    # --- what a run keeps -------------------------------------------------------------------------

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [p for p in self.model.model.parameters() if p.requires_grad], []

    def weights(self) -> Groups:
        return {"encoder": weights(self.model)}

    def restore(self, groups: Groups, place: str) -> None:
        load_weights(self.model, groups["encoder"])

    def save(self, folder: Path) -> None:
        save(self.model, folder / FOLDER)

    def path(self) -> str:
        return ""

    def plan_memory(self, rows: Sequence[Example]) -> list[str]:
        return []

    def cuts(self, row: Example) -> bool:
        return self.model.length(row) > self.cfg.encoder.max_length

    def limit(self) -> str:
        return f"{self.cfg.encoder.max_length:,} tokens (encoder.max_length)"

    def flop_weights(self) -> flops.Weights | None:
        return None

    def start(self) -> AbstractContextManager[Any] | None:
        return None  # the head is new, so an untrained encoder has nothing to measure

    def base(self) -> AbstractContextManager[Any] | None:
        return None


def _label(example: Example) -> str:
    assert example.label is not None, f"{example.task} {example.id} has no label to learn from"
    return example.label


METHOD = EncoderTuning

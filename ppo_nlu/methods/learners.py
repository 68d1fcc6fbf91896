"""What the training loop asks of each method: a step on some rows, weights to keep, weights back.

`ppo`, `grpo` and `sft` train LoRA on a causal language model, `encoder` a whole encoder. A new
method is a class here and a line in `LEARNERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from ppo_nlu.config import Config, GRPOConfig, PPOConfig
from ppo_nlu.losses import AdaptiveKL
from ppo_nlu.methods import encoder, grpo, ppo, sft, updates
from ppo_nlu.methods.reference_cache import ReferenceCache
from ppo_nlu.methods.rollout import Rollout, seeded, tell_reuse
from ppo_nlu.methods.updates import Budget, Metrics, check_first_ratio
from ppo_nlu.model import lora, peft_format
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.value_head import VALUE_HEAD
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.rewards import RunningScale

Groups = dict[str, dict[str, Tensor]]


class Learner(ABC):
    """One method at work on one model."""

    model: Policy | encoder.Encoder  # what `evaluate` asks for answers
    batch_size: int  # rows of a step
    samples: int = 1  # answers that a step trains on, for each row
    unit: str  # what a trained row is called in the summary line
    remark: str | None = None  # something to tell after the last step
    seen: Metrics  # what was known of the last step before its update
    truncated = 0  # prompts cut so far in the last step

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        self.cfg, self.specs = cfg, specs
        self.seen = {}

    @abstractmethod
    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What trains at `optim.lr`, and what at `optim.value_lr`."""

    @abstractmethod
    def step(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        """Train on these rows; raises updates.BadStep where something is not finite."""

    @abstractmethod
    def weights(self) -> Groups:
        """The trained tensors by group, as a checkpoint keeps them."""

    @abstractmethod
    def restore(self, groups: Groups, place: str) -> None:
        """Take trained tensors back; `place` is named in errors."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a run hands over into its folder."""

    def state(self) -> dict[str, Any]:
        """Numbers beside the weights that a resumed run needs."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take those numbers back."""
        return

    def base(self) -> AbstractContextManager[Any] | None:
        """A region in which the model is the untrained one; None where there is no such thing."""
        return None

    def describe(self, index: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of the last step at these places, for a human to look at."""
        return []


class LoraLearner(Learner):
    """The parts that all but the encoder share: LoRA on a frozen causal language model."""

    model: Policy
    budget: Budget  # what a forward of the update may hold

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        super().__init__(cfg, specs)
        self.model = load_policy(cfg)

    def base(self) -> AbstractContextManager[Any]:
        return lora.lora_disabled(self.model.model)

    def weights(self) -> Groups:
        return {"adapter": lora.state_dict(self.model.model)}

    def restore(self, groups: Groups, place: str) -> None:
        lora.load_state_dict(self.model.model, groups["adapter"], place)

    def save(self, folder: Path) -> None:
        name, groups = self.cfg.model.name_or_path, self.weights()
        beside = {VALUE_HEAD: dump_tensors(groups["value_head"])} if "value_head" in groups else {}
        peft_format.save_adapter(self.model.model, folder / "adapter", self.cfg.lora, name, beside)


class OnPolicy(LoraLearner):
    """The parts that PPO and GRPO share: what a run remembers of its rollouts."""

    unit = "answers"
    section: PPOConfig | GRPOConfig

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        super().__init__(cfg, specs)
        self.batch_size = cfg.rollout.batch_size
        self.samples = cfg.rollout.samples_per_prompt
        self.scale = RunningScale() if cfg.reward.normalise else None
        self.reference = ReferenceCache() if cfg.rollout.reference_cache else None
        # Old log-probs out of the decode pass; None: to be seen.
        self.reuse: bool | None = {"always": True, "never": False}.get(cfg.rollout.reuse_logprobs)
        self.budget = Budget(self.section.micro_batch_size, cfg.train.micro_batch_tokens)
        self.checked = False  # whether the first ratio was looked at on the pass that is used
        self.told = False  # whether it was told of any pass
        self.rollout: Rollout | None = None

    @abstractmethod
    def learn(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        """Collect answers into `rollout` (and what is known of them into `seen`), then update."""

    @abstractmethod
    def advantages(self, row: int) -> Any:
        """Those of an answer of the last step, for a human to look at."""

    def step(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        metrics = self.learn(optimizer, examples, step)
        assert self.rollout is not None
        self.rollout.trunk = None  # of a step that had nothing to learn from
        remarks = [*self.budget.remarks]
        self.budget.remarks.clear()
        gap = metrics.get("policy/first_ratio_gap")
        if gap is not None and not self.checked:
            # Once more where later updates stand on the rollout's pass and this one did not.
            self.checked = self.rollout.stood or not self.keep_graph()
            remark = check_first_ratio(gap, self.cfg.model.dtype == "float32")
            if self.checked or not self.told:  # the same pass again is nothing new
                remarks.append(remark or "")
            self.told = True
        if step == 0:
            remarks.append(check_form(self.seen["answer/unparsed"]) or "")
        told = [remark for remark in (self.remark, *remarks) if remark]
        self.remark = "\n".join(told) or None
        return self.seen | metrics

    def keep_graph(self) -> int:
        """How many tokens of a rollout's pass may stay for the update; 0: none.

        Only where the decode pass gives the old log-probs: in low precision a pass that is cut
        otherwise rounds otherwise, and the first ratio would not be that of a training pass.
        """
        policy = self.model
        if not (self.reuse and policy.tree) or policy.checkpointing:
            return 0
        rows = self.batch_size * self.samples
        return updates.graph_tokens(self.section, self.budget, rows, policy.device)

    def collected(self, rollout: Rollout, seen: Metrics) -> None:
        """Remember a rollout and what it showed."""
        self.rollout, self.seen, self.truncated = rollout, seen, rollout.truncated
        if self.reuse is None:
            self.reuse = rollout.reused
            self.remark = tell_reuse(rollout)

    def state(self) -> dict[str, Any]:
        return {
            "reward_scale": self.scale and self.scale.seen,
            "reuse": self.reuse,
            "checked": self.checked,
            "told": self.told,
            "reference": self.reference and self.reference.state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        # A checkpoint of an earlier version has none of these.
        self.reuse, self.checked = state.get("reuse"), state.get("checked", True)
        self.told = state.get("told", True)
        if self.scale is not None:
            self.scale.seen = dict(state["reward_scale"])
        if self.reference is not None and state.get("reference") is not None:
            self.reference.set_state(state["reference"])

    def describe(self, index: Sequence[int]) -> list[dict[str, Any]]:
        roll = self.rollout
        assert roll is not None
        return [
            {
                "id": roll.examples[j].id,
                "fields": roll.examples[j].fields,
                "label": roll.examples[j].label,
                "response": roll.responses[j],
                "tokens": roll.answers[j],
                "score": float(roll.scores[j]),
                "logprobs": roll.logprobs[j].tolist(),
                "advantages": self.advantages(j),
            }
            for j in index
        ]


class PPO(OnPolicy):
    """Proximal policy optimisation with a critic."""

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        self.section = cfg.ppo
        super().__init__(cfg, specs)
        self.kl = AdaptiveKL(cfg.ppo.kl_coef, cfg.ppo.kl_target, cfg.ppo.kl_horizon)
        self.batch: ppo.Batch | None = None

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return lora.lora_parameters(self.model.model), list(self.model.value_head.parameters())

    def learn(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        # Answers, scores, KL-shaped rewards, advantages; then epochs of minibatch updates.
        self.batch, seen = ppo.collect(
            self.model, self.specs, self.cfg, self.kl, examples, step, self.scale,
            self.reference, self.reuse, self.keep_graph(),
        )  # fmt: skip
        self.collected(self.batch.rollout, seen)
        return ppo.update(self.model, optimizer, self.cfg, self.batch, step, self.budget)

    def advantages(self, row: int) -> Any:
        assert self.batch is not None
        return self.batch.advantages[row].tolist()

    def weights(self) -> Groups:
        head = {k: v.detach().cpu() for k, v in self.model.value_head.state_dict().items()}
        return super().weights() | {"value_head": head}

    def restore(self, groups: Groups, place: str) -> None:
        super().restore(groups, place)
        lora.take(self.model.value_head.state_dict(), groups["value_head"], place)

    def state(self) -> dict[str, Any]:
        return super().state() | {"kl_coef": self.kl.coef}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self.kl.coef = state["kl_coef"]


class GRPO(OnPolicy):
    """Group relative policy optimisation, without a critic."""

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        self.section = cfg.grpo
        super().__init__(cfg, specs)
        self.batch: grpo.Batch | None = None

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return lora.lora_parameters(self.model.model), []

    def learn(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        # Groups of answers, scores, advantages inside each group; then epochs of updates.
        self.batch, seen = grpo.collect(
            self.model, self.specs, self.cfg, examples, step, self.scale, self.reference,
            self.reuse, self.keep_graph(),
        )  # fmt: skip
        self.collected(self.batch.rollout, seen)
        return grpo.update(self.model, optimizer, self.cfg, self.batch, step, self.budget)

    def advantages(self, row: int) -> Any:
        assert self.batch is not None
        return float(self.batch.advantages[row])


def check_form(unparsed: float) -> str | None:
    """What to say where the base hardly ever gives an answer in form: nothing to learn from."""
    if unparsed < 0.9:
        return None
    return (
        f"warning: {100 * unparsed:.0f} % of the first answers name no allowed answer, so there "
        "is little to learn from; take an instruction-tuned model, start from an SFT run "
        "(init_from), or teach this one the form: python -m ppo_nlu.teach_form"
    )


class SFT(LoraLearner):
    """Supervised fine-tuning on the right answers."""

    unit = "rows"

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        super().__init__(cfg, specs)
        self.batch_size = cfg.sft.batch_size
        self.budget = Budget(cfg.sft.micro_batch_size, cfg.train.micro_batch_tokens)
        self.rows: Sequence[Example] = ()

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return lora.lora_parameters(self.model.model), []

    def step(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        self.rows, self.seen = examples, {}
        # Masks of a seed of their own, so that a resumed run draws the same.
        with torch.random.fork_rng(devices=[]), lora.dropout_on(self.model.model):
            torch.manual_seed(seeded("dropout", self.cfg.seed, step).initial_seed())
            metrics = sft.update(self.model, self.specs, optimizer, self.cfg, examples, self.budget)
        self.remark = "\n".join(self.budget.remarks) or None
        self.budget.remarks.clear()
        self.truncated = int(metrics["answer/truncated_prompts"])
        return metrics

    def describe(self, index: Sequence[int]) -> list[dict[str, Any]]:
        rows = [self.rows[j] for j in index]
        return [{"id": row.id, "fields": row.fields, "label": row.label} for row in rows]


class EncoderLearner(Learner):
    """Fine-tuning of an encoder, the baseline."""

    unit = "rows"
    model: encoder.Encoder

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec]):
        super().__init__(cfg, specs)
        self.batch_size = cfg.encoder.batch_size
        (spec,) = specs.values()
        self.model = encoder.load(cfg, spec)

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [p for p in self.model.model.parameters() if p.requires_grad], []

    def step(self, optimizer: Optimizer, examples: Sequence[Example], step: int) -> Metrics:
        return encoder.step(self.model, optimizer, self.cfg, examples, step)

    def weights(self) -> Groups:
        return {"encoder": encoder.weights(self.model)}

    def restore(self, groups: Groups, place: str) -> None:
        encoder.load_weights(self.model, groups["encoder"])

    def save(self, folder: Path) -> None:
        encoder.save(self.model, folder / encoder.FOLDER)


LEARNERS: dict[str, type[Learner]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "sft": SFT,
    "encoder": EncoderLearner,
}

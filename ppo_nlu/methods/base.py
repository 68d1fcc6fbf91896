"""What the training loop asks of a method: `collect`, then `update`; and weights to save and load.

A method is a subclass of `Method` in a file of its own. The file calls it `METHOD`, and the name of
the file stands in `config.METHODS`. What is not abstract here is for LoRA on a causal language
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from ppo_nlu.config import Config
from ppo_nlu.data.shots import Shots
from ppo_nlu.methods import memory
from ppo_nlu.methods.minibatch import Budget
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt
from ppo_nlu.methods.report import Report
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model import lora, peft_format
from ppo_nlu.model.value_head import VALUE_HEAD
from ppo_nlu.runtime import flops
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks import Example, TaskSpec

Groups = dict[str, dict[str, Tensor]]


class Method(ABC):
    """One method at work on one model."""

    model: Any  # a `Policy` or an `Encoder`: what an `Answerer` asks
    title: str  # the method's name for a reader
    batch_size: int  # rows of a step
    samples: int = 1  # answers that a step trains on, for each row
    unit: str = "rows"  # what a trained row is called in the summary line
    budget: Budget | None = None  # the limit of one forward of an update, where there is one

    def __init__(self, cfg: Config, specs: Mapping[str, TaskSpec], model: Any):
        self.cfg, self.specs, self.model = cfg, specs, model
        self.shots = Shots(cfg)  # for training and evaluation: the rows are read once a run
        self.optimizer = build_optimizer(cfg.optim, *self.parameters())

    @abstractmethod
    def collect(self, rows: Sequence[Example], step: int) -> Any:
        """Run all that comes before learning; the result is a batch for `update`."""

    @abstractmethod
    def update(self, batch: Any, step: int) -> Report:
        """Learn from a batch."""

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that train at `optim.lr`, and those that train at `optim.value_lr`."""
        return lora.lora_parameters(self.model.model), []

    def weights(self) -> Groups:
        """The trained tensors by group, as a checkpoint keeps them."""
        return {"adapter": lora.state_dict(self.model.model)}

    def restore(self, groups: Groups, place: str) -> None:
        """Load trained tensors again; `place` is named in errors."""
        lora.load_state_dict(self.model.model, groups["adapter"], place)

    def save(self, folder: Path) -> None:
        """Write the trained weights into the run's folder."""
        name, groups = self.cfg.model.name_or_path, self.weights()
        beside = {VALUE_HEAD: dump_tensors(groups["value_head"])} if "value_head" in groups else {}
        peft_format.save_adapter(self.model.model, folder / "adapter", self.cfg.lora, name, beside)

    def workload(self) -> Workload:
        """What the memory plan needs to know; here for a method that draws no answers."""
        return Workload(
            prompts=self.cfg.eval.batch_size,
            samples=1,
            minibatch=self.batch_size,
            micro_batch=self.budget.rows if self.budget else 0,
            per_prompt=1,
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        return

    def path(self) -> str:
        """How the model is run, for the user; empty where there is one way only."""
        policy = self.model
        if not policy.tree:
            return "plain path (one padded row a prompt)"
        if policy.window is None or policy.window >= policy.context:
            return "prefix tree"
        rows = f"rows of up to {policy.window:,} tokens"
        return f"prefix tree for {rows}, else one padded row a prompt"

    def plan_memory(self, rows: Sequence[Example]) -> list[str]:
        """What a run on such rows will need, a line each; on a GPU the budget keeps to the plan."""
        prompts = memory.prompts_of(self.model, self.specs, self.cfg, rows, self.shots)
        trained = [parameter for group in self.parameters() for parameter in group]
        plan = memory.plan(self.model, self.cfg, self.workload(), trained, prompts)
        if self.budget is not None:
            self.budget.tokens = plan.micro_batch_tokens
        return plan.lines()

    def cuts(self, row: Example) -> bool:
        """Whether the text of this row is cut, because its prompt is too long without any shot."""
        cfg = self.cfg
        longest = longest_prompt(self.model, cfg, cfg.rollout.max_new_tokens)
        return fit_prompt(self.model, self.specs[row.task], row, longest, cfg.prompt).cut

    def limit(self) -> str:
        """How many tokens of a row are read at most, and what says so."""
        longest = longest_prompt(self.model, self.cfg, self.cfg.rollout.max_new_tokens)
        asked = longest == self.cfg.data.max_prompt_tokens
        return f"{longest:,} tokens ({'data.max_prompt_tokens' if asked else 'the context'})"

    def flop_weights(self) -> flops.Weights | None:
        """The weights by which a profile counts FLOPs; None where it counts none."""
        return flops.weights_of(self.model)

    def start(self) -> AbstractContextManager[Any] | None:
        """A context in which the model is as it was before training: the base, with the adapter of
        `init_from` where one is given. None where there is no such model."""
        return lora.lora_disabled(self.model.model)

    def base(self) -> AbstractContextManager[Any] | None:
        """A context in which the model is the base, without the adapter of `init_from`."""
        return lora.bare(self.model.model)

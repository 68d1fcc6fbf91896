"""The memory plan: what a run will need, printed before its first step, and what one forward holds.

Everything but the activations follows from shapes, in bytes:

    weights      what is frozen, as it lies in memory
    adapters     LoRA and the critic, twice: the parameters and their gradients
    optimizer    AdamW: two fp32 numbers a parameter; Adafactor: one for each row and each column
                 of a matrix
    keys, values 2 · layers · key heads · head size for each token of the prompts (shared tokens
                 once), and for each row of the decode buffers, which are as long as the longest
                 prompt's own part and the longest answer
    log-probs    two blocks of logits in fp32, never all logits; while answers are drawn
                 16 bytes an answer and vocabulary entry (logits, weights, padding, a spare)

Activations are counted on a pass over a few prompts (`memory_sizes`).

The plan is of tensors. A process on a CPU takes more: the libraries (about 430 MiB with torch and
transformers). They are there before the first step, and the last line of the plan adds them.

Rollout and update do not overlap, so the larger of the two counts. But where the first pass of an
update reuses the rollout's prompt pass, the activations of the prompts are there during both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ppo_nlu.config import Config
from ppo_nlu.data.shots import Shots
from ppo_nlu.methods.memory_sizes import (
    Lengths,
    Sizes,
    TokenBytes,
    bytes_of,
    free_bytes,
    frozen,
    logprob_bytes,
    optimizer_bytes,
    resident_bytes,
)
from ppo_nlu.methods.minibatch import Budget, graph_tokens
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model.policy import Policy
from ppo_nlu.tasks import Example, TaskSpec

MARGIN = 0.9  # share of a GPU's free memory that the plan uses


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use; tokens and answers of the largest forward of an update."""

    weights: int
    adapters: int
    optimizer: int
    keys_values: int  # of the rollout
    drawing: int  # the rollout's other working memory
    activations: int  # of the update, with what a layer needs while it is run backward
    backward: int  # what it needs then, a part of the activations
    logprobs: int  # the update's workspace, free again when the backward begins
    per_token: int  # of the activations
    tokens: int
    answers: int
    micro_batch_tokens: int  # tokens a forward of the update may run; 0 = no limit
    free: int | None = None  # on the GPU, before the first step
    graph: int = 0  # activations of the prompt pass that the rollout keeps for the update
    resident: int | None = None  # the process before the first step, with weights and adapters

    @property
    def fixed(self) -> int:
        """Bytes held during the whole run."""
        return self.weights + self.adapters + self.optimizer

    @property
    def rollout(self) -> int:
        return self.keys_values + self.drawing + self.graph

    @property
    def update(self) -> int:
        return self.activations + max(self.logprobs - self.backward, 0)

    @property
    def peak(self) -> int:
        """The most tensors that will be held at once."""
        return self.fixed + max(self.rollout, self.update)

    @property
    def process(self) -> int | None:
        """What the process will take at its peak on a CPU: what it has, and what is to come."""
        if self.resident is None:
            return None
        gradients = self.adapters // 2
        return self.resident + gradients + self.optimizer + max(self.rollout, self.update)

    def lines(self) -> list[str]:
        """The plan as lines for the user."""
        free = "" if self.free is None else f", {_size(self.free)} free on the GPU"
        limit = (
            f"at most {self.micro_batch_tokens:,} tokens"
            if self.micro_batch_tokens
            else "no limit of tokens"
        )
        found = [
            f"memory plan: {_size(self.peak)} of tensors{free}",
            f"  throughout: weights {_size(self.weights)}, adapters and gradients "
            f"{_size(self.adapters)}, optimizer {_size(self.optimizer)}",
            f"  rollout: keys and values {_size(self.keys_values)}, drawing answers "
            f"{_size(self.drawing)}"
            + (f", activations kept for the update {_size(self.graph)}" if self.graph else ""),
            f"  update: activations {_size(self.activations)} ({self.answers} answers or about "
            f"{self.tokens:,} tokens at a time, {_size(self.per_token)} each), log-probs "
            f"{_size(self.logprobs)}",
            f"  micro-batch: {limit} (train.micro_batch_tokens)",
        ]
        if self.process is not None and self.resident is not None:
            found.append(
                f"  process: about {_size(self.process)}, of which {_size(self.resident)} now: "
                "the libraries and the weights"
            )
        if self.free is not None and self.adapters // 2 + self.optimizer + self.rollout > self.free:
            found.append("  warning: the rollout may not fit; lower rollout.batch_size")
        return found


def plan(
    policy: Policy,
    cfg: Config,
    work: Workload,
    trained: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
) -> MemoryPlan:
    """The plan of a run whose prompts are like these; on a GPU it chooses `micro_batch_tokens`.

    Runs two forwards of at most four of the prompts.
    """
    sizes, longest = Sizes.of(policy), cfg.rollout.max_new_tokens
    packed = policy.packs(max(map(len, prompts)) + longest)
    lengths = Lengths.of(prompts, packed)
    adapters = 2 * sum(bytes_of(p) for p in trained)
    states = sum(optimizer_bytes(cfg.optim.name, p) for p in trained)

    rows = work.prompts * work.samples
    prefill = lengths.tokens(work.prompts)
    cached = prefill + rows * (lengths.longest + longest)

    each = TokenBytes.of(policy, prompts, lengths, longest, work.critic)
    answers = min(work.minibatch, work.micro_batch or work.minibatch)
    tokens = lengths.tokens(math.ceil(answers / work.per_prompt)) + answers * (longest - 1)
    limit = cfg.train.micro_batch_tokens
    free = free_bytes(policy.device)
    workspace = logprob_bytes(answers * longest, sizes, policy.device)
    if free is not None and not limit:
        room = MARGIN * free - adapters // 2 - states - workspace
        limit = max(int(room / each.total), lengths.shared + lengths.longest + longest)
    tokens = min(tokens, limit) if limit else tokens

    keeps = False  # the rollout keeps its prompt pass for the update
    if packed and work.rollout and not policy.checkpointing and _reuses_logprobs(cfg):
        most = graph_tokens(work.minibatch, Budget(work.micro_batch, limit), rows, policy.device)
        keeps = prefill + rows * (longest - 1) <= most
    return MemoryPlan(
        weights=sum(bytes_of(t) for t in frozen(policy)),
        adapters=adapters,
        optimizer=states,
        keys_values=cached * sizes.keys_values,
        drawing=max(rows * sizes.vocab * 16, prefill * each.layer // 2),
        activations=tokens * each.total,
        backward=tokens * each.backward,
        logprobs=workspace,
        per_token=each.total,
        tokens=tokens,
        answers=answers,
        micro_batch_tokens=limit,
        free=free,
        resident=resident_bytes() if policy.device.type == "cpu" else None,
        # Keys and values are counted already.
        graph=prefill * (each.kept - sizes.keys_values) if keeps else 0,
    )


def _reuses_logprobs(cfg: Config) -> bool:
    """Whether old log-probs will come from the decode pass, as far as the config tells."""
    how = cfg.rollout.reuse_logprobs
    return how == "always" or (how == "auto" and cfg.model.dtype == "float32")


def prompts_of(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    examples: Sequence[Example],
    drawn: Shots,
) -> list[list[int]]:
    """The prompts of these rows, as training will see them."""
    longest = longest_prompt(policy, cfg, cfg.rollout.max_new_tokens)
    shots = {name: drawn.pool(spec) for name, spec in specs.items()}
    return [
        fit_prompt(policy, specs[row.task], row, longest, cfg.prompt, shots[row.task]).ids
        for row in examples
    ]


def _size(count: int) -> str:
    """Bytes for a human, in powers of 1,024."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"

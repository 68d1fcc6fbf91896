"""What a run will need of memory, told before its first step, and how much fits into one forward.

Everything but the activations follows from shapes, in bytes:

    weights      what is frozen, as it lies in memory
    adapters     LoRA and the critic, twice: the parameters and their gradients
    optimizer    AdamW: two numbers of fp32 a parameter; Adafactor: one for each row and each column
                 of a matrix
    keys, values 2 · layers · key heads · head size for each token of the prompts (those shared,
                 once) and again for each row of the decode buffers, as long as the longest own part
                 of a prompt with the longest answer
    log-probs    two blocks of logits in fp32, never all of them; while answers are drawn
                 16 bytes an answer and vocabulary entry (logits, weights, padding, a spare)

Activations are counted: a pass over a few prompts of the run, with the longest answers, tells how
many bytes autograd keeps for each token. What a layer needs besides while it is run backward is
taken to be half of what it keeps. With checkpointing a layer keeps its input alone, and one
layer at a time all the rest. On a GPU the attention's scores of one layer are added: four of fp32
for each head and pair of a token with one of the longest run that it attends to.

The plan is of tensors. A process on a CPU takes more: libraries (about 430 MiB with torch and
transformers), which are there before the first step and are added in the last line.

Rollout and update do not overlap, so the larger of the two counts; but where the first pass of an
update stands on the rollout's, what autograd keeps of the prompts is there during both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppo_nlu.config import Config, GRPOConfig, PPOConfig
from ppo_nlu.data import demonstrations
from ppo_nlu.methods.minibatch import Budget, graph_tokens
from ppo_nlu.methods.rollout import fit_prompt, longest_prompt
from ppo_nlu.model.policy import Policy, trainable
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tree import prefixes
from ppo_nlu.tree.trim import whole

PROBE = 4  # prompts of the pass that is counted
MARGIN = 0.9  # of the free memory of a GPU that is planned with


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use; tokens and answers of the largest forward of an update."""

    weights: int
    adapters: int
    optimizer: int
    keys_values: int  # of the rollout
    drawing: int  # the rollout's working memory besides
    activations: int  # of the update, with what a layer needs while it is run backward
    backward: int  # that part of them
    logprobs: int  # the update's workspace, free again when the backward begins
    per_token: int  # of the activations
    tokens: int
    answers: int
    micro_batch_tokens: int  # tokens a forward of the update may run; 0 = no limit
    free: int | None = None  # of the GPU, before the first step
    graph: int = 0  # activations of the prompts' pass that the rollout keeps for the update
    resident: int | None = None  # the process before the first step, with weights and adapters

    @property
    def fixed(self) -> int:
        """What is there throughout."""
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
        """For the user."""
        free = "" if self.free is None else f", {_size(self.free)} free on the GPU"
        limit = (
            f"at most {self.micro_batch_tokens:,} tokens"
            if self.micro_batch_tokens
            else ("no limit of tokens")
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
    trained: Sequence[Tensor],
    prompts: Sequence[Sequence[int]],
) -> MemoryPlan:
    """The plan of a run whose prompts are like these; on a GPU it chooses `micro_batch_tokens`.

    Runs two forwards of at most four of the prompts.
    """
    sizes = Sizes.of(policy)
    longest = cfg.rollout.max_new_tokens
    prefix, shared = 0, policy.packs(max(map(len, prompts)) + longest)
    if shared and len(prompts) > 1:
        prefix = min(prefixes.common(prompts[0], prompt) for prompt in prompts[1:])
    own = [len(prompt) - prefix for prompt in prompts]
    if not shared:
        own = [max(own)] * len(own)
    mean = sum(own) / len(own)
    adapters = 2 * sum(_bytes(p) for p in trained)
    states = sum(optimizer_bytes(cfg.optim.name, p) for p in trained)

    samples = cfg.rollout.samples_per_prompt if cfg.method != "sft" else 1
    asked = cfg.rollout.batch_size if cfg.method != "sft" else cfg.eval.batch_size
    rows = asked * samples
    prefill = prefix + round(asked * mean)
    cached = prefill + rows * (max(own) + longest)

    full = saved_bytes(policy, prompts[:PROBE], longest, values=cfg.method == "ppo")
    with whole(policy.decoder):
        each = saved_bytes(policy, prompts[:PROBE], longest, values=cfg.method == "ppo")
    layer = each // sizes.layers
    kept = sizes.layers * sizes.hidden * sizes.item + layer if policy.checkpointing else full
    backward = layer // 2
    if policy.device.type != "cpu":  # the attention forms the scores of a layer there
        backward += 16 * sizes.heads * max(prefix, max(own) + longest)
    per_token = kept + backward

    step, micro, together = _update_rows(cfg, rows, samples)
    answers = min(step, micro or step)
    tokens = prefix + round(-(-answers // together) * mean) + answers * (longest - 1)
    limit = cfg.train.micro_batch_tokens
    free = free_bytes(policy.device)
    workspace = logprob_bytes(answers * longest, sizes, policy.device)
    if free is not None and not limit:
        room = MARGIN * free - adapters // 2 - states - workspace
        limit = max(int(room / per_token), prefix + max(own) + longest)
    tokens = min(tokens, limit) if limit else tokens
    answered = rows * (longest - 1)
    stays = 0  # tokens of a pass whose graph stays
    how = cfg.rollout.reuse_logprobs
    reused = how == "always" or (how == "auto" and cfg.model.dtype == "float32")
    if cfg.method != "sft" and shared and not policy.checkpointing and reused:
        section: PPOConfig | GRPOConfig = getattr(cfg, cfg.method)
        budget = Budget(section.micro_batch_size, limit)
        stays = graph_tokens(section, budget, rows, policy.device)
    return MemoryPlan(
        weights=sum(_bytes(t) for t in _frozen(policy)),
        adapters=adapters,
        optimizer=states,
        keys_values=cached * sizes.keys_values,
        drawing=max(rows * sizes.vocab * 16, prefill * layer // 2),
        activations=tokens * per_token,
        backward=tokens * backward,
        logprobs=workspace,
        per_token=per_token,
        tokens=tokens,
        answers=answers,
        micro_batch_tokens=limit,
        free=free,
        resident=resident_bytes() if policy.device.type == "cpu" else None,
        # Keys and values are counted already.
        graph=prefill * (kept - sizes.keys_values) if prefill + answered <= stays else 0,
    )


def prompts_of(
    policy: Policy, specs: Mapping[str, TaskSpec], cfg: Config, examples: Sequence[Example]
) -> list[list[int]]:
    """The prompts of these rows, as training will see them."""
    longest = longest_prompt(policy, cfg, cfg.rollout.max_new_tokens)
    shots = {name: demonstrations.of(spec, cfg) for name, spec in specs.items()}
    return [
        fit_prompt(policy, specs[row.task], row, longest, cfg.prompt, shots[row.task]).ids
        for row in examples
    ]


@dataclass(frozen=True)
class Sizes:
    """Of a decoder: `item` bytes a number, `keys_values` bytes a token in all layers."""

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


def saved_bytes(
    policy: Policy, prompts: Sequence[Sequence[int]], longest: int, values: bool = True
) -> int:
    """Bytes that autograd keeps for a token: of a pass over these prompts, each with an answer of
    the `longest` length, over the tokens that it runs. Parameters are not counted, and blocks keep
    all that they do without checkpointing."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*_frozen(policy), *trainable(policy))}

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


def _update_rows(cfg: Config, rows: int, samples: int) -> tuple[int, int, int]:
    """Answers of an optimizer step, of a micro-batch (0: all of them), and of a prompt in it."""
    if cfg.method == "sft":
        return cfg.sft.batch_size, cfg.sft.micro_batch_size, 1
    section: Any = getattr(cfg, cfg.method)
    step = min(section.minibatch_size or rows, rows)
    return step, section.micro_batch_size, samples if step == rows else 1


def _frozen(policy: Policy) -> Iterable[Tensor]:
    named = (p for p in policy.model.parameters() if not p.requires_grad)
    return [*named, *policy.model.buffers()]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _size(count: int) -> str:
    """Bytes for a human, in powers of 1,024."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"

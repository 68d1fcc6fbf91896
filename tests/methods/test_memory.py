"""The memory plan: sizes by hand, and the whole against the peak that the allocator saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ppo_nlu.config import Config, OptimConfig, PPOConfig, RolloutConfig, TrainConfig
from ppo_nlu.methods import memory, memory_sizes
from ppo_nlu.methods.workload import Workload
from ppo_nlu.model import BUNDLED, lora
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy, trainable
from ppo_nlu.runtime import optim
from ppo_nlu.tree.checkpointing import checkpoint_blocks
from ppo_nlu.tree.trim import whole
from tests import tiny

MIB = 2**20


def config(
    answers: int = 4, longest: int = 5, minibatch: int = 2, samples: int = 1, limit: int = 0
) -> Config:
    return Config(
        task="sst2",
        rollout=RolloutConfig(
            batch_size=answers, max_new_tokens=longest, samples_per_prompt=samples
        ),
        ppo=PPOConfig(minibatch_size=minibatch),
        train=TrainConfig(micro_batch_tokens=limit),
        optim=OptimConfig(name="adamw"),
    )


def prompts(count: int = 4, shared: int = 6, own: int = 3) -> list[list[int]]:
    """`own` tokens behind `shared` common ones; the first of them tells the prompts apart."""
    return [[*range(3, 3 + shared), 20 + i, *[9] * (own - 1)] for i in range(count)]


def plan_of(policy: Policy, cfg: Config, rows: list[list[int]]) -> memory.MemoryPlan:
    work = Workload.on_rollouts(cfg.rollout, cfg.ppo, critic=True)
    return memory.plan(policy, cfg, work, trainable(policy), rows)


def test_the_parts_that_follow_from_shapes() -> None:
    """A llama of 2 layers, 32 units, 2 key heads of 8 numbers; LoRA of rank 4 on all linears."""
    policy = tiny.policy()
    plan = plan_of(policy, config(), prompts())
    base = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in policy.model.buffers())
    assert plan.weights == 4 * (base + buffers)
    linears = 32 + 32, 32 + 16, 32 + 16, 32 + 32, 32 + 48, 32 + 48, 48 + 32  # q k v o gate up down
    critic = 32 * 32 + 32 + 32 + 1
    trained = 2 * 4 * sum(linears) + critic
    assert plan.adapters == 2 * 4 * trained
    assert plan.optimizer == 2 * 4 * trained
    # 6 shared and 4 · 3 own tokens of prompts, 4 rows of 3 + 5; a token of 2 layers has 2 · 2 heads
    # of 8 numbers of 4 bytes
    assert plan.keys_values == (6 + 12 + 4 * 8) * 256
    # 2 answers of a minibatch: 6 + 2 · (3 + 4)
    assert (plan.answers, plan.tokens) == (2, 20)
    assert plan.activations == 20 * plan.per_token
    assert plan.peak == plan.weights + plan.adapters + plan.optimizer + max(
        plan.keys_values + plan.drawing, plan.activations + max(plan.logprobs - plan.backward, 0)
    )
    assert plan.micro_batch_tokens == 0 and plan.free is None


def test_what_is_not_there_at_once_is_not_added() -> None:
    """Log-probs are done before the backward begins; the rollout before the update."""
    plan = replace(plan_of(tiny.policy(), config(), prompts()), weights=1, adapters=2, optimizer=4)
    plan = replace(plan, activations=100, backward=30, logprobs=20, keys_values=60, drawing=10)
    assert (plan.update, plan.peak) == (100, 107)
    plan = replace(plan, logprobs=50)
    assert (plan.update, plan.peak) == (120, 127)
    assert replace(plan, drawing=80).peak == 147


def test_samples_of_a_prompt_share_it() -> None:
    """Whole steps of 2 prompts with 3 answers each: 6 shared, 2 · 3 own, 6 · 4 of answers."""
    policy = tiny.policy()
    plan = plan_of(policy, config(answers=2, samples=3, minibatch=6), prompts())
    assert (plan.answers, plan.tokens) == (6, 6 + 2 * 3 + 6 * 4)
    assert plan.keys_values == (6 + 2 * 3 + 6 * 8) * 256


def test_the_plain_path_shares_and_pads() -> None:
    """Rows as long as the longest prompt: 2 · (10 + 4) where prompts have 9 and 10 tokens."""
    policy = tiny.policy()
    policy.tree = False
    found = prompts(3)
    plan = plan_of(policy, config(), [*found, [*found[0], 9]])
    assert plan.tokens == 2 * (10 + 4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_optimizers_state_is_as_large_as_told(name: str) -> None:
    policy = tiny.policy()
    made = trainable(policy)
    optimizer = optim.build_optimizer(OptimConfig(name=name), made)
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    found = sum(t.numel() * t.element_size() for t in held if t.dim())  # without the step counts
    assert sum(memory_sizes.optimizer_bytes(name, p) for p in made) == found


def test_planning_changes_nothing() -> None:
    policy = tiny.policy()
    before, weights = torch.get_rng_state(), lora.state_dict(policy.model)
    plan_of(policy, config(), prompts())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in trainable(policy))
    after = lora.state_dict(policy.model)
    assert all(torch.equal(weights[key], after[key]) for key in weights)


def test_a_gpu_gets_the_tokens_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of what is free, less what the first step adds, over the bytes of a token."""
    policy = tiny.policy()
    free = 8 * MIB
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    plan = plan_of(policy, config(), prompts())
    left = 0.9 * free - plan.adapters // 2 - plan.optimizer - plan.logprobs
    assert plan.micro_batch_tokens == int(left / plan.per_token) > 20
    assert any("8.0 MiB free" in line for line in plan.lines())
    assert any(f"at most {plan.micro_batch_tokens:,} tokens" in line for line in plan.lines())
    # At least one answer; and the user's own limit holds.
    free = 0
    assert plan_of(policy, config(), prompts()).micro_batch_tokens == 6 + 3 + 5
    assert any(
        "lower rollout.batch_size" in line for line in plan_of(policy, config(), prompts()).lines()
    )
    own = plan_of(policy, config(limit=15), prompts())
    assert (own.micro_batch_tokens, own.tokens) == (15, 15)


def test_checkpointing_keeps_a_layers_input() -> None:
    policy = tiny.policy()
    full = memory_sizes.saved_bytes(policy, prompts(), 5)
    policy.checkpointing = True
    checkpoint_blocks(policy.decoder)
    # What a block needs while it is run again is counted too.
    assert memory_sizes.saved_bytes(policy, prompts(), 5) == full
    plan = plan_of(policy, config(), prompts())
    with whole(policy.decoder):
        layer = memory_sizes.saved_bytes(policy, prompts(), 5) // 2
    assert layer > full // 2  # the last block kept little
    assert plan.per_token == 2 * 32 * 4 + layer + layer // 2
    assert all("forward" in vars(block) for block in policy.decoder.layers)  # wrapped as before


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator held at once for this work, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture(scope="module")
def bundled() -> Policy:
    if not (BUNDLED / "config.json").is_file():
        pytest.skip("the bundled model is not in ppo_nlu/assets")
    return load_policy(Config(task="sst2"))


def update(policy: Policy, rows: Sequence[Sequence[int]], longest: int) -> None:
    scored = policy.score(rows, [[5] * longest for _ in rows], values=True)
    assert scored.values is not None
    (scored.logprobs.sum() + scored.values.sum()).backward()


@pytest.mark.parametrize(("answers", "longest"), [(8, 4), (32, 12), (64, 8)])
@pytest.mark.parametrize("tree", [True, False])
def test_the_plan_holds_within_a_factor(
    bundled: Policy,
    monkeypatch: pytest.MonkeyPatch,
    answers: int,
    longest: int,
    tree: bool,
) -> None:
    """Rollout and update of the bundled model, each with answers of the full length: the plan is
    never less than the measured peak, and at most 1.3 of it."""
    monkeypatch.setattr(bundled, "tree", tree)
    monkeypatch.setattr(bundled.stop, "ended", lambda rows: [False] * len(rows))
    shared = "You read a sentence from a film review. Is its opinion favourable or not? "
    rows = [
        bundled.encode(f"{shared}The film {i} is a {'very ' * (i % 9)}good one.")
        for i in range(answers)
    ]
    cfg = config(answers, longest, answers)
    plan = plan_of(bundled, cfg, rows)
    update(bundled, rows, longest)  # gradients are there, as the plan's `adapters` say
    found = allocated(lambda: update(bundled, rows, longest))
    assert found <= plan.update <= 1.3 * found, f"{plan.update / found:.2f} of {found / MIB}"
    if tree and answers == 64:
        with monkeypatch.context() as patch:
            for block in bundled.decoder.layers:  # type: ignore[union-attr]
                patch.setattr(block, "forward", block.forward)
            patch.setattr(bundled, "checkpointing", True)
            checkpoint_blocks(bundled.decoder)
            less = plan_of(bundled, cfg, rows)
            found = allocated(lambda: update(bundled, rows, longest))
        assert found <= less.update <= 1.3 * found, f"{less.update / found:.2f}"
    assert bool(plan.graph) == tree, "an update of one forward reuses the prompt pass"

    def drawn() -> None:
        most = 10**9 if plan.graph else 0
        generate(bundled, rows, Sampling(longest), critic=True, keep_graph=most)

    found = allocated(drawn)
    assert found <= plan.rollout <= 1.3 * found, f"{plan.rollout / found:.2f} of {found / MIB}"


def test_the_process_is_more_than_its_tensors() -> None:
    """On a CPU the last line adds what is there already: libraries, weights, adapters."""
    plan = plan_of(tiny.policy(), config(), prompts())
    with open("/proc/self/status", encoding="ascii") as file:
        resident = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    assert plan.resident is not None and abs(plan.resident - resident) < 0.1 * resident
    to_come = plan.adapters // 2 + plan.optimizer + max(plan.rollout, plan.update)
    assert plan.process == plan.resident + to_come > plan.peak
    assert "  process: about" in plan.lines()[-1]
    on_a_gpu = replace(plan, resident=None)
    assert on_a_gpu.process is None and not any("process" in line for line in on_a_gpu.lines())

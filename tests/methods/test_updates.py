"""What the updates share: cutting a minibatch, running out of memory, minibatches of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from ppo_nlu.config import Config, GRPOConfig, PPOConfig, RolloutConfig
from ppo_nlu.errors import UserError
from ppo_nlu.losses import AdaptiveKL
from ppo_nlu.methods import grpo, ppo, sft, updates
from ppo_nlu.methods.updates import Budget, cut
from ppo_nlu.model.policy import Policy, trainable


@dataclass
class Rows:
    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]


# Four prompts that share 3 tokens, with 2, 5, 1 and 5 of their own, the last two of them alike.
PROMPTS = [
    [1, 2, 3, 4, 4],
    [1, 2, 3, 5, 5, 5, 5, 5],
    [1, 2, 3, 6],
    [1, 2, 3, 7, 7, 7, 7, 7],
]
ANSWERS = [[8], [8, 9], [8, 9, 9], [8], [8, 9], [8], [8], [8, 9]]
ROWS = Rows(PROMPTS, ANSWERS, [0, 0, 1, 1, 2, 2, 3, 3])


# ---- cutting --------------------------------------------------------------------------------


def test_without_tokens_a_minibatch_is_cut_as_it_stands() -> None:
    assert list(cut(ROWS, [5, 3, 1, 7, 0], Budget())) == [[5, 3, 1, 7, 0]]
    assert list(cut(ROWS, [5, 3, 1, 7, 0], Budget(rows=2))) == [[5, 3], [1, 7], [0]]


def test_tokens_are_counted_as_the_tree_runs_them() -> None:
    """By hand: 3 shared tokens a micro-batch, a prompt's own once, an answer's but the last.

    Longest first: prompt 1 with rows 2 (5 + 2) and 3 (+ 0) makes 10 with the head; prompt 3 with
    row 7 (5 + 1) makes 16 and row 6 adds 0; prompt 0 with row 1 (2 + 1) makes 19, row 0 adds 0;
    prompt 2 with row 4 (1 + 1) makes 21, row 5 adds 0.
    """
    index = list(range(8))
    assert list(cut(ROWS, index, Budget(tokens=21))) == [[2, 3, 7, 6, 1, 0, 4, 5]]
    assert list(cut(ROWS, index, Budget(tokens=20))) == [[2, 3, 7, 6, 1, 0], [4, 5]]
    assert list(cut(ROWS, index, Budget(tokens=16))) == [[2, 3, 7, 6], [1, 0, 4, 5]]
    assert list(cut(ROWS, index, Budget(tokens=15))) == [[2, 3], [7, 6, 1, 0, 4, 5]]
    assert list(cut(ROWS, index, Budget(tokens=20, rows=3))) == [[2, 3, 7], [6, 1, 0], [4, 5]]
    alone = [[2], [3], [7], [6], [1], [0], [4], [5]]
    assert list(cut(ROWS, index, Budget(tokens=1, rows=1))) == alone
    assert list(cut(ROWS, index, Budget(tokens=1))) == [[2], [3], [7], [6], [1], [0], [4], [5]]


def test_the_plain_path_runs_every_row_whole() -> None:
    """Rows of 8 + 2, 8, 8 + 1, 8, 5 + 1, 5, 4 + 1 and 4 tokens, longest prompt first."""
    found = list(cut(ROWS, list(range(8)), Budget(tokens=18), shared=False))
    assert found == [[2, 3], [7, 6], [1, 0, 4], [5]]


# ---- the gradient of a minibatch ------------------------------------------------------------


def gradients(policy: Policy, backward: Callable[[], object]) -> list[Tensor]:
    for parameter in trainable(policy):
        parameter.grad = None
    backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(policy)]
    for parameter in trainable(policy):
        parameter.grad = None
    return found


def setting(method: str, plain: bool = False) -> tuple[Policy, Callable[[Budget], object]]:
    """A policy, and the backward of one minibatch of 12 answers under a budget."""
    policy = tiny.policy("mpt" if plain else "llama")
    cfg = Config(
        task="sst2",
        method=method,
        rollout=RolloutConfig(4, 3, 4),
        ppo=PPOConfig(minibatch_size=12),
        grpo=GRPOConfig(kl_coef=0.1, drop_even=False),
    )
    rows = tiny.examples(4)
    if method == "ppo":
        batch, _ = ppo.collect(policy, tiny.SPECS, cfg, AdaptiveKL(0.2, 6, 100), rows, 0)
        index = list(range(12))
        return policy, lambda budget: ppo.backward(policy, cfg, batch, index, budget)
    if method == "grpo":
        group, _ = grpo.collect(policy, tiny.SPECS, cfg, rows, 0)
        group.advantages = torch.linspace(-1, 2, 12)
        return policy, lambda budget: grpo.backward(policy, cfg, group, list(range(12)), budget)

    def supervised(budget: Budget) -> None:
        class Keep(SGD):  # the step would clear the gradient
            def step(self, closure=None):  # type: ignore[override]
                return None

            def zero_grad(self, set_to_none: bool = True) -> None:
                return None

        optimizer = Keep(trainable(policy), lr=0.0)
        open_cfg = replace(cfg, optim=replace(cfg.optim, max_grad_norm=0.0))
        sft.update(policy, tiny.SPECS, optimizer, open_cfg, tiny.examples(5), budget)

    return policy, supervised


@pytest.mark.parametrize("plain", [False, True], ids=["tree", "plain"])
@pytest.mark.parametrize("method", ["ppo", "grpo", "sft"])
def test_a_budget_changes_memory_only(method: str, plain: bool) -> None:
    policy, backward = setting(method, plain)
    whole = gradients(policy, lambda: backward(Budget()))
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for budget in (Budget(tokens=60), Budget(tokens=1), Budget(rows=3, tokens=90), Budget(rows=5)):
        for one, other in zip(whole, gradients(policy, lambda b=budget: backward(b)), strict=True):  # type: ignore[misc]
            tiny.close(one, other, 1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo", "sft"])
def test_out_of_memory_halves_the_micro_batch_with_the_same_result(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that holds 3 rows: 12 are halved to 6 and to 3, 5 to 2."""
    policy, backward = setting(method)
    whole = gradients(policy, lambda: backward(Budget()))
    plain, sizes = policy.score, list[int]()

    def small(prompts, answers, owners=None, *rest, **named):
        sizes.append(len(answers))
        if len(answers) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(prompts, answers, owners, *rest, **named)

    monkeypatch.setattr(policy, "score", small)
    budget = Budget(rows=0 if method != "sft" else 5)
    for one, other in zip(whole, gradients(policy, lambda: backward(budget)), strict=True):
        tiny.close(one, other, 1e-5)
    assert budget.rows in (2, 3) and max(sizes[-2:]) <= 3
    assert len(budget.remarks) == 1 and "smaller micro-batch" in budget.remarks[0]
    sizes.clear()
    gradients(policy, lambda: backward(budget))
    assert max(sizes) <= 3, "it stays halved"


def test_out_of_memory_in_a_later_part_starts_afresh() -> None:
    """The sum of 1..6, the 5 not fitting beside another: 6 + 15 would be counted twice over."""
    weight = nn.Parameter(torch.zeros(()))
    rows = Rows([[1]] * 6, [[2]] * 6, list(range(6)))

    def backward(micro: list[int]) -> updates.Metrics:
        if 4 in micro and len(micro) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        (weight * sum(j + 1 for j in micro)).backward()
        return {"loss": float(sum(j + 1 for j in micro))}

    budget = Budget(rows=4)
    metrics = updates.accumulate([weight], rows, list(range(6)), budget, backward)
    assert weight.grad is not None and float(weight.grad) == metrics["loss"] == 21
    assert budget.rows == 1 and len(budget.remarks) == 1


def test_one_answer_that_does_not_fit_is_told() -> None:
    def backward(micro: list[int]) -> updates.Metrics:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"train.micro_batch_tokens: .*model.checkpointing=true"):
        updates.accumulate([], Rows([[1]] * 3, [[2]] * 3, [0, 1, 2]), [0, 1, 2], Budget(), backward)


# ---- epochs and minibatches -----------------------------------------------------------------


def test_a_minibatch_of_nothing_takes_no_step() -> None:
    """Three minibatches of two rows, the middle one with nothing to learn: two steps, no more.
    Without that AdamW would go on in the old direction."""
    weight = nn.Parameter(torch.zeros(()))
    optimizer, seen = AdamW([weight], lr=0.1), list[list[int]]()

    def backward(index: list[int]) -> updates.Metrics | None:
        seen.append(index)
        if index == [2, 3]:
            return None
        weight.backward(torch.ones(()))
        return {"loss": 2.0, "policy/ratio_mean": 1.0, "policy/ratio_gap": 0.5 * len(seen)}

    cfg = Config(task="sst2", grpo=GRPOConfig(minibatch_size=2))
    metrics = updates.run([weight], optimizer, cfg, cfg.grpo, lambda epoch: range(6), backward)
    assert seen == [[0, 1], [2, 3], [4, 5]] and int(optimizer.state[weight]["step"]) == 2
    assert metrics["optim/steps"] == 2 and metrics["loss"] == 2.0
    assert metrics["policy/first_ratio_gap"] == 0.5 and metrics["policy/ratio_gap"] == 1.5
    nothing = updates.run([weight], optimizer, cfg, cfg.grpo, lambda epoch: [], backward)
    assert nothing == {"optim/steps": 0.0, "optim/skipped": 0.0}


def test_an_update_stands_on_the_rollout_only_where_it_is_one_forward() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    whole = PPOConfig(minibatch_size=16)
    assert updates.graph_tokens(whole, Budget(), 16, cpu) > 10**9
    assert updates.graph_tokens(whole, Budget(tokens=900), 16, cpu) == 900
    assert updates.graph_tokens(whole, Budget(tokens=900), 16, gpu) == 450
    assert updates.graph_tokens(whole, Budget(), 17, cpu) == 0, "minibatches of 16"
    assert updates.graph_tokens(whole, Budget(rows=8), 16, cpu) == 0, "micro-batches of 8"
    assert updates.graph_tokens(GRPOConfig(), Budget(), 64, cpu) > 10**9


def steps_of(found: updates.Metrics, gradient: float = 1.0, **changes) -> tuple[nn.Parameter, int]:
    """A weight after up to three epochs of one minibatch with these metrics, and the epochs run."""
    weight, epochs = nn.Parameter(torch.zeros(())), list[int]()

    def backward(index: list[int]) -> updates.Metrics:
        epochs.append(len(epochs))
        assert weight.grad is None, "a minibatch starts without a gradient"
        weight.backward(torch.tensor(gradient))
        ratios = {"policy/ratio_mean": 1.0, "policy/ratio_gap": 0.0, "policy/approx_kl": 0.0}
        return {"loss": 1.0, **ratios, **found}

    cfg = Config(task="sst2", ppo=PPOConfig(epochs=3, minibatch_size=2, **changes))
    optimizer = SGD([weight], lr=0.1)
    try:
        updates.run([weight], optimizer, cfg, cfg.ppo, lambda epoch: range(2), backward)
    except updates.BadStep:
        assert weight.grad is None
        return weight, -len(epochs)
    return weight, len(epochs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_with_a_fine_gradient_is_no_step_nor_the_other_way_round(bad: float) -> None:
    for weight, epochs in (steps_of({"loss": bad}), steps_of({}, gradient=bad)):
        assert weight.item() == 0 and epochs == -1


def test_target_kl_has_half_as_much_room_again() -> None:
    """The minibatch beyond the limit is still a step, and the last one."""
    assert steps_of({"policy/approx_kl": 0.149}, target_kl=0.1)[1] == 3
    weight, epochs = steps_of({"policy/approx_kl": 0.151}, target_kl=0.1)
    assert epochs == 1 and weight.item() == pytest.approx(-0.1)
    assert steps_of({"policy/approx_kl": 9.0})[1] == 3

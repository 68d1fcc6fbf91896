"""What the updates share: cutting a minibatch, running out of memory, minibatches of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from ppo_nlu.config import Config, GRPOConfig, OptimConfig, PPOConfig, RolloutConfig
from ppo_nlu.errors import UserError
from ppo_nlu.methods import grpo, ppo, sft
from ppo_nlu.methods.minibatch import Budget, Epochs, Metrics, OptimizerStep, cut, graph_tokens


@dataclass
class Rows:
    prompts: list[list[int]]
    answers: list[list[int]]
    prompt_of: list[int]


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

    Longest first: prompt 1 with rows 2 (5 + 2) and 3 (+ 0) makes 3 + 7 = 10; prompt 3 with
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


def setting(method: str, plain: bool = False) -> Callable[[Budget], list[Tensor]]:
    """The gradient of one minibatch of 12 answers (or 5 rows) under a budget."""
    policy = tiny.policy("mpt" if plain else "llama")
    cfg = Config(
        task="sst2",
        method=method,
        rollout=RolloutConfig(4, 3, 4),
        ppo=PPOConfig(minibatch_size=12, epochs=1),
        grpo=GRPOConfig(kl_coef=0.1, drop_even=False),
        optim=OptimConfig(max_grad_norm=0.0),
    )
    made = {"ppo": ppo.PPO, "grpo": grpo.GRPO, "sft": sft.SFT}[method](cfg, tiny.SPECS, policy)
    batch = made.collect(tiny.examples(5 if method == "sft" else 4), 0)
    if method == "grpo":
        batch.advantages = torch.linspace(-1, 2, 12)

    def gradients(budget: Budget) -> list[Tensor]:
        made.budget, kept = budget, tiny.keep_gradients(made)
        messages = made.update(batch, 0).messages
        budget.messages += [line for line in messages if "micro-batch" in line]
        return kept

    gradients.policy = policy  # type: ignore[attr-defined]
    return gradients


@pytest.mark.parametrize("plain", [False, True], ids=["tree", "plain"])
@pytest.mark.parametrize("method", ["ppo", "grpo", "sft"])
def test_a_budget_changes_memory_only(method: str, plain: bool) -> None:
    gradients = setting(method, plain)
    whole = gradients(Budget())
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for budget in (Budget(tokens=60), Budget(tokens=1), Budget(rows=3, tokens=90), Budget(rows=5)):
        for one, other in zip(whole, gradients(budget), strict=True):
            tiny.close(one, other, 1e-5)


@pytest.mark.parametrize("method", ["ppo", "grpo", "sft"])
def test_out_of_memory_halves_the_micro_batch_with_the_same_result(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that holds 3 rows: 12 are halved to 6 and to 3, 5 to 2."""
    gradients = setting(method)
    whole, policy = gradients(Budget()), gradients.policy  # type: ignore[attr-defined]
    plain, sizes = policy.score, list[int]()

    def small(prompts, answers, prompt_of=None, *rest, **named):
        sizes.append(len(answers))
        if len(answers) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(prompts, answers, prompt_of, *rest, **named)

    monkeypatch.setattr(policy, "score", small)
    budget = Budget(rows=0 if method != "sft" else 5)
    for one, other in zip(whole, gradients(budget), strict=True):
        tiny.close(one, other, 1e-5)
    assert budget.rows in (2, 3) and max(sizes[-2:]) <= 3
    assert len(budget.messages) == 1 and "smaller micro-batch" in budget.messages[0]
    sizes.clear()
    gradients(budget)
    assert max(sizes) <= 3, "it stays halved"


def test_out_of_memory_in_a_later_part_starts_afresh() -> None:
    """The sum of 1..6, the 5 not fitting beside another: 6 + 15 would be counted twice over."""
    weight = nn.Parameter(torch.zeros(()))
    rows = Rows([[1]] * 6, [[2]] * 6, list(range(6)))

    step, budget = OptimizerStep(SGD([weight], lr=0.0), 0.0), Budget(rows=4)
    for micro in step.micro_batches(rows, list(range(6)), budget):
        with step.part(micro):
            if 4 in micro and len(micro) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            step.backward(
                weight * sum(j + 1 for j in micro), {"sum": torch.tensor(sum(micro) + 0.0)}
            )
    assert weight.grad is not None and float(weight.grad) == 21 and step.metrics["sum"] == 15
    assert budget.rows == 1 and len(budget.messages) == 1


def test_one_answer_that_does_not_fit_is_told() -> None:
    weight, rows = nn.Parameter(torch.zeros(())), Rows([[1]] * 3, [[2]] * 3, [0, 1, 2])
    step = OptimizerStep(SGD([weight], lr=0.0), 0.0)
    with pytest.raises(UserError, match=r"train.micro_batch_tokens: .*model.checkpointing=true"):
        for micro in step.micro_batches(rows, [0, 1, 2], Budget()):
            with step.part(micro):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_another_error_in_a_part_goes_through() -> None:
    step = OptimizerStep(SGD([nn.Parameter(torch.zeros(()))], lr=0.0), 0.0)
    with pytest.raises(RuntimeError, match="shapes"), step.part([0, 1]):
        raise RuntimeError("shapes differ")


# ---- epochs and minibatches -----------------------------------------------------------------


def test_epochs_are_cut_into_minibatches_with_a_step_each() -> None:
    """Three minibatches of two rows, the middle one with nothing to learn: two steps, no more.
    Without that AdamW would go on in the old direction."""
    weight = nn.Parameter(torch.zeros(()))
    optimizer, seen = AdamW([weight], lr=0.1), list[list[int]]()
    epochs = Epochs(GRPOConfig(minibatch_size=2))
    for index in epochs.minibatches(lambda epoch: range(6)):
        seen.append(index)
        if index == [2, 3]:
            continue
        step = OptimizerStep(optimizer, 1.0)
        ratios = {"policy/ratio_mean": 1.0, "policy/ratio_gap": 0.5 * len(seen)}
        step.backward(weight + 2, {name: torch.tensor(x) for name, x in ratios.items()})
        step.metrics["loss"] = 2.0
        epochs.take(step, index)
    metrics = epochs.metrics()
    assert seen == [[0, 1], [2, 3], [4, 5]] and int(optimizer.state[weight]["step"]) == 2
    assert metrics["optim/steps"] == 2 and metrics["loss"] == 2.0
    assert metrics["policy/first_ratio_gap"] == 0.5 and metrics["policy/ratio_gap"] == 1.5
    nothing = Epochs(GRPOConfig(minibatch_size=2))
    assert list(nothing.minibatches(lambda epoch: [])) == []
    assert nothing.metrics() == {"optim/steps": 0.0, "optim/skipped": 0.0}


def test_an_update_reuses_the_prompt_pass_only_where_it_is_one_forward() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert graph_tokens(16, Budget(), 16, cpu) > 10**9
    assert graph_tokens(16, Budget(tokens=900), 16, cpu) == 900
    assert graph_tokens(16, Budget(tokens=900), 16, gpu) == 450
    assert graph_tokens(16, Budget(), 17, cpu) == 0, "minibatches of 16"
    assert graph_tokens(16, Budget(rows=8), 16, cpu) == 0, "micro-batches of 8"
    assert graph_tokens(0, Budget(), 64, cpu) > 10**9, "0 is all"


def steps_of(found: Metrics, gradient: float = 1.0, **changes) -> tuple[nn.Parameter, int]:
    """A weight after up to three epochs of one minibatch with these metrics, and the epochs run;
    below 0 where the last one was bad."""
    weight, count = nn.Parameter(torch.zeros(())), 0
    optimizer, epochs = (
        SGD([weight], lr=0.1),
        Epochs(PPOConfig(epochs=3, minibatch_size=2, **changes)),
    )
    for index in epochs.minibatches(lambda epoch: range(2)):
        count += 1
        assert weight.grad is None, "a minibatch starts without a gradient"
        step = OptimizerStep(optimizer, 1.0)
        step.backward(weight * gradient, {})
        ratios = {"policy/ratio_mean": 1.0, "policy/ratio_gap": 0.0, "policy/approx_kl": 0.0}
        step.metrics |= {"loss": 1.0, **ratios, **found}
        epochs.take(step, index)
    assert weight.grad is None
    if epochs.bad is not None:
        assert epochs.bad[0] == [0, 1] and epochs.bad[1]["policy/ratio_mean"] == 1.0
    return weight, count if epochs.bad is None else -count


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_or_a_bad_gradient_alone_is_no_step(bad: float) -> None:
    for weight, epochs in (steps_of({"loss": bad}), steps_of({}, gradient=bad)):
        assert weight.item() == 0 and epochs == -1


def test_epochs_end_above_one_and_a_half_times_target_kl() -> None:
    """The minibatch beyond the limit is still a step, and the last one."""
    assert steps_of({"policy/approx_kl": 0.149}, target_kl=0.1)[1] == 3
    weight, epochs = steps_of({"policy/approx_kl": 0.151}, target_kl=0.1)
    assert epochs == 1 and weight.item() == pytest.approx(-0.1)
    assert steps_of({"policy/approx_kl": 9.0})[1] == 3

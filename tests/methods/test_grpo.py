"""GRPO: advantages and loss against slow references and TRL's formula, and what is left out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ppo_nlu import losses
from ppo_nlu.config import Config, GRPOConfig, RolloutConfig
from ppo_nlu.config import OptimConfig as Optim
from ppo_nlu.losses import grpo_loss, rloo_advantages
from ppo_nlu.methods import grpo
from ppo_nlu.methods.minibatch import Metrics, OptimizerStep
from ppo_nlu.model import lora
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks.rewards import RunningScale
from ppo_nlu.tree import passes

# Two groups of three with spread, one even, one with an answer of advantage 0 (scores 1, -1, 0).
ANSWERS = (
    "Positive </Judgement>", "Negative </Judgement>", "good film Positive </Judgement>",
    "Positive </Judgement>", "Positive </Judgement>", "Positive </Judgement>",
    "Positive </Judgement>", "Positive Positive film good", "Negative </Judgement>",
    "Negative </s>", "bad Negative </Judgement>", "Negative </Judgement>",
)  # fmt: skip
SCORES = [1, 0, 1, 0, 0, 0, 1, -1, 0, -1, 1, 1]  # labels Positive, Negative by turns


def config(**changes) -> Config:
    return Config(
        task="sst2",
        method="grpo",
        rollout=RolloutConfig(4, 3, 4),
        grpo=GRPOConfig(**changes),
        optim=Optim(name="adamw", lr=1e-2, max_grad_norm=0.0),
    )


def made(policy: Policy, cfg: Config) -> grpo.GRPO:
    return grpo.GRPO(cfg, tiny.SPECS, policy)


def collect(
    policy: Policy, cfg: Config, room: int | None = None, scale: RunningScale | None = None
) -> grpo.Batch:
    """A batch; `room`: most tokens of a prompt pass and its answers that are kept."""
    method = made(policy, cfg)
    method.sampler.scale = scale
    if room is not None:
        method.sampler.reuse = True
        method.sampler.graph_room = lambda section, budget: room  # type: ignore[method-assign]
    return method.collect(tiny.examples(4), 0)


def update(policy: Policy, optimizer: Optimizer, cfg: Config, batch: grpo.Batch, step: int = 0):
    """The metrics of an update; the first ratio is not checked."""
    method = made(policy, cfg)
    method.optimizer, method.first_ratio.checked = optimizer, True
    return method.update(replace(batch, metrics={}), step).metrics


def forced(
    policy: Policy, cfg: Config, texts=ANSWERS, scale: RunningScale | None = None
) -> tuple[grpo.Batch, Metrics]:
    """A batch of given answers."""
    ids = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        tiny.force(patch, policy, ids)
        batch = collect(policy, cfg, scale=scale)
        return batch, batch.metrics


def gradients(
    policy: Policy, cfg: Config, batch: grpo.Batch, index: list[int]
) -> tuple[list[Tensor], Metrics]:
    """Gradients and metrics of these answers as one minibatch."""
    once = replace(cfg.grpo, epochs=1, minibatch_size=0, max_ratio=0.0)
    method = made(policy, replace(cfg, grpo=once))
    method.order = lambda batch, step, epoch: index  # type: ignore[method-assign]
    method.first_ratio.checked = True
    kept = tiny.keep_gradients(method)
    report = method.update(replace(batch, metrics={}), 0)
    assert report.bad is None and all(p.grad is None for p in policy.value_head.parameters())
    return kept, report.metrics


def indices(patch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list that learns the answers of each minibatch."""
    seen: list[list[int]] = []
    plain = OptimizerStep.micro_batches

    def spy(self, rows, index, *rest):
        seen.append(list(index))
        return plain(self, rows, index, *rest)

    patch.setattr(OptimizerStep, "micro_batches", spy)
    return seen


# ---- advantages -----------------------------------------------------------------------------


def test_rloo_leaves_the_answer_itself_out() -> None:
    """Scores 1, 0, 0, -1: the means of the others are -1/3, 0, 0 and 1/3."""
    found = rloo_advantages(torch.tensor([1.0, 0, 0, -1, 0.1, 0.1, 0.1, 0.1]), 4)
    torch.testing.assert_close(found, torch.tensor([4 / 3, 0, 0, -4 / 3, 0, 0, 0, 0]))
    assert found[4:].eq(0).all()


def test_rloo_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(24, generator=draw, dtype=torch.float64)
    for size in (2, 3, 8):
        expected = []
        for i in range(24):
            start = i - i % size
            rest = [float(scores[j]) for j in range(start, start + size) if j != i]
            expected.append(float(scores[i]) - sum(rest) / len(rest))
        found = rloo_advantages(scores, size)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(AssertionError):
        rloo_advantages(scores, 1)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        # mean 2/3, deviation sqrt((1/9 + 4/9 + 1/9) / 2) = 0.57735
        ({}, [1 / 3 / 0.57745, -2 / 3 / 0.57745, 1 / 3 / 0.57745]),
        ({"scale": False}, [1 / 3, -2 / 3, 1 / 3]),
        ({"advantage": "rloo"}, [1 / 2, -1, 1 / 2]),
    ],
)
def test_the_advantages_of_a_batch(changes, first) -> None:
    policy = tiny.policy()
    batch, metrics = forced(policy, config(**changes))
    assert batch.rollout.scores.tolist() == SCORES
    torch.testing.assert_close(batch.advantages[:3], torch.tensor(first), rtol=1e-4, atol=1e-6)
    assert batch.advantages[3:6].eq(0).all() and batch.advantages[8] == 0
    assert metrics["grpo/even_groups"] == 1 and metrics["reward/mean"] == 3 / 12
    assert batch.groups == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    assert "kl/ref" not in metrics and batch.rollout.ref_logprobs is None


# ---- the loss -------------------------------------------------------------------------------


def trl_loss(
    logps: list[list[float]] | list[Tensor],
    old: list[Tensor],
    ref: list[Tensor],
    advantages: list[float],
    low: float,
    high: float,
    beta: float,
) -> Tensor:
    """TRL 1.16's `_compute_loss` with loss_type="dapo", token by token, no mask: per-token
    -min(ρA, clip(ρ, 1 - low, 1 + high)A) + β(exp(d) - d - 1), d = ref - logp, over all tokens."""
    total, tokens = torch.zeros(()), 0
    for row in range(len(logps)):
        for t in range(len(logps[row])):
            now = torch.as_tensor(logps[row][t])
            coef_1 = torch.exp(now - old[row][t])
            coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
            loss = -torch.min(coef_1 * advantages[row], coef_2 * advantages[row])
            gap = ref[row][t] - now
            total = total + loss + beta * (torch.exp(gap) - gap - 1)
            tokens += 1
    return total / tokens


def alone(policy: Policy, batch: grpo.Batch, index: list[int]) -> list[Tensor]:
    """Log-probs of each answer by the plain forward of one row."""
    found = []
    for j in index:
        answer = batch.rollout.answers[j]
        prompt = batch.rollout.prompts[batch.rollout.prompt_of[j]]
        states = tiny.alone(policy.decoder, prompt, answer)
        table = torch.log_softmax(policy.logits(states), -1)
        found.append(table.gather(1, torch.tensor(answer)[:, None]).squeeze(1))
    return found


def off_policy(batch: grpo.Batch, seed: int = 0) -> None:
    """Old log-probs up to 0.5 away, so that ratios leave the clip range on both sides."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch.rollout.logprobs.shape, generator=draw) - 0.5
    batch.rollout.logprobs += noise * batch.rollout.mask


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("clip_high", [None, 0.28])
def test_loss_and_gradient_are_those_of_trls_formula(kl_coef: float, clip_high) -> None:
    """The whole way from prompts to LoRA gradients, against one row at a time."""
    policy, cfg = tiny.policy(), config(kl_coef=kl_coef, clip_high=clip_high, drop_even=False)
    batch, _ = forced(policy, cfg)
    off_policy(batch)
    rollout, index = batch.rollout, list(range(12))
    actual, metrics = gradients(policy, cfg, batch, index)
    old = [rollout.logprobs[j, : len(a)] for j, a in enumerate(rollout.answers)]
    with torch.no_grad(), lora.lora_disabled(policy.model):
        ref = alone(policy, batch, index)
    if kl_coef:
        assert rollout.ref_logprobs is not None
        for mine, theirs in zip(rollout.ref_logprobs, ref, strict=True):
            tiny.close(mine[: len(theirs)], theirs)
    advantages = batch.advantages.tolist()
    now = alone(policy, batch, index)
    loss = trl_loss(now, old, ref, advantages, 0.2, clip_high or 0.2, kl_coef)
    expected = torch.autograd.grad(loss, lora.lora_parameters(policy.model))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    for mine, theirs in zip(actual, expected, strict=True):
        tiny.close(mine, theirs)
    assert metrics["policy/clip_fraction"] > 0.1
    assert ("kl/loss" in metrics) is bool(kl_coef)


def test_clip_higher_by_hand() -> None:
    """ρ = 1.25, A = 1: clipped at 1.2 without, free with 0.28; ρ = 1.5: clipped at 1.28.
    A = -1 and ρ = 0.7: clipped at 0.8 either way."""
    ratios = torch.tensor([[1.25, 1.5], [0.7, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    old, advantages = torch.zeros_like(ratios), torch.tensor([1.0, -1.0], dtype=torch.float64)
    for high, expected in ((None, -(1.2 + 1.2 - 0.8) / 3), (0.28, -(1.25 + 1.28 - 0.8) / 3)):
        loss, _ = grpo_loss(ratios.log(), old, None, advantages, mask, clip_high=high)
        assert float(loss) == pytest.approx(expected)


def test_the_kl_of_the_metrics_is_that_of_a_whole_answer() -> None:
    policy, cfg = tiny.policy(), config(kl_coef=0.3)
    batch, metrics = forced(policy, cfg)
    index = list(range(12))
    with torch.no_grad():
        now = alone(policy, batch, index)
        with lora.lora_disabled(policy.model):
            then = alone(policy, batch, index)
    gaps = [b - a for a, b in zip(now, then, strict=True)]
    per_answer = [float((gap.exp() - gap - 1).sum()) for gap in gaps]
    assert metrics["kl/ref"] == pytest.approx(sum(per_answer) / 12, rel=1e-3)
    assert "kl/ref" not in gradients(policy, cfg, batch, index)[1], "not the mean over tokens"


# ---- what is left out -----------------------------------------------------------------------


def test_an_even_group_is_left_out_with_its_kl() -> None:
    """With KL on, the update is that of the other groups alone; kept, it would pull it."""
    policy = tiny.policy()
    cfg = config(kl_coef=0.5)
    others = [0, 1, 2, 6, 7, 8, 9, 10, 11]
    for drop, rows in ((True, others), (False, list(range(12)))):
        cfg = config(kl_coef=0.5, drop_even=drop)
        batch, metrics = forced(policy, cfg)
        with pytest.MonkeyPatch.context() as patch:
            seen = indices(patch)
            optimizer = torch.optim.SGD(lora.lora_parameters(policy.model), lr=0.0)
            assert update(policy, optimizer, cfg, batch, 0)["grpo/trained"] == len(rows)
        assert sorted(seen[-1]) == rows and metrics["grpo/even_groups"] == 1
    without, _ = gradients(policy, cfg, batch, others)
    with_it, _ = gradients(policy, cfg, batch, list(range(12)))
    assert max(float((a - b).abs().max()) for a, b in zip(without, with_it, strict=True)) > 1e-3


@pytest.mark.parametrize("drop", [True, False])
def test_rows_of_advantage_0_are_not_run_and_change_nothing(
    drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without KL 8 of 12 answers are run; the gradient and the loss are those of all of them."""
    policy, cfg = tiny.policy(), config(drop_even=drop)
    batch, _ = forced(policy, cfg)
    off_policy(batch)
    index = [j for group in batch.groups for j in group]
    plain, run = policy.score, []

    def spy(prompts, answers, *rest, **named):
        run.extend(answers)
        return plain(prompts, answers, *rest, **named)

    monkeypatch.setattr(policy, "score", spy)
    found, metrics = gradients(policy, cfg, batch, index)
    assert len(run) == metrics["grpo/trained"] == 8
    now = alone(policy, batch, index)
    rollout = batch.rollout
    old = [rollout.logprobs[j, : len(rollout.answers[j])] for j in index]
    advantages = [float(batch.advantages[j]) for j in index]
    loss = trl_loss(now, old, [x.detach() for x in now], advantages, 0.2, 0.2, 0.0)
    expected = torch.autograd.grad(loss, lora.lora_parameters(policy.model))
    whole = float(loss.detach())
    assert metrics["loss"] == pytest.approx(whole, abs=1e-6)
    assert metrics["policy/loss"] == pytest.approx(whole, abs=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        tiny.close(mine, theirs)
    trained = [j for j in index if batch.advantages[j] != 0]
    gap = torch.cat([n - o for j, n, o in zip(index, now, old, strict=True) if j in trained])
    assert metrics["policy/ratio_mean"] == pytest.approx(float(gap.detach().exp().mean()), rel=1e-4)


def test_a_step_of_even_groups_moves_nothing() -> None:
    """Not even by the momentum of the steps before."""
    policy, cfg = tiny.policy(), config()
    parameters = lora.lora_parameters(policy.model)
    optimizer = AdamW(parameters, lr=0.1)
    batch, _ = forced(policy, cfg)
    assert update(policy, optimizer, cfg, batch, 0)["optim/steps"] == 1
    before = [p.detach().clone() for p in parameters]
    batch, metrics = forced(policy, cfg, ["Positive </Judgement>"] * 12)
    assert metrics["grpo/even_groups"] == 4
    found = update(policy, optimizer, cfg, batch, 1)
    assert found == {"optim/steps": 0.0, "optim/skipped": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_left_out_groups_change_nothing_on_a_reused_prompt_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three of four groups are trained; the fourth's prompt is run without gradient."""
    policy, cfg = tiny.policy(), config(kl_coef=0.1)
    found, grown = [], []
    plain = passes.run_answers
    monkeypatch.setattr(passes, "run_answers", lambda *a: grown.append(0) or plain(*a))
    for tokens in (10**6, 0):
        batch = collect(policy, cfg, room=tokens)
        assert (batch.rollout.prompt_pass is None) == (tokens == 0)
        batch.advantages = torch.linspace(-1, 1, 12)
        found.append(gradients(policy, cfg, batch, [9, 10, 11, 0, 1, 2, 5, 4, 3]))
    assert len(grown) == 1
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        tiny.close(mine, theirs)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)


# ---- updates --------------------------------------------------------------------------------


def test_the_first_ratio_is_one_and_then_moves() -> None:
    policy, cfg = tiny.policy(), config(epochs=2, kl_coef=0.1, drop_even=False)
    batch = collect(policy, cfg)
    batch.advantages = torch.linspace(-1, 1, 12)
    optimizer = build_optimizer(cfg.optim, lora.lora_parameters(policy.model))
    metrics = update(policy, optimizer, cfg, batch, 0)
    assert metrics["policy/first_ratio_gap"] < 1e-4 < metrics["policy/ratio_gap"]
    assert metrics["optim/steps"] == 2


def test_the_answers_to_one_prompt_stay_together() -> None:
    """So that the prompt is run once for them: groups in a fresh order, minibatches of two."""
    policy, cfg = tiny.policy(), config(minibatch_size=6, epochs=3, kl_coef=0.1, drop_even=False)
    batch, _ = forced(policy, cfg)
    with pytest.MonkeyPatch.context() as patch:
        seen = indices(patch)
        optimizer = torch.optim.SGD(lora.lora_parameters(policy.model), lr=0.0)
        update(policy, optimizer, cfg, batch, 0)
    assert [len(index) for index in seen] == [6] * 6
    for index in seen:
        assert all(index[at : at + 3] == list(range(index[at], index[at] + 3)) for at in (0, 3))
    epochs = [seen[0] + seen[1], seen[2] + seen[3], seen[4] + seen[5]]
    assert all(sorted(rows) == list(range(12)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) > 1


def test_prompts_and_equal_answers_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, cfg = tiny.policy(), config(kl_coef=0.1, drop_even=False)
    batch, _ = forced(policy, cfg)
    plain, calls = policy.score, []

    def spy(prompts, answers, *rest, **named):
        calls.append((len(prompts), len(answers)))
        return plain(prompts, answers, *rest, **named)

    monkeypatch.setattr(policy, "score", spy)
    gradients(policy, cfg, batch, list(range(12)))
    assert calls == [(4, 10)], "the second prompt got one answer three times"


def test_it_learns_to_answer() -> None:
    """Every label is Positive: from noise (reward -1, no answer) to the right answer, closed."""
    policy = tiny.policy(few=True, shaken=False, scale=0.3)
    cfg = Config(
        task="sst2",
        method="grpo",
        rollout=RolloutConfig(8, 8, 4),
        optim=Optim(name="adamw", lr=2e-2),
    )
    optimizer = build_optimizer(cfg.optim, lora.lora_parameters(policy.model))
    method, rows, means = made(policy, cfg), tiny.examples(8, "Positive"), []
    method.optimizer = optimizer
    for step in range(50):
        batch = method.collect(rows, step)
        means.append(method.update(batch, step).metrics["reward/mean"])
    assert means[0] < -0.7
    assert sum(means[-5:]) / 5 > 0.8, means


def test_scores_put_on_one_scale_do_not_hide_an_even_group() -> None:
    policy, cfg = tiny.policy(), replace(config(), grpo=GRPOConfig(scale=False))
    batch, _ = forced(policy, cfg, scale=RunningScale())
    mean = sum(SCORES) / 12
    deviation = math.sqrt(sum((s - mean) ** 2 for s in SCORES) / 12)
    unscaled = losses.group_advantages(torch.tensor(SCORES, dtype=torch.float32), 3, False)
    tiny.close(batch.advantages, unscaled / deviation)
    assert len(batch.groups) == 3


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_update_is_at_the_temperature_of_the_draws(temperature: float) -> None:
    """So the first ratio is 1; log-probs and entropy are those of the plain forward over it."""
    policy, cfg = tiny.policy(), config(kl_coef=0.1, drop_even=False)
    cfg = replace(cfg, rollout=replace(cfg.rollout, temperature=temperature))
    batch = collect(policy, cfg)
    _, metrics = gradients(policy, cfg, batch, list(range(12)))
    assert metrics["policy/ratio_gap"] < 1e-4
    entropy, kl, count = 0.0, 0.0, 0
    for j, answer in enumerate(batch.rollout.answers):
        prompt = batch.rollout.prompts[batch.rollout.prompt_of[j]]
        tables = []
        for region in (nullcontext(), lora.lora_disabled(policy.model)):
            with torch.no_grad(), region:
                states = tiny.alone(policy.decoder, prompt, answer)
                tables.append(torch.log_softmax(policy.head(states) / temperature, -1))
        now, then = tables
        entropy -= float((now.exp() * now).sum())
        count += len(answer)
        for t, token in enumerate(answer):
            d = float(then[t, token] - now[t, token])
            kl += math.exp(d) - 1 - d
    assert metrics["policy/entropy"] == pytest.approx(entropy / count, abs=1e-4)
    assert metrics["kl/loss"] == pytest.approx(kl / count, abs=1e-5)

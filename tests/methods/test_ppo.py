"""The PPO update: first ratio, minibatches, guards, what is trained; and that it learns."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ppo_nlu.config import (
    Config,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
    load_config,
)
from ppo_nlu.config import OptimConfig as Optim
from ppo_nlu.errors import UserError
from ppo_nlu.losses import AdaptiveKL
from ppo_nlu.methods import ppo, report
from ppo_nlu.methods.minibatch import Metrics, OptimizerStep
from ppo_nlu.methods.report import check_first_ratio
from ppo_nlu.model import lora
from ppo_nlu.model.load import load_policy
from ppo_nlu.model.policy import Policy, trainable
from ppo_nlu.runtime.optim import build_optimizer
from ppo_nlu.tasks.rewards import RunningScale
from ppo_nlu.tree import pack

ANSWERS = (
    "Positive </Judgement>",
    "Negative </Judgement>",
    "good film Positive </Judgement>",
    "Positive Positive film good",  # cut by the limit
    "Negative </s>",
    "</Judgement>",
    "bad Negative </Judgement>",
    "Positive </Judgement>",
)


def config(
    prompts: int = 4, samples: int = 2, limit: int = 4, max_grad_norm: float = 0.0, **changes
) -> Config:
    count = prompts * samples
    return Config(
        task="sst2",
        rollout=RolloutConfig(prompts, samples, limit),
        ppo=PPOConfig(**{"minibatch_size": count, "epochs": 1, **changes}),
        optim=Optim(name="adamw", lr=1e-2, max_grad_norm=max_grad_norm),
    )


def made(policy: Policy, cfg: Config) -> ppo.PPO:
    return ppo.PPO(cfg, tiny.SPECS, policy)


def kl_of(cfg: Config) -> AdaptiveKL:
    return AdaptiveKL(cfg.ppo.kl_coef, cfg.ppo.kl_target, cfg.ppo.kl_horizon)


def collect(
    policy: Policy,
    cfg: Config,
    step: int = 0,
    kl: AdaptiveKL | None = None,
    room: int | None = None,
    scale: RunningScale | None = None,
) -> ppo.Batch:
    """A batch; `room`: most tokens of a prompt pass and its answers that are kept."""
    method = made(policy, cfg)
    method.kl, method.sampler.scale = kl or method.kl, scale
    if room is not None:
        method.sampler.reuse = True
        method.sampler.graph_room = lambda section, budget: room  # type: ignore[method-assign]
    return method.collect(tiny.examples(cfg.rollout.batch_size), step)


def update(policy: Policy, optimizer: Optimizer, cfg: Config, batch: ppo.Batch, step: int = 0):
    """The metrics of an update; the first ratio is not checked."""
    method = made(policy, cfg)
    method.optimizer, method.first_ratio.checked = optimizer, True
    return method.update(batch, step).metrics


def forced(policy: Policy, cfg: Config, texts=ANSWERS) -> ppo.Batch:
    """A batch of given answers."""
    ids = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        tiny.force(patch, policy, ids)
        return collect(policy, cfg)


def snapshot(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in trainable(policy)]


def moved(policy: Policy, before: list[Tensor]) -> float:
    return max(
        float((now.detach() - then).abs().max())
        for now, then in zip(trainable(policy), before, strict=True)
    )


def gradients(policy: Policy, cfg: Config, batch: ppo.Batch) -> tuple[list[Tensor], Metrics]:
    """Gradients and metrics of the whole batch as one minibatch."""
    size = batch.rollout.size
    once = replace(cfg.ppo, epochs=1, minibatch_size=size, max_ratio=0.0)
    method = made(policy, replace(cfg, ppo=once, optim=replace(cfg.optim, max_grad_norm=0.0)))
    method.order = lambda batch, step, epoch: list(range(size))  # type: ignore[method-assign]
    method.first_ratio.checked = True
    kept = tiny.keep_gradients(method)
    report = method.update(replace(batch, metrics={}), 0)
    assert report.bad is None
    return kept, report.metrics


def sgd(policy: Policy, lr: float = 0.1) -> SGD:
    return SGD(trainable(policy), lr=lr)


# ---- reusing the prompt pass ----------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.TREE_KINDS)
def test_an_update_that_reuses_the_prompt_pass_has_the_same_gradient(kind: str) -> None:
    policy, cfg = tiny.policy(kind), config(entropy_coef=0.1)
    kept, plain = (collect(policy, cfg, room=tokens) for tokens in (10**6, 0))
    assert kept.rollout.answers == plain.rollout.answers
    assert kept.rollout.prompt_pass is not None and plain.rollout.prompt_pass is None
    for tensor in (kept.rollout.logprobs, kept.rollout.values, kept.rollout.ref_logprobs):
        assert tensor is not None and not tensor.requires_grad
    mine, metrics = gradients(policy, cfg, kept)
    assert kept.rollout.prompt_pass is None, "it serves one pass: then the weights move"
    theirs, wanted = gradients(policy, cfg, plain)
    for a, b in zip(mine, theirs, strict=True):
        tiny.close(a, b)
    assert metrics == pytest.approx(wanted, abs=1e-5)
    assert metrics["policy/ratio_gap"] < 1e-4


def test_the_prompts_are_run_once_for_rollout_and_first_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs: prefill, answers behind it, then a whole pass for the second one."""
    policy, cfg = tiny.policy(), config(epochs=2, kl_coef=0.0)
    batch = collect(policy, cfg, room=9999)
    sizes: list[int] = []
    policy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    metrics = update(policy, sgd(policy), cfg, batch, 0)
    assert len(sizes) == 2 and sizes[0] < sizes[1] / 4
    assert sizes[0] <= sum(len(answer) - 1 for answer in batch.rollout.answers)
    assert metrics["policy/first_ratio_gap"] < 1e-4 < metrics["policy/ratio_gap"]


@pytest.mark.parametrize("end", ["a step", "no use for it", "an error"])
def test_a_kept_pass_is_freed(end: str) -> None:
    """Its graph must not hold on to itself: Python's collector does not see through autograd."""
    policy, cfg = tiny.policy(), config(epochs=2)
    batch = collect(policy, cfg, room=9999)
    prompt_pass = batch.rollout.prompt_pass
    assert prompt_pass is not None and prompt_pass.layers is not None
    seen = [weakref.ref(x) for pair in prompt_pass.layers for x in pair]
    del prompt_pass
    if end == "a step":
        update(policy, sgd(policy), cfg, batch, 0)
    elif end == "no use for it":
        batch.rollout.take_prompt_pass([0])
    else:
        batch.advantages = batch.advantages[:, :1]
        with pytest.raises(Exception):  # noqa: B017
            update(policy, sgd(policy), cfg, batch, 0)
    assert all(x() is None for x in seen)


def test_the_first_ratio_is_looked_at_on_the_pass_that_is_used() -> None:
    """The first step compares decode and training pass. From the second on, updates reuse the
    prompt pass, and its first ratio is checked then."""
    cfg = replace(config(kl_coef=0.0), model=ModelConfig(name_or_path="bundled"))
    method = ppo.PPO(cfg, tiny.SPECS)
    method.optimizer = sgd(method.model, 1e-3)
    used, checked = [], []
    for step in range(3):
        used.append(method.sampler.graph_room(method.section, method.budget) > 0)
        method.update(method.collect(tiny.examples(cfg.rollout.batch_size), step), step)
        checked.append(method.first_ratio.checked)
    assert used == [False, True, True] and checked == [False, True, True]


def test_a_pass_that_is_too_long_or_of_few_prompts_is_not_reused() -> None:
    policy, cfg = tiny.policy(), config()
    run = pack.build(collect(policy, cfg, room=0).rollout.prompts).cost.tokens_run
    longest = cfg.rollout.batch_size * 2 * (cfg.rollout.max_new_tokens - 1)
    assert collect(policy, cfg, room=run + longest - 1).rollout.prompt_pass is None
    batch = collect(policy, cfg, room=run + longest)
    assert batch.rollout.prompt_pass is not None
    assert batch.rollout.take_prompt_pass([0, 1, 2, 3]) is None, "two prompts of four"
    assert batch.rollout.prompt_pass is None


# ---- the first ratio ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*tiny.TREE_KINDS, "mpt"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_ratio_is_one(kind: str, temperature: float) -> None:
    policy, cfg = tiny.policy(kind), config(minibatch_size=4, epochs=2)
    cfg = replace(cfg, rollout=replace(cfg.rollout, temperature=temperature))
    batch = collect(policy, cfg)
    assert gradients(policy, cfg, batch)[1]["policy/ratio_gap"] < 1e-4
    metrics = update(policy, sgd(policy), cfg, batch, 0)
    assert metrics["policy/first_ratio_gap"] < 1e-4
    assert check_first_ratio(metrics["policy/first_ratio_gap"], True) is None
    assert metrics["policy/ratio_gap"] > metrics["policy/first_ratio_gap"], "then it moves"


def test_first_ratio_is_one_for_a_pretrained_model() -> None:
    policy, cfg = tiny.pretrained("stories260K"), config(limit=12)
    tiny.shake(policy)
    batch = collect(policy, cfg)
    assert batch.rollout.mask.sum(1).max() == 12
    assert update(policy, sgd(policy), cfg, batch, 0)["policy/first_ratio_gap"] < 1e-4


def test_a_first_ratio_away_from_one_is_seen() -> None:
    """exp(0.01) - 1 = 0.01005 on a single token of the whole batch."""
    policy, cfg = tiny.policy(), config()
    batch = collect(policy, cfg)
    batch.rollout.logprobs[3, 0] -= 0.01
    gap = update(policy, sgd(policy), cfg, batch, 0)["policy/first_ratio_gap"]
    assert gap == pytest.approx(math.exp(0.01) - 1, abs=1e-4)
    with pytest.raises(UserError, match=r"the first ratio is 1.0e-02 away from 1"):
        check_first_ratio(gap, exact=True)


def test_check_first_ratio_bounds() -> None:
    assert check_first_ratio(9e-5, exact=True) is None
    assert "warning" in str(check_first_ratio(2e-4, exact=True))
    with pytest.raises(UserError):
        check_first_ratio(1.1e-3, exact=True)
    assert "low precision: 3.0e-02" in str(check_first_ratio(3e-2, exact=False))


# ---- minibatches and micro-batches ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mpt"])
@pytest.mark.parametrize("target", ["gae", "td0"])
def test_micro_batches_change_memory_only(kind: str, target: str) -> None:
    """16 answers at once, as 4 x 4, 6 x 3 with a rest, and one by one."""
    policy = tiny.policy(kind)
    cfg = config(8, 2, critic_target=target, entropy_coef=0.1, value_coef=0.5)
    batch = collect(policy, cfg)
    whole, metrics = gradients(policy, cfg, batch)
    assert len(set(map(len, batch.rollout.answers))) > 1 and max(g.abs().max() for g in whole) > 0
    for size in (1, 3, 4):
        parts, again = gradients(
            policy, replace(cfg, ppo=replace(cfg.ppo, micro_batch_size=size)), batch
        )
        for one, other in zip(whole, parts, strict=True):
            tiny.close(one, other, 1e-6)
        assert again.keys() == metrics.keys()
        for name, value in metrics.items():
            assert again[name] == pytest.approx(value, abs=1e-5), name


def test_one_step_a_minibatch() -> None:
    """Minibatches of 3 from 8 answers are 3, 3 and 2: an optimizer step each, in every epoch."""
    for size, epochs, steps in ((8, 2, 2), (3, 2, 6), (2, 3, 12), (16, 1, 1)):
        policy, cfg = tiny.policy(), config(minibatch_size=size, epochs=epochs)
        optimizer = build_optimizer(cfg.optim, trainable(policy))
        metrics = update(policy, optimizer, cfg, collect(policy, cfg), 0)
        assert metrics["optim/steps"] == steps == epochs * math.ceil(8 / size)
        assert {int(s["step"]) for s in optimizer.state.values()} == {steps}


def test_minibatches_are_real() -> None:
    """1 and 4 minibatches end at different weights (with TRL 1.10 they did not)."""
    ends = []
    for size in (8, 2):
        policy, cfg = tiny.policy(), config(minibatch_size=size)
        batch = collect(policy, cfg)
        update(policy, sgd(policy), cfg, batch, 0)
        ends.append(snapshot(policy))
    assert max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True)) > 1e-4


def test_every_answer_once_an_epoch_in_a_fresh_order(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, cfg = tiny.policy(), config(minibatch_size=3, epochs=2)
    seen: list[list[int]] = []
    plain = OptimizerStep.micro_batches

    def spy(self, rows, index, *rest):
        seen.append(list(index))
        return plain(self, rows, index, *rest)

    monkeypatch.setattr(OptimizerStep, "micro_batches", spy)
    batch = collect(policy, cfg)
    update(policy, sgd(policy), cfg, batch, 0)
    first, second = [*chain(*seen[:3])], [*chain(*seen[3:])]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    update(policy, sgd(policy), cfg, batch, 1)
    assert seen[6:9] != seen[:3]
    update(policy, sgd(policy), cfg, batch, 0)
    assert seen[12:] == seen[:6], "the order depends on seed, step and epoch alone"


def test_the_gradient_is_clipped_and_its_norm_logged_before() -> None:
    norms, moves = [], []
    for limit in (0.0, 1e-9, 1e6):
        policy, cfg = tiny.policy(), config(max_grad_norm=limit)
        batch, before = collect(policy, cfg), snapshot(policy)
        metrics = update(policy, sgd(policy, 1.0), cfg, batch, 0)
        norms.append(metrics["optim/grad_norm"])
        moves.append(moved(policy, before))
    grads, _ = gradients(tiny.policy(), config(), collect(tiny.policy(), config()))
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    assert norms == pytest.approx([norm] * 3, rel=1e-5) and norm > 0.1
    assert moves[0] > 1e-2 and moves[1] < 1e-8 and moves[2] == pytest.approx(moves[0])


# ---- what is trained ------------------------------------------------------------------------


def test_the_reward_sits_on_the_token_that_ends_the_answer() -> None:
    """Labels by turns Positive and Negative, two answers each; the fourth is cut by the limit."""
    policy = tiny.policy()
    batch = forced(policy, config(kl_coef=0.0))
    scores = [1, 0, 0, -1, -1, -1, 1, 0]
    lengths = [2, 2, 4, 4, 2, 1, 3, 2]
    labels = ["Positive"] * 2 + ["Negative"] * 2
    assert [e.label for e in batch.rollout.examples] == labels * 2
    assert batch.rollout.scores.tolist() == scores
    expected = torch.zeros(8, 4)
    for row, (score, length) in enumerate(zip(scores, lengths, strict=True)):
        expected[row, length - 1] = score
    assert torch.equal(batch.rewards, expected)
    assert batch.rollout.mask.sum(1).tolist() == lengths


def test_kl_is_in_the_reward_of_every_token() -> None:
    policy, cfg = tiny.policy(), config(kl_coef=0.3)
    batch, without = forced(policy, cfg), forced(policy, config(kl_coef=0.0))
    mask = batch.rollout.mask
    tiny.close(batch.rewards, without.rewards - 0.3 * batch.rollout.kl * mask)
    assert float((batch.rewards - without.rewards)[mask].abs().min()) > 0


def test_returns_have_no_bootstrap_behind_a_cut_answer() -> None:
    """γ = λ = 1: every return is the sum of the rewards that follow, for the cut answer too."""
    policy, cfg = tiny.policy(), config(lam=1.0, whiten_advantages=False)
    batch = forced(policy, cfg)
    to_go = batch.rewards.flip(1).cumsum(1).flip(1)
    assert float(batch.rollout.values.abs().min(dim=1).values[3]) > 0
    tiny.close(batch.returns[batch.rollout.mask], to_go[batch.rollout.mask])
    tiny.close(batch.advantages, batch.returns - batch.rollout.values)


def test_advantages_are_whitened_over_the_tokens_of_the_batch() -> None:
    batch = forced(tiny.policy(), config())
    counted = batch.advantages[batch.rollout.mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-6)
    assert float(counted.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("row", [0, 3, 4, 5], ids=["tag", "cut", "eos is pad", "tag alone"])
def test_the_ending_token_is_trained(row: int) -> None:
    policy, cfg = tiny.policy(), config(value_coef=0.0)
    batch = forced(policy, cfg)
    last = int(batch.rollout.mask[row].sum()) - 1
    before, _ = gradients(policy, cfg, batch)
    batch.advantages[row, last] += 1.0
    after, _ = gradients(policy, cfg, batch)
    change = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    assert change > 1e-4
    if last < 3:
        batch.advantages[row, last + 1 :] = 1e3
        nothing, _ = gradients(policy, cfg, batch)
        assert all(torch.equal(a, b) for a, b in zip(nothing, after, strict=True)), "padding"


def test_padding_is_never_read() -> None:
    policy, cfg = tiny.policy(), config(entropy_coef=0.1, micro_batch_size=3)
    batch = forced(policy, cfg)
    before, metrics = gradients(policy, cfg, batch)
    gaps = ~batch.rollout.mask
    for table in (
        *(batch.rollout.logprobs, batch.rollout.values, batch.rollout.kl),
        *(batch.advantages, batch.returns, batch.rewards),
    ):
        table[gaps] = math.nan
    after, again = gradients(policy, cfg, batch)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert again == metrics


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """At the first step the surrogate's gradient is that of -mean(A log π)."""
    policy, cfg = tiny.policy(), config(value_coef=0.0)
    batch = forced(policy, cfg)
    actual, _ = gradients(policy, cfg, batch)
    rollout, params = batch.rollout, lora.lora_parameters(policy.model)
    logprobs = []
    for j, answer in enumerate(rollout.answers):
        states = tiny.alone(policy.decoder, rollout.prompts[rollout.prompt_of[j]], answer)
        table = torch.log_softmax(policy.logits(states), -1)
        logprobs += [table[t, token] for t, token in enumerate(answer)]
    loss = -(torch.stack(logprobs) * batch.advantages[rollout.mask]).mean()
    expected = torch.autograd.grad(loss, params)
    for mine, theirs in zip(actual[: len(params)], expected, strict=True):
        tiny.close(mine, theirs)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_entropy_bonus_raises_the_entropy(sign: float) -> None:
    policy, cfg = tiny.policy(), config(value_coef=0.0)
    cfg = replace(cfg, ppo=replace(cfg.ppo, entropy_coef=sign))
    batch = forced(policy, cfg)
    batch.advantages.zero_()
    before = update(policy, sgd(policy, 0.05), cfg, batch, 0)["policy/entropy"]
    after = gradients(policy, cfg, batch)[1]["policy/entropy"]
    assert sign * (after - before) > 1e-3


@pytest.mark.parametrize("target", ["gae", "td0"])
def test_detach_value_keeps_the_value_loss_out_of_lora(target: str) -> None:
    policy, cfg = tiny.policy(), config(critic_target=target)
    batch = forced(policy, cfg)
    batch.advantages.zero_()
    count = len(lora.lora_parameters(policy.model))
    for detach in (False, True):
        policy.detach_value = detach
        grads, _ = gradients(policy, cfg, batch)
        assert max(float(g.abs().max()) for g in grads[count:]) > 1e-4
        assert (max(float(g.abs().max()) for g in grads[:count]) == 0) is detach


def test_value_loss_pulls_values_to_the_returns() -> None:
    policy, cfg = tiny.policy(), config(epochs=30, value_coef=1.0, value_clip=None)
    batch = forced(policy, cfg)
    batch.advantages.zero_()
    first = gradients(policy, cfg, batch)[1]["value/loss"]
    gap = (batch.rollout.values - batch.returns)[batch.rollout.mask]
    assert first == pytest.approx(float(0.5 * gap.square().mean()), rel=1e-4)
    update(policy, build_optimizer(cfg.optim, trainable(policy)), cfg, batch, 0)
    assert gradients(policy, cfg, batch)[1]["value/loss"] < 0.3 * first


# ---- guards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["advantages", "returns"])
def test_a_loss_that_is_not_finite_moves_nothing(what: str) -> None:
    policy, cfg = tiny.policy(), config()
    batch, before = forced(policy, cfg), snapshot(policy)
    getattr(batch, what)[2, 1] = math.nan
    optimizer = build_optimizer(cfg.optim, trainable(policy))
    method = made(policy, cfg)
    method.optimizer = optimizer
    report = method.update(batch, 0)
    assert report.bad is not None and "loss" in report.bad.metrics
    told = sorted(row["id"] for row in report.bad.rows)
    assert told == sorted(row.id for row in batch.rollout.examples)
    assert report.metrics == batch.metrics
    assert moved(policy, before) == 0 and not optimizer.state
    assert all(p.grad is None for p in trainable(policy)), "nothing is left for the next step"


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    policy, cfg = tiny.policy(), config()
    batch, before = forced(policy, cfg), snapshot(policy)
    parameter = trainable(policy)[0]
    hook = parameter.register_hook(lambda grad: grad * math.inf)
    method = made(policy, cfg)
    method.optimizer = sgd(policy)
    assert method.update(batch, 0).bad is not None
    hook.remove()
    assert moved(policy, before) == 0


@pytest.mark.parametrize(("limit", "skipped"), [(10.0, 2), (0.0, 0), (1000.0, 0)])
def test_a_mean_ratio_over_the_limit_is_skipped(limit: float, skipped: int) -> None:
    """Every old log-prob 5 too low: all ratios are e⁵ = 148."""
    policy, cfg = tiny.policy(), config(max_ratio=limit, epochs=2)
    batch, before = forced(policy, cfg), snapshot(policy)
    batch.rollout.logprobs -= 5.0
    metrics = update(policy, sgd(policy, 1e-6), cfg, batch, 0)
    assert metrics["optim/skipped"] == skipped and metrics["optim/steps"] == 2 - skipped
    assert (moved(policy, before) == 0) is (skipped == 2)
    assert metrics["policy/ratio_mean"] == pytest.approx(math.exp(5), rel=1e-2)
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(5), rel=1e-2), "not a sum"


def test_target_kl_ends_the_epochs() -> None:
    """The first pass is at KL 0; the second sees that the policy moved, and is the last."""
    steps = {}
    for target in (None, 1e-6, 1e3):
        policy, cfg = tiny.policy(), config(epochs=5, target_kl=target)
        batch = forced(policy, cfg)
        metrics = update(policy, sgd(policy), cfg, batch, 0)
        steps[target] = metrics["optim/steps"]
    assert steps == {None: 5, 1e-6: 2, 1e3: 5}


# ---- KL coefficient and metrics -------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "adaptive", "factor"),
    [(1e-4, True, 1 + 0.2 * 8 / 100), (1e4, True, 1 - 0.2 * 8 / 100), (1e-4, False, 1.0)],
)
def test_the_kl_coefficient_is_steered(target: float, adaptive: bool, factor: float) -> None:
    """Clipped at ±0.2, times 8 answers over a horizon of 100."""
    policy = tiny.policy()
    cfg = config(kl_target=target, kl_horizon=100, kl_adaptive=adaptive, kl_estimator="k2")
    kl = kl_of(cfg)
    metrics = collect(policy, cfg, kl=kl).metrics
    assert metrics["kl/coef"] == 0.2, "what this step used"
    assert kl.coef == pytest.approx(0.2 * factor)


def test_the_kl_of_the_coefficient_is_the_sum_over_an_answer() -> None:
    policy, cfg = tiny.policy(), config(kl_estimator="exact", kl_horizon=100)
    probe = collect(policy, cfg)
    per_answer = float(probe.rollout.kl.sum(1).mean())
    cfg = replace(cfg, ppo=replace(cfg.ppo, kl_target=per_answer / 1.1))
    kl = kl_of(cfg)
    metrics = collect(policy, cfg, kl=kl).metrics
    assert metrics["kl/ref"] == pytest.approx(per_answer, rel=1e-5)
    assert kl.coef == pytest.approx(0.2 * (1 + 0.1 * 8 / 100), rel=1e-5)


def test_metrics_of_a_batch() -> None:
    policy, cfg = tiny.policy(), config(kl_coef=0.0, lam=1.0)
    ids = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in ANSWERS]
    with pytest.MonkeyPatch.context() as patch:
        tiny.force(patch, policy, ids)
        batch = collect(policy, cfg)
    mask, metrics = batch.rollout.mask, batch.metrics
    assert metrics["reward/mean"] == pytest.approx(-1 / 8)  # 1, 0, 0, -1, -1, -1, 1, 0
    assert metrics["reward/std"] == pytest.approx(math.sqrt(5 / 8 - 1 / 64))
    assert metrics["answer/accuracy"] == 2 / 8 and metrics["answer/unparsed"] == 3 / 8
    assert metrics["answer/tokens"] == 20 / 8
    returns, values = batch.returns[mask], batch.rollout.values[mask]
    explained = 1 - (returns - values).var() / returns.var()
    assert metrics["value/explained_variance"] == pytest.approx(float(explained), abs=1e-5)


# ---- whole programs in small ----------------------------------------------------------------


def test_the_legacy_preset_drives_an_update(tmp_path: Path) -> None:
    tiny.causal_lm("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "legacy.yaml"
    path.write_text(
        f"task: sst2\nmodel: {{name_or_path: {tmp_path / 'model'}, device: cpu}}\n"
        "ppo: {preset: legacy}\n"
    )
    cfg = load_config(path)
    assert cfg.lora == LoraConfig(16, 32.0, True, 0.0, ["q_proj", "v_proj"])
    assert cfg.reward == RewardConfig("code") and cfg.ppo.micro_batch_size == 8
    policy = load_policy(cfg)
    names = lora.lora_layers(policy.model)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"} and len(names) == 4
    assert policy.value_head.body is None
    before = snapshot(policy)
    head = policy.value_head.parameters()
    optimizer = build_optimizer(cfg.optim, lora.lora_parameters(policy.model), head)
    batch = collect(policy, cfg)
    assert batch.metrics["reward/mean"] >= -3 and batch.rollout.size == 16
    metrics = update(policy, optimizer, cfg, batch, 0)
    assert metrics["optim/steps"] == 4 and metrics["policy/first_ratio_gap"] < 1e-4
    assert moved(policy, before) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), [("adamw", 1e-2), ("adafactor", 5e-3)])
def test_it_learns_to_answer(name: str, lr: float) -> None:
    """Every label is Positive: from noise (reward -1, no answer) to the right answer, closed."""
    policy = tiny.policy(few=True, shaken=False, scale=0.3)
    cfg = Config(
        task="sst2",
        rollout=RolloutConfig(8, 8, 4),
        ppo=PPOConfig(epochs=2, minibatch_size=32, kl_coef=0.01, kl_adaptive=False),
        optim=Optim(name=name, lr=lr),
    )
    head = policy.value_head.parameters()
    optimizer = build_optimizer(cfg.optim, lora.lora_parameters(policy.model), head)
    method, rows, means = made(policy, cfg), tiny.examples(8, "Positive"), []
    method.optimizer = optimizer
    for step in range(40):
        batch = method.collect(rows, step)
        means.append(method.update(batch, step).metrics["reward/mean"])
    assert means[0] < -0.7
    assert sum(means[-5:]) / 5 > 0.8
    assert set(batch.rollout.predictions) <= {"Positive", None}


# ---- what the user is told of the first ratio ------------------------------------------------


def lines_of(method: ppo.PPO, monkeypatch: pytest.MonkeyPatch, steps: range) -> list[bool]:
    """In which steps a line about the first ratio is told."""
    monkeypatch.setattr(report, "check_first_ratio", lambda gap, exact: "the first ratio")
    told = []
    method.optimizer = sgd(method.model, 1e-3)
    for step in steps:
        batch = method.collect(tiny.examples(method.batch_size), step)
        told.append("the first ratio" in method.update(batch, step).messages)
    return told


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_first_ratio_is_told_once_of_each_pass(
    epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step, and at the second, whose update is the first to reuse the prompt pass.
    Later epochs run their own passes, which changes nothing."""
    cfg = replace(config(kl_coef=0.0, epochs=epochs), model=ModelConfig(name_or_path="bundled"))
    method = ppo.PPO(cfg, tiny.SPECS)
    assert lines_of(method, monkeypatch, range(4)) == [True, True, False, False]
    assert method.first_ratio.checked
    again = ppo.PPO(cfg, tiny.SPECS)
    again.set_state(method.state())
    assert lines_of(again, monkeypatch, range(4, 6)) == [False, False], "a resumed run"


def test_a_prompt_pass_that_is_never_reused_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget has room for the answers, but not for the graph of the prompts too."""
    cfg = replace(
        config(kl_coef=0.0),
        model=ModelConfig(name_or_path="bundled"),
        train=TrainConfig(micro_batch_tokens=40),
    )
    method = ppo.PPO(cfg, tiny.SPECS)
    assert lines_of(method, monkeypatch, range(3)) == [True, False, False]
    assert method.sampler.graph_room(method.section, method.budget) == 40
    assert not method.first_ratio.checked


def test_micro_batches_of_one_update_reuse_the_prompt_pass_once() -> None:
    """The first part has the answers of three prompts of four; the others run on their own."""
    policy, cfg = tiny.policy(), config()
    batch = collect(policy, cfg, room=9999)
    rollout = batch.rollout
    given = [rollout.take_prompt_pass(part) is not None for part in ([0, 2, 4], [1, 3, 5], [6, 7])]
    assert given == [True, False, False] and rollout.used_prompt_pass


# ---- the whole way against loops in plain Python --------------------------------------------


def shift(x: list[float], mean: bool) -> list[float]:
    """Whitened: over the deviation, with or without the mean."""
    middle = sum(x) / len(x)
    deviation = math.sqrt(sum((y - middle) ** 2 for y in x) / (len(x) - 1) + 1e-8)
    return [(y - middle) / deviation + (middle if mean else 0.0) for y in x]


def ragged(flat: list[float], lengths: list[int]) -> list[list[float]]:
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gamma": 0.9, "lam": 0.7},
        {"whiten_rewards": True},
        {"whiten_advantages": False},
        {"whiten_rewards": True, "whiten_advantages": False, "gamma": 0.9},
    ],
)
@pytest.mark.parametrize("normalise", [False, True])
def test_rewards_advantages_and_returns_against_loops(changes: dict, normalise: bool) -> None:
    """From scores, KL and values of the rollout; the KL's coefficient is not the config's any more,
    and the returns are those of rewards, whether advantages are whitened or not."""
    policy, cfg = tiny.policy(), config(**changes)
    ids = [policy.tokenizer.convert_tokens_to_ids(text.split()) for text in ANSWERS]
    kl, scale = AdaptiveKL(0.7, 1.0, 1000), RunningScale() if normalise else None
    with pytest.MonkeyPatch.context() as patch:
        tiny.force(patch, policy, ids)
        batch = collect(policy, cfg, kl=kl, scale=scale)
    lengths = [len(answer) for answer in ids]
    scores = [1.0, 0.0, 0.0, -1.0, -1.0, -1.0, 1.0, 0.0]
    if normalise:  # mean -1/8, and the deviation of the eight
        deviation = math.sqrt(sum((s + 1 / 8) ** 2 for s in scores) / 8)
        scores = [(s + 1 / 8) / deviation for s in scores]
    assert batch.rollout.kl is not None and batch.rollout.values is not None
    rewards: list[float] = []
    for j, length in enumerate(lengths):
        own = [-0.7 * float(batch.rollout.kl[j, t]) for t in range(length)]
        own[-1] += scores[j]
        rewards += own
    if cfg.ppo.whiten_rewards:
        rewards = shift(rewards, mean=True)
    advantages, returns = [], []
    for j, row in enumerate(ragged(rewards, lengths)):
        values = [float(v) for v in batch.rollout.values[j, : len(row)]] + [0.0]
        later, found = 0.0, []
        for t in reversed(range(len(row))):
            delta = row[t] + cfg.ppo.gamma * values[t + 1] - values[t]
            later = delta + cfg.ppo.gamma * cfg.ppo.lam * later
            found.append(later)
        advantages += found[::-1]
        returns += [a + v for a, v in zip(found[::-1], values, strict=False)]
    if cfg.ppo.whiten_advantages:
        advantages = shift(advantages, mean=False)
    mask = batch.rollout.mask
    assert batch.rewards[mask].tolist() == pytest.approx(rewards, abs=1e-5)
    assert batch.advantages[mask].tolist() == pytest.approx(advantages, abs=1e-5)
    assert batch.returns[mask].tolist() == pytest.approx(returns, abs=1e-5)


def loss_by_loops(policy: Policy, cfg: Config, batch: ppo.Batch) -> dict[str, float]:
    """Of the whole batch, token by token; the policy's numbers by transformers, row by row."""
    c, rollout, sums = cfg.ppo, batch.rollout, dict.fromkeys(("policy", "value", "entropy"), 0.0)
    for j, answer in enumerate(rollout.answers):
        with torch.no_grad():
            states = tiny.alone(policy.decoder, rollout.prompts[rollout.prompt_of[j]], answer)
            logp = torch.log_softmax(policy.head(states) / cfg.rollout.temperature, -1)
            values = [*policy.value_head(states).tolist(), 0.0]
        for t, token in enumerate(answer):
            advantage = float(batch.advantages[j, t])
            ratio = math.exp(float(logp[t, token]) - float(rollout.logprobs[j, t]))
            bounded = min(max(ratio, 1 - c.clip), 1 + (c.clip_high or c.clip))
            loss = max(-advantage * ratio, -advantage * bounded)
            if c.dual_clip and advantage < 0:
                loss = min(loss, -c.dual_clip * advantage)
            sums["policy"] += loss
            if c.critic_target == "td0":
                target = float(batch.rewards[j, t]) + c.gamma * values[t + 1]
                sums["value"] += (target - values[t]) ** 2
            else:
                target, old = float(batch.returns[j, t]), float(rollout.values[j, t])
                clip = math.inf if c.value_clip is None else c.value_clip
                near = min(max(values[t], old - clip), old + clip)
                sums["value"] += max((values[t] - target) ** 2, (near - target) ** 2) / 2
            sums["entropy"] -= float((logp[t].exp() * logp[t]).sum())
    return {name: total / sum(map(len, rollout.answers)) for name, total in sums.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip": 0.1, "clip_high": 0.4},
        {"dual_clip": 1.3},
        {"value_clip": 0.05},
        {"value_clip": None, "value_coef": 0.7},
        {"entropy_coef": 0.3},
        {"critic_target": "td0", "gamma": 0.8},
    ],
    ids=lambda changes: " ".join(changes) or "default",
)
def test_the_loss_of_a_batch_against_loops(changes: dict) -> None:
    """At a temperature of 0.7, old log-probs up to 0.6 and old values up to 0.3 away."""
    policy, cfg = tiny.policy(), config(**changes)
    cfg = replace(cfg, rollout=replace(cfg.rollout, temperature=0.7))
    batch, draw = forced(policy, cfg), torch.Generator().manual_seed(1)
    for table, most in ((batch.rollout.logprobs, 0.6), (batch.rollout.values, 0.3)):
        table += (2 * torch.rand(table.shape, generator=draw) - 1) * most
    _, metrics = gradients(policy, cfg, batch)
    wanted = loss_by_loops(policy, cfg, batch)
    assert metrics["policy/loss"] == pytest.approx(wanted["policy"], abs=1e-5)
    assert metrics["value/loss"] == pytest.approx(wanted["value"], abs=1e-5)
    whole = wanted["policy"] + cfg.ppo.value_coef * wanted["value"]
    whole -= cfg.ppo.entropy_coef * wanted["entropy"]
    assert metrics["loss"] == pytest.approx(whole, abs=1e-5)
    if not changes:
        assert metrics["policy/clip_fraction"] > 0.1 and metrics["value/clip_fraction"] > 0.1

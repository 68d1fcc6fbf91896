"""Profiling: exclusive times by a clock of the test, FLOPs against torch's counter, the trace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from ppo_nlu.config import LoraConfig, ModelConfig
from ppo_nlu.runtime import profiling
from ppo_nlu.runtime.flops import Weights, gemm_rate, weights_of
from tests import tiny


class Clock:
    """Stands still until told; process time runs at twice the speed, as with two threads."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        stub = SimpleNamespace(
            perf_counter=lambda: 100 + self.now, process_time=lambda: 2 * self.now
        )
        patch.setattr(profiling, "time", stub)
        patch.setattr(profiling, "gemm_rate", lambda device, dtype: 4e12)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_without_a_profile_nothing_is_booked() -> None:
    assert not profiling.active()
    assert profiling.phase("decode") is profiling.phase("update")  # one object that does nothing
    with profiling.step(), profiling.phase("decode"), profiling.phase("decode"):
        profiling.count(tokens_run=3)
    with profiling.Profile(1) as profile:
        assert profiling.active()
    assert not profiling.active()
    assert set(profile.rows) == {"other"} and profile.rows["other"].tokens_run == 0


def test_times_are_exclusive(clock: Clock) -> None:
    """update 1 + 3 around 2 of score; 0.5 + 0.25 outside all; evaluation keeps its parts apart."""
    with profiling.Profile(1) as profile:
        clock.pass_(0.5)
        with profiling.phase("update"):
            clock.pass_(1)
            with profiling.phase("score"):
                clock.pass_(2)
            clock.pass_(3)
        with profiling.phase("evaluation"):
            clock.pass_(4)
            with profiling.phase("decode"):
                clock.pass_(8)
                with profiling.phase("evaluation"):
                    clock.pass_(16)
        with profiling.phase("update"):
            clock.pass_(32)
        clock.pass_(0.25)
    report = profile.report()
    seconds = {name: row["seconds"] for name, row in report["phases"].items()}
    assert seconds == {
        "score": 2, "update": 36, "evaluation": 20, "evaluation/decode": 8, "other": 0.75,
    }  # fmt: skip
    assert report["total"]["seconds"] == 66.75 and report["total"]["cpu_seconds"] == 133.5
    assert report["phases"]["update"]["share"] == pytest.approx(36 / 66.75)
    assert sum(row["share"] for row in report["phases"].values()) == pytest.approx(1)


def test_a_phase_ends_with_an_error_too(clock: Clock) -> None:
    with profiling.Profile(1) as profile:
        with pytest.raises(KeyError), profiling.phase("update"):
            clock.pass_(1)
            raise KeyError
        clock.pass_(2)
        with pytest.raises(AssertionError), profiling.phase("updates"):
            pass
    assert profile.rows["update"].seconds == 1 and profile.rows["other"].seconds == 2


def test_tokens_and_rates_go_to_the_open_phase(clock: Clock) -> None:
    """8 TFLOP in 4 s are 2 TFLOP/s, half of the machine's 4; the table adds evaluation up."""
    with profiling.Profile(1) as profile:
        with profiling.phase("decode"):
            profiling.count(tokens_run=5, tokens_saved=7)
            profiling.count(tokens_run=1000, flops=8e12)
            clock.pass_(4)
        with profiling.phase("evaluation"):
            clock.pass_(1)
            with profiling.phase("prefill"):
                profiling.count(tokens_run=11, flops=1e12)
                clock.pass_(2)
    report = profile.report()
    row = report["phases"]["decode"]
    assert (row["tokens_run"], row["tokens_saved"], row["tflop"]) == (1005, 7, 8)
    assert (row["tflops_per_s"], row["gemm_share"]) == (2, 0.5)
    lines = profiling.table(report).splitlines()
    assert [line.split()[0] for line in lines] == ["phase", "decode", "evaluation", "other", "all"]
    assert lines[1].split() == "decode 4.00 57.1 % 8.00 1,005 7 2.0000 50.0 %".split()
    assert lines[2].split()[1] == "3.00" and lines[2].split()[5:7] == ["11", "0"]
    assert json.loads(json.dumps(report)) == report


def test_the_formula_by_hand() -> None:
    """10 tokens through 100 + 8 weights, 3 positions at 50 + 6, 20 pairs over 4 wide layers."""
    weights = Weights(blocks=100, adapters=8, head=50, critic=6, attention=4)
    forward = 2 * 10 * 108 + 2 * 3 * 56 + 4 * 20 * 4
    assert weights.forward(10, 3, 20) == forward
    assert weights.forward(10, 3, 20, lora=False) == forward - 2 * 10 * 8
    backward = 10 * (2 * 100 + 4 * 8) + 3 * (2 * 50 + 4 * 6) + 8 * 20 * 4
    assert weights.backward(10, 3, 20) == backward
    with profiling.Profile(1, weights=weights) as profile:
        with profiling.phase("update"):
            profiling.count(tokens_run=10, positions=3, pairs=20)
        with torch.no_grad(), profiling.phase("score"):
            profiling.count(tokens_run=10, positions=3, pairs=20)
        with torch.no_grad(), profiling.phase("reference"):
            profiling.count(tokens_run=10, positions=3, pairs=20)
    found = {name: row.flops for name, row in profile.rows.items()}
    assert found["update"] == forward + backward
    assert found["score"] == forward and found["reference"] == forward - 2 * 10 * 8


def flops() -> FlopCounterMode:
    """Torch's counter, which knows no products in place."""
    known = {torch.ops.aten.addmm_: lambda *shapes, **rest: addmm_flop(*shapes)}
    return FlopCounterMode(display=False, custom_mapping=known)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """A pass of one row and its backward, the products counted by torch as they are dispatched.

    Less than the formula by one thing: the input of the first layer is no function of a trained
    weight, so its gradient is not formed (its query, key and value layers).
    """
    policy = tiny.policy(kind, model_cfg=ModelConfig(path="plain"), lora_cfg=LoraConfig(r=4))
    policy.model.set_attn_implementation("eager")
    weights = weights_of(policy)
    prompt, answer = [5, 6, 7, 8, 9, 10, 11], [3, 4, 5]
    tokens = len(prompt) + len(answer) - 1
    pairs = tokens**2  # eager attention forms the masked ones too
    with torch.no_grad(), flops() as counter:
        policy.score([prompt], [answer], values=True)
    forward = weights.forward(tokens, len(answer), pairs)
    assert counter.get_total_flops() == forward
    with flops() as counter:
        scored = policy.score([prompt], [answer], values=True)
        assert scored.values is not None
        (scored.logprobs.sum() + scored.values.sum()).backward()
    first = {"llama": 32 * (32 + 16 + 16) + 4 * 3 * 32, "gpt2": 32 * 96 + 4 * 32}[kind]
    expected = forward + weights.backward(tokens, len(answer), pairs) - 2 * tokens * first
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "neox", "gpt2"])
def test_flops_of_a_tree_are_those_that_torch_counts(kind: str) -> None:
    """The products with weights; torch does not count the CPU's fused attention."""
    policy = tiny.policy(kind, lora_cfg=LoraConfig(r=4))
    weights = weights_of(policy)
    assert policy.tree and weights.trimmed_blocks > 0
    prompts = [[*range(5, 30), 7, 8], [*range(5, 30), 9, 10, 11]]
    with torch.no_grad(), flops() as counter:
        policy.score(prompts, [[3, 4, 5], [6, 7]], values=True)
    cost = policy.last_pass
    assert (cost.tokens_run, cost.predicting) == (25 + 2 + 2 + 3 + 1, 5)
    assert counter.get_total_flops() == weights.forward(cost.tokens_run, 5, 0, predicting=5)


@pytest.mark.parametrize(
    ("steps", "traced"), [(1, [1]), (2, [2]), (3, [3]), (4, [3, 4]), (9, [3, 4])]
)
def test_two_steps_behind_the_warm_up_are_traced_and_not_timed(
    clock: Clock, tmp_path: Path, steps: int, traced: list[int]
) -> None:
    """Step k takes 10ᵏ seconds, so a sum of times tells the steps that are in it."""
    path = tmp_path / "trace.json"
    with profiling.Profile(steps, trace=path) as profile:
        for number in range(1, steps + 1):
            with profiling.step(), profiling.phase("update"):
                torch.ones(3).exp()
                clock.pass_(10**number)
            clock.pass_(0.5)
    report = profile.report()
    assert report["traced_steps"] == traced
    timed = [n for n in range(1, steps + 1) if n not in traced] or [1]
    assert report["phases"]["update"]["seconds"] == sum(10**n for n in timed)
    assert report["traced_steps_timed"] == (steps == 1)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("aten::exp") == len(traced)
    assert names.count("update") == len(traced)


def test_a_run_cut_short_leaves_the_trace_that_there_is(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(KeyboardInterrupt), profiling.Profile(9, trace=path) as profile:
        for number in range(3):
            with profiling.step(), profiling.phase("update"):
                clock.pass_(1)
                if number == 2:
                    raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and not profiling.active()
    assert profile.report()["traced_steps"] == [3]
    assert profile.rows["update"].seconds == 2


def test_the_rate_of_the_machine_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert 1e8 < gemm_rate("cpu", torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), before)

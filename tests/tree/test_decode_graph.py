"""Recorded decode steps: the order of recording and replaying.

No GPU is needed: the recording is one that runs the step again, into the same tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import pytest
import tiny
import torch
from torch import Tensor

from ppo_nlu.model.generate import Generation, Sampling, generate
from ppo_nlu.model.policy import Policy
from ppo_nlu.tree.decode_graph import CudaRecordings, Recorder
from tests.model.test_generate import endless, policy_of, ragged, seeded


class Again:
    """A recording for the CPU; what it is asked to do is written down."""

    log: ClassVar[list[str]] = []
    off = 0.0  # added to every replayed state

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        self.call, self.out = call, torch.empty(0)
        self.out = call().clone()
        self.log.append("record")
        return self.out

    def replay(self) -> None:
        self.out.copy_(self.call() + self.off)
        self.log.append("replay")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Again, "log", [])
    return Again.log


def record(policy: Policy) -> None:
    """From now on the policy decodes by recorded steps."""
    policy.recorder = Recorder(policy.decoder, Again)


def made(kind: str = "llama", **options) -> Policy:
    policy = policy_of(kind, **options)
    assert policy.tree and policy.recorder is None  # which is for a GPU
    return policy


def assert_same(found: Generation, expected: Generation) -> None:
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    assert found.hidden is not None and expected.hidden is not None
    tiny.close(found.hidden, expected.hidden)
    tiny.close(found.logprobs, expected.logprobs)
    if expected.values is not None:
        assert found.values is not None
        tiny.close(found.values, expected.values)


def test_recorded_once_then_replayed(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made()
    endless(policy, monkeypatch)
    expected = generate(policy, ragged(), Sampling(7, 2), seeded(), critic=True)
    record(policy)
    assert_same(generate(policy, ragged(), Sampling(7, 2), seeded(), critic=True), expected)
    # Six steps: two plain ones, then the recording, its comparison with another plain one, and
    # four replays.
    assert log == ["record", "replay", *["replay"] * 4]
    log.clear()
    assert_same(generate(policy, ragged(), Sampling(7, 2), seeded(), critic=True), expected)
    assert log == ["record", *["replay"] * 4]  # it has been compared
    log.clear()
    assert_same(
        generate(policy, ragged(), Sampling(3, 2), seeded()),
        generate(made(), ragged(), Sampling(3, 2), seeded()),
    )
    assert log == []  # two steps are not worth it


def test_finished_rows_stay_and_count_no_more(log: list[str]) -> None:
    policy = made(few=True)
    prompts = ragged(2, size=12)
    expected = generate(policy, prompts, Sampling(10, 4), seeded(5), critic=True)
    lengths = expected.mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    record(policy)
    assert_same(generate(policy, prompts, Sampling(10, 4), seeded(5), critic=True), expected)
    # All rows over: no further step. Two are plain, the third is compared before it is replayed.
    steps = int(lengths.max()) - 1
    assert steps < 9 and log == ["record", "replay", *["replay"] * (steps - 2)]


def test_a_step_that_cannot_be_recorded(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made()
    endless(policy, monkeypatch)
    expected = generate(policy, ragged(), Sampling(5), seeded())
    record(policy)

    def refuse(self: Again, call: Callable[[], Tensor]) -> Tensor:
        call()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Again, "record", refuse)
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted"):
        found = generate(policy, ragged(), Sampling(5), seeded())
    assert_same(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, tried once
        assert_same(generate(policy, ragged(), Sampling(5), seeded()), expected)
    assert log == []


def test_out_of_memory_while_recording(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the model's doing: plain steps, and the next rollout tries again."""
    policy = made()
    endless(policy, monkeypatch)
    expected = generate(policy, ragged(), Sampling(5), seeded())
    record(policy)
    before = Again.record

    def full(self: Again, call: Callable[[], Tensor]) -> Tensor:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(Again, "record", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(generate(policy, ragged(), Sampling(5), seeded()), expected)
    assert log == []
    monkeypatch.setattr(Again, "record", before)
    assert_same(generate(policy, ragged(), Sampling(5), seeded()), expected)
    assert log == ["record", "replay", *["replay"] * 2]


def test_a_recording_that_holds_nothing(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded on a stream of another device, a replay writes nowhere: the old state still stands
    there, and must not be taken for a result."""
    policy = made()
    endless(policy, monkeypatch)
    expected = generate(policy, ragged(), Sampling(5), seeded())
    record(policy)
    monkeypatch.setattr(Again, "replay", lambda self: self.log.append("nothing"))
    with pytest.warns(UserWarning, match="without a CUDA graph: it comes out nan away"):
        found = generate(policy, ragged(), Sampling(5), seeded())
    assert_same(found, expected)
    assert log == ["record", "nothing"]


def test_all_recordings_of_a_model_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private pool for every rollout would grow the memory with each; all is made on the model's
    device, which need not be the current one."""
    entered: list[str] = []

    class Entered(nullcontext):
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            entered.append(str(device))

    made: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(("stream", 0)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: made.append(("pool", 0)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(("graph", 0)))
    recordings = CudaRecordings(torch.device("cuda:1"))
    first, second = recordings(), recordings()
    assert first.shared is second.shared is recordings
    assert [name for name, _ in made] == ["stream", "pool", "graph", "graph"]
    assert entered == ["cuda:1"] * 3


def test_a_replay_that_differs(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made()
    endless(policy, monkeypatch)
    expected = generate(policy, ragged(), Sampling(5), seeded())
    record(policy)
    monkeypatch.setattr(Again, "off", 1.0)
    with pytest.warns(UserWarning, match="away from a plain step"):
        found = generate(policy, ragged(), Sampling(5), seeded())
    assert_same(found, expected)
    assert log == ["record", "replay"]

"""A decode step as a CUDA graph: one launch in place of the thousand kernels of a step.

A step of few rows keeps a GPU busy for less time than the host takes to launch its kernels. So the
first steps of a rollout run plainly: that compiles and tunes the kernels, and is enough for most
labels. The next step is recorded, and from then on the recording is replayed. A recording reads and
writes the same memory every time, as `TreeCache` does in its static form. The first recording of a
model is compared with a plain step. A model whose step cannot be recorded, or gives something else
when it is replayed, goes on with plain steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor, nn

from ppo_nlu.errors import first_line
from ppo_nlu.tree.cache import TreeCache

PLAIN = 2  # steps before the one that is recorded
NEAR = 0.02  # of the largest state: how far a replayed step may be from a plain one


class Recording(Protocol):
    """A graph: `record` notes what a call would run, `replay` runs it."""

    def record(self, call: Callable[[], Tensor]) -> Tensor: ...
    def replay(self) -> None: ...


class CudaRecordings:
    """Makes the recordings of one device, which share a stream and a memory pool.

    With a pool for every rollout memory would grow. The stream belongs to the device of the model,
    which need not be the current one: on another device's stream nothing would be recorded, and
    replays would do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        # A pool lives as long as a graph of it does: the last one stays until the next is there.
        self.last: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> CudaRecording:
        return CudaRecording(self)


class CudaRecording:
    """The graph of torch."""

    def __init__(self, shared: CudaRecordings) -> None:
        self.shared = shared
        with torch.cuda.device(shared.device):
            self.graph = torch.cuda.CUDAGraph()

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        """The tensor that every replay will write. Nothing is run."""
        stream = self.shared.stream
        with torch.cuda.device(self.shared.device):
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            # Not torch.cuda.graph(): it collects garbage and empties the cache at every use.
            with torch.cuda.stream(stream):
                self.graph.capture_begin(pool=self.shared.pool)
                try:
                    out = call()
                except BaseException:
                    with suppress(RuntimeError):  # it says again that the recording is broken
                        self.graph.capture_end()
                    raise
                self.graph.capture_end()
            current.wait_stream(stream)
        self.shared.last = self.graph
        return out

    def replay(self) -> None:
        with torch.cuda.device(self.shared.device):
            self.graph.replay()


class Recorder:
    """Records the decode steps of one model as long as its recordings are `sound` (None: none has
    been compared yet)."""

    def __init__(
        self, decoder: nn.Module, recordings: Callable[[], Recording] | None = None
    ) -> None:
        self.decoder = decoder
        device = next(decoder.parameters()).device
        self.recordings = CudaRecordings(device) if recordings is None else recordings
        self.sound: bool | None = None

    def steps(self, cache: TreeCache) -> GraphedStep:
        """The steps of one rollout."""
        return GraphedStep(self, cache)


class GraphedStep:
    """`TreeCache.step` of a static cache: plain at first, by a recording after `PLAIN` steps."""

    def __init__(self, recorder: Recorder, cache: TreeCache):
        self.recorder, self.cache = recorder, cache
        self.steps = 0
        self.graph: Recording | None = None
        self.token = self.position_ids = self.out = torch.empty(0)

    def __call__(self, token: Tensor, position_ids: Tensor) -> Tensor:
        """Run one token of each row (rows,) at its position. Returns the states (rows, H)."""
        self.steps += 1
        if self.steps == PLAIN + 1 and self.recorder.sound is not False:
            self._record(token, position_ids)
        if self.graph is None:
            return self._plain(token, position_ids)
        self.token.copy_(token)
        self.position_ids.copy_(position_ids)
        self.graph.replay()
        return self.out.clone()  # the next replay writes there

    def _plain(self, token: Tensor, position_ids: Tensor) -> Tensor:
        return self.cache.step(self.recorder.decoder, token, position_ids)

    def _record(self, token: Tensor, position_ids: Tensor) -> None:
        self.token, self.position_ids = token.clone(), position_ids.clone()
        graph, slot = self.recorder.recordings(), self.cache.slot.clone()
        reason = None
        try:
            self.out = graph.record(lambda: self._plain(self.token, self.position_ids))
        except torch.cuda.OutOfMemoryError:
            # Not the model's doing: plain steps this time, and another try at the next rollout.
            self.cache.slot.copy_(slot)
            return
        except Exception as error:  # whatever a model does that cannot be recorded
            reason = first_line(error) or type(error).__name__
        self.cache.slot.copy_(slot)
        if reason is None and self.recorder.sound is None:
            plain = self._plain(token, position_ids)
            self.cache.slot.copy_(slot)
            self.out.fill_(math.nan)  # shows what a replay does not write
            graph.replay()
            gap, size = float((self.out - plain).abs().max()), float(plain.abs().max())
            self.cache.slot.copy_(slot)
            if not gap <= NEAR * size:
                reason = f"it comes out {gap:.1e} away from a plain step"
        self.recorder.sound = reason is None
        if reason is None:
            self.graph = graph
        else:
            warnings.warn(f"decoding without a CUDA graph: {reason}", stacklevel=2)

"""A decode step as a CUDA graph: one launch in place of the thousand that a step is made of.

A step of few rows keeps a GPU busy for less time than the host takes to launch its kernels. So the
first steps of a rollout run plainly, which compiles and tunes the kernels, and is all that a label
needs; the next is recorded, and from then on the recording is replayed. A recording reads and
writes the same places every time, which `TreeCache` in its static form does. The first recording of
a model is compared with a plain step; a model whose step cannot be recorded, or comes out
otherwise, goes on with plain steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ppo_nlu.tree_attention import TreeCache

PLAIN = 2  # steps before the one that is recorded
NEAR = 0.02  # of the largest state: how far a replayed step may be from a plain one
_sound: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what the comparison found


class Recording(Protocol):
    """A graph: `record` notes what a call would run, `replay` runs it."""

    def record(self, call: Callable[[], Tensor]) -> Tensor: ...
    def replay(self) -> None: ...


class CudaRecording:
    """The graph of torch, recorded on a stream of its own."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        """The tensor that every replay will write. Nothing is run."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        # Not torch.cuda.graph(): it collects garbage and empties the cache at every use.
        with torch.cuda.stream(stream):
            self.graph.capture_begin()
            try:
                out = call()
            except BaseException:
                with suppress(RuntimeError):  # that the recording is broken is known
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        current.wait_stream(stream)
        return out

    def replay(self) -> None:
        self.graph.replay()


class GraphedStep:
    """`TreeCache.step` of a static cache, by a recording once `PLAIN` steps are over."""

    def __init__(
        self,
        decoder: nn.Module,
        cache: TreeCache,
        recording: Callable[[], Recording] = CudaRecording,
    ):
        self.decoder, self.cache, self.recording = decoder, cache, recording
        self.steps = 0
        self.graph: Recording | None = None
        self.token = self.place = self.out = torch.empty(0)

    def __call__(self, token: Tensor, place: Tensor) -> Tensor:
        """One token a row (rows,) at its position; the last hidden states (rows, H)."""
        self.steps += 1
        if self.steps == PLAIN + 1 and _sound.get(self.decoder, True):
            self._record(token, place)
        if self.graph is None:
            return self.cache.step(self.decoder, token, place)
        self.token.copy_(token)
        self.place.copy_(place)
        self.graph.replay()
        return self.out.clone()  # the next replay writes there

    def _record(self, token: Tensor, place: Tensor) -> None:
        self.token, self.place = token.clone(), place.clone()
        graph, slot = self.recording(), self.cache.slot.clone()
        reason = None
        try:
            self.out = graph.record(lambda: self.cache.step(self.decoder, self.token, self.place))
        except torch.cuda.OutOfMemoryError:
            raise  # which is not the model's doing
        except Exception as error:  # whatever a model does that cannot be recorded
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.cache.slot.copy_(slot)
        if reason is None and self.decoder not in _sound:
            plain = self.cache.step(self.decoder, token, place)
            self.cache.slot.copy_(slot)
            graph.replay()
            gap, size = float((self.out - plain).abs().max()), float(plain.abs().max())
            self.cache.slot.copy_(slot)
            if not gap <= NEAR * size:
                reason = f"it comes out {gap:.1e} away from a plain step"
        _sound[self.decoder] = reason is None
        if reason is None:
            self.graph = graph
        else:
            warnings.warn(f"decoding without a CUDA graph: {reason}", stacklevel=2)

"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib
import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """A bar on a terminal; in a file or a pipe a plain line about every tenth of the run."""

    def __init__(
        self, total: int, start: int = 0, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.step, self.enabled = total, start, enabled
        self.stream = sys.stderr if stream is None else stream
        self._start, self._samples, self._began = start, 0, time.monotonic()
        self._bar = self._open_bar() if enabled and self.stream.isatty() else None

    def _open_bar(self) -> Any:
        return importlib.import_module("tqdm").tqdm(
            total=self.total,
            initial=self.step,
            file=self.stream,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]",
        )

    def update(
        self, samples: int = 0, reward: float | None = None, kl: float | None = None
    ) -> None:
        """One step is done: `samples` answers in it, its mean reward and KL to the reference."""
        self.step += 1
        self._samples += samples
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._facts(reward, kl)), refresh=False)
            self._bar.update(1)
        elif self.enabled and self._is_due():
            facts = [f"step {self.step}/{self.total}", *self._facts(reward, kl), self._left()]
            self._print(", ".join(facts))

    def write(self, text: str, stream: TextIO | None = None) -> None:
        """Print another line of the program without breaking the bar; also when disabled."""
        stream = self.stream if stream is None else stream
        if self._bar is not None:
            self._bar.write(text, file=stream)
        else:
            print(text, file=stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def _is_due(self) -> bool:
        """After the first step, at each tenth of the whole, and at the end."""
        tenth = self.step * 10 // self.total > (self.step - 1) * 10 // self.total
        return tenth or self.step in (self._start + 1, self.total)

    def _facts(self, reward: float | None, kl: float | None) -> list[str]:
        facts = [f"{n} {v:.3f}" for n, v in (("reward", reward), ("KL", kl)) if v is not None]
        seconds = time.monotonic() - self._began
        if self._samples and seconds > 0:
            facts.append(f"{self._samples / seconds:.1f} samples/s")
        return facts

    def _left(self) -> str:
        done = self.step - self._start
        seconds = (time.monotonic() - self._began) / done * (self.total - self.step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d} left"

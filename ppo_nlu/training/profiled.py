"""The profile of a run: where its time goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ppo_nlu.model.base_model import DTYPES
from ppo_nlu.runtime import profiling
from ppo_nlu.storage import files
from ppo_nlu.training.run import Run


@contextmanager
def profiled(run: Run) -> Iterator[None]:
    """A region whose times go to profile.json and, with a trace of two steps, to trace.json."""
    profile = profiling.Profile(
        run.cfg.train.steps - run.step,
        device=run.method.model.device,
        dtype=DTYPES[run.cfg.model.dtype],
        weights=run.method.flop_weights(),
        trace=run.folder / "trace.json",
    )
    try:
        with profile:
            yield
    finally:
        report = profile.report()
        files.atomic_write_json(run.folder / "profile.json", report)
        trace = " and trace.json" if report["traced_steps"] else ""
        print(f"\n{profiling.table(report)}\nprofile: {run.folder}/profile.json{trace}")

"""One cell of `engines.py`, in a process of its own: `benchmarks/engine_workers.py JOB.json`.

Runs in our environment or in one of TRL's. Writes JSON to the job's `out`: the clock (process CPU
and wall seconds) before the first step and after each, rewards, tokens, and memory, resident after
the imports and at its peak.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not benchmarks/: see kernels.py

from benchmarks.engine_job import Meter


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text())
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    random.seed(job["seed"])
    if job["engine"] == "ours":
        from benchmarks import engine_ours as engine
    else:
        from benchmarks import engine_trl as engine
    meter = Meter(job["device"])
    engine.RUN[job["kind"]](job, meter)
    lengths = [len(row["ids"]) for row in job["rows"]]
    result = meter.result() | {"prompt_tokens": sum(lengths) / max(len(lengths), 1)}
    Path(job["out"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

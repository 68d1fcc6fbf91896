"""What few-shot evaluation costs beside zero-shot: the same rows, scored and decoded.

    python benchmarks/few_shot.py --model FOLDER --data FOLDER [--rows 872] [--shots 0 5]

The numbers of shots alternate, so that a slow spell of the machine meets all of them. The figures
are CPU seconds of the process, after model and data were read: medians and ranges over the rounds,
and the ratio to the first number of shots. The path without the tree is timed with --path plain.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not benchmarks/: see kernels.py

import torch

from ppo_nlu.answering.answer import DECODES, held_out
from ppo_nlu.answering.by_policy import PolicyAnswerer
from ppo_nlu.config import load_config
from ppo_nlu.model.load import load_policy
from ppo_nlu.tasks import get_task


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="folder of a causal LM")
    parser.add_argument("--data", required=True, help="folder that holds glue/")
    parser.add_argument("--rows", type=int, default=872)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--path", choices=["auto", "plain"], default="auto")
    parser.add_argument("--decode", nargs="+", choices=DECODES, default=["greedy", "score"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "few_shot.yaml"
        config.write_text("task: sst2\n")
        settings = [
            f"model.name_or_path={args.model}", f"data.path={args.data}", f"eval.limit={args.rows}",
            f"model.path={args.path}", "rollout.max_new_tokens=8", "model.device=cpu",
        ]  # fmt: skip
        cfg = load_config(config, settings)
    spec, policy = get_task("sst2"), load_policy(cfg)
    rows = held_out(spec, cfg).examples
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(args.rounds):
        for decode in args.decode:
            for shots in args.shots:
                few = replace(cfg, prompt=replace(cfg.prompt, shots=shots))
                answerer = PolicyAnswerer(policy, few)
                answerer.shots.pool(spec)  # reads the training rows, which is not timed
                began = time.process_time()
                found = list(answerer.answer(spec, rows, decode))
                seconds.setdefault((decode, shots), []).append(time.process_time() - began)
                assert len(found) == len(rows) and not any(row.dropped for row in found)
    for decode in args.decode:
        base = median(seconds[decode, args.shots[0]])
        for shots in args.shots:
            own = seconds[decode, shots]
            print(
                f"{decode}, {shots} shots, {len(rows)} rows: {median(own):.1f} CPU s "
                f"({min(own):.1f} to {max(own):.1f}), {median(own) / base:.2f} x that of "
                f"{args.shots[0]} shots"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What decides between labels where answers are scored: their length, or what the model expects?

    python benchmarks/label_scores.py CONFIG|RUN_DIR --rows 200 --name NAME [section.key=value ...]

The labels are scored once behind each prompt, and once behind the prompt with empty texts. From
these log-probabilities come the three choices of `eval.label_scores`, each with accuracy, macro-F1
and the share of its most frequent answer, and a table of the labels: what their first token, the
other tokens and the closing tag cost. Rows are appended to benchmarks/results/label_scores.csv and
label_tokens.csv.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not benchmarks/: see kernels.py

import torch
from torch import Tensor

from ppo_nlu.answering.answer import held_out
from ppo_nlu.answering.by_policy import PolicyAnswerer, label_logprobs
from ppo_nlu.answering.load_run import load_base, load_trained, run_config
from ppo_nlu.answering.stored_config import read_config
from ppo_nlu.config import Config
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.custom import specs_of
from ppo_nlu.tasks.prompts import answer
from ppo_nlu.tree.prefixes import common

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HOWS = ("sum", "mean", "prior")
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="CONFIG|RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--name", required=True, help="what the rows call the model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_intermixed_args(argv)
    is_run = Path(args.target).is_dir()
    cfg = (run_config if is_run else read_config)(args.target, args.overrides)
    cfg = replace(cfg, eval=replace(cfg.eval, limit=args.rows))
    answerer = load_trained(cfg, args.target) if is_run else load_base(cfg)
    assert isinstance(answerer, PolicyAnswerer)
    (spec,) = specs_of(cfg).values()
    rows = held_out(spec, cfg).examples
    logprobs, mask = scored(answerer, cfg, spec, rows)
    best = choices(logprobs, mask)
    said = {"model": args.name, "task": spec.name, "rows": len(rows), "seed": cfg.seed}
    said |= {"commit": commit(), "torch": torch.__version__}
    measured = [said | measure(spec, rows, how, best[how].tolist()) for how in HOWS]
    tag = tag_tokens(answerer, spec)
    labels = [said | row for row in by_label(spec, rows, logprobs, mask, best, tag)]
    for table, name in ((measured, "label_scores.csv"), (labels, "label_tokens.csv")):
        append(args.results / name, table)
        show([{key: row[key] for key in row if key not in said} for row in table])
    return 0


@torch.no_grad()
def scored(
    answerer: PolicyAnswerer, cfg: Config, spec: TaskSpec, rows: list[Example]
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels' tokens and their mask (1 + N, K, R); the first row has no text."""
    policy, style = answerer.policy, cfg.prompt
    longest = longest_prompt(policy, cfg, cfg.rollout.max_new_tokens)
    empty = Example("", dict.fromkeys(spec.fields, ""), None)
    fitted = [fit_prompt(policy, spec, row, longest, style) for row in (empty, *rows)]
    shared = policy.prefix_cache([prompt.ids for prompt in fitted])
    parts, size = [], cfg.eval.batch_size
    for start in range(0, len(fitted), size):
        part = fitted[start : start + size]
        parts.append(label_logprobs(policy, spec, part, style.form, shared))
        print(f"{min(start + size, len(fitted))} of {len(fitted)}", file=sys.stderr, flush=True)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def choices(logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The number of the likeliest label (N,) under each choice."""
    sums = logprobs.sum(-1)
    scores = {"sum": sums, "mean": sums / mask.sum(-1), "prior": sums - sums[:1]}
    return {how: scores[how][1:].argmax(-1) for how in HOWS}


def measure(spec: TaskSpec, rows: list[Example], how: str, best: list[int]) -> Row:
    """Accuracy and macro-F1 of these answers, and how often the most frequent one is given."""
    from sklearn.metrics import accuracy_score, f1_score

    right = [spec.written(row.label or "") for row in rows]
    said = [spec.words[number] for number in best]
    top, count = Counter(said).most_common(1)[0]
    macro = f1_score(right, said, labels=list(spec.words), average="macro", zero_division=0)
    return {
        "label_scores": how,
        "accuracy": f"{accuracy_score(right, said):.4f}",
        "macro_f1": f"{macro:.4f}",
        "most_frequent": top,
        "its_share": f"{count / len(said):.4f}",
    }


def tag_tokens(answerer: PolicyAnswerer, spec: TaskSpec) -> int:
    """How many tokens at the end of the answers are the same for all labels."""
    ids = [answerer.policy.encode(answer(word))[::-1] for word in spec.words]
    return min(common(ids[0], other) for other in ids[1:])


def by_label(
    spec: TaskSpec,
    rows: list[Example],
    logprobs: Tensor,
    mask: Tensor,
    best: dict[str, Tensor],
    tag: int,
) -> Iterator[Row]:
    """For each label its tokens, what they cost (mean log-prob), and how often it is answered."""
    right = Counter(spec.written(row.label or "") for row in rows)
    for number, word in enumerate(spec.words):
        count = int(mask[1, number].sum())
        own = logprobs[1:, number, :count].mean(0).tolist()
        said = {how: int((best[how] == number).sum()) for how in HOWS}
        yield {
            "label": word,
            "tokens": count - tag,
            "tag_tokens": tag,
            "first": f"{own[0]:.2f}",
            "others": f"{sum(own[1 : count - tag]):.2f}",
            "tag": f"{sum(own[count - tag :]):.2f}",
            "sum": f"{sum(own):.2f}",
            "per_token": f"{sum(own) / count:.2f}",
            "without_text": f"{float(logprobs[0, number].sum()):.2f}",
            "right": right[word],
            **{f"answered_{how}": said[how] for how in HOWS},
        }


def append(path: Path, rows: list[Row]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(rows)


def show(rows: list[Row]) -> None:
    """A Markdown table."""
    print(f"\n| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

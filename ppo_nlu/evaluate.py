"""Evaluation: `python -m ppo_nlu.evaluate RUN_DIR|CONFIG [--decode DECODE] [--split dev|test]`.

Three ways to read an answer off a model, reported side by side because they differ: one sample at
T=1, greedy decoding, and scoring each label word whole behind the prompt (never unparsed).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from ppo_nlu import cli, data, lora, metrics, prefix_tree
from ppo_nlu.answers import parse
from ppo_nlu.checkpoint import atomic_write_json, require_run_dir
from ppo_nlu.config import Config, load_config
from ppo_nlu.errors import UserError
from ppo_nlu.generate import Sampling, generate
from ppo_nlu.model import Policy, check_words, load_policy
from ppo_nlu.prompts import answer
from ppo_nlu.rollout import fit_prompt, longest_prompt, seeded
from ppo_nlu.tasks import Example, TaskSpec, get_task

DECODES = ("sample", "greedy", "score")
VALUE_HEAD = "value_head.safetensors"
T = TypeVar("T")


@dataclass
class Answer:
    """One row as it was answered; `probabilities` by label word where they were scored."""

    example: Example
    prediction: str | None
    response: str
    probabilities: dict[str, float] | None = None
    cut: bool = False  # the prompt was cut to fit the context

    def to_json(self) -> dict[str, Any]:
        """The row of a predictions.jsonl."""
        return {
            "id": self.example.id,
            "label": self.example.label,
            "prediction": self.prediction,
            "response": self.response,
            "probabilities": self.probabilities,
        }


def answer_all(
    policy: Policy,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decode: str,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Answers in the order of the examples, a window of batches at a time; ends early on `stop`.

    Inside a window rows of like length run together, so little padding is run.
    """
    size = cfg.eval.batch_size
    longest = longest_prompt(policy, cfg, _room(policy, spec, cfg))
    for start in range(0, len(examples), 16 * size):
        window = examples[start : start + 16 * size]
        fitted = [fit_prompt(policy, spec, example, longest) for example in window]
        order = sorted(range(len(window)), key=lambda i: -len(fitted[i][1]))
        done: dict[int, Answer] = {}
        for index in _batches(order, size):
            if stop():
                return
            rows = [window[i] for i in index]
            texts = [fitted[i][0] for i in index]
            prompts = [fitted[i][1] for i in index]
            if decode == "score":
                answers = _by_score(policy, spec, rows, texts, prompts)
            else:
                generator = seeded("evaluate", cfg.seed, start, index[0])
                answers = _by_decoding(policy, spec, cfg, rows, prompts, decode, generator)
            for i, row in zip(index, answers, strict=True):
                done[i] = replace(row, cut=fitted[i][2])
        yield from (done[i] for i in range(len(window)))


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def _room(policy: Policy, spec: TaskSpec, cfg: Config) -> int:
    """Tokens to keep free behind a prompt: the longest answer, sampled or a label word."""
    words = max(len(policy.encode(answer(word))) for word in spec.words)
    return max(cfg.rollout.max_new_tokens, words)


def require_room(policy: Policy, spec: TaskSpec, cfg: Config) -> None:
    """A UserError where the form of the prompt, with no text in it, leaves no room for an answer;
    told before anything is made or run."""
    longest = longest_prompt(policy, cfg, _room(policy, spec, cfg))
    fit_prompt(policy, spec, Example("", dict.fromkeys(spec.fields, ""), None), longest)


def _by_decoding(
    policy: Policy,
    spec: TaskSpec,
    cfg: Config,
    rows: Sequence[Example],
    prompts: list[list[int]],
    decode: str,
    generator: torch.Generator,
) -> list[Answer]:
    drawn = generate(
        policy,
        prompts,
        cfg.rollout.max_new_tokens,
        Sampling(1.0, decode == "greedy", cfg.eval.top_k, cfg.eval.top_p),
        generator=generator,
    )
    texts = [policy.decode(row) for row in drawn.rows]
    return [Answer(e, parse(spec, t), t) for e, t in zip(rows, texts, strict=True)]


@torch.no_grad()
def label_probabilities(
    policy: Policy, spec: TaskSpec, texts: Sequence[str], prompts: Sequence[list[int]]
) -> torch.Tensor:
    """softmax over the labels of log π(` Word </Judgement>` | prompt), (P, K), no length norm.

    Each label is tokenised behind its prompt, as a whole text; where a label changes the prompt's
    last tokens, scoring starts at the first token that differs.
    """
    heads, answers, owners = [], [], []
    for number, (text, ids) in enumerate(zip(texts, prompts, strict=True)):
        whole = [policy.encode(text + answer(word)) for word in spec.words]
        cut = min(prefix_tree.common(ids, row) for row in whole)
        heads.append(ids[:cut])
        answers += [row[cut:] for row in whole]
        owners += [number] * len(whole)
    scored = policy.score(heads, answers, owners)
    return scored.logprobs.sum(1).view(len(texts), -1).softmax(-1)


def _by_score(
    policy: Policy,
    spec: TaskSpec,
    rows: Sequence[Example],
    texts: Sequence[str],
    prompts: Sequence[list[int]],
) -> list[Answer]:
    table = label_probabilities(policy, spec, texts, prompts).tolist()
    answers = []
    for example, probabilities in zip(rows, table, strict=True):
        by_word = dict(zip(spec.words, probabilities, strict=True))
        best = max(by_word, key=lambda word: by_word[word])
        answers.append(Answer(example, best, answer(best), by_word))
    return answers


def report(spec: TaskSpec, cfg: Config, answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy with its interval, per-class figures, histogram and unparsed rate."""
    labels = [_label(row.example) for row in answers]
    predictions = [row.prediction for row in answers]
    return metrics.classification_report(
        labels, predictions, spec.words, cfg.eval.bootstrap, cfg.seed
    )


def _label(example: Example) -> str:
    if example.label is None:
        raise UserError(f"eval.split: row {example.id} has no label; use --split dev")
    return example.label


def evaluate_all(
    policy: Policy,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decodes: Sequence[str] = DECODES,
    progress: bool = False,
    title: str = "evaluate",
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[Answer]]:
    """All answers under each way of decoding, with a progress bar; fewer where `stop` said so."""
    found: dict[str, list[Answer]] = {}
    for decode in decodes:
        rows = answer_all(policy, spec, cfg, examples, decode, stop)
        found[decode] = list(shown(rows, f"{title}: {decode}", len(examples), progress))
    return found


def shown(rows: Iterable[T], title: str, total: int | None, progress: bool) -> Iterator[T]:
    """The rows as they come, with a bar on stderr; in a file or a pipe it is renewed rarely."""
    pause = 0.1 if sys.stderr.isatty() else 60.0
    yield from tqdm(rows, title, total, disable=not progress, leave=False, mininterval=pause)


def headline(found: dict[str, list[Answer]]) -> dict[str, float]:
    """The metric under each decoding, and the rate of sampled answers that hold none."""
    row = {
        decode: sum(a.prediction == _label(a.example) for a in answers) / len(answers)
        for decode, answers in found.items()
    }
    sampled = found.get("sample") or next(iter(found.values()))
    return row | {"unparsed": sum(a.prediction is None for a in sampled) / len(sampled)}


def run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a finished run; a UserError where the run is none or has not finished."""
    folder = require_run_dir(run_dir)
    cfg = load_config(folder / "config.yaml", overrides)
    if not (folder / "adapter" / lora.CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: the run has not finished and left no adapter/; "
            f"finish it with python -m ppo_nlu.train {folder}/config.yaml --resume {folder}"
        )
    return cfg


def load_trained(cfg: Config, run_dir: str | Path) -> Policy:
    """The policy of a finished run, with its trained adapter and value head."""
    adapter = Path(run_dir) / "adapter"
    policy = load_policy(cfg)
    lora.load_adapter(policy.model, adapter)
    try:
        policy.value_head.load_state_dict(load_file(adapter / VALUE_HEAD))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{adapter / VALUE_HEAD}: not the value head of this run ({error}); resume the run's "
            f"last step to write it again: python -m ppo_nlu.train {run_dir}/config.yaml "
            f"--resume {run_dir}"
        ) from error
    return policy


def write_predictions(path: Path, answers: Iterable[Answer]) -> None:
    """One JSON object a row; the file appears whole or not at all."""
    for _ in recorded(path, answers):
        pass


def recorded(path: Path, answers: Iterable[Answer]) -> Iterator[Answer]:
    """The answers as they come, each written down at once; with the last the file gets its name."""
    part = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in answers:
                file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
                yield row
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def join(decoded: Sequence[Answer], scored: Sequence[Answer]) -> list[Answer]:
    """Decoded answers with the label probabilities of scored ones."""
    pairs = zip(decoded, scored, strict=True)
    return [replace(row, probabilities=other.probabilities) for row, other in pairs]


def main(argv: list[str] | None = None) -> int:
    """The program."""
    parser = cli.Parser("python -m ppo_nlu.evaluate", description=__doc__)
    parser.add_argument("target", metavar="RUN_DIR|CONFIG", help="a run, or a config: its base")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--decode", choices=DECODES, help="one way of decoding (default: all three)"
    )
    parser.add_argument("--split", choices=("train", "dev", "test"), help="default: eval.split")
    parser.add_argument(
        "--output", type=Path, help="a folder for predictions.jsonl and report.json"
    )
    args = parser.parse_intermixed_args(argv)
    target = Path(args.target)
    is_run = target.is_dir()
    read = run_config if is_run else load_config
    cfg = read(target, args.overrides)
    spec = get_task(cfg.task)
    split = args.split or cfg.eval.split
    default = target / f"eval-{split}" if is_run else Path(f"eval-{spec.name}-{split}")
    output = require_own(args.output or default)
    rows = data.load_split(spec, split, cfg.data)
    examples = rows.examples[: cfg.eval.limit or None]
    print(f"data: {rows.note}; {split}: {len(examples):,} rows", flush=True)
    policy = load_trained(cfg, target) if is_run else load_policy(cfg)
    check_words(policy, spec)
    require_room(policy, spec, cfg)
    output.mkdir(parents=True, exist_ok=True)
    reports, found_by = {}, {}
    for decode in (args.decode,) if args.decode else DECODES:
        answers = answer_all(policy, spec, cfg, examples, decode)
        written = recorded(output / f"predictions-{decode}.jsonl", answers)
        found = list(shown(written, f"evaluate: {decode}", len(examples), cfg.log.progress))
        found_by[decode] = found
        if all(row.example.label is not None for row in found):
            reports[decode] = report(spec, cfg, found)
            print_report(decode, reports[decode])
    first = found_by["greedy"] if len(found_by) > 1 else next(iter(found_by.values()))
    both = join(first, found_by["score"]) if "score" in found_by else first
    write_predictions(output / "predictions.jsonl", both)
    if reports:
        atomic_write_json(output / "report.json", {"data": rows.source, "split": split} | reports)
    else:
        print(f"no scores: {split} has rows without a label")
    if cut := sum(row.cut for row in first):
        print(f"{cut:,} prompts were cut to fit the context of {policy.context:,} tokens")
    print(f"written: {output}")
    return 0


def require_own(output: Path) -> Path:
    """The folder for the results: new, empty, or that of an earlier evaluation."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    if any(not name.startswith((".tmp-", "predictions", "report.json")) for name in names):
        raise UserError(f"--output {output}: holds files of other kinds; name a new folder")
    return output


def print_report(decode: str, row: dict[str, Any]) -> None:
    """A report as a few lines of text."""
    interval = row["accuracy_interval"]
    spread = f" (95 % {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    print(
        f"\n{decode}: accuracy {100 * row['accuracy']:.1f} %{spread}, "
        f"unparsed {100 * row['unparsed']:.1f} %"
    )
    for word, figures in row["per_class"].items():
        shown = "  ".join(
            f"{title} {100 * figures[key]:5.1f}"
            for title, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
        )
        print(f"  {word:<14} {shown}  of {figures['support']}")
    counts = ", ".join(f"{word} {count}" for word, count in row["predicted"].items())
    print(f"  predicted: {counts}")


if __name__ == "__main__":
    sys.exit(cli.run(main))

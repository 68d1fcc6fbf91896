"""Evaluation: `python -m ppo_nlu.evaluate RUN_DIR|CONFIG [--decode DECODE] [--split dev|test]`.

Three ways to read an answer off a model, reported side by side because they differ: one sample at
T=1, greedy decoding, and scoring each label word whole behind the prompt (never unparsed).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ppo_nlu import data
from ppo_nlu.answering.provenance import read_config, resume_command, stored_config
from ppo_nlu.config import Config
from ppo_nlu.data import demonstrations
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_model
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.methods.rollout import Fitted, fit_prompt, longest_prompt, seeded
from ppo_nlu.model import lora
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.policy import VALUE_HEAD, Policy, check_words, load_policy
from ppo_nlu.runtime import cli, runlog
from ppo_nlu.runtime.checkpoint import require_run_dir
from ppo_nlu.storage.files import (
    LOCK,
    TEMP,
    FolderLock,
    atomic_open,
    atomic_write_json,
    make_folder,
    read_tensors,
    to_json,
)
from ppo_nlu.tasks import TASKS, Example, TaskSpec, metrics
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.custom import specs_of
from ppo_nlu.tasks.prompts import answer
from ppo_nlu.tree import prefix_tree
from ppo_nlu.tree.prefix_tree import Opening

DECODES = ("sample", "greedy", "score")
T = TypeVar("T")


@dataclass
class Answer:
    """One row as it was answered; `probabilities` by label word where they were scored."""

    example: Example
    prediction: str | None
    response: str
    probabilities: dict[str, float] | None = None
    cut: bool = False  # the prompt was cut to fit the context
    dropped: int = 0  # worked examples left out of the prompt, to fit the context

    def to_json(self, named: bool = False) -> dict[str, Any]:
        """The row of a predictions.jsonl; `named`: with its task."""
        return ({"task": self.example.task} if named else {}) | {
            "id": self.example.id,
            "label": self.example.label,
            "prediction": self.prediction,
            "response": self.response,
            "probabilities": self.probabilities,
        }


def answer_all(
    policy: Policy | Encoder,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decode: str,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """Answers in the order of the examples, a window of batches at a time; ends early on `stop`.

    Inside a window rows of like length run together, so the plain path runs little padding; what
    all of its prompts begin with is run once.
    """
    if isinstance(policy, Encoder):
        found = encoder_model.answer_all(policy, spec, cfg, examples, decode, stop)
        for example, (prediction, probabilities) in zip(examples, found, strict=False):
            yield Answer(example, prediction, prediction or "", probabilities)
        return
    if decode == "score" and not spec.words:
        raise UserError(f"--decode: {spec.name} has no list of answers to score; use greedy")
    size = cfg.eval.batch_size
    longest = longest_prompt(policy, cfg, _room(policy, spec, cfg))
    shots = demonstrations.of(spec, cfg)
    for start in range(0, len(examples), 16 * size):
        window = examples[start : start + 16 * size]
        fitted = [fit_prompt(policy, spec, row, longest, cfg.prompt, shots) for row in window]
        order = sorted(range(len(window)), key=lambda i: -len(fitted[i].ids))
        opening = None
        if len(window) > size:
            opening = policy.opening([fit.ids for fit in fitted])
        done: dict[int, Answer] = {}
        for index in _batches(order, size):
            if stop():
                return
            rows, prompts = [window[i] for i in index], [fitted[i] for i in index]
            if decode == "score":
                answers = _by_score(policy, spec, rows, prompts, cfg.prompt.form, opening)
            else:
                generator = seeded("evaluate", cfg.seed, start, index[0])
                answers = _by_decoding(policy, spec, cfg, rows, prompts, decode, generator, opening)
            for i, row in zip(index, answers, strict=True):
                done[i] = replace(row, cut=fitted[i].cut, dropped=fitted[i].dropped)
        yield from (done[i] for i in range(len(window)))


def decodes_of(spec: TaskSpec) -> tuple[str, ...]:
    """The ways of decoding that the task has: free text cannot be scored."""
    return DECODES if spec.words else DECODES[:2]


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield list(order[start : start + size])


def _room(policy: Policy, spec: TaskSpec, cfg: Config) -> int:
    """Tokens to keep free behind a prompt: the longest answer, sampled or a label word."""
    form = cfg.prompt.form
    replies = [answer(policy.seal(word), form) for word in spec.words]
    words = max((len(policy.encode(reply)) for reply in replies), default=0)
    return max(cfg.rollout.max_new_tokens, words)


def require_fit(policy: Policy | Encoder, spec: TaskSpec, cfg: Config) -> None:
    """A UserError where the tokenizer does not keep the answers, or where the form of the prompt
    leaves no room for one; told before anything is made or run."""
    if isinstance(policy, Encoder):
        return
    check_words(policy, spec, cfg.prompt)
    longest = longest_prompt(policy, cfg, _room(policy, spec, cfg))
    fit_prompt(policy, spec, Example("", dict.fromkeys(spec.fields, ""), None), longest, cfg.prompt)


def _by_decoding(
    policy: Policy,
    spec: TaskSpec,
    cfg: Config,
    rows: Sequence[Example],
    prompts: Sequence[Fitted],
    decode: str,
    generator: torch.Generator,
    opening: Opening | None,
) -> list[Answer]:
    drawn = generate(
        policy,
        [prompt.ids for prompt in prompts],
        cfg.rollout.max_new_tokens,
        Sampling(1.0, decode == "greedy", cfg.eval.top_k, cfg.eval.top_p),
        generator=generator,
        opening=opening,
    )
    require_logprobs(drawn.logprobs)
    texts = [policy.decode(row) for row in drawn.rows]
    form = cfg.prompt.form
    return [Answer(e, parse(spec, t, form), t) for e, t in zip(rows, texts, strict=True)]


def require_logprobs(logprobs: torch.Tensor) -> None:
    """Weights can be finite and their logits not: then nothing is known of the answers."""
    if bool(logprobs.isnan().any()):
        raise UserError(
            "the model's log-probabilities are no numbers: its weights or the adapter's are "
            "damaged or far too large, or model.dtype is too narrow for them"
        )


@torch.no_grad()
def label_probabilities(
    policy: Policy,
    spec: TaskSpec,
    prompts: Sequence[Fitted],
    form: str = "judgement",
    opening: Opening | None = None,
) -> torch.Tensor:
    """softmax over the labels of log π(` Word </Judgement>` | prompt), (P, K), no length norm.

    Each label is tokenised behind its prompt, as a whole text; where a label changes the prompt's
    last tokens, scoring starts at the first token that differs. In the analysis form the label
    stands behind an empty reason.
    """
    heads, answers, owners = [], [], []
    replies = [answer(policy.seal(word), form) for word in spec.words]
    for number, prompt in enumerate(prompts):
        whole = [policy.encode(prompt.text + reply) for reply in replies]
        cut = min(prefix_tree.common(prompt.ids, row) for row in whole)
        heads.append(prompt.ids[:cut])
        answers += [row[cut:] for row in whole]
        owners += [number] * len(whole)
    scored = policy.score(heads, answers, owners, opening=opening)
    require_logprobs(scored.logprobs)
    return scored.logprobs.sum(1).view(len(prompts), -1).softmax(-1)


def _by_score(
    policy: Policy,
    spec: TaskSpec,
    rows: Sequence[Example],
    prompts: Sequence[Fitted],
    form: str,
    opening: Opening | None,
) -> list[Answer]:
    """The likeliest word; for a rating the expectation over its grid."""
    table = label_probabilities(policy, spec, prompts, form, opening).tolist()
    answers = []
    for example, probabilities in zip(rows, table, strict=True):
        by_word = dict(zip(spec.words, probabilities, strict=True))
        best = max(by_word, key=lambda word: by_word[word])
        if spec.rating:
            best = f"{sum(float(word) * p for word, p in by_word.items()):.3f}"
        answers.append(Answer(example, best, answer(best, form), by_word))
    return answers


def report(
    spec: TaskSpec, answers: Sequence[Answer], resamples: int = 0, seed: int = 0
) -> dict[str, Any]:
    """The task's metrics, histogram and unparsed rate; with `resamples` the interval of the mean
    of the metrics."""
    if missing := [row.example.id for row in answers if row.example.label is None]:
        raise UserError(f"eval.split: row {missing[0]} has no label; use --split dev")
    return metrics.report(
        spec,
        [row.example for row in answers],
        [row.prediction for row in answers],
        [row.probabilities for row in answers],
        resamples,
        seed,
    )


def evaluate_all(
    policy: Policy | Encoder,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decodes: Sequence[str] | None = None,
    progress: bool = False,
    title: str = "evaluate",
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[Answer]]:
    """All answers under each way of decoding, with a progress bar; fewer where `stop` said so."""
    found: dict[str, list[Answer]] = {}
    for decode in decodes or decodes_of(spec):
        rows = answer_all(policy, spec, cfg, examples, decode, stop)
        found[decode] = list(shown(rows, f"{title}: {decode}", len(examples), progress))
    return found


def headline(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The task's score under each decoding, and the rate of sampled answers that hold none."""
    sampled = reports.get("sample") or next(iter(reports.values()))
    row = {name: reports[name]["score"] if name in reports else None for name in DECODES}
    return row | {"unparsed": sampled["unparsed"]}


def mean_headline(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean over tasks; null where a task lacks the number."""
    means: dict[str, float | None] = {}
    for name in (*DECODES, "unparsed"):
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        means[name] = sum(known) / len(known) if len(known) == len(values) else None
    return means


def shown(rows: Iterable[T], title: str, total: int | None, progress: bool) -> Iterator[T]:
    """The rows as they come, with a bar on stderr; in a file or a pipe it is renewed rarely."""
    pause = 0.1 if sys.stderr.isatty() else 60.0
    yield from tqdm(rows, title, total, disable=not progress, leave=False, mininterval=pause)


def run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a finished run; a UserError where the run is none or has not finished."""
    folder = require_run_dir(run_dir)
    cfg = stored_config(folder, overrides)
    kept = encoder_folder(folder) if cfg.method == "encoder" else folder / "adapter"
    named = "config.json" if cfg.method == "encoder" else lora.CONFIG_FILE
    if not (kept / named).is_file():
        raise UserError(
            f"{folder}: the run has not finished and left no {kept.name}/; "
            f"finish it with {resume_command(folder, cfg)}"
        )
    return cfg


def encoder_folder(run_dir: str | Path) -> Path:
    """Where a run of method `encoder` leaves its model."""
    return Path(run_dir) / encoder_model.FOLDER


def load_trained(cfg: Config, run_dir: str | Path) -> Policy | Encoder:
    """The policy of a finished run, with its trained adapter and value head, or its encoder."""
    if cfg.method == "encoder":
        return encoder_model.load_saved(cfg, specs_of(cfg)[cfg.names[0]], encoder_folder(run_dir))
    adapter = Path(run_dir) / "adapter"
    policy = load_policy(replace(cfg, init_from=None))  # the run's own adapter is whole
    lora.load_adapter(policy.model, adapter)
    if cfg.method != "ppo":
        return policy  # no critic was trained
    path = adapter / VALUE_HEAD
    try:
        head = read_tensors(path)
    except UserError as error:
        raise UserError(
            f"{error}; resume the run's last step to write the value head again: "
            f"{resume_command(run_dir, cfg)}"
        ) from error
    lora.take(policy.value_head.state_dict(), head, str(path))
    return policy


def write_predictions(path: Path, answers: Iterable[Answer], named: bool = False) -> None:
    """One JSON object a row; the file appears whole or not at all."""
    for _ in recorded(path, answers, named):
        pass


def recorded(path: Path, answers: Iterable[Answer], named: bool = False) -> Iterator[Answer]:
    """The answers as they come, each written down at once; with the last the file gets its name."""
    with atomic_open(path) as file:
        for row in answers:
            file.write(to_json(row.to_json(named)) + "\n")
            yield row


def join(decoded: Sequence[Answer], scored: Sequence[Answer]) -> list[Answer]:
    """Decoded answers with the label probabilities of scored ones."""
    pairs = zip(decoded, scored, strict=True)
    return [replace(row, probabilities=other.probabilities) for row, other in pairs]


@dataclass
class Measured:
    """One task's rows and how they were answered, by way of decoding; `before`: by the base."""

    spec: TaskSpec
    rows: data.Dataset
    after: dict[str, list[Answer]]
    before: dict[str, list[Answer]] | None = None
    resamples: int = 0
    seed: int = 0

    @cached_property
    def reports(self) -> dict[str, dict[str, Any]]:
        """The report of each way of decoding, with its interval."""
        return {
            decode: report(self.spec, rows, self.resamples, self.seed)
            for decode, rows in self.after.items()
        }

    def entry(self) -> dict[str, Any]:
        """The task's part of a summary.json."""
        base = None
        if self.before is not None:
            base = {decode: report(self.spec, rows) for decode, rows in self.before.items()}
        return {
            "title": self.spec.title,
            "data": self.rows.source,
            "note": self.rows.note,
            "partial": self.rows.partial,
            "rows": len(self.rows.examples),
            "before": headline(base) if base else None,
            "after": headline(self.reports),
            "reports": self.reports,
        }


def summarise(cfg: Config, measured: Sequence[Measured]) -> dict[str, Any]:
    """What a summary.json says of the evaluation; over several tasks `before` and `after` are
    means of the tasks' scores."""
    entries = {one.spec.name: one.entry() for one in measured}
    before = [entry["before"] for entry in entries.values() if entry["before"]]
    summary: dict[str, Any] = {
        "task": "+".join(entries),
        "method": cfg.method,
        "model": cfg.model.name_or_path,
        "data": "+".join(dict.fromkeys(one.rows.source for one in measured)),
        "seed": cfg.seed,
        "eval_split": cfg.eval.split,
        "eval_rows": sum(entry["rows"] for entry in entries.values()),
        "before": mean_headline(before) if before else None,
        "after": mean_headline([entry["after"] for entry in entries.values()]),
        "tasks": entries,
    }
    if len(entries) == 1:
        summary["reports"] = next(iter(entries.values()))["reports"]
    scored = [next(reversed(one.after.values())) for one in measured]
    summary["truncated_eval_prompts"] = sum(row.cut for rows in scored for row in rows)
    summary["dropped_eval_shots"] = sum(row.dropped for rows in scored for row in rows)
    return summary


def held_out(spec: TaskSpec, cfg: Config, split: str | None = None) -> data.Dataset:
    """The rows to evaluate on: at most `eval.limit`, no group of rows cut in two."""
    found = data.load_split(spec, split or cfg.eval.split, cfg.data)
    return replace(found, examples=data.first(found.examples, cfg.eval.limit))


def main(argv: list[str] | None = None) -> int:
    """The program."""
    started = time.perf_counter()
    parser = cli.Parser("python -m ppo_nlu.evaluate", description=__doc__)
    parser.add_argument("target", metavar="RUN_DIR|CONFIG", help="a run, or a config: its base")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--decode", choices=DECODES, help="one way of decoding (default: all three)"
    )
    parser.add_argument("--split", help="train, dev or test (default: eval.split)")
    parser.add_argument(
        "--output", type=Path, help="a folder for predictions, report.json and summary.json"
    )
    args = parser.parse_intermixed_args(argv)
    target = Path(args.target)
    is_run = target.is_dir()
    cfg = (run_config if is_run else read_config)(target, args.overrides)
    cfg = replace(cfg, eval=replace(cfg.eval, split=args.split or cfg.eval.split))
    specs, split = specs_of(cfg), cfg.eval.split
    label = "+".join(name.replace("/", "-") for name in specs)
    default = target / f"eval-{split}" if is_run else Path(f"eval-{label}-{split}")
    output = require_own(cli.require_place("--output", args.output or default), specs)
    held = {name: held_out(spec, cfg) for name, spec in specs.items()}
    for rows in held.values():
        print(f"data: {rows.note}; {split}: {len(rows.examples):,} rows", flush=True)
    policy = load_trained(cfg, target) if is_run else load_base_policy(cfg)
    for spec in specs.values():
        require_fit(policy, spec, cfg)
    with FolderLock(make_folder(output)):
        measured = list(_measured(policy, specs, cfg, held, args.decode, output))
    if all(row.label is not None for rows in held.values() for row in rows.examples):
        method = "few-shot" if cfg.prompt.shots else "zero-shot"
        summary = summarise(cfg, measured) | {
            "method": cfg.method if is_run else method,
            "wall_s": time.perf_counter() - started,
            "peak_memory_mb": runlog.peak_memory_mb(policy.device),
        }
        atomic_write_json(output / "summary.json", summary)
    if cut := sum(row.cut for one in measured for row in next(iter(one.after.values()))):
        print(f"{cut:,} prompts were cut to fit the model's context")
    if lost := sum(row.dropped for one in measured for row in next(iter(one.after.values()))):
        print(f"{lost:,} worked examples were left out, whole, where a prompt did not fit")
    print(f"written: {output}")
    return 0


def _measured(
    policy: Policy | Encoder,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    held: Mapping[str, data.Dataset],
    decode: str | None,
    output: Path,
) -> Iterator[Measured]:
    """Each task answered, written down and told."""
    for name, spec in specs.items():
        folder = make_folder(output / name.replace("/", "-") if len(specs) > 1 else output)
        decodes = (decode,) if decode else decodes_of(spec)
        found = _answered(policy, spec, cfg, held[name].examples, decodes, folder)
        one = Measured(spec, held[name], found, None, cfg.eval.bootstrap, cfg.seed)
        _tell(one, cfg, folder)
        yield one


def load_base_policy(cfg: Config) -> Policy:
    """The policy that a config starts from; an encoder is nothing before its training."""
    if cfg.method == "encoder":
        raise UserError("method: an encoder answers only after training; give its run folder")
    return load_policy(cfg)


def _answered(
    policy: Policy | Encoder,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decodes: Sequence[str],
    folder: Path,
) -> dict[str, list[Answer]]:
    """The answers of one task, written down as they come."""
    found = {}
    for decode in decodes:
        answers = answer_all(policy, spec, cfg, examples, decode)
        written = recorded(folder / f"predictions-{decode}.jsonl", answers)
        title = f"{spec.title}: {decode}"
        found[decode] = list(shown(written, title, len(examples), cfg.log.progress))
    first = found.get("greedy") or next(iter(found.values()))
    both = join(first, found["score"]) if "score" in found else first
    write_predictions(folder / "predictions.jsonl", both)
    return found


def _tell(one: Measured, cfg: Config, folder: Path) -> None:
    """Print the reports of one task and write them to report.json; without labels, say so."""
    if any(row.label is None for row in one.rows.examples):
        print(f"{one.spec.title}: no scores, since {cfg.eval.split} has rows without a label")
        return
    place = {"data": one.rows.source, "split": cfg.eval.split}
    atomic_write_json(folder / "report.json", place | one.reports)
    for decode, row in one.reports.items():
        print_report(f"{one.spec.title}, {decode}", row)


def require_own(output: Path, tasks: Iterable[str] = ()) -> Path:
    """The folder for the results: new, empty, or that of an earlier evaluation."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    names = [path.name for path in output.iterdir()] if output.is_dir() else []
    own = (TEMP, LOCK, "predictions", "report.json", "summary.json")
    plain = {name.replace("/", "-") for name in (*TASKS, *tasks)}
    if any(not name.startswith(own) and name not in plain for name in names):
        raise UserError(f"--output {output}: holds files of other kinds; name a new folder")
    return output


def print_report(title: str, row: dict[str, Any]) -> None:
    """A report as a few lines of text."""
    interval = row["interval"]
    spread = f" (95 % {100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    values = row["metrics"]
    figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in values.items())
    mean = f"; mean {100 * row['score']:.1f} %" if len(values) > 1 else ""
    print(f"\n{title}: {figures}{mean}{spread}, unparsed {100 * row['unparsed']:.1f} %")
    for word, per_class in row.get("per_class", {}).items():
        shown = "  ".join(
            f"{title} {100 * per_class[key]:5.1f}"
            for title, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
        )
        print(f"  {word:<14} {shown}  of {per_class['support']}")
    if row["predicted"]:
        counts = ", ".join(f"{word} {count}" for word, count in row["predicted"].items())
        print(f"  predicted: {counts}")


if __name__ == "__main__":
    sys.exit(cli.run(main))

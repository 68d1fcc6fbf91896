"""Training: `python -m ppo_nlu.train CONFIG [section.key=value ...] [--resume|--output RUN_DIR]`.

Teaches a model a task, or several, from labels: by PPO or GRPO, by supervised fine-tuning, or as an
encoder with a head. Says at the end what that gained: the untuned base and the tuned model on the
evaluation split under three ways of decoding.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppo_nlu import data
from ppo_nlu.answering import aggregate, answer, predictions, provenance
from ppo_nlu.answering.answer import Answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.config import Config, diff, dump, load_config, strict_config, to_dict
from ppo_nlu.config.idle_keys import BY_REWARD, idle_keys
from ppo_nlu.data import mixture
from ppo_nlu.errors import UserError
from ppo_nlu.methods import memory
from ppo_nlu.methods.base import Method
from ppo_nlu.methods.registry import METHODS
from ppo_nlu.methods.report import BadStep, Report
from ppo_nlu.model.base_model import DTYPES
from ppo_nlu.model.policy import Policy
from ppo_nlu.runtime import (
    arguments,
    checkpoint,
    cli,
    flops,
    optim,
    optimizer_state,
    profiling,
    run_folder,
    runlog,
    streams,
)
from ppo_nlu.runtime.curves import draw_curves
from ppo_nlu.runtime.progress import Progress
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.runtime.summary import peak_memory_mb, results_table
from ppo_nlu.storage import files, sealed
from ppo_nlu.storage.locks import FolderLock
from ppo_nlu.tasks import REWARD_KINDS, Example, TaskSpec, rewards
from ppo_nlu.tasks.custom import specs_of

# What a resumed run may change: how it is shown and kept, not what is computed.
MAY_CHANGE = (
    "log",
    "eval.batch_size",
    "eval.before",
    "eval.bootstrap",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "model.device",
    "data.path",
    "custom.train",
    "custom.dev",
    "custom.test",
)
PLANNED_BY = 16  # rows of the first step by which the memory plan judges the prompts


@dataclass
class Run:
    """Everything that lives while a model is trained; rows by the name of their task."""

    cfg: Config
    specs: dict[str, TaskSpec]
    folder: Path
    method: Method
    train_rows: dict[str, list[Example]]
    held: dict[str, data.Dataset]
    source: str
    learned_from: dict[str, data.Dataset] = field(default_factory=dict)  # by task; to be told
    started: float = field(default_factory=time.perf_counter)  # of the program
    step: int = 0
    saved: int = 0  # the step of the newest checkpoint
    made_of: dict[str, Any] = field(default_factory=dict)  # fingerprints; see `provenance`
    pending: dict[str, Any] | None = None  # a step's metrics where a stop cut its evaluation short
    bad_in_a_row: int = 0
    totals: dict[str, float] = field(
        default_factory=lambda: {"samples": 0, "train_s": 0.0, "truncated": 0, "bad_steps": 0}
    )


def train(run: Run, stop: StopRequest) -> None:
    """The algorithm, top to bottom; one pass of the loop is one step of the method."""
    cfg, method = run.cfg, run.method
    sinks = runlog.open_sinks(cfg.log, run.folder, to_dict(cfg), run.step)
    log = runlog.MetricsLog(run.folder, sinks)
    for line in log.truncate_after(run.step if run.pending is None else run.step - 1):
        print(f"warning: {line}", file=sys.stderr)
    with log, Progress(cfg.train.steps, run.step, cfg.log.progress) as progress:
        if run.pending is not None and _evaluated(run, run.pending, stop):
            log.log(run.step, run.pending)
            run.pending = None
        while run.step < cfg.train.steps and not stop:
            started = time.perf_counter()
            with profiling.step():
                # 1. rows of the tasks, and the learning rate of this step
                rows = mixture.batch(
                    run.train_rows, cfg.mixture, method.batch_size, run.step, cfg.seed
                )
                factor = optim.learning_rate(cfg.optim, run.step, cfg.train.steps)
                optim.set_lr(method.optimizer, factor)
                # 2. what the method asks of the model: for PPO answers, scores, advantages
                batch = method.collect(rows, run.step)
                # 3. learn from it
                report = method.update(batch, run.step)
                metrics = {"optim/lr": cfg.optim.lr * factor} | _told(run, report, progress)
            run.step += 1
            samples = len(rows) * method.samples
            metrics |= _count(run, samples, report.truncated, time.perf_counter() - started)
            # 4. evaluate and log
            if _evaluated(run, metrics, stop):
                with profiling.phase("io"):
                    log.log(run.step, metrics)
            else:
                run.pending = metrics
            progress.update(samples, metrics.get("reward/mean"), metrics.get("kl/ref"))
            # 5. checkpoint
            every = cfg.train.checkpoint_every
            if run.step == cfg.train.steps or (every and run.step % every == 0):
                save(run)
        if run.saved < run.step:  # a stop, at whatever moment of the loop it came
            save(run)


def _told(run: Run, report: Report, progress: Progress) -> dict[str, Any]:
    """Say what a step found; its metrics."""
    if report.bad is not None:
        _write_bad(run, report.bad, progress)
    for line in report.messages:
        progress.write(line, None if line.startswith("warning") else sys.stdout)
    if report.bad is not None:
        return report.metrics | {"optim/bad_step": 1.0}
    run.bad_in_a_row = 0
    return report.metrics


def _write_bad(run: Run, bad: BadStep, progress: Progress) -> None:
    """Count a step that is not finite, and write its batch down; too many in a row end the run."""
    run.bad_in_a_row += 1
    run.totals["bad_steps"] += 1
    dumped = run.folder / "bad_steps" / f"step_{run.step + 1:06d}.json"
    files.make_folder(dumped.parent)
    files.atomic_write_json(dumped, {"metrics": bad.metrics, "rows": bad.rows})
    progress.write(
        f"step {run.step + 1}: loss or gradient is not finite; the rest of the step is skipped, "
        f"its batch is in {dumped}"
    )
    if run.bad_in_a_row >= run.cfg.train.max_bad_steps:
        save(run)
        raise UserError(
            f"optim.lr: {run.bad_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite (batches in {dumped.parent}); try a lower optim.lr, more KL (ppo.kl_coef, "
            "grpo.kl_coef) or model.dtype=float32"
        )


def _count(run: Run, samples: int, truncated: int, elapsed: float) -> dict[str, float]:
    """Add a step to the run's totals; its times."""
    if run.step == 1:
        run.totals["first_step_s"] = time.perf_counter() - run.started
    run.totals["samples"] += samples
    run.totals["train_s"] += elapsed
    run.totals["truncated"] += truncated
    return {"time/step_s": elapsed, "time/samples_per_s": samples / elapsed}


def _evaluated(run: Run, metrics: dict[str, Any], stop: StopRequest) -> bool:
    """Where it is due, put each task's greedy metrics on the evaluation split into the metrics, and
    keep the best weights so far beside the last; False where a stop cut this short."""
    every = run.cfg.train.eval_every
    if not every or run.step % every:
        return True
    scores = []
    for name, spec in run.specs.items():
        rows = run.held[name].examples
        with profiling.phase("evaluation"):
            answerer = answerer_of(run.method.model, run.cfg)
            found = answer.ask(answerer, spec, rows, ("greedy",), stop=lambda: bool(stop))["greedy"]
        if len(found) < len(rows):
            return False
        report = aggregate.report(spec, found)
        metrics |= {f"eval/{name}/{metric}": value for metric, value in report["metrics"].items()}
        scores.append(report["score"])
    mean = sum(scores) / len(scores)
    with profiling.phase("io"):
        checkpoint.save_best(run.folder, run.step, mean, run.method.weights(), {"step": run.step})
    return True


def save(run: Run) -> None:
    """Everything that a resumed run needs to go on to the last bit."""
    with profiling.phase("io"):
        files.sync_file(run.folder / runlog.METRICS)  # never behind its checkpoint
        files.sync_folder(run.folder)
        tensors, state = optimizer_state.flatten_optimizer(run.method.optimizer)
        checkpoint.save(
            run.folder,
            run.step,
            run.method.weights() | {"optimizer": tensors},
            {
                "step": run.step,
                "learner": run.method.state(),  # the name that earlier checkpoints have
                "bad_in_a_row": run.bad_in_a_row,
                "totals": run.totals | {"wall_s": time.perf_counter() - run.started},
                "made_of": run.made_of,
                "pending": run.pending,
                "optimizer": state,
            },
        )
        run.saved = run.step
        checkpoint.prune(run.folder, run.cfg.train.keep_checkpoints)


def restore(run: Run) -> None:
    """Go on from the last checkpoint that can be read; from the start where there never was one.

    A damaged one is told and renamed. Where all are damaged the run is left as it is.
    """
    checkpoint.require_readable(run.folder)
    lines = len(runlog.read_metrics(run.folder))
    checkpoint.clean(run.folder)
    damaged: dict[Path, sealed.Damaged] = {}
    told: list[str] = []
    for path in checkpoint.candidates(run.folder):
        try:
            told = _take_back(run, path)
            break
        except sealed.Damaged as error:
            damaged[path] = error
    else:
        if damaged:
            raise UserError(
                f"--resume {run.folder}: none of its {len(damaged)} checkpoint(s) can be read "
                f"({next(iter(damaged.values()))}); copy them again, or start a new run with "
                "--output"
            )
        if lines:
            told = [
                f"{run.folder}: no checkpoint is there; {lines} line(s) of metrics are dropped, "
                "the run begins at the start"
            ]
    for path, damage in damaged.items():
        aside = checkpoint.set_aside(path)
        told.append(f"{damage}; it is kept as {aside.name}" if aside else str(damage))
    for line in told + _checked_best(run.folder):
        print(f"warning: {line}", file=sys.stderr)


def _take_back(run: Run, path: Path) -> list[str]:
    """Everything that a checkpoint holds into the run, and what is to be told of it; `Damaged`
    where it does not fit."""
    tensors, state = checkpoint.load(path)
    try:
        _require_kinds(run, state)
        told = provenance.compare(run.folder, state["made_of"], run.made_of)
        run.method.restore(tensors, str(path))
        run.method.set_state(state["learner"])
        optimizer_state.restore_optimizer(
            run.method.optimizer, tensors["optimizer"], state["optimizer"]
        )
        run.pending, run.bad_in_a_row = state["pending"], int(state["bad_in_a_row"])
        totals = {name: value + 0 for name, value in state["totals"].items()}
        wall = totals.pop("wall_s")
        run.totals, run.started = totals, run.started - wall
        run.step = run.saved = checkpoint.step_of(path)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise sealed.Damaged(
            f"{path}: does not hold what a checkpoint of this run holds ({error!r})"
        ) from error
    return told


def _require_kinds(run: Run, state: Mapping[str, Any]) -> None:
    """KeyError or TypeError where an entry of the state is not of the kind that `save` writes."""
    kinds = {"made_of": dict, "pending": dict | None, "totals": dict, "bad_in_a_row": int}
    if wrong := [key for key, kind in kinds.items() if not isinstance(state[key], kind)]:
        raise TypeError(f"{wrong[0]} is {state[wrong[0]]!r:.40}")
    totals = state["totals"]
    for name in {*run.totals, "wall_s", *totals}:
        if type(totals[name]) not in (int, float) or not 0 <= totals[name] < math.inf:
            raise TypeError(f"{name} is {totals[name]!r:.40}")


def _checked_best(folder: Path) -> list[str]:
    """A damaged `best` is told and renamed; the next evaluation writes another."""
    best = checkpoint.best(folder)
    try:
        if best is not None:
            checkpoint.load(best)
    except sealed.Damaged as error:
        checkpoint.set_aside(best)  # type: ignore[arg-type]
        return [f"{error}; the best is now looked for among the coming steps"]
    return []


def start(cfg: Config, folder: Path | None, output: Path | None, work: ExitStack) -> Run:
    """Read the data, load the model, make the run folder (or take that of a resumed run); `work`
    gives a new folder back."""
    specs = specs_of(cfg)
    seen = data.saw_labels(cfg.model.name_or_path) and cfg.method != "encoder"
    rows, held = {}, {}
    for name, spec in specs.items():
        rows[name] = data.train_examples(spec, cfg.data, seen)
        held[name] = answer.held_out(spec, cfg)
        if any(row.label is None for row in held[name].examples):
            raise UserError(f"eval.split: {cfg.eval.split} has no labels to measure by; use dev")
        print(
            f"data: {rows[name].note}; {len(rows[name].examples):,} to train on, "
            f"{len(held[name].examples):,} to evaluate"
        )
        if spec.reward not in REWARD_KINDS and cfg.method in BY_REWARD:
            rewards.load(spec.reward)
    method = METHODS[cfg.method](cfg, specs)
    answerer = answerer_of(method.model, cfg)
    for spec in specs.values():
        answerer.require_fit(spec)
    tree = ""
    if isinstance(method.model, Policy):
        tree = f", {path_of(method.model)}"
    print(f"model: {cfg.model.name_or_path} on {method.model.device}{tree}")
    train_rows = {name: found.examples for name, found in rows.items()}
    plan_memory(method, mixture.batch(train_rows, cfg.mixture, PLANNED_BY, 0, cfg.seed))
    held_rows = {name: found.examples for name, found in held.items()}
    own = [spec.reward for spec in specs.values() if spec.reward not in REWARD_KINDS]
    named = own if cfg.method in BY_REWARD else ()
    made_of = provenance.of_run(cfg, train_rows, held_rows, method.model.device, named, MAY_CHANGE)
    if folder is None:
        lock = run_folder.claim(output or run_folder.new_run_dir(), dump(cfg))
        folder = work.enter_context(lock).folder
        work.enter_context(cli.works_in(folder, provenance.resume_command(folder, cfg)))
    print(f"run folder: {folder}", flush=True)
    source = "+".join(dict.fromkeys(found.source for found in rows.values()))
    return Run(cfg, specs, folder, method, train_rows, held, source, rows, made_of=made_of)


def path_of(policy: Policy) -> str:
    """How the model is run, for the user."""
    if not policy.tree:
        return "plain path (one padded row a prompt)"
    if policy.window is None or policy.window >= policy.context:
        return "prefix tree"
    return f"prefix tree for rows of up to {policy.window:,} tokens, else one padded row a prompt"


def plan_memory(method: Method, examples: list[Example]) -> None:
    """Say what the run will need, judged by these rows; on a GPU the method keeps to the plan."""
    policy = method.model
    if not isinstance(policy, Policy):
        return
    prompts = memory.prompts_of(policy, method.specs, method.cfg, examples)
    trained = [parameter for group in method.parameters() for parameter in group]
    plan = memory.plan(policy, method.cfg, method.workload(), trained, prompts)
    print("\n".join(plan.lines()))
    if method.budget is not None:
        method.budget.tokens = plan.micro_batch_tokens


def finish(run: Run, stop: StopRequest) -> bool:
    """Write the adapter, evaluate base and tuned model, draw the curves, print the table; False
    where a stop came before the evaluation was over."""
    cfg, folder, method = run.cfg, run.folder, run.method
    with profiling.phase("io"):
        method.save(folder)

    answerer = answerer_of(method.model, cfg)

    def measure(what: str) -> dict[str, dict[str, list[Answer]]]:
        found = {}
        for name, spec in run.specs.items():
            title = f"{what}: {spec.title}" if cfg.log.progress else None
            rows = run.held[name].examples
            found[name] = answer.ask(answerer, spec, rows, None, title, lambda: bool(stop))
        return found

    with profiling.phase("evaluation"):
        after = measure("tuned")
    before: dict[str, dict[str, list[Answer]]] = {}
    untrained = method.base() if cfg.eval.before else None
    if untrained is not None and not stop:
        with untrained, profiling.phase("evaluation"):
            before = measure("base")
    if stop:
        return False
    measured = [
        aggregate.Measured(
            spec, run.held[name], after[name], before.get(name), cfg.eval.bootstrap, cfg.seed
        )
        for name, spec in run.specs.items()
    ]
    answers = [
        answer.join(found["greedy"], found["score"]) if "score" in found else found["greedy"]
        for found in after.values()
    ]
    flat = [row for found in answers for row in found]
    with profiling.phase("io"):
        predictions.write_predictions(folder / "predictions.jsonl", flat, named=len(answers) > 1)
    summary = aggregate.summarise(cfg, measured) | {
        "data": run.source,
        "reward_before": mean_reward(run, before) if before and cfg.method in BY_REWARD else None,
        "train_samples": int(run.totals["samples"]),
        "train_labels": int(run.totals["samples"]) // method.samples,
        "train_steps": run.step,
        "first_step_s": run.totals.get("first_step_s"),
        "train_s": run.totals["train_s"],
        "samples_per_s": run.totals["samples"] / max(run.totals["train_s"], 1e-9),
        "truncated_prompts": int(run.totals["truncated"]),
        "bad_steps": int(run.totals["bad_steps"]),
        "wall_s": time.perf_counter() - run.started,
        "peak_memory_mb": peak_memory_mb(method.model.device),
    }
    for name, rows in run.learned_from.items():
        summary["tasks"][name] |= {"train_note": rows.note, "train_partial": rows.partial}
    files.atomic_write_json(folder / "summary.json", summary)
    show(run, summary)
    return True


def mean_reward(run: Run, found: dict[str, dict[str, list[Answer]]]) -> float:
    """What these sampled answers would earn, KL left out: the curve's starting height."""
    earned = [
        rewards.reward(
            run.specs[name], row.example, row.prediction, row.response, run.cfg.reward.scale
        )
        for name, answers in found.items()
        for row in answers["sample"]
    ]
    return sum(earned) / len(earned)


def show(run: Run, summary: dict[str, Any]) -> None:
    """The table of what was gained, and where everything is."""
    name = run.cfg.method.upper() if run.cfg.method != "encoder" else "Encoder"
    names = []
    for name, entry in summary["tasks"].items():
        title = entry["title"]
        names.append(f"bundled data, not {title}" if run.source == "bundled" else title)
        figures = " and ".join(run.specs[name].metrics)
        print(
            f"\n{names[-1]}, {run.cfg.eval.split}: {figures} in percent, "
            f"{entry['rows']:,} rows, seed {run.cfg.seed}"
        )
        print(results_table(entry["before"], entry["after"]))
    if len(names) > 1:
        print("\nMean over the tasks")
        print(results_table(summary["before"], summary["after"]))
    print(
        f"{summary['train_samples']:,} {run.method.unit} in {summary['train_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} a second), {summary['wall_s']:.0f} s in all, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    )
    print(f"run folder: {run.folder}")
    if run.cfg.log.plot:
        start: dict[str, float | None] = {"reward": summary["reward_before"]}
        (first, *others) = run.specs.values()
        if summary["before"] and not others and len(first.metrics) == 1:
            start[first.metrics[0]] = summary["before"]["greedy"]
        title = f"{name} on {', '.join(names)}, seed {run.cfg.seed}"
        drawn = draw_curves(run.folder, title, before=start)
        hint = "not drawn, since matplotlib is missing: pip install -e '.[plot]'"
        print(f"{'reward curve' if run.cfg.method in BY_REWARD else 'curves'}: {drawn or hint}")


def main(argv: list[str] | None = None) -> int:
    """The program; returns the exit code."""
    started = time.perf_counter()
    parser = arguments.Parser("python -m ppo_nlu.train", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/sst2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a stopped run")
    where.add_argument("--output", type=Path, metavar="RUN_DIR", help="default: a new one in runs/")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="measure where the time goes: profile.json, trace.json",
    )
    args = parser.parse_intermixed_args(argv)
    cfg = provenance.read_config(args.config, args.overrides, training=True)
    with ExitStack() as work:
        if args.resume:
            run_folder.require_run_dir(args.resume)
            work.enter_context(FolderLock(args.resume))
            work.enter_context(
                cli.works_in(args.resume, provenance.resume_command(args.resume, cfg))
            )
            check_same(cfg, args.resume)
        elif args.output:
            # Before minutes of loading; `start` makes it.
            run_folder.require_free(arguments.require_place("--output", args.output))
        with StopRequest() as stop:
            run = start(cfg, args.resume, args.output, work)
            run.started = started
            if args.resume:
                restore(run)
                after = f"resumed after step {run.step} of {cfg.train.steps}"
                print(after if run.step else "no step was saved: begins at the start")
            else:
                tell_idle(cfg, strict_config.given(Config, args.config, args.overrides))
            with profiled(run) if args.profile else nullcontext():
                train(run, stop)
                done = not stop and finish(run, stop)
    if done:
        with suppress(OSError):  # of an earlier process, whose run is whole now
            (run.folder / cli.CRASH).unlink(missing_ok=True)
        return 0
    if stop:
        print(
            f"\nstopped after step {run.step} of {cfg.train.steps}, everything is saved; go on with"
        )
        print(f"  {provenance.resume_command(run.folder, cfg)}")
    return stop.exit_code


def tell_idle(cfg: Config, said: Mapping[str, object]) -> None:
    """Say which of the user's keys this run does not read."""
    seen = data.saw_labels(cfg.model.name_or_path)
    for key, why in idle_keys(cfg, said, seen):
        streams.tell(f"note: {key} has no effect {why}")


@contextmanager
def profiled(run: Run) -> Iterator[None]:
    """A region whose times go to profile.json and, with a trace of two steps, to trace.json."""
    policy = run.method.model
    profile = profiling.Profile(
        run.cfg.train.steps - run.step,
        policy.device,
        DTYPES[run.cfg.model.dtype],
        flops.weights_of(policy) if isinstance(policy, Policy) else None,
        run.folder / "trace.json",
    )
    try:
        with profile:
            yield
    finally:
        report = profile.report()
        files.atomic_write_json(run.folder / "profile.json", report)
        trace = " and trace.json" if report["traced_steps"] else ""
        print(f"\n{profiling.table(report)}\nprofile: {run.folder}/profile.json{trace}")


def check_same(cfg: Config, folder: Path) -> None:
    """A run is resumed with the config it was started with; anything else is a UserError. What may
    differ, and does, is told."""
    stored = folder / "config.yaml"
    before = load_config(stored)
    changed = diff(cfg, before, MAY_CHANGE)
    if changed:
        raise UserError(
            f"--resume {folder}: the run was started with another config (differs in "
            f"{', '.join(changed[:5])}); resume with {shlex.quote(str(stored))}, or start a new "
            "run with --output"
        )
    if told := diff(cfg, before):
        print(f"resumed with another {', '.join(told)}; the run folder keeps its config.yaml")


if __name__ == "__main__":
    sys.exit(cli.run(main))

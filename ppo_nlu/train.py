"""Training: `python -m ppo_nlu.train CONFIG [section.key=value ...] [--resume|--output RUN_DIR]`.

Trains a model on the labels of a task, or of several: by PPO or GRPO, by supervised fine-tuning, or
as an encoder with a head. At the end it measures what that gained: the untuned base and the tuned
model on the evaluation split, under three ways of decoding.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

from ppo_nlu.answering import aggregate, answer
from ppo_nlu.answering.load_run import answerer_of
from ppo_nlu.answering.stored_config import read_config, resume_command
from ppo_nlu.config import Config, strict_config, to_dict
from ppo_nlu.data import mixture
from ppo_nlu.errors import UserError
from ppo_nlu.methods.report import BadStep, Report
from ppo_nlu.runtime import arguments, checkpoint, cli, optim, profiling, run_folder, runlog
from ppo_nlu.runtime.progress import Progress
from ppo_nlu.runtime.stop_request import StopRequest
from ppo_nlu.storage import files
from ppo_nlu.storage.locks import FolderLock
from ppo_nlu.training.finish import finish
from ppo_nlu.training.profiled import profiled
from ppo_nlu.training.resume import check_same, restore, save
from ppo_nlu.training.run import Run, start, tell_idle


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
        if run.saved < run.step:  # after a stop, wherever in the loop it came
            save(run)


def _told(run: Run, report: Report, progress: Progress) -> dict[str, Any]:
    """Print the messages of a step, and return its metrics."""
    if report.bad is not None:
        _write_bad(run, report.bad, progress)
    for line in report.messages:
        progress.write(line, None if line.startswith("warning") else sys.stdout)
    if report.bad is not None:
        return report.metrics | {"optim/bad_step": 1.0}
    run.bad_in_a_row = 0
    return report.metrics


def _write_bad(run: Run, bad: BadStep, progress: Progress) -> None:
    """Count a step that is not finite, and write its batch to a file; too many in a row end the
    run."""
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
    """Add a step to the run's totals, and return its times."""
    if run.step == 1:
        run.totals["first_step_s"] = time.perf_counter() - run.started
    run.totals["samples"] += samples
    run.totals["train_s"] += elapsed
    run.totals["truncated"] += truncated
    return {"time/step_s": elapsed, "time/samples_per_s": samples / elapsed}


def _evaluated(run: Run, metrics: dict[str, Any], stop: StopRequest) -> bool:
    """Where an evaluation is due, add each task's greedy metrics on the evaluation split to
    `metrics`, and save the weights if they are the best so far; False where a stop cut it short."""
    every = run.cfg.train.eval_every
    if not every or run.step % every:
        return True
    scores = []
    for name, spec in run.specs.items():
        rows = run.held[name].examples
        with profiling.phase("evaluation"):
            answerer = answerer_of(run.method.model, run.cfg, run.method.shots)
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


def main(argv: list[str] | None = None) -> int:
    """The program; returns the exit code."""
    started = time.perf_counter()
    parser = arguments.Parser("python -m ppo_nlu.train", description=__doc__)
    parser.add_argument(
        "config",
        type=arguments.config_file,
        metavar="CONFIG",
        help="a YAML file, such as configs/sst2.yaml; `python -m ppo_nlu configs` lists them",
    )
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
    cfg = read_config(args.config, args.overrides, training=True)
    with ExitStack() as work:
        if args.resume:
            run_folder.require_run_dir(args.resume)
            work.enter_context(FolderLock(args.resume))
            work.enter_context(cli.works_in(args.resume, resume_command(args.resume, cfg)))
            check_same(cfg, args.resume)
        elif args.output:
            # Checked before minutes of loading; `start` makes the folder.
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
        with suppress(OSError):  # left by an earlier process; now the run is whole
            (run.folder / cli.CRASH).unlink(missing_ok=True)
        return 0
    if stop:
        print(
            f"\nstopped after step {run.step} of {cfg.train.steps}, everything is saved; go on with"
        )
        print(f"  {resume_command(run.folder, cfg)}")
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))

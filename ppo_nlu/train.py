"""Training: `python -m ppo_nlu.train CONFIG [section.key=value ...] [--resume|--output RUN_DIR]`.

Teaches a language model a task by PPO from labels, and says at the end what that gained: the
untuned base and the tuned policy on the evaluation split under three ways of decoding.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch.optim import Optimizer

from ppo_nlu import checkpoint, cli, data, evaluate, lora, optim, ppo, rewards, runlog
from ppo_nlu.config import Config, diff, dump, load_config, to_dict
from ppo_nlu.errors import UserError
from ppo_nlu.losses import AdaptiveKL
from ppo_nlu.model import Policy, check_words, load_policy, resolve
from ppo_nlu.tasks import Example, TaskSpec, get_task

# What a resumed run may change: how it is shown and kept, not what is computed.
MAY_CHANGE = (
    "log",
    "eval.batch_size",
    "eval.before",
    "eval.bootstrap",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.path",
)


@dataclass
class Run:
    """Everything that lives while a policy is trained."""

    cfg: Config
    spec: TaskSpec
    folder: Path
    policy: Policy
    optimizer: Optimizer
    kl: AdaptiveKL
    train_rows: list[Example]
    eval_rows: list[Example]
    source: str
    started: float = field(default_factory=time.perf_counter)  # of the program
    step: int = 0
    saved: int = 0  # the step of the newest checkpoint
    pending: dict[str, Any] | None = None  # a step's metrics where a stop cut its evaluation short
    bad_in_a_row: int = 0
    totals: dict[str, float] = field(
        default_factory=lambda: {"samples": 0, "train_s": 0.0, "truncated": 0, "bad_steps": 0}
    )


def train(run: Run, stop: checkpoint.StopRequest) -> None:
    """The algorithm, top to bottom; one pass of the loop is one PPO iteration."""
    cfg = run.cfg
    sinks = runlog.open_sinks(cfg.log, run.folder, to_dict(cfg), run.step)
    log = runlog.MetricsLog(run.folder, sinks)
    log.truncate_after(run.step if run.pending is None else run.step - 1)
    with log, runlog.Progress(cfg.train.steps, run.step, cfg.log.progress) as progress:
        if run.pending is not None and _evaluated(run, run.pending, stop):
            log.log(run.step, run.pending)
            run.pending = None
        while run.step < cfg.train.steps and not stop:
            started = time.perf_counter()
            # 1. sample prompts
            rows = data.batch_indices(
                len(run.train_rows), cfg.rollout.batch_size, run.step, cfg.seed
            )
            examples = [run.train_rows[row] for row in rows]
            # 2.-4. answers, scores, KL-shaped rewards, advantages
            batch, metrics = ppo.collect(run.policy, run.spec, cfg, run.kl, examples, run.step)
            # 5. epochs of minibatch updates
            factor = optim.learning_rate(cfg.optim, run.step, cfg.train.steps)
            optim.set_lr(run.optimizer, factor)
            metrics |= {"optim/lr": cfg.optim.lr * factor}
            metrics |= _update(run, batch, progress)
            run.step += 1
            metrics |= _count(run, batch, time.perf_counter() - started)
            # 6. evaluate and log
            if _evaluated(run, metrics, stop):
                log.log(run.step, metrics)
            else:
                run.pending = metrics
            progress.update(batch.rollout.size, metrics["reward/mean"], metrics["kl/ref"])
            # 7. checkpoint
            every = cfg.train.checkpoint_every
            if run.step == cfg.train.steps or (every and run.step % every == 0):
                save(run)
        if run.saved < run.step:  # a stop, at whatever moment of the loop it came
            save(run)


def _update(run: Run, batch: ppo.Batch, progress: runlog.Progress) -> ppo.Metrics:
    """The PPO update, guarded: what is not finite is skipped, counted and written down."""
    try:
        metrics = ppo.update(run.policy, run.optimizer, run.cfg, batch, run.step)
    except ppo.BadStep as bad:
        run.optimizer.zero_grad(set_to_none=True)
        run.bad_in_a_row += 1
        run.totals["bad_steps"] += 1
        dumped = _dump(run, batch, bad)
        progress.write(
            f"step {run.step + 1}: {bad}; the rest of the step is skipped, its batch is in {dumped}"
        )
        if run.bad_in_a_row >= run.cfg.train.max_bad_steps:
            save(run)
            raise UserError(
                f"optim.lr: {run.bad_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (batches in {dumped.parent}); try a lower optim.lr, a higher ppo.kl_coef "
                "or model.dtype=float32"
            ) from None
        return {"optim/bad_step": 1.0}
    run.bad_in_a_row = 0
    if run.step == 0:
        exact = run.cfg.model.dtype == "float32"
        remark = ppo.check_first_ratio(metrics["policy/first_ratio_gap"], exact)
        if remark:
            progress.write(remark)
    return metrics


def _count(run: Run, batch: ppo.Batch, elapsed: float) -> dict[str, float]:
    """Add a step to the run's totals; its times."""
    if run.step == 1:
        run.totals["first_step_s"] = time.perf_counter() - run.started
    run.totals["samples"] += batch.rollout.size
    run.totals["train_s"] += elapsed
    run.totals["truncated"] += batch.rollout.truncated
    return {"time/step_s": elapsed, "time/samples_per_s": batch.rollout.size / elapsed}


def _dump(run: Run, batch: ppo.Batch, bad: ppo.BadStep) -> Path:
    """The rows of a bad minibatch as readable JSON."""
    roll = batch.rollout
    rows = [
        {
            "id": roll.examples[j].id,
            "fields": roll.examples[j].fields,
            "label": roll.examples[j].label,
            "response": roll.responses[j],
            "tokens": roll.answers[j],
            "score": float(roll.scores[j]),
            "logprobs": roll.logprobs[j].tolist(),
            "advantages": batch.advantages[j].tolist(),
        }
        for j in bad.index
    ]
    path = run.folder / "bad_steps" / f"step_{run.step + 1:06d}.json"
    path.parent.mkdir(exist_ok=True)
    checkpoint.atomic_write_json(path, {"metrics": bad.metrics, "rows": rows})
    return path


def _evaluated(run: Run, metrics: dict[str, Any], stop: checkpoint.StopRequest) -> bool:
    """Where it is due, put the greedy accuracy on the evaluation split into the metrics, and keep
    the best adapter so far beside the last; False where a stop cut this short."""
    every = run.cfg.train.eval_every
    if not every or run.step % every:
        return True
    found = evaluate.evaluate_all(
        run.policy, run.spec, run.cfg, run.eval_rows, ("greedy",), stop=lambda: bool(stop)
    )
    if len(found["greedy"]) < len(run.eval_rows):
        return False
    accuracy = evaluate.headline(found)["greedy"]
    checkpoint.save_best(run.folder, run.step, accuracy, _weights(run), {"step": run.step})
    metrics[f"eval/{run.spec.name}/accuracy"] = accuracy
    return True


def _weights(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    head = {k: v.detach().cpu() for k, v in run.policy.value_head.state_dict().items()}
    return {"adapter": lora.state_dict(run.policy.model), "value_head": head}


def save(run: Run) -> None:
    """Everything that a resumed run needs to go on to the last bit."""
    tensors, state = checkpoint.flatten_optimizer(run.optimizer)
    checkpoint.save(
        run.folder,
        run.step,
        _weights(run) | {"optimizer": tensors},
        {
            "step": run.step,
            "kl_coef": run.kl.coef,
            "bad_in_a_row": run.bad_in_a_row,
            "totals": run.totals | {"wall_s": time.perf_counter() - run.started},
            "rows": fingerprint(run),
            "pending": run.pending,
            "optimizer": state,
        },
    )
    run.saved = run.step
    checkpoint.prune(run.folder, run.cfg.train.keep_checkpoints)


def fingerprint(run: Run) -> str:
    """A hash of the training rows, wherever they were read from."""
    digest = hashlib.sha256()
    for row in run.train_rows:
        digest.update(repr((row.id, sorted(row.fields.items()), row.label)).encode())
    return digest.hexdigest()


def restore(run: Run) -> None:
    """Go on from the last complete checkpoint; from the start where there is none."""
    checkpoint.clean(run.folder)
    last = checkpoint.latest(run.folder)
    if last is None:
        return
    tensors, state = checkpoint.load(last)
    if state["rows"] != fingerprint(run):
        raise UserError(
            f"--resume {run.folder}: the run was started on other training rows than those found "
            f"now ({run.source}); give the same data with data.path"
        )
    lora.load_state_dict(run.policy.model, tensors["adapter"], str(last))
    run.policy.value_head.load_state_dict(tensors["value_head"])
    checkpoint.restore_optimizer(run.optimizer, tensors["optimizer"], state["optimizer"])
    run.step = run.saved = state["step"]
    run.kl.coef, run.pending = state["kl_coef"], state["pending"]
    run.bad_in_a_row, run.totals = state["bad_in_a_row"], state["totals"]
    run.started -= run.totals.pop("wall_s")


def start(cfg: Config, folder: Path | None, output: Path | None) -> Run:
    """Read the data, load the model, make the run folder (or take that of a resumed run)."""
    spec = get_task(cfg.task)
    bundled = cfg.model.name_or_path == "bundled"
    rows = data.train_examples(spec, cfg.data, bundled)
    held = data.load_split(spec, cfg.eval.split, cfg.data)
    eval_rows = held.examples[: cfg.eval.limit or None]
    if any(row.label is None for row in eval_rows):
        raise UserError(f"eval.split: {cfg.eval.split} has no labels to measure by; use dev")
    print(f"data: {rows.note}; {len(rows.examples):,} to train on, {len(eval_rows):,} to evaluate")
    policy = load_policy(cfg)
    check_words(policy, spec)
    evaluate.require_room(policy, spec, cfg)
    path = "prefix tree" if policy.tree else "plain path (one padded row a prompt)"
    print(f"model: {cfg.model.name_or_path} on {policy.device}, {path}")
    optimizer = optim.build_optimizer(
        cfg.optim, lora.lora_parameters(policy.model), policy.value_head.parameters()
    )
    kl = AdaptiveKL(cfg.ppo.kl_coef, cfg.ppo.kl_target, cfg.ppo.kl_horizon)
    if folder is None:
        folder = checkpoint.claim(output or checkpoint.new_run_dir(), dump(cfg))
    print(f"run folder: {folder}", flush=True)
    return Run(cfg, spec, folder, policy, optimizer, kl, rows.examples, eval_rows, rows.source)


def finish(run: Run, stop: checkpoint.StopRequest) -> bool:
    """Write the adapter, evaluate base and tuned policy, draw the curves, print the table; False
    where a stop came before the evaluation was over."""
    cfg, folder, policy = run.cfg, run.folder, run.policy
    name = resolve(cfg.model.name_or_path)
    (folder / "adapter").mkdir(exist_ok=True)
    head = dump_tensors(_weights(run)["value_head"])
    checkpoint.atomic_write_bytes(folder / "adapter" / evaluate.VALUE_HEAD, head)
    lora.save_adapter(policy.model, folder / "adapter", cfg.lora, name)  # its config.json is last

    def measure(title: str) -> dict[str, list[evaluate.Answer]]:
        return evaluate.evaluate_all(
            policy, run.spec, cfg, run.eval_rows, evaluate.DECODES, cfg.log.progress, title, stopped
        )

    def stopped() -> bool:
        return bool(stop)

    after = measure("tuned")
    before: dict[str, list[evaluate.Answer]] | None = None
    if cfg.eval.before and not stop:
        with lora.lora_disabled(policy.model):
            before = measure("base")
    if len(after["score"]) < len(run.eval_rows) or (
        cfg.eval.before and (before is None or len(before["score"]) < len(run.eval_rows))
    ):
        return False
    joined = evaluate.join(after["greedy"], after["score"])
    evaluate.write_predictions(folder / "predictions.jsonl", joined)
    summary: dict[str, Any] = {
        "task": cfg.task,
        "method": cfg.method,
        "model": cfg.model.name_or_path,
        "data": run.source,
        "seed": cfg.seed,
        "eval_split": cfg.eval.split,
        "eval_rows": len(run.eval_rows),
        "reward_before": mean_reward(run, before["sample"]) if before else None,
        "before": evaluate.headline(before) if before else None,
        "after": evaluate.headline(after),
        "reports": {decode: evaluate.report(run.spec, cfg, rows) for decode, rows in after.items()},
        "train_samples": int(run.totals["samples"]),
        "first_step_s": run.totals.get("first_step_s"),
        "train_s": run.totals["train_s"],
        "samples_per_s": run.totals["samples"] / max(run.totals["train_s"], 1e-9),
        "truncated_prompts": int(run.totals["truncated"]),
        "truncated_eval_prompts": sum(row.cut for row in after["score"]),
        "bad_steps": int(run.totals["bad_steps"]),
        "wall_s": time.perf_counter() - run.started,
        "peak_memory_mb": runlog.peak_memory_mb(policy.device),
    }
    checkpoint.atomic_write_json(folder / "summary.json", summary)
    show(run, summary)
    return True


def mean_reward(run: Run, answers: list[evaluate.Answer]) -> float:
    """What these answers would earn, KL left out: the curve's starting height."""
    scale = run.cfg.reward.scale
    earned = [rewards.score(row.prediction, row.example.label or "", scale) for row in answers]
    return sum(earned) / len(earned)


def show(run: Run, summary: dict[str, Any]) -> None:
    """The table of what was gained, and where everything is."""
    bundled = run.source == "bundled"
    data_name = f"bundled data, not {run.spec.title}" if bundled else run.spec.title
    print(
        f"\n{data_name}, {run.cfg.eval.split}: accuracy in percent, "
        f"{summary['eval_rows']:,} rows, seed {run.cfg.seed}"
    )
    print(runlog.results_table(summary["before"], summary["after"]))
    print(
        f"{summary['train_samples']:,} answers in {summary['train_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} a second), {summary['wall_s']:.0f} s in all, "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    )
    print(f"run folder: {run.folder}")
    if run.cfg.log.plot:
        start = {"reward": summary["reward_before"]}
        if summary["before"]:
            start["accuracy"] = summary["before"]["greedy"]
        drawn = runlog.draw_curves(
            run.folder, f"PPO on {data_name}, seed {run.cfg.seed}", before=start
        )
        hint = "not drawn, since matplotlib is missing: pip install -e '.[plot]'"
        print(f"reward curve: {drawn or hint}")


def main(argv: list[str] | None = None) -> int:
    """The program; returns the exit code."""
    started = time.perf_counter()
    parser = cli.Parser("python -m ppo_nlu.train", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/sst2.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a stopped run")
    where.add_argument("--output", type=Path, metavar="RUN_DIR", help="default: a new one in runs/")
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.config, args.overrides)
    if args.resume:
        check_same(cfg, args.resume)
    elif args.output:
        checkpoint.require_free(args.output)  # before minutes of loading; `start` makes it
    with checkpoint.StopRequest() as stop:
        run = start(cfg, args.resume, args.output)
        run.started = started
        if args.resume:
            restore(run)
            print(f"resumed after step {run.step} of {cfg.train.steps}")
        train(run, stop)
        if not stop and finish(run, stop):
            return 0
    if stop:
        print(
            f"\nstopped after step {run.step} of {cfg.train.steps}, everything is saved; go on with"
        )
        folder = shlex.quote(str(run.folder))
        print(f"  python -m ppo_nlu.train {folder}/config.yaml --resume {folder}")
    return stop.exit_code


def check_same(cfg: Config, folder: Path) -> None:
    """A run is resumed with the config it was started with; anything else is a UserError."""
    stored = checkpoint.require_run_dir(folder) / "config.yaml"
    changed = diff(cfg, load_config(stored), MAY_CHANGE)
    if changed:
        raise UserError(
            f"--resume {folder}: the run was started with another config (differs in "
            f"{', '.join(changed[:5])}); resume with {stored}, or start a new run with --output"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))

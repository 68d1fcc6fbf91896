"""Teach a base the form of answers: `python -m ppo_nlu.teach_form CONFIG --output FOLDER`.

For bases that were never tuned to follow instructions, such as the bundled one: PPO learns from
answers that the model gives, and a word it never says earns nothing. All weights are trained on the
tasks' prompts, each with an answer in the right form and no label behind it: where the base mostly
answers in form already, its own sampled answers, so that it keeps what it knows; elsewhere a word
drawn evenly from the allowed ones. FOLDER/model is the taught model, for `model.name_or_path`.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ppo_nlu import data
from ppo_nlu.answering.stored_config import read_config
from ppo_nlu.config import Config
from ppo_nlu.data import mixture
from ppo_nlu.errors import UserError
from ppo_nlu.methods import sft
from ppo_nlu.methods.minibatch import OptimizerStep
from ppo_nlu.methods.prompts import fit_prompt, longest_prompt
from ppo_nlu.methods.rollout import seeded
from ppo_nlu.model.base_model import load_base
from ppo_nlu.model.generate import Sampling, generate
from ppo_nlu.model.load import check_words, measure, path_and_limit
from ppo_nlu.model.policy import Policy
from ppo_nlu.model.value_head import ValueHead
from ppo_nlu.runtime import arguments, cli, optim
from ppo_nlu.runtime.progress import Progress
from ppo_nlu.runtime.summary import peak_memory_mb
from ppo_nlu.storage import access, files, locks
from ppo_nlu.storage.atomic_folder import atomic_folder
from ppo_nlu.tasks import Example, TaskSpec
from ppo_nlu.tasks.answers import parse
from ppo_nlu.tasks.custom import specs_of

PROBED = 64  # rows of a task on which the base is asked whether it knows the form


def main(argv: list[str] | None = None) -> int:
    """The program; returns the exit code."""
    started = time.perf_counter()
    parser = arguments.Parser("python -m ppo_nlu.teach_form", description=__doc__)
    parser.add_argument(
        "config",
        type=arguments.config_file,
        metavar="CONFIG",
        help="tasks, data, optim, train.steps, sft",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_intermixed_args(argv)
    cfg = read_config(args.config, args.overrides)
    folder: Path = arguments.require_place("--output", args.output)
    _require_new(folder)
    specs = specs_of(cfg)
    if free := [name for name, spec in specs.items() if not spec.words]:
        raise UserError(f"tasks: {free[0]} has no list of answers to teach; leave it out")
    seen = data.saw_labels(cfg.model.name_or_path)
    rows, absent = {}, {}
    for name, spec in specs.items():
        try:
            rows[name] = data.train_examples(spec, cfg.data, seen).examples
        except UserError as error:  # its own runs will say so; the other tasks need not wait
            absent[name] = error
            print(f"warning: {name} is left out: {error}", file=sys.stderr)
    if not rows:
        raise next(iter(absent.values()))
    specs = {name: spec for name, spec in specs.items() if name in rows}
    torch.manual_seed(cfg.seed)
    policy = _load(cfg)
    for spec in specs.values():
        check_words(policy, spec, cfg.prompt)
    print(f"model: {cfg.model.name_or_path} on {policy.device}", flush=True)
    files.make_folder(folder)
    with locks.FolderLock(folder):
        _require_new(folder)  # again, now that nobody else writes there
        summary = _taught(policy, specs, cfg, rows, folder, seen)
        summary |= {"left_out": sorted(absent), "wall_s": time.perf_counter() - started}
        files.atomic_write_json(folder / "summary.json", summary)
    taught, wall = summary["train_samples"], summary["wall_s"]
    print(f"{taught:,} prompts, no label read, {wall:.0f} s; written: {folder / 'model'}")
    return 0


def _require_new(folder: Path) -> None:
    if folder.is_file() or (folder / "summary.json").exists():
        raise UserError(f"--output {folder}: is a file or a finished run; name a new folder")


def _taught(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    rows: Mapping[str, list[Example]],
    folder: Path,
    seen: bool,
) -> dict[str, Any]:
    """Teach, save the model and measure what that changed; the summary.json, less two keys."""
    probes = {name: found[:PROBED] for name, found in rows.items()}
    before = unparsed(policy, specs, cfg, probes)
    teach(policy, specs, cfg, rows, [name for name in specs if before[name] < 0.5])
    after = unparsed(policy, specs, cfg, probes)
    for name in specs:
        print(
            f"{name}: unparsed {100 * before[name]:.0f} % before, {100 * after[name]:.0f} % after"
        )
    _save(policy, folder / "model", seen)
    return {
        "task": "+".join(specs),
        "method": "form",
        "model": cfg.model.name_or_path,
        "seed": cfg.seed,
        "unparsed_before": before,
        "unparsed_after": after,
        "train_samples": cfg.train.steps * cfg.sft.batch_size,
        "peak_memory_mb": peak_memory_mb(policy.device),
    }


def _load(cfg: Config) -> Policy:
    """The base with all its weights to train, and no LoRA."""
    model, tokenizer = load_base(cfg.model)
    loaded, limit = measure(model, tokenizer, cfg)
    policy = Policy(model, tokenizer, ValueHead(1, "linear"), cfg.model)
    policy.settle(*path_and_limit(policy, cfg, loaded, limit))
    model.requires_grad_(True)
    return policy


def teach(
    policy: Policy,
    specs: Mapping[str, TaskSpec],
    cfg: Config,
    rows: Mapping[str, list[Example]],
    known: Sequence[str],
) -> None:
    """Train all weights on answers in the right form; for `known` tasks on the base's own."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    # The answer's form and nothing else: no shots, whose answers are labels.
    bare = replace(
        cfg, sft=replace(cfg.sft, loss="completion"), prompt=replace(cfg.prompt, shots=0)
    )
    optimizer = optim.build_optimizer(cfg.optim, parameters)
    size, seed = cfg.sft.batch_size, cfg.seed
    batches = [mixture.batch(rows, cfg.mixture, size, k, seed) for k in range(cfg.train.steps)]
    own = {}
    for name in known:
        asked = {row.id: row for batch in batches for row in batch if row.task == name}
        own[name] = _answered(policy, specs[name], cfg, list(asked.values()))
    with Progress(cfg.train.steps, 0, cfg.log.progress) as progress:
        for step, batch in enumerate(batches):
            uniform = random.Random(f"ppo_nlu form {cfg.seed} {step}").random
            prompts, answers = [], []
            for row in batch:
                words = specs[row.task].words
                word = own.get(row.task, {}).get(row.id) or words[int(uniform() * len(words))]
                wanted = replace(row, label=word, extra={})  # without its written-out reason
                prompt, target, _ = sft.targets(policy, specs[row.task], bare, wanted)
                prompts.append(prompt)
                answers.append(target)
            hidden, _ = policy.hidden(prompts, answers)
            targets = torch.tensor([t for a in answers for t in a], device=policy.device)
            loss = cross_entropy(policy.logits(hidden), targets)
            optim.set_lr(optimizer, optim.learning_rate(cfg.optim, step, cfg.train.steps))
            minibatch = OptimizerStep(optimizer, cfg.optim.max_grad_norm)
            minibatch.backward(loss, {})
            if not minibatch.take():
                raise UserError(
                    f"optim.lr: the gradient of step {step + 1} is not finite; lower optim.lr"
                )
            progress.update(len(batch))


def _answered(
    policy: Policy, spec: TaskSpec, cfg: Config, rows: Sequence[Example]
) -> dict[str, str | None]:
    """One sampled answer to each row, parsed, by the row's id."""
    found: dict[str, str | None] = {}
    longest = longest_prompt(policy, cfg, cfg.rollout.max_new_tokens)
    for start in range(0, len(rows), cfg.eval.batch_size):
        part = rows[start : start + cfg.eval.batch_size]
        prompts = [fit_prompt(policy, spec, row, longest, cfg.prompt).ids for row in part]
        draw = seeded("form", cfg.seed, spec.name, start)
        drawn = generate(policy, prompts, Sampling(cfg.rollout.max_new_tokens), generator=draw)
        for row, reply in zip(part, drawn.rows, strict=True):
            found[row.id] = parse(spec, policy.decode(reply), cfg.prompt.form)
    return found


def unparsed(
    policy: Policy, specs: Mapping[str, TaskSpec], cfg: Config, rows: Mapping[str, list[Example]]
) -> dict[str, float]:
    """The share of sampled answers that name no allowed word, by task."""
    shares = {}
    for name, spec in specs.items():
        found = _answered(policy, spec, cfg, rows[name]).values()
        shares[name] = sum(word is None for word in found) / len(found)
    return shares


def _save(policy: Policy, folder: Path, seen: bool) -> None:
    """A Hugging Face folder, whole or not at all; with the list of rows whose labels the base has
    seen, if it has. What an interrupted call left is replaced."""
    with atomic_folder(folder) as new, access.write_errors(folder):
        policy.model.save_pretrained(new)
        policy.tokenizer.save_pretrained(new)
        if seen:
            shutil.copyfile(data.SEEN_LABELS, new / data.SEEN_LABELS.name)
        if folder.is_dir():
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(cli.run(main))

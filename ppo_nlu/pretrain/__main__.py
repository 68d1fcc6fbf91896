"""Train the bundled tiny language model: `python -m ppo_nlu.pretrain configs/tiny/sst2_tiny.yaml`.

Top to bottom: choose the labels the model may see, read and filter the texts, train a SentencePiece
tokenizer, pretrain a small Llama causally, let it recall the words of a text (no labels), teach it
the <Judgement> form from the few labels, score it, write it with its model card. Each stage leaves
its result in the output folder and is not repeated while it is there (`--again STAGE` repeats from
that stage on).

    python -m ppo_nlu.pretrain CONFIG [section.key=value ...] [--output DIR] [--again STAGE]

The finished model is the folder OUTPUT/model; copy it to ppo_nlu/assets/tiny to ship it.

The dev labels choose nothing: the instruction stage stops on held-out sentences of SST-2 train,
whose labels then count as seen.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ppo_nlu.config.strict_config import load_dataclass
from ppo_nlu.model.load import load_policy
from ppo_nlu.pretrain import scores, stages
from ppo_nlu.pretrain.card import model_card
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.lessons import gather
from ppo_nlu.pretrain.results import (
    Facts,
    load_stage,
    save_model,
    save_stage,
    write_seen,
)
from ppo_nlu.pretrain.tokenizer import load_tokenizer, tokenizer_lines, train_tokenizer
from ppo_nlu.runtime import arguments, cli
from ppo_nlu.storage.files import atomic_write_text, make_folder
from ppo_nlu.storage.locks import FolderLock

DESCRIPTION = "Train the bundled tiny language model."
TRAINED = {
    "pretrain": stages.pretrain,
    "recall": stages.recall,
    "rating": stages.rate,
    "instruct": stages.instruct,
}
RESULTS = {
    "tokenizer": "model/tokenizer.model",
    "pretrain": "stages/pretrained.safetensors",
    "recall": "stages/recalled.safetensors",
    "rating": "stages/rated.safetensors",
    "instruct": "stages/instructed.safetensors",
}


def run(cfg: TinyConfig, folder: Path, again: str | None, command: str) -> dict[str, Any]:
    """All stages in order; a stage whose result is in the folder is not repeated."""
    final = folder / "model"
    for place in (final, folder / "stages"):
        make_folder(place)
    if again:
        forget(folder, again)
    facts = Facts(folder / "stages" / "facts.json", cfg)
    material = gather(cfg)
    print(f"labels seen: {material.split.excluded_rows} of {material.split.total_rows} train rows")
    if not (folder / RESULTS["tokenizer"]).is_file():
        forget(folder, "pretrain")
        train_tokenizer(tokenizer_lines(material, cfg.tokenizer), cfg.tokenizer, final)
    torch.manual_seed(cfg.seed)
    policy = stages.new_policy(cfg.model, load_tokenizer(final))
    for stage, train in TRAINED.items():
        result = folder / RESULTS[stage]
        if not result.is_file():
            forget(folder, stage)
            with matmul_precision(cfg.pretrain.matmul_precision):
                facts.put(stage, train(policy, material, cfg))
            save_stage(policy.model, result)
        load_stage(policy.model, result)
    save_model(policy.model, final)
    write_seen(material.split, final / "seen_labels.txt")
    told = scores.settings(cfg, final)
    shipped = load_policy(told)  # its weights are rounded
    for name, lesson in (("dev", material.dev), ("heldout", material.heldout)):
        facts.put(name, asdict(scores.evaluate(shipped, lesson, told, cfg.eval.samples)))
    atomic_write_text(final / "README.md", model_card(cfg, material, facts.all, final, command))
    return facts.all


def forget(folder: Path, stage: str) -> None:
    """Delete the results of a stage and of those behind it, which stand on it."""
    names = list(RESULTS)
    for name in names[names.index(stage) :]:
        (folder / RESULTS[name]).unlink(missing_ok=True)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Matrix products in a lower precision while the weights stay float32; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, run all stages, print the scores."""
    parser = arguments.Parser(prog="python -m ppo_nlu.pretrain", description=DESCRIPTION)
    parser.add_argument("config", type=arguments.config_file)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, help="folder for the stages and the finished model")
    parser.add_argument("--again", choices=RESULTS, help="repeat from this stage on")
    args = parser.parse_intermixed_args(argv)
    cfg = load_dataclass(TinyConfig, args.config, args.overrides)
    command = f"python -m ppo_nlu.pretrain {shlex.join([str(args.config), *args.overrides])}"
    folder = make_folder(arguments.require_place("--output", args.output or Path(cfg.output)))
    with FolderLock(folder):
        facts = run(cfg, folder, args.again, command)
    print(json.dumps({name: facts[name] for name in ("dev", "heldout")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

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
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ppo_nlu.config.strict_config import load_dataclass
from ppo_nlu.pretrain import scores, stages
from ppo_nlu.pretrain.card import model_card
from ppo_nlu.pretrain.config import TinyConfig
from ppo_nlu.pretrain.lessons import gather
from ppo_nlu.pretrain.results import (
    Facts,
    load_model,
    load_stage,
    save_model,
    save_stage,
    write_seen,
)
from ppo_nlu.pretrain.tokenizer import load_tokenizer, tokenizer_lines, train_tokenizer
from ppo_nlu.runtime import cli
from ppo_nlu.storage.files import FolderLock, atomic_write_text, make_folder

DESCRIPTION = "Train the bundled tiny language model."
RESULTS = {
    "tokenizer": "model/tokenizer.model",
    "pretrain": "stages/pretrained.safetensors",
    "recall": "stages/recalled.safetensors",
    "rating": "stages/rated.safetensors",
    "instruct": "stages/instructed.safetensors",
}


def run(cfg: TinyConfig, folder: Path, again: str | None, command: str) -> dict[str, Any]:
    """All stages in order; a stage whose result is in the folder is not repeated."""
    files = {stage: folder / name for stage, name in RESULTS.items()}
    for stage in list(RESULTS)[list(RESULTS).index(again) :] if again else ():
        files[stage].unlink(missing_ok=True)
    final = folder / "model"
    for place in (final, folder / "stages"):
        make_folder(place)
    facts = Facts(folder / "stages" / "facts.json", cfg)

    material = gather(cfg)
    print(f"labels seen: {material.split.excluded_rows} of {material.split.total_rows} train rows")
    if not files["tokenizer"].is_file():
        train_tokenizer(tokenizer_lines(material, cfg.tokenizer), cfg.tokenizer, final)
        files["pretrain"].unlink(missing_ok=True)
    tokenizer = load_tokenizer(final)
    torch.manual_seed(cfg.seed)
    model = stages.new_model(cfg.model, tokenizer)
    if not files["pretrain"].is_file():
        rows = stages.pack(material.corpus, tokenizer, cfg.pretrain, cfg.seed)
        began = time.perf_counter()
        with stages.matmul_precision(cfg.pretrain.matmul_precision):
            loss = stages.pretrain(model, rows, cfg.pretrain)
        seconds = round(time.perf_counter() - began)
        facts.put("pretrain", {"loss": loss, "tokens": rows.numel(), "seconds": seconds})
        save_stage(model, files["pretrain"])
        files["recall"].unlink(missing_ok=True)
    load_stage(model, files["pretrain"])
    if not files["recall"].is_file():
        with stages.matmul_precision(cfg.pretrain.matmul_precision):
            excess = stages.recall(model, tokenizer, material.corpus, cfg.recall, cfg.seed)
        facts.put("recall", {"excess_loss": excess})
        save_stage(model, files["recall"])
        files["rating"].unlink(missing_ok=True)
    load_stage(model, files["recall"])
    if not files["rating"].is_file():
        with stages.matmul_precision(cfg.pretrain.matmul_precision):
            rated = stages.rate(model, tokenizer, material, cfg.rating, cfg.seed)
        facts.put("rating", asdict(rated))
        save_stage(model, files["rating"])
        files["instruct"].unlink(missing_ok=True)
    load_stage(model, files["rating"])
    if not files["instruct"].is_file():
        with stages.matmul_precision(cfg.pretrain.matmul_precision):
            lesson = stages.instruct(model, tokenizer, material, cfg.instruct, cfg.seed)
        facts.put("instruct", asdict(lesson))
        save_stage(model, files["instruct"])
    load_stage(model, files["instruct"])

    save_model(model, final)
    write_seen(material.split, final / "seen_labels.txt")
    rounded = load_model(final)  # what is scored is what is shipped
    for name, scored in (("dev", material.dev), ("heldout", material.heldout)):
        facts.put(name, asdict(scores.evaluate(rounded, tokenizer, scored, cfg.eval, cfg.seed)))
    atomic_write_text(final / "README.md", model_card(cfg, material, facts.all, final, command))
    return facts.all


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, run all stages, print the scores."""
    parser = cli.Parser(prog="python -m ppo_nlu.pretrain", description=DESCRIPTION)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, help="folder for the stages and the finished model")
    parser.add_argument("--again", choices=RESULTS, help="repeat from this stage on")
    args = parser.parse_intermixed_args(argv)
    cfg = load_dataclass(TinyConfig, args.config, args.overrides)
    command = f"python -m ppo_nlu.pretrain {shlex.join([str(args.config), *args.overrides])}"
    folder = make_folder(cli.require_place("--output", args.output or Path(cfg.output)))
    with FolderLock(folder):
        facts = run(cfg, folder, args.again, command)
    print(json.dumps({name: facts[name] for name in ("dev", "heldout")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

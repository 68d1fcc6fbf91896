"""Take the trained policy out of a run folder: as a PEFT adapter, or merged into a whole model.

    python -m ppo_nlu.export RUN_DIR --output DIR                      the adapter, for peft
    python -m ppo_nlu.export RUN_DIR --output DIR --merge              a Hugging Face folder
    python -m ppo_nlu.export RUN_DIR --output DIR --checkpoint best    not the end of the run

Overrides as in training (`model.device=cpu`, `model.name_or_path=...`) go at the end. DIR appears
whole or not at all.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from ppo_nlu.answering.load_run import CHECKPOINT_HELP
from ppo_nlu.answering.stored_config import stored_config
from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.model import lora, peft_format
from ppo_nlu.model.base_model import load_base
from ppo_nlu.model.value_head import VALUE_HEAD
from ppo_nlu.runtime import arguments, checkpoint, cli, run_folder
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.atomic_folder import atomic_folder
from ppo_nlu.storage.files import atomic_write_text
from ppo_nlu.storage.folders import read_checked, read_tensors, write_folder
from ppo_nlu.storage.sealed import parse_object, to_json

# Texts on which the merged model must agree with the policy; of each the last 64 tokens.
PROBES = (
    "The film is good, and long.",
    "Prompt:\nJudge the sentence: a dull , lifeless story .\nAssistant:\n<Judgement>",
    "Prompt:\nDo the two mean the same?\nAssistant:\n<Judgement> No </Judgement>",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run; the exit code."""
    args = _arguments(argv)
    run = run_folder.require_run_dir(args.run_dir)
    cfg = stored_config(run, args.overrides)
    output = arguments.require_place("--output", Path(args.output))
    _refuse_used(output)
    with atomic_folder(output) as folder:
        if args.merge:
            report = export_merged(run, cfg, args.checkpoint, folder)
        else:
            report = export_adapter(run, cfg, args.checkpoint, folder)
    print(f"{report}\nwritten to {output}")
    return 0


def export_adapter(run: Path, cfg: Config, which: str | None, folder: Path) -> str:
    """Write the PEFT adapter, its value head and a README; returns a line for the user."""
    base = base_name(cfg)
    if which is None:
        _copy_adapter(_final_adapter(run), base, folder)
    else:
        _write_checkpoint(run, cfg, which, folder)
    atomic_write_text(folder / "README.md", ADAPTER_README.format(**_facts(cfg)))
    return f"adapter for {base}"


def export_merged(run: Path, cfg: Config, which: str | None, folder: Path) -> str:
    """Write the merged model with its tokenizer, load it and compare; returns a line for the user.

    At most two models are in memory at a time.
    """
    model, tokenizer = _policy(run, cfg, which)
    wanted = _logits(model, tokenizer)
    merged: Any = lora.merge(model)
    del model
    gc.collect()
    with write_errors(folder):
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    del merged
    gc.collect()
    atomic_write_text(folder / "README.md", MERGED_README.format(**_facts(cfg)))
    again = _logits(*load_base(replace(cfg.model, name_or_path=str(folder))))
    gap = max(float((a - b).abs().max()) for a, b in zip(again, wanted, strict=True))
    bound = _bound(cfg.model.dtype, wanted)
    line = f"largest difference of the logits {gap:.2g} (allowed {bound:.2g}, {cfg.model.dtype})"
    if not gap <= bound:
        raise UserError(
            f"--merge: the merged model's logits differ from the policy's: {line}; "
            "export without --merge"
        )
    return f"merged into {base_name(cfg)}: {line}"


def base_name(cfg: Config) -> str:
    """The base model's name as the user gave it; of a full path the last part."""
    return peft_format.portable_name(cfg.model.name_or_path)


# ---- what a run holds ------------------------------------------------------------------------


def _final_adapter(run: Path) -> Path:
    source = run / "adapter"
    if (run / "encoder").is_dir():
        raise UserError(
            f"{run}: an encoder has no adapter; {run}/encoder is its Hugging Face folder"
        )
    if not source.is_dir():
        raise UserError(f"{run} has no adapter/ (is the run finished?); try --checkpoint last")
    return source


def _policy(run: Path, cfg: Config, which: str | None) -> tuple[nn.Module, Any]:
    """The base with the run's LoRA layers, and the tokenizer."""
    source = _final_adapter(run) if which is None else None
    groups, path = ({}, run) if which is None else _checkpoint(run, which)
    if source is None:
        settings: Any = replace(cfg.lora, targets=peft_format.targets_of(groups["adapter"]))
    else:
        settings = peft_format.read_adapter_config(source)
    model, tokenizer = load_base(cfg.model)
    lora.attach(model, settings)
    if source is not None:
        peft_format.load_adapter(model, source)
    else:
        lora.load_state_dict(model, groups["adapter"], str(path))
    return model.eval(), tokenizer


def _checkpoint(run: Path, which: str) -> tuple[checkpoint.Tensors, Path]:
    path = checkpoint.named(run, which)
    groups, _ = checkpoint.load(path)
    if "adapter" not in groups:
        raise UserError(f"{path} holds no LoRA weights; without --checkpoint adapter/ is taken")
    return groups, path


def _copy_adapter(source: Path, base: str, folder: Path) -> None:
    """The run's adapter and value head, whole and finite, with the base's name in the config."""
    peft_format.read_adapter_config(source)  # refuses what cannot be read
    contents = {}
    for name in (VALUE_HEAD, peft_format.WEIGHTS_FILE):
        if (source / name).is_file() or name == peft_format.WEIGHTS_FILE:
            for key, tensor in read_tensors(source / name).items():
                lora.require_numbers(tensor, torch.float32, f"{source / name}: {key}")
            contents[name] = read_checked(source / name)
    config = parse_object(read_checked(source / peft_format.CONFIG_FILE).decode())
    text = to_json(config | {"base_model_name_or_path": base}, indent=2) + "\n"
    write_folder(folder, contents | {peft_format.CONFIG_FILE: text.encode()})


def _write_checkpoint(run: Path, cfg: Config, which: str, folder: Path) -> None:
    groups, _ = _checkpoint(run, which)
    model, _ = _policy(run, cfg, which)
    beside = {VALUE_HEAD: dump_tensors(groups["value_head"])} if "value_head" in groups else {}
    peft_format.save_adapter(model, folder, cfg.lora, base_name(cfg), beside)


# ---- the check -------------------------------------------------------------------------------


def _logits(model: nn.Module, tokenizer: Any) -> list[Tensor]:
    """The logits (T, V) of every probe on the CPU, fp32, one row at a time: nothing is padded."""
    device = next(model.parameters()).device
    found = []
    for text in PROBES:
        ids = torch.tensor([tokenizer(text)["input_ids"][-64:]], device=device)
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return found


def _bound(dtype: str, logits: Sequence[Tensor]) -> float:
    """1e-4 in fp32; in half precision merging rounds W, a twentieth of the largest logit."""
    if dtype == "float32":
        return 1e-4
    return 0.05 * max(float(rows.abs().max()) for rows in logits)


# ---- the folder ------------------------------------------------------------------------------


def _refuse_used(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} is not empty; name a new folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; name a new folder")


def _facts(cfg: Config) -> dict[str, str]:
    return {
        "task": "+".join(cfg.names),
        "method": cfg.method,
        "base": base_name(cfg),
        "load": "BUNDLED" if cfg.model.name_or_path == "bundled" else repr(base_name(cfg)),
        "more": "; from ppo_nlu.model import BUNDLED" * (cfg.model.name_or_path == "bundled"),
        "dtype": cfg.model.dtype,
    }


ADAPTER_README = """\
# LoRA adapter for {task} ({method})

Base model: `{base}`. Trained with ppo_nlu; `value_head.safetensors`, if there, is its critic and is
not needed for answers. From within this folder (if the Hugging Face hub has no model of the base's
name, give the path to it on your machine):

```python
from transformers import AutoModelForCausalLM; from peft import PeftModel{more}
base = AutoModelForCausalLM.from_pretrained({load}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, ".")
```
"""

MERGED_README = """\
# {task} ({method}), merged

`{base}` with its LoRA adapter merged in. Trained with ppo_nlu. From within this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments.Parser(
        prog="python -m ppo_nlu.export",
        description="Take the trained policy out of a run folder.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="what ppo_nlu.train wrote")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new or empty folder")
    parser.add_argument("--merge", action="store_true", help="write a whole model, not an adapter")
    parser.add_argument("--checkpoint", metavar="best|last|step_N", help=CHECKPOINT_HELP)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""What `engines.py` needs before it measures: the rivals' environments, models and prompts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.engine_cells import TRL, Cell

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "ppo_nlu" / "assets" / "tiny"
# Beside TRL; GRPO of 1.12.0 imports requests. torch<2.14 is the CPU build where an index has one.
PINNED = ("torch<2.14", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "requests")

# Shapes that random weights are made of: vocabulary, width, feed-forward, layers, heads, KV heads.
SHAPES: dict[str, dict[str, Any]] = {
    "llama30": {
        "vocab_size": 32000, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8,
        "num_attention_heads": 5, "num_key_value_heads": 5, "max_position_embeddings": 1024,
    },
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
    "tiny": {
        "vocab_size": 32000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
}  # fmt: skip
SHAPES["llama30-long"] = SHAPES["llama30"] | {"max_position_embeddings": 4096}


def shape_config(name: str) -> Any:
    """The Hugging Face config of a shape."""
    from transformers import LlamaConfig, Qwen2Config

    common = {"tie_word_embeddings": False} | SHAPES[name]
    if name.startswith("qwen"):
        return Qwen2Config(bos_token_id=None, eos_token_id=None, **common)
    return LlamaConfig(bos_token_id=1, eos_token_id=2, **common)


def python_of(version: str, folder: Path) -> Path:
    """The interpreter of TRL's environment in `folder`, made where it is not there yet."""
    home = folder / f"trl-{version}"
    python, done = home / "bin" / "python", home / "made"
    if not done.exists():
        print(f"making the environment of TRL {version} in {home}", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", f"trl=={version}", *PINNED]
        subprocess.run(command, check=True)
        done.write_text("")
    return python


def model_folder(name: str, folder: Path, tokenizer: Path | None) -> Path:
    """The folder of a model: the bundled one, or random weights (seed 0) of a shape, made once."""
    if name == "bundled":
        return BUNDLED
    target = folder / name
    if not (target / "tokenizer_config.json").exists():
        if tokenizer is None:
            raise SystemExit(
                f"{name} needs the Llama-2 tokenizer: --tokenizer FOLDER (tokenizer.json and "
                "tokenizer_config.json)"
            )
        import torch
        from transformers import AutoTokenizer, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(shape_config(name))
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M random weights")
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(target)
    return target


def prompts(cell: Cell, model: Path, data_root: str | None, steps: int) -> list[dict[str, Any]]:
    """The rows of all steps in order: id, task, fields, label, prompt text and token ids."""
    if cell.task == "synthetic":
        return synthetic(cell, steps)
    from ppo_nlu import data

    rows = _rows(cell.task, str(model), data_root)[: cell.rows or None]
    places = [
        place
        for step in range(steps)
        for place in data.batch_indices(len(rows), cell.prompts, step, cell.seed)
    ]
    return [rows[place] for place in places]


@cache
def _rows(task: str, model: str, data_root: str | None) -> list[dict[str, Any]]:
    """The training rows of a task that fit into 480 tokens, with their prompts."""
    from transformers import AutoTokenizer

    from ppo_nlu import data
    from ppo_nlu.config import DataConfig
    from ppo_nlu.tasks import get_task
    from ppo_nlu.tasks.prompts import render

    spec, tokenizer = get_task(task), AutoTokenizer.from_pretrained(model)
    cfg = DataConfig(path=data_root, min_words=4)  # SST-2's rows are phrases, down to one word
    examples = data.train_examples(spec, cfg, model == str(BUNDLED)).examples[:4096]
    texts = [render(spec, row.fields) for row in examples]
    rows = [
        {"id": row.id, "task": spec.name, "fields": row.fields, "label": row.label,
         "written": spec.written(row.label or ""), "text": text, "ids": ids}
        for row, text, ids in zip(examples, texts, tokenizer(texts)["input_ids"], strict=True)
    ]  # fmt: skip
    return [row for row in rows if len(row["ids"]) <= 480]


def synthetic(cell: Cell, steps: int) -> list[dict[str, Any]]:
    """Prompts of `length` token ids, `shared` percent of which are those of all the others.

    Their text is that of an SST-2 row that says "row 17"; the ids do not come from it.
    """
    import random

    from ppo_nlu.tasks import get_task
    from ppo_nlu.tasks.prompts import render

    spec, draw = get_task("sst2"), random.Random(cell.seed)
    (name,) = spec.fields
    size = SHAPES[cell.model]["vocab_size"]
    both = cell.length * cell.shared // 100
    opening = [draw.randrange(3, size) for _ in range(both)]
    rows = []
    for i in range(cell.prompts * steps):
        own = [draw.randrange(3, size) for _ in range(cell.length - both)]
        fields = {name: f"row {i}"}
        row = {"id": str(i), "task": "sst2", "fields": fields, "label": spec.words[0]}
        written = spec.written(row["label"])
        rows.append(row | {"written": written, "text": render(spec, fields), "ids": opening + own})
    return rows


def environment(threads: int, inherit: bool = False) -> dict[str, str]:
    """The environment of an engine's process: so many threads (0: its own choice), no network.

    Without `inherit` what $PYTHONPATH names stays out of the rivals' environments.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    given = {k: v for k, v in os.environ.items() if k not in names}
    given |= {name: str(threads) for name in names} if threads else {}
    path = [str(ROOT), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    return given | {
        "PYTHONPATH": os.pathsep.join(path if inherit else path[:1]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": os.path.join(os.environ.get("TMPDIR", "/tmp"), "engines-datasets"),
        "WANDB_DISABLED": "true",
    }


def write_job(path: Path, job: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """The order for an engine's process."""
    path.write_text(json.dumps(job | {"rows": list(rows)}))


def releases() -> tuple[str, ...]:
    """All releases of TRL that take part."""
    return tuple(TRL.values())

"""An encoder's weights as tensors, and the folder that a finished run leaves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor

from ppo_nlu.errors import UserError
from ppo_nlu.methods.encoder_model import Encoder
from ppo_nlu.model.lora import require_numbers
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.files import make_folder, temporary_name
from ppo_nlu.storage.folders import write_folder

FOLDER = "encoder"  # in the folder of a finished run
WEIGHTS = "model.safetensors"


def weights(encoder: Encoder) -> dict[str, Tensor]:
    """Copies of all parameters and buffers on the CPU, no two of which share memory."""
    state = encoder.model.state_dict()
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in state.items()}


def load_weights(encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `weights` took."""
    take(encoder.model, tensors, True, "the checkpoint")


def save(encoder: Encoder, folder: str | Path) -> None:
    """Write a folder that `AutoModelForSequenceClassification` and `AutoTokenizer` read.

    Each file appears whole or not at all, config.json last: with it the folder is complete. The
    bytes do not depend on the rows that the encoder has read.
    """
    folder = make_folder(folder)
    contents = {WEIGHTS: dump_tensors(weights(encoder), {"format": "pt"})}
    encoder.reset_tokenizer()
    # transformers writes files, not bytes, and `atomic_folder` does not replace a full folder: so
    # its files are staged here. ($TMPDIR may be missing or full.)
    staged = temporary_name(folder / "files")
    with write_errors(folder):
        try:
            encoder.tokenizer.save_pretrained(staged)
            encoder.model.config.save_pretrained(staged)
            files = sorted(path for path in staged.iterdir() if path.is_file())
            contents |= {path.name: path.read_bytes() for path in files}
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    last = contents.pop("config.json")
    write_folder(folder, contents | {"config.json": last})


def take(model: Any, tensors: Mapping[str, Tensor], head: bool, source: str) -> None:
    """Copy the weights of the body, and of the head if `head`, into the model.

    `source` is named in errors.
    """
    body = f"{model.base_model_prefix}."
    own = {k: x for k, x in model.state_dict().items() if head or k.startswith(body)}
    wrong = [k for k, x in own.items() if k not in tensors or tensors[k].shape != x.shape]
    if wrong or not own:
        raise UserError(
            f"{source}: {len(wrong)} tensors are missing or of another shape than those of this "
            f"encoder ({', '.join(wrong[:3])}); give weights of the model in model.name_or_path"
        )
    for name, x in own.items():
        require_numbers(tensors[name], x.dtype, f"{source}: {name}")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(tensors[name])

"""The base model of a config: from a folder or the hub, on a device, in a dtype.

Whatever is wrong with them becomes one line for the user.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from ppo_nlu.config import ModelConfig
from ppo_nlu.errors import UserError, first_line
from ppo_nlu.model import BUNDLED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(name: str) -> str:
    """`bundled` as the folder of the bundled model; any other name as it is."""
    return str(BUNDLED) if name == "bundled" else name


def load_base(cfg: ModelConfig) -> tuple[Any, Any]:
    """The Hugging Face causal LM (eval mode, frozen) and its tokenizer; a UserError where it cannot
    be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, device = resolve(cfg.name_or_path), pick_device(cfg.device)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path: {path} holds no config.json; give a model folder")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name_or_path: there is no folder {path}; check the path")
    else:
        options["local_files_only"] = not hub_answers(name)
    options_of_model = options | {
        "dtype": DTYPES[cfg.dtype],
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # told below
    }
    load = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        try:
            loaded: Any = load(name, attn_implementation=cfg.attention, **options_of_model)
        except ValueError as error:
            if cfg.attention == "eager" or "attention implementation" not in str(error):
                raise
            loaded = load(name, attn_implementation="eager", **options_of_model)
            kind = loaded[0].config.model_type
            tell(f"attention is eager: {kind} has no {cfg.attention}")
    except Exception as error:  # whatever a broken folder makes of the library
        raise UserError(
            f"model.name_or_path: cannot load {cfg.name_or_path!r} ({reason_of(error)}); give a "
            "folder with config.json, weights and tokenizer, or a model name of the hub"
        ) from error
    model, info = loaded
    # The library would fill these with random numbers.
    wrong = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"model.name_or_path: the weights of {cfg.name_or_path!r} are not whole: {len(wrong)} "
            f"tensors are missing or of another shape, such as {min(wrong)}; give a complete model"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def hub_answers(name: str) -> bool:
    """Whether the hub answers, in one try. The library alone would try for half a minute a file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HfHubHTTPError:
        return True  # an answer, though not a good one; loading will say which
    except Exception:
        return False  # a model in the cache can still be loaded
    return True


def reason_of(error: Exception) -> str:
    """The first line of the library's error."""
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors; ask for safetensors"
    first = first_line(error)
    return first if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {first}"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; a GPU that is asked for and absent is a UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device: no such device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda is asked for, but torch sees no GPU; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"model.device: there is no {name}; torch sees {count} GPU(s), from cuda:0")
    return device


def tell(note: str | None) -> None:
    """A line about the model for the user; on stderr, since stdout may be for answers."""
    if note:
        print(f"model: {note}", file=sys.stderr, flush=True)

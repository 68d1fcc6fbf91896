"""What is asked of transformers for an encoder: config, tokenizer, weights, a random model.

A broken folder makes the library raise anything; each error becomes one line for the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.model import BUNDLED
from ppo_nlu.model.base_model import hub_answers, reason_of


def bundled() -> tuple[Any, Any]:
    """A small BERT's config, and the bundled tokenizer with BERT's frame around a row."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, BertConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(
        BUNDLED,
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(word, tokenizer.convert_tokens_to_ids(word)) for word in ("<s>", "</s>")],
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, tokenizer


def options_of(cfg: Config) -> dict[str, Any]:
    """The library's options for `model.name_or_path`, a folder or a name on the hub."""
    name, options = name_of(cfg), _trust(cfg)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model.name_or_path: {path} holds no config.json; give a model folder")
    if not path.is_dir() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise UserError(f"model.name_or_path: there is no folder {path}; check the path")
    if not path.is_dir():
        options["local_files_only"] = not hub_answers(name)
    return options


def pretrained(cfg: Config, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Config and tokenizer of `model.name_or_path`."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = name_of(cfg)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise _cannot_load(cfg, error) from error
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {cfg.model.name_or_path!r} has no padding "
            "token; give an encoder, such as google-bert/bert-base-uncased"
        )
    return config, tokenizer


def pretrained_weights(cfg: Config, config: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of `model.name_or_path`. The head may be random; a body with gaps is refused."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name_of(cfg),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below
            **options,
        )
    except Exception as error:
        raise _cannot_load(cfg, error) from error
    body = f"{model.base_model_prefix}."
    found = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    # Not every pre-training has a pooler; a missing one starts at random.
    wrong = [key for key in found if key.startswith(body) and ".pooler." not in key]
    if wrong:
        raise UserError(
            f"model.name_or_path: the weights of {cfg.model.name_or_path!r} are not whole: "
            f"{len(wrong)} tensors are missing or of another shape, such as {min(wrong)}; "
            "give a complete encoder"
        )
    return model.state_dict()


def saved_config(cfg: Config, folder: Path) -> Any:
    """The config of a folder that `encoder_save.save` wrote."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_trust(cfg))
    except Exception as error:
        raise UserError(f"{folder}: its config.json cannot be read ({reason_of(error)})") from error


def saved_tokenizer(cfg: Config, folder: Path) -> Any:
    """The tokenizer of such a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **_trust(cfg))
    except Exception as error:
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason_of(error)})") from error


def random_model(cfg: Config, config: Any) -> Any:
    """A model of that config with random weights, fp32, on the CPU."""
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32, attn_implementation=cfg.model.attention, **_trust(cfg)
        )
    except Exception as error:
        raise _cannot_load(cfg, error) from error
    model.config.architectures = [type(model).__name__]
    return model


def name_of(cfg: Config) -> str:
    """`model.name_or_path`, `~` written out."""
    name = cfg.model.name_or_path
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _trust(cfg: Config) -> dict[str, Any]:
    return {"trust_remote_code": cfg.model.trust_remote_code}


def _cannot_load(cfg: Config, error: Exception) -> UserError:
    return UserError(
        f"model.name_or_path: cannot load {cfg.model.name_or_path!r} as an encoder "
        f"({reason_of(error)}); give a folder with config.json, weights and tokenizer, or the name "
        "of an encoder on the hub"
    )

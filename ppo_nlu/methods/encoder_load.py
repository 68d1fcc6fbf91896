"""Loads an encoder: a new one with a head for the task, or the one that a finished run left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.methods import encoder_library as library
from ppo_nlu.methods.encoder_model import Encoder, answers_of, drawing_from
from ppo_nlu.methods.encoder_save import FOLDER, WEIGHTS, take
from ppo_nlu.model.base_model import DTYPES, pick_device
from ppo_nlu.storage.folders import check_folder, read_checked, read_tensors
from ppo_nlu.storage.sealed import parse_object
from ppo_nlu.tasks import TaskSpec


def load(cfg: Config, spec: TaskSpec) -> Encoder:
    """The encoder of the config with a head for the task, in eval mode.

    Its weights are those of `model.name_or_path`, or of the run that `init_from` names. Their head
    is taken where it gives the same answers in the same order; else a fresh one is drawn from
    `seed`. `bundled` is a random BERT of two layers, drawn from `seed`, with the bundled tokenizer.
    """
    wanted, device = answers_of(spec), pick_device(cfg.model.device)
    if cfg.model.dtype == "float16":
        raise UserError(
            "model.dtype: float16 lacks the range for an encoder; use bfloat16 or float32"
        )
    bundled = cfg.model.name_or_path == "bundled"
    with drawing_from(torch.device("cpu"), "encoder start", cfg.seed):
        options = {} if bundled else library.options_of(cfg)
        config, tokenizer = library.bundled() if bundled else library.pretrained(cfg, options)
        stored = _stored_answers(config)
        _require_length(cfg, config, tokenizer)
        _set_head(config, spec, wanted)
        _set_dropout(config, cfg.encoder.dropout)
        model = library.random_model(cfg, config)
        if cfg.init_from:
            source = saved_folder(cfg.init_from)
            stored = _answers_in(source)
            take(model, _weights_in(source), stored == wanted, f"init_from: {source / WEIGHTS}")
        elif not bundled:
            tensors = library.pretrained_weights(cfg, config, options)
            take(model, tensors, stored == wanted, f"model.name_or_path: {library.name_of(cfg)}")
    return Encoder(model.to(device).eval(), tokenizer, spec, DTYPES[cfg.model.dtype])


def load_saved(cfg: Config, spec: TaskSpec, folder: str | Path) -> Encoder:
    """The encoder that `save` wrote there; UserError where its head is not the task's."""
    folder, device = Path(folder), pick_device(cfg.model.device)
    check_folder(folder, but=WEIGHTS)  # these are checked as they are read
    config = library.saved_config(cfg, folder)
    stored = _stored_answers(config)
    if stored != answers_of(spec):
        raise UserError(
            f"{folder}: its head gives {', '.join(stored)}, the task {spec.name} asks for "
            f"{', '.join(answers_of(spec))}; name the run of this task"
        )
    tokenizer = library.saved_tokenizer(cfg, folder)
    with drawing_from(torch.device("cpu"), "encoder start", cfg.seed):
        model = library.random_model(cfg, config)
    take(model, _weights_in(folder), True, str(folder / WEIGHTS))
    return Encoder(model.to(device).eval(), tokenizer, spec, DTYPES[cfg.model.dtype])


def saved_folder(path: str | Path) -> Path:
    """The encoder of a run folder, or the folder of an encoder itself."""
    for folder in (Path(path) / FOLDER, Path(path)):
        if (folder / WEIGHTS).is_file() and (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"init_from: {path} holds no encoder ({FOLDER}/config.json and {FOLDER}/{WEIGHTS}); "
        "give a finished run with method: encoder"
    )


def _stored_answers(config: Any) -> list[str]:
    """What the outputs stand for, by a config; LABEL_0 and so on where nobody said."""
    return [config.id2label[i] for i in sorted(config.id2label)]


def _answers_in(folder: Path) -> list[str]:
    """The stored answers of a saved encoder. Its config is read as data; none of its code runs."""
    path = folder / "config.json"
    try:
        table = parse_object(read_checked(path).decode()).get("id2label") or {}
        return [str(table[key]) for key in sorted(table, key=int)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its id2label cannot be read ({error})") from error


def _weights_in(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / WEIGHTS)


def _require_length(cfg: Config, config: Any, tokenizer: Any) -> None:
    """UserError where rows of `encoder.max_length` tokens exceed the encoder's positions."""
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    longest = min((n for n in limits if n and n > 0), default=math.inf)
    if cfg.encoder.max_length > longest:
        raise UserError(
            f"encoder.max_length: {cfg.encoder.max_length} tokens are more than the {longest} that "
            f"{cfg.model.name_or_path!r} can read; lower it"
        )


def _set_head(config: Any, spec: TaskSpec, answers: Sequence[str]) -> None:
    """Ask for a head that gives these answers."""
    config.id2label = dict(enumerate(answers))
    config.label2id = {answer: i for i, answer in enumerate(answers)}
    config.problem_type = "regression" if spec.rating else "single_label_classification"


def _set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout of the config, whatever the architecture calls it."""
    for name, value in config.to_dict().items():
        if "dropout" in name and (value is None or type(value) in (int, float)):
            setattr(config, name, dropout)

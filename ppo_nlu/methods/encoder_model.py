"""An encoder with a head for one task: how it reads rows, answers them, is loaded and saved.

Any Hugging Face encoder; a classifier over the label words, or one number for a rating. A row is
read without any prompt, as a sentence or a pair: the first field, and the remaining ones joined by
a space (COPA: the premise, then "choice1 choice2 question"), the longer part cut to fit.

Weights are fp32; `model.dtype=bfloat16` computes in bf16 under autocast. How it is trained is in
`encoder`.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from ppo_nlu.config import Config
from ppo_nlu.errors import UserError
from ppo_nlu.methods.minibatch import chunks
from ppo_nlu.methods.rollout import seeded
from ppo_nlu.model import BUNDLED
from ppo_nlu.model.base_model import DTYPES, hub_answers, pick_device, reason_of
from ppo_nlu.model.lora import require_numbers
from ppo_nlu.storage.access import write_errors
from ppo_nlu.storage.files import make_folder, temporary_name
from ppo_nlu.storage.folders import (
    check_folder,
    read_checked,
    read_tensors,
    write_folder,
)
from ppo_nlu.storage.sealed import parse_object
from ppo_nlu.tasks import Example, TaskSpec

FOLDER = "encoder"  # of a finished run, in its folder
WEIGHTS = "model.safetensors"
SPAN = 5.0  # the range of a rating, as the head sees it

Given = tuple[str | None, dict[str, float] | None]  # an answer, and its probabilities by word


class Encoder(nn.Module):
    """A Hugging Face sequence classifier with its tokenizer and the task of its head."""

    def __init__(self, model: Any, tokenizer: Any, spec: TaskSpec, dtype: torch.dtype):
        super().__init__()
        self.model, self.tokenizer, self.spec, self.dtype = model, tokenizer, spec, dtype
        self.saved_as = _cutting(tokenizer)
        self.takes = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Token ids of B rows to the head's (B, K), fp32; K is 1 for a rating."""
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low):
            return self.model(**batch).logits.float()

    def read(self, examples: Sequence[Example], max_length: int) -> dict[str, Tensor]:
        """The rows as padded token ids (B, T) and what goes with them, on the device."""
        texts, pairs = zip(*(as_pair(self.spec, row.fields) for row in examples), strict=True)
        batch = self.tokenizer(
            list(texts),
            list(pairs) if len(self.spec.fields) > 1 else None,
            truncation="longest_first",
            max_length=max_length,
            padding=True,
            return_tensors="pt",
            split_special_tokens=True,  # "[SEP]" in the text of a row is text
        )
        return {name: ids.to(self.device) for name, ids in batch.items() if name in self.takes}


def as_pair(spec: TaskSpec, fields: Mapping[str, str]) -> tuple[str, str]:
    """The first field, and the others joined by a space ("" where there is one field only)."""
    first, *others = (fields[name].strip() for name in spec.fields)
    return first, " ".join(others)


def answers_of(spec: TaskSpec) -> list[str]:
    """What the outputs of the head stand for, in their order; UserError for a free text."""
    if spec.kind == "text":
        raise UserError(
            f"task: {spec.name} asks for a free text, which an encoder cannot write; "
            "use method: ppo or method: sft"
        )
    if spec.rating:
        return [f"rating from {spec.rating.low:g} to {spec.rating.high:g}"]
    return list(spec.words)


def rating_of(spec: TaskSpec, output: float) -> float:
    """The number that an output of the head stands for, within the range."""
    assert spec.rating is not None
    low, high = spec.rating.low, spec.rating.high
    return min(max(low + output / SPAN * (high - low), low), high)


@contextmanager
def drawing_from(device: torch.device, *parts: object) -> Iterator[None]:
    """Inside, torch's own random numbers come from these parts; afterwards all is as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeded(*parts).initial_seed())
        yield


# ---- answers ---------------------------------------------------------------------------------


def answer_all(
    encoder: Encoder,
    spec: TaskSpec,
    cfg: Config,
    examples: Sequence[Example],
    decode: str,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Given]:
    """(answer, probability of each label word) in the order of the examples; early end on `stop`.

    `greedy` and `score` take the most probable word, `sample` draws one. A rating is its number
    with three decimals under every decoding, without probabilities. Where the outputs are not
    finite there is no answer. Inside a window rows of like length run together.
    """
    size = cfg.eval.batch_size
    encoder.eval()
    for start in range(0, len(examples), 16 * size):
        window = examples[start : start + 16 * size]
        order = sorted(range(len(window)), key=lambda i: -sum(map(len, window[i].fields.values())))
        outputs: dict[int, Tensor] = {}
        for index in chunks(order, size):
            if stop():
                return
            rows = [window[i] for i in index]
            with torch.no_grad():
                table = encoder(encoder.read(rows, cfg.encoder.max_length)).cpu()
            outputs |= dict(zip(index, table, strict=True))
        for i in range(len(window)):
            yield _given(spec, outputs[i], decode, ("encoder answer", cfg.seed, start + i))


def _given(spec: TaskSpec, output: Tensor, decode: str, place: tuple[object, ...]) -> Given:
    """The answer that a row's outputs (K,) give."""
    if not output.isfinite().all():
        return None, None
    if spec.rating:
        return f"{rating_of(spec, float(output)) + 0.0:.3f}", None
    probabilities = output.softmax(-1)
    best = int(probabilities.argmax())
    if decode == "sample":
        best = int(torch.multinomial(probabilities, 1, generator=seeded(*place)))
    return spec.words[best], dict(zip(spec.words, probabilities.tolist(), strict=True))


# ---- loading ---------------------------------------------------------------------------------


def load(cfg: Config, spec: TaskSpec) -> Encoder:
    """The encoder of the config with a head for the task, in eval mode.

    Its weights are those of `model.name_or_path`, or of the run that `init_from` names. The head is
    theirs where it gives the same answers in the same order, else a fresh one from `seed`; so are
    the weights of `bundled`, a random BERT of two layers with the bundled tokenizer.
    """
    wanted, device = answers_of(spec), pick_device(cfg.model.device)
    if cfg.model.dtype == "float16":
        raise UserError(
            "model.dtype: float16 is too coarse for an encoder; use bfloat16 or float32"
        )
    bundled = cfg.model.name_or_path == "bundled"
    with drawing_from(torch.device("cpu"), "encoder start", cfg.seed):
        options = {} if bundled else _options(cfg)
        config, tokenizer = _bundled() if bundled else _from_library(cfg, options)
        stored = _stored_answers(config)
        _require_room(cfg, config, tokenizer)
        _set_head(config, spec, wanted)
        _set_dropout(config, cfg.encoder.dropout)
        model = _blank(cfg, config)
        if cfg.init_from:
            source = saved_folder(cfg.init_from)
            stored = _answers_in(source)
            _take(model, _read_weights(source), stored == wanted, f"init_from: {source / WEIGHTS}")
        elif not bundled:
            tensors = _library_weights(cfg, config, options)
            _take(model, tensors, stored == wanted, f"model.name_or_path: {_name(cfg)}")
    return Encoder(model.to(device).eval(), tokenizer, spec, DTYPES[cfg.model.dtype])


def load_saved(cfg: Config, spec: TaskSpec, folder: str | Path) -> Encoder:
    """The encoder that `save` wrote there; UserError where it answers otherwise than the task."""
    from transformers import AutoTokenizer

    folder, device = Path(folder), pick_device(cfg.model.device)
    check_folder(folder, but=WEIGHTS)  # which are read, and checked, below
    config = _read_config(cfg, folder)
    stored = _stored_answers(config)
    if stored != answers_of(spec):
        raise UserError(
            f"{folder}: its head gives {', '.join(stored)}, the task {spec.name} asks for "
            f"{', '.join(answers_of(spec))}; name the run of this task"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_trust(cfg))
    except Exception as error:  # whatever a broken folder makes of the library
        raise UserError(f"{folder}: its tokenizer cannot be read ({reason_of(error)})") from error
    with drawing_from(torch.device("cpu"), "encoder start", cfg.seed):
        model = _blank(cfg, config)
    _take(model, _read_weights(folder), True, str(folder / WEIGHTS))
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


def _bundled() -> tuple[Any, Any]:
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


def _options(cfg: Config) -> dict[str, Any]:
    """How to ask the library for `model.name_or_path`, a folder or a name of the hub."""
    name, options = _name(cfg), _trust(cfg)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"model.name_or_path: {path} holds no config.json; give a model folder")
    if not path.is_dir() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise UserError(f"model.name_or_path: there is no folder {path}; check the path")
    if not path.is_dir():
        options["local_files_only"] = not hub_answers(name)
    return options


def _from_library(cfg: Config, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Config and tokenizer of `model.name_or_path`."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = _name(cfg)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # whatever a broken folder makes of the library
        raise _cannot_load(cfg, error) from error
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {cfg.model.name_or_path!r} has no padding "
            "token; give an encoder, such as google-bert/bert-base-uncased"
        )
    return config, tokenizer


def _library_weights(cfg: Config, config: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of `model.name_or_path`; those of the head may be random, the body's are not."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            _name(cfg),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
            **options,
        )
    except Exception as error:
        raise _cannot_load(cfg, error) from error
    body = f"{model.base_model_prefix}."
    found = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    # A pooler is not part of every pre-training; where it is missing it starts at random.
    wrong = [key for key in found if key.startswith(body) and ".pooler." not in key]
    if wrong:
        raise UserError(
            f"model.name_or_path: the weights of {cfg.model.name_or_path!r} are not whole: "
            f"{len(wrong)} tensors are missing or of another shape, such as {min(wrong)}; "
            "give a complete encoder"
        )
    return model.state_dict()


def _name(cfg: Config) -> str:
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


def _read_config(cfg: Config, folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_trust(cfg))
    except Exception as error:
        raise UserError(f"{folder}: its config.json cannot be read ({reason_of(error)})") from error


def _stored_answers(config: Any) -> list[str]:
    """What the outputs stand for in a config; LABEL_0 and so on where nobody said."""
    return [config.id2label[i] for i in sorted(config.id2label)]


def _answers_in(folder: Path) -> list[str]:
    """The same for a saved encoder, whose config is read as data: no code of its own is run."""
    path = folder / "config.json"
    try:
        table = parse_object(read_checked(path).decode()).get("id2label") or {}
        return [str(table[key]) for key in sorted(table, key=int)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its id2label cannot be read ({error})") from error


def _require_room(cfg: Config, config: Any, tokenizer: Any) -> None:
    """The rows must fit into the encoder's positions."""
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    longest = min((n for n in limits if n and n > 0), default=math.inf)
    if cfg.encoder.max_length > longest:
        raise UserError(
            f"encoder.max_length: {cfg.encoder.max_length} tokens are more than the {longest} that "
            f"{cfg.model.name_or_path!r} can read; lower it"
        )


def _set_head(config: Any, spec: TaskSpec, answers: Sequence[str]) -> None:
    config.id2label = dict(enumerate(answers))
    config.label2id = {answer: i for i, answer in enumerate(answers)}
    config.problem_type = "regression" if spec.rating else "single_label_classification"


def _set_dropout(config: Any, dropout: float) -> None:
    """Every dropout that the config names, whatever the architecture calls it."""
    for name, value in config.to_dict().items():
        if "dropout" in name and (value is None or type(value) in (int, float)):
            setattr(config, name, dropout)


def _blank(cfg: Config, config: Any) -> Any:
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


# ---- weights ---------------------------------------------------------------------------------


def weights(encoder: Encoder) -> dict[str, Tensor]:
    """Copies of all parameters and buffers on the CPU, no two of which share memory."""
    state = encoder.model.state_dict()
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in state.items()}


def load_weights(encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `weights` took."""
    _take(encoder.model, tensors, True, "the checkpoint")


def save(encoder: Encoder, folder: str | Path) -> None:
    """A Hugging Face folder that `AutoModelForSequenceClassification` and `AutoTokenizer` read.

    Each file appears whole or not at all, config.json last: with it the folder is complete. The
    tokenizer cuts and pads as it did when it was loaded, whatever was read since.
    """
    folder = make_folder(folder)
    contents = {WEIGHTS: dump_tensors(weights(encoder), {"format": "pt"})}
    _set_cutting(encoder.tokenizer, encoder.saved_as)
    made = temporary_name(folder / "files")  # here and not in $TMPDIR, which may be missing or full
    with write_errors(folder):
        try:
            encoder.tokenizer.save_pretrained(made)
            encoder.model.config.save_pretrained(made)
            files = sorted(path for path in made.iterdir() if path.is_file())
            contents |= {path.name: path.read_bytes() for path in files}
        finally:
            shutil.rmtree(made, ignore_errors=True)
    last = contents.pop("config.json")
    write_folder(folder, contents | {"config.json": last})


def _cutting(tokenizer: Any) -> tuple[Any, Any] | None:
    """How a fast tokenizer cuts and pads; each call that does so changes it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else (backend.truncation, backend.padding)


def _set_cutting(tokenizer: Any, cutting: tuple[Any, Any] | None) -> None:
    if cutting is None:
        return
    backend, (truncation, padding) = tokenizer.backend_tokenizer, cutting
    backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
    backend.no_padding() if padding is None else backend.enable_padding(**padding)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / WEIGHTS)


def _take(model: Any, tensors: Mapping[str, Tensor], head: bool, source: str) -> None:
    """Copy the weights of the body, and of the head where asked, into the model."""
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

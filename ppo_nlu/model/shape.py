"""What a model's config says: its decoder, sizes, windows, and how long its rows may be.

Where the position tables change with the length of a batch, the context ends before the change. So
a row never depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ppo_nlu.model.refusal import refused

FAR = 1024  # tokens: rows beyond a longer window are tried only where the config asks for them
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
KNOWN = {  # the windows, and settings with "window" or "chunk" in their name that set none
    *WINDOWS,
    "max_window_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "chunk_size_feed_forward",
}
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
)
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # plain keys and values


def text_config(model: Any) -> Any:
    """The decoder's configuration; of a model that also reads pictures, that of its text."""
    find = getattr(model.config, "get_text_config", None)
    return find() if find else model.config


def decoder_of(model: Any) -> Any:
    """The decoder without its head; of a model that also reads pictures, that of its text."""
    composite = text_config(model) is not model.config
    found = model.get_decoder() if composite else model.base_model
    while found.get_output_embeddings() is not None:  # Llama 4 names its head's model so
        inner = found.base_model
        found = inner if inner is not found else found.model
    return found


def settings(config: Any, name: str) -> list[Any]:
    """The values of a setting: one, one for each layer where they differ, or none."""
    try:
        found = [getattr(config, name, None)]
    except Exception:  # where layers differ transformers raises, but no AttributeError
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    return [value for value in found if value is not None]


def _whole(config: Any, name: str) -> list[int]:
    """Those values of a setting that are whole numbers above 0."""
    found = settings(config, name)
    return [v for v in found if isinstance(v, int) and not isinstance(v, bool) and v > 0]


def context_of(config: Any) -> int:
    """The longest sequence that a model was made for, in tokens; 2,048 where nothing says it."""
    return next((min(found) for name in LENGTHS if (found := _whole(config, name))), 2048)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: layers, attention heads, key heads, the size of a head, the width of
    its states. An estimate where layers differ or do not attend."""

    layers: int
    heads: int
    keys: int
    size: int
    hidden: int


def shape_of(decoder: nn.Module) -> Shape:
    """What plans of memory and time are made from."""
    config: Any = decoder.config
    hidden = len(embedding_of(decoder).weight[0])
    heads = max(_whole(config, "num_attention_heads") or _whole(config, "num_heads") or [1])
    keys = max(_whole(config, "num_key_value_heads") or [heads])
    size = max(_whole(config, "head_dim") or [max(hidden // heads, 1)])
    layers = len(blocks_of(decoder)[1])
    return Shape(layers=layers, heads=heads, keys=keys, size=size, hidden=hidden)


def limit_of(model: Any, asked: int) -> tuple[int, str | None]:
    """Where the context must end, in tokens, and a line for the user where that is early.

    `asked` is the longest row that the config asks for, 0 for none.
    """
    with refused(model, "cannot be run"):
        return _limit_of(decoder_of(model), asked)


def _limit_of(decoder: Any, asked: int) -> tuple[int, str | None]:
    limit, note = context_of(decoder.config), None
    switch = switch_of_positions(decoder)
    if switch is not None and switch < limit:
        limit = switch
        note = (
            f"the context ends at {switch:,} tokens: a longer row would change the position tables "
            "of all rows of its batch"
        )
    far = min((w for w in windows(decoder.config) if FAR < w < limit), default=None)
    if far is not None and asked <= far:
        limit = far
        note = None if asked else (
            f"the context ends at {far:,} tokens, the window of this model's attention; "
            "data.max_prompt_tokens allows longer rows, which are checked and run more slowly"
        )  # fmt: skip
    return limit, note


def windows(config: Any) -> list[int]:
    """The windows of the layers' attention, in tokens, from the shortest on."""
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    off = {
        "sliding_window": not any(settings(config, "use_sliding_window") or [True])
        or "sliding_attention" not in kinds,
        "attention_chunk_size": "chunked_attention" not in kinds,
    }
    return sorted({w for name in WINDOWS if not off.get(name) for w in _whole(config, name)})


def is_odd(model: Any, decoder: nn.Module) -> bool:
    """Whether a row's length may matter in a way that we cannot read from the config: the model's
    code is not transformers' own, or its config names windows or position tables that we do not
    know."""
    config: Any = decoder.config
    names = [n for n in config.to_dict() if ("window" in n or "chunk" in n) and n not in KNOWN]
    unknown = any(_whole(config, name) for name in names)
    stretched = bool(_whole(config, "original_max_position_embeddings"))
    told = any(hasattr(module, "rope_type") for module in decoder.modules())
    foreign = not type(model).__module__.startswith("transformers.")
    return foreign or unknown or (stretched and not told)


def only_attention(config: Any) -> bool:
    """Whether every layer attends to keys and values; the tree cannot run other layers."""
    return set(getattr(config, "layer_types", None) or LAYERS) <= LAYERS


def switch_of_positions(decoder: Any) -> int | None:
    """The longest row that leaves the rotary tables of its batch unchanged; None: every row does.

    LongRoPE takes other frequencies once any row is longer, dynamic NTK new ones for each length.
    Llama 4 scales queries by their place in the padded row.
    """
    found = []
    if getattr(decoder.config, "attn_temperature_tuning", False):  # Llama 4 counts padding there
        found.append(int(decoder.config.floor_scale) - 1)
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer, kind in kinds.items():
            if kind == "longrope" or "dynamic" in str(kind):
                found.append(_original_length(module, layer))
    return min(found, default=None)


def _original_length(module: Any, layer: str | None) -> int:
    """How many positions a rotary module has before its table is stretched."""
    config = module.config
    table = getattr(config, "rope_parameters", None) or {}
    table = table.get(layer, table) if layer else table
    length = table.get("original_max_position_embeddings")
    return int(length or getattr(module, "original_max_seq_len", None) or context_of(config))


def embedding_of(decoder: Any) -> Any:
    """The module that turns token ids into vectors."""
    return decoder.get_input_embeddings()


def blocks_of(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, the first list of modules, and its name."""
    lists = ((n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList))
    return next(lists)

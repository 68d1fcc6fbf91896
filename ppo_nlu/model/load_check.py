"""The check at load: what the engine computes must be what the model gives for one row alone.

`Reference.of` runs a few rows through the model as transformers loaded it, before LoRA, norms or
blocks are put in; `choose_path` holds the prefix tree and the plain path against it, in one pass
and token by token. The rows are longer than every window that a row of the run can reach. Where
the position tables change with the length of a batch, the context ends below the change, so that
a row never depends on its neighbours. `head_form` measures what the model does to the numbers that
its LM head gives, such as a soft cap.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_nlu.errors import UserError, first_line
from ppo_nlu.tree import pack, passes

TEXT = "The film is good, and long. Now judge the opinion of the sentence."
FAR = 1024  # tokens: rows behind a longer window are tried only where the config asks for them
EXACT = 1e-4  # how far logits may be apart in fp32, where none is larger than 10
ROUGH = 0.1  # of the spread of the logits: how far apart (root mean square) in low precision
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
KNOWN = {  # which layers have a window; a way to save memory
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


class Runner(Protocol):
    """What the check needs of a policy."""

    model: Any
    tokenizer: Any
    decoder: nn.Module
    takes_positions: bool

    @property
    def window(self) -> int | None: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


# ---- what the model is -------------------------------------------------------------------------


def text_config(model: Any) -> Any:
    """The configuration of the decoder's text; of most models there is one only."""
    find = getattr(model.config, "get_text_config", None)
    return find() if find else model.config


def decoder_of(model: Any) -> Any:
    """The decoder without its head; of a model that reads pictures too, the one of its text."""
    composite = text_config(model) is not model.config
    found = model.get_decoder() if composite else model.base_model
    while found.get_output_embeddings() is not None:  # Llama 4 names its head's model so
        inner = found.base_model
        found = inner if inner is not found else found.model
    return found


def settings(config: Any, name: str) -> list[Any]:
    """The values of a setting: one, or one a layer where they differ; none where it is not set."""
    try:
        found = [getattr(config, name, None)]
    except Exception:  # transformers raises where layers differ, and not an AttributeError
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
    """Of a decoder: layers, attention heads, heads of keys and values, the size of a head, and the
    width of its states. An estimate where layers differ or do not attend."""

    layers: int
    heads: int
    keys: int
    size: int
    hidden: int


def shape_of(decoder: nn.Module) -> Shape:
    """What plans of memory and time are made from."""
    config: Any = decoder.config
    hidden = len(_embedding(decoder).weight[0])
    heads = max(_whole(config, "num_attention_heads") or _whole(config, "num_heads") or [1])
    keys = max(_whole(config, "num_key_value_heads") or [heads])
    size = max(_whole(config, "head_dim") or [max(hidden // heads, 1)])
    return Shape(len(_blocks(decoder)[1]), heads, keys, size, hidden)


def limit_of(model: Any, asked: int) -> tuple[int, str | None]:
    """Where the context has to end, in tokens, and a line for the user where that is early.

    `asked` is the longest row that the config asks for, 0 for none.
    """
    with _told(model, "cannot be run"):
        return _limit_of(decoder_of(model), asked)


def _limit_of(decoder: Any, asked: int) -> tuple[int, str | None]:
    limit, note = context_of(decoder.config), None
    switch = switch_of_positions(decoder)
    if switch is not None and switch < limit:
        limit = switch
        note = (
            f"the context ends at {switch:,} tokens: behind, the position tables of all rows of a "
            "batch would change with its longest"
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
    """The numbers of tokens that some layer's attention ends at, from the shortest on."""
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    off = {
        "sliding_window": not any(settings(config, "use_sliding_window") or [True])
        or "sliding_attention" not in kinds,
        "attention_chunk_size": "chunked_attention" not in kinds,
    }
    return sorted({w for name in WINDOWS if not off.get(name) for w in _whole(config, name)})


def is_odd(model: Any, decoder: nn.Module) -> bool:
    """Whether lengths may matter to a model in a way that its config does not tell us: its code is
    not transformers' own, or the config has windows or position tables of other names."""
    config: Any = decoder.config
    names = [n for n in config.to_dict() if ("window" in n or "chunk" in n) and n not in KNOWN]
    unknown = any(_whole(config, name) for name in names)
    stretched = bool(_whole(config, "original_max_position_embeddings"))
    told = any(hasattr(module, "rope_type") for module in decoder.modules())
    foreign = not type(model).__module__.startswith("transformers.")
    return foreign or unknown or (stretched and not told)


def only_attention(config: Any) -> bool:
    """Whether every layer attends to keys and values; a state of another kind has no tree."""
    return set(getattr(config, "layer_types", None) or LAYERS) <= LAYERS


def switch_of_positions(decoder: Any) -> int | None:
    """The longest batch before the rotary tables change for all of its rows; None: they never do.

    LongRoPE takes other frequencies once any row is longer, dynamic NTK new ones for each length;
    Llama 4 scales its queries by the slots in front of them.
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
    """How many positions a rotary module was made for before its table is stretched."""
    config = module.config
    table = getattr(config, "rope_parameters", None) or {}
    table = table.get(layer, table) if layer else table
    length = table.get("original_max_position_embeddings")
    return int(length or getattr(module, "original_max_seq_len", None) or context_of(config))


# ---- the head ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadForm:
    """The logits are cap · tanh(scale · (h Wᵀ + b) / cap), without the tanh where `cap` is None."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """The logits from what the head gives."""
        raw = raw if self.scale == 1 else raw * self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap


def head_of(model: Any) -> nn.Linear:
    """The LM head; a UserError where there is none, or no linear one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise _unsupported(model, "has no linear LM head")
    return head


@torch.no_grad()
def head_form(model: Any, decoder: Any) -> HeadForm:
    """What a model makes of its head's numbers: measured on numbers put in their place, in fp32.

    A model that does anything else (or runs its head on other states than the decoder's last) is
    refused with a UserError.
    """
    head = head_of(model)
    states: list[Tensor] = []
    raw = torch.empty(0)

    def replace(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        nonlocal raw
        states.append(args[0])
        raw = torch.linspace(-80, 80, out.numel(), device=out.device).view(out.shape)
        raw[..., 0], raw[..., 1] = 1e-2, 1e6  # the slope at 0, and where a cap ends
        return raw

    handle = head.register_forward_hook(replace)
    try:
        with _told(model, "cannot be run"):
            ids = _spread(decoder, 4)[None].to(head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            out = decoder(input_ids=ids, use_cache=False, return_dict=True)
            last = out.last_hidden_state.float()
    finally:
        handle.remove()
    if len(states) != 1 or logits.shape != raw.shape:
        raise _unsupported(model, "has an LM head that is not run as one linear layer")
    slope, end = float(logits[..., 0].mean()) / 1e-2, float(logits[..., 1].mean())
    slope = 1.0 if abs(slope - 1) < 1e-5 else slope
    capped = not abs(end - slope * 1e6) <= 1e-3 * abs(slope) * 1e6
    form = HeadForm(slope, end if capped else None)
    near = 1e-4 if head.weight.dtype == torch.float32 else 1e-2
    fits = slope > 0 and end > 0 and torch.allclose(logits, form.apply(raw), 1e-4, 1e-4)
    given = states[0].float()
    factor = float((given * last).sum() / last.square().sum())  # MiniCPM's, between the two
    factor = 1.0 if abs(factor - 1) < near else factor
    fits = fits and (factor == 1 or head.bias is None)
    if not fits or not torch.allclose(given, factor * last, near, near):
        raise _unsupported(model, "does more behind its last layer than an LM head, a scale or cap")
    return HeadForm(form.scale * factor, form.cap)


def _embedding(decoder: Any) -> Any:
    """The module that turns token ids into vectors."""
    return decoder.get_input_embeddings()


def _spread(decoder: Any, count: int) -> Tensor:
    """Token ids from all over the vocabulary."""
    size = len(_embedding(decoder).weight)
    return torch.arange(1, count + 1) * max(size // (count + 2), 1) % size


# ---- rows to compare ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A few prompts and answers; answer j stands behind prompt `owners[j]`."""

    prompts: list[list[int]]
    answers: list[list[int]]
    owners: list[int]

    @property
    def longest(self) -> int:
        """The tokens of the longest row."""
        pairs = zip(self.answers, self.owners, strict=True)
        return max(len(self.prompts[owner]) + len(answer) for answer, owner in pairs)


@dataclass(frozen=True)
class Trial:
    """A probe, and what the model gives for its answers' tokens, one row at a time, as loaded:
    logits (N, V), or in a `brief` trial states (N, H) of the first layers, in fp32 whatever the
    model's dtype. `exact`: they are of fp32."""

    probe: Probe
    wanted: Tensor
    exact: bool = True
    brief: bool = True


@dataclass(frozen=True)
class Reference:
    """What the model gives as it was loaded.

    The `near` trials are of short prompts that share a prefix, in the first layers and in the whole
    model: in low precision rounding hides small mistakes of the whole. Each of the `far` ones
    reaches behind a window, in the first layers. `idle` are the linear layers that the model never
    calls, whatever it does with their weights.
    """

    near: list[Trial]
    far: list[Trial]
    idle: frozenset[str]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokenizer: Any, reach: int) -> Reference:
        """Run them; `reach` is the length of the longest row that the run can have."""
        with _told(model, "cannot be run"):
            return cls._of(model, tokenizer, reach)

    @classmethod
    def _of(cls, model: Any, tokenizer: Any, reach: int) -> Reference:
        decoder = decoder_of(model)
        weight = _embedding(decoder).weight
        size = len(weight)
        ids = [i % size for i in tokenizer(TEXT)["input_ids"]] or [0]
        exact = weight.dtype == torch.float32
        room = min(reach, 60)
        short, whole = _short(ids, size, room, 12), _short(ids, size, room, 5)
        if not exact:  # where the whole is compared roughly, one row is enough
            whole = Probe(whole.prompts[:1], [whole.answers[0][:3]], [0])
        with _watched(model) as idle:
            near = [Trial(whole, _logits_alone(model, whole), exact, brief=False)]
        behind = [w for w in windows(decoder.config) if short.longest < w < reach]
        with _brief(decoder):
            near.insert(0, Trial(short, _states_alone(decoder, short)))
            if is_odd(model, decoder) and reach > room:
                top = min([reach, FAR, *windows(decoder.config)])
                long = _behind(ids, size, max(top - 40, 1), top)
                near.append(Trial(long, _states_alone(decoder, long)))
            probes = [_behind(ids, size, window, reach) for window in behind]
            far = [Trial(probe, _states_alone(decoder, probe)) for probe in probes]
        if not all(bool(trial.wanted.isfinite().all()) for trial in (*near, *far)):
            raise UserError(
                "model.name_or_path: the model's logits are NaN or infinite; its weights are "
                "damaged, or model.dtype is too narrow for them"
            )
        return cls(near, far, frozenset(idle))


@contextmanager
def _told(model: Any, what: str) -> Iterator[None]:
    """Inside, whatever a library raises is one line; but for a lack of memory, which is not the
    model's doing."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError, UserError):
        raise
    except Exception as error:
        raise _unsupported(model, f"{what} ({_reason(error)})") from error


@contextmanager
def _brief(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder computes in fp32 and ends behind its first layers, with one of every kind
    or more.

    The layers and tensors are put aside and put back, not changed. Embeddings, which are large,
    stay as they are, and what they give is widened.
    """
    name, blocks = _blocks(decoder)
    parent, _, own = name.rpartition(".")
    holder = decoder.get_submodule(parent)
    setattr(holder, own, nn.ModuleList(list(blocks)[: _enough(decoder.config, blocks)]))
    tables = [m for m in decoder.modules() if isinstance(m, nn.Embedding)]
    large = {id(table.weight) for table in tables}
    tensors = {id(t): t for t in (*decoder.parameters(), *decoder.buffers()) if id(t) not in large}
    low = [(t, t.data) for t in tensors.values() if t.dtype in (torch.bfloat16, torch.float16)]
    hooks = [table.register_forward_hook(_widen) for table in tables]
    try:
        for tensor, data in low:
            tensor.data = data.float()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, data in low:
            tensor.data = data
        setattr(holder, own, blocks)


def _widen(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.float()


def _blocks(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, the first list of modules, and its name."""
    lists = ((n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList))
    return next(lists)


def _enough(config: Any, blocks: nn.ModuleList) -> int:
    """How many layers hold one of every kind, and two at least."""
    types = getattr(config, "layer_types", None) or [None] * len(blocks)
    kinds = [
        (kind, *(type(module).__name__ for module in block.modules()))
        for kind, block in zip(types, blocks, strict=False)
    ]
    return max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[str]]:
    """Inside, linear layers are watched; the set then holds those that were not called.

    Where one of several layers of a name is called, such as an expert, all of them count as called.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    kind = {name: re.sub(r"\d+", "#", name) for name in linears}
    called, idle = set[str](), set[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(kind[name])

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
    try:
        yield idle
    finally:
        for handle in handles:
            handle.remove()
    idle |= {name for name in linears if kind[name] not in called}


def _short(ids: Sequence[int], size: int, room: int, answer: int) -> Probe:
    """Two ragged prompts that share a prefix, three ragged answers, the longest of `answer` tokens;
    rows of up to `room` tokens."""
    row = (list(ids) * 40)[:room]
    other = [(i * 7 + 3) % size for i in range(9)]
    longest = max(room - 16, 2)
    shared = max(longest - 6, 1)
    answers = [row[-answer:] if room > 20 else row[:1], other[:3], other[3:7]]
    return Probe([row[:longest], [*row[:shared], *other]], answers, [0, 0, 1])


def _behind(ids: Sequence[int], size: int, window: int, reach: int) -> Probe:
    """Rows that are longer than a window, by a little and by more, and one that grows across."""
    body = [(i * 31 + ids[i % len(ids)]) % size for i in range(min(window + 40, reach))]
    lengths = [len(body) - 5, max(len(body) - 33, 1), max(window - 2, 1)]
    answers = [body[3:8], body[9:12], body[5:9]]
    return Probe([body[-n:] for n in lengths], answers, [0, 1, 2])


def _logits_alone(model: Any, probe: Probe) -> Tensor:
    """The model's own logits (N, V) of the answers' tokens, one row without padding, fp32."""
    few = "logits_to_keep" in inspect.signature(model.forward).parameters  # the head is wide
    found = []
    for row, count in _rows(model, probe):
        named = {"logits_to_keep": count} if few else {}
        found.append(model(input_ids=row, use_cache=False, **named).logits[0, -count:].float())
    return torch.cat(found)


def _states_alone(decoder: Any, probe: Probe) -> Tensor:
    """The states (N, H) that predict the answers' tokens, one row without padding, fp32."""
    return torch.cat(
        [
            decoder(input_ids=row, use_cache=False, return_dict=True).last_hidden_state[0, -count:]
            for row, count in _rows(decoder, probe)
        ]
    ).float()


def _rows(model: nn.Module, probe: Probe) -> Iterator[tuple[Tensor, int]]:
    """The token ids (1, T) of each answer behind its prompt, and how many of them it has."""
    device = next(model.parameters()).device
    for answer, owner in zip(probe.answers, probe.owners, strict=True):
        yield torch.tensor([[*probe.prompts[owner], *answer[:-1]]], device=device), len(answer)


# ---- which path ----------------------------------------------------------------------------------


def choose_path(policy: Runner, wanted: str, reference: Reference | None = None) -> bool:
    """Whether the prefix tree may be used: it must give the reference's logits (None: those of the
    model as it is), in one pass and token by token.

    Where the tree is not used, the plain path must give them; that it does not is a UserError.
    """
    if reference is None:
        limit = limit_of(policy.model, 0)[0]
        reference = Reference.of(policy.model, policy.tokenizer, limit)
    if wanted != "plain":
        reason = _against_the_tree(policy, reference)
        if reason is None:
            return True
        if wanted == "tree":
            raise UserError(f"model.path: in the prefix tree this model {reason}; use auto")
    if reason := _objection(policy, [*reference.near, *reference.far], False):
        raise _unsupported(policy.model, reason)
    return False


def _against_the_tree(policy: Runner, reference: Reference) -> str | None:
    if policy.window is not None and policy.window < reference.near[0].probe.longest:
        return f"has a window of {policy.window} tokens, too short to be checked"
    if not policy.takes_positions or not only_attention(policy.decoder.config):
        return "takes no positions, or has layers that do not attend"
    return _objection(policy, reference.near, True)


def longest_row(policy: Runner, reference: Reference) -> int | None:
    """Where rows have to end if the plain path, which takes those behind a window, is wrong there;
    None where it is right, or nothing was to be tried."""
    return policy.window if _objection(policy, reference.far, False) else None


@torch.no_grad()
def _objection(policy: Runner, trials: Sequence[Trial], shared: bool) -> str | None:
    """What is wrong with a path (`shared`: the tree) in these trials; None: nothing."""
    for trial in trials:
        try:
            with _brief(policy.decoder) if trial.brief else nullcontext():
                passes = [run(policy, trial.probe, shared) for run in (_in_one_pass, _decoded)]
            found = [x.float() if trial.brief else policy.logits(x) for x in passes]
        except (torch.cuda.OutOfMemoryError, MemoryError, UserError):
            raise
        except Exception as error:  # attention, or a past, of its own kind
            return f"cannot be run in batches ({_reason(error)})"
        for one, where in zip(found, ("padding", "tokens that were run before"), strict=True):
            if not _near(one, trial.wanted, trial.exact):
                return f"gives other logits behind {where} than for one row alone"
    return None


def _near(found: Tensor, wanted: Tensor, exact: bool) -> bool:
    """Whether logits are the same but for rounding; NaN is not."""
    gap = found - wanted
    if exact:
        return float(gap.abs().max()) <= EXACT * max(1.0, float(wanted.abs().max()) / 10)
    spread = wanted - wanted.mean(-1, keepdim=True)
    return float(gap.square().mean()) <= ROUGH**2 * float(spread.square().mean())


def _in_one_pass(policy: Runner, probe: Probe, shared: bool) -> Tensor:
    """The states that predict the answers' tokens (N, H), all tokens run at once."""
    tree = pack.build(probe.prompts, probe.answers, probe.owners, shared)
    tree = tree.to(_device(policy))
    flat, _ = passes.run(policy.decoder, tree, policy.takes_positions)
    return flat.index_select(0, tree.positions[tree.mask])


def _decoded(policy: Runner, probe: Probe, shared: bool) -> Tensor:
    """The same states, the answers run token by token; a row leaves the batch when it is over."""
    device, owners, answers = _device(policy), probe.owners, probe.answers
    tree = pack.build(probe.prompts, shared=shared).to(device)
    _, state = passes.run(policy.decoder, tree, policy.takes_positions, keep=True)
    cache = state.start(owners, max(map(len, answers)) - 1)
    rows = list(range(len(answers)))
    states = [[state.ends[owner]] for owner in owners]
    for step in range(max(map(len, answers)) - 1):
        going = [place for place, row in enumerate(rows) if len(answers[row]) > step + 1]
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[place] for place in going]
        token = torch.tensor([answers[row][step] for row in rows], device=device)
        places = [len(probe.prompts[owners[row]]) + step for row in rows]
        place = torch.tensor(places, device=device) if policy.takes_positions else None
        for row, hidden in zip(rows, cache.step(policy.decoder, token, place), strict=True):
            states[row].append(hidden)
    return torch.stack([hidden for row in states for hidden in row])


def _device(policy: Runner) -> torch.device:
    return next(policy.decoder.parameters()).device


def _unsupported(model: Any, reason: str) -> UserError:
    return UserError(
        f"model.name_or_path: {model.config.model_type} {reason}; "
        "this architecture is not supported"
    )


def _reason(error: Exception) -> str:
    """What a library says, in a few words."""
    line = first_line(error, 160)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__

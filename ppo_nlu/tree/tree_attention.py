"""Attention over a packed prefix tree: each token attends to its ancestors, and to nothing else.

All tokens of a tree lie in one row, without padding, so a decoder runs them in one forward. What
makes them separate sequences is this attention. It is a sum of parts: every run of tokens against
itself (causal), and against the run that it continues (all of it). A shared run's keys and values
are there once; many runs' queries meet them in one product. The parts' results are merged by their
log-sum-exp, as in FlashAttention (arXiv 2205.14135, section 3.1) and cascade inference.

With p = exp(s - L), L the log-sum-exp over all parts, the backward of a part needs nothing of the
others but the merged output and L; so each part's gradient is that of an attention of its own.

`attention` is what transformers' attention interface calls; `switched_on` tells it the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from ppo_nlu.ops import without_autocast

NAME = "ppo_nlu_tree"
FUSED_ON = "cpu"  # the device with a fused kernel that gives and takes the log-sum-exp
LOOSE = 0.85  # rows shorter than this share of the longest go to a batch of their own


Index: TypeAlias = "Tensor | slice"


@dataclass
class Part:
    """Queries and keys of one product, as indices of packed tokens: (rows, length), or a slice.

    `bias` (rows, 1, 1, keys) is -inf on padded keys, None where there are none to be seen. Of the
    flattened queries `real` are no padding (None: all of them), and `tokens` are their tokens;
    `padded` (rows, 1, queries) marks the others. The keys are those of an `earlier` pass, or of
    this one.
    """

    queries: Index
    keys: Index
    causal: bool
    bias: Tensor | None
    tokens: Index
    real: Tensor | None
    padded: Tensor | None
    earlier: bool = False

    @classmethod
    def of(
        cls,
        queries: Sequence[tuple[int, int]],
        keys: Sequence[tuple[int, int]] | None = None,
    ) -> Part:
        """Of spans (start, length) of queries and keys; without keys, each against itself."""
        if len(queries) == 1:
            (start, length), (first, count) = queries[0], (keys or queries)[0]
            run = slice(start, start + length)
            return cls(run, slice(first, first + count), keys is None, None, run, None, None)
        index, real = _table(queries)
        at, bias = index, None
        if keys is not None:
            at, seen = _table(keys)
            if not bool(seen.all()):
                bias = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None, None]
        tokens = _run(index[real])
        if bool(real.all()):
            return cls(index, at, keys is None, bias, tokens, None, None)
        picked = real.flatten().nonzero().squeeze(1)
        return cls(index, at, keys is None, bias, tokens, picked, ~real[:, None])

    def to(self, device: torch.device) -> Part:
        """The same part with its tensors on `device`."""
        tensors = ((name, x) for name, x in vars(self).items() if isinstance(x, Tensor))
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors}
        return replace(self, **moved)


@dataclass
class Plan:
    """The parts of one pass over `size` tokens at positions below `reach`: `own` covers every token
    once; `above` leads to the ancestors.

    `keep` receives each layer's keys and values (N, heads, d) where it is a list. The last block's
    states are `wanted` at these tokens alone (None: at all of them). `past` are each layer's keys
    and values of an earlier pass, where some of `above` lead to its tokens.
    """

    own: list[Part]
    above: list[Part]
    keep: list[tuple[Tensor, Tensor]] | None = None
    wanted: Tensor | None = None
    size: int = 0
    reach: int = 0
    past: list[tuple[Tensor, Tensor]] | None = None

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        own, above = [p.to(device) for p in self.own], [p.to(device) for p in self.above]
        wanted = None if self.wanted is None else self.wanted.to(device)
        return replace(self, own=own, above=above, wanted=wanted)


def plan(
    runs: Sequence[tuple[int, int]],
    shared: Sequence[tuple[int, int, int, int]],
    own: Sequence[tuple[int, int, int, int]],
    wanted: Tensor | None = None,
    reach: int = 0,
    earlier: tuple[bool, bool] = (False, False),
) -> Plan:
    """The plan of a packed row; `wanted` and `reach` as in `Plan`.

    Args:
        runs: (start, length) of each run of tokens, which together cover the row.
        shared: (start, length, start, length) of queries and of the run that they stand behind; a
            few, each with many queries, so each is a product of its own.
        own: the same for runs with few queries each, such as a prompt's answers.
        earlier: whether `shared`, and `own`, lead to tokens of an earlier pass.
    """
    ordered = sorted((run for run in runs if run[1]), key=lambda run: -run[1])
    covered = [Part.of(batch) for batch in _batches(ordered, [length for _, length in ordered])]
    links = sorted((link for link in own if link[1] and link[3]), key=lambda link: -link[3])
    batches = [([link], earlier[0]) for link in shared if link[1] and link[3]]
    batches += [(batch, earlier[1]) for batch in _batches(links, [link[3] for link in links])]
    above = [
        replace(Part.of([x[:2] for x in batch], [x[2:] for x in batch]), earlier=before)
        for batch, before in batches
    ]
    return Plan(covered, above, None, wanted, sum(length for _, length in runs), reach)


def _batches(items: Sequence[Any], lengths: Sequence[int]) -> Iterator[list[Any]]:
    """Consecutive items of like length; the lengths fall."""
    batch: list[Any] = []
    longest = 0
    for item, length in zip(items, lengths, strict=True):
        if batch and length < LOOSE * longest:
            yield batch
            batch = []
        if not batch:
            longest = length
        batch.append(item)
    if batch:
        yield batch


def _table(spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Indices (rows, longest) of spans (start, length), and which are real; padding repeats the
    last token of its span."""
    starts, lengths = torch.tensor(spans, dtype=torch.long).unbind(1)
    column = torch.arange(int(lengths.max()))
    real = column < lengths[:, None]
    return starts[:, None] + torch.minimum(column, lengths[:, None] - 1), real


def _run(tokens: Tensor) -> Index:
    """The same tokens as a slice, where they follow each other: copies are then plain ones."""
    first, count = int(tokens[0]), len(tokens)
    if torch.equal(tokens, torch.arange(first, first + count)):
        return slice(first, first + count)
    return tokens


# ---- the interface of transformers -----------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row: query (1, heads, N, d), key (1, fewer heads, N, d), value (1,
    fewer heads, N, up to d). Returns (1, N, heads, size of a value) and no weights.
    """
    tree = _running[0]
    assert tree is not None, "the prefix tree's attention is called from outside of a pass"
    window = rest.get("sliding_window")
    if dropout or rest.get("softcap") or rest.get("s_aux") is not None:
        raise NotImplementedError("the prefix tree knows plain attention without dropout only")
    if window and window < tree.reach:
        raise NotImplementedError(f"the prefix tree knows plain attention only, no window {window}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # they may come in two dtypes; none is cast below
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    size = v.shape[-1]
    if size < q.shape[-1]:  # multi-head latent attention: its values are smaller
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - size))
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(tree, TreeCache):
        with without_autocast(query):
            return tree.attend(layer, q, k, v, scale)[None, ..., :size], None
    if tree.keep is not None:
        if layer != len(tree.keep):
            raise NotImplementedError("the prefix tree needs one attention a layer, in their order")
        tree.keep.append((k, v))
    past = tree.past[layer] if tree.past is not None else ()
    out: Tensor = _TreeAttention.apply(tree, scale, q, k, v, *past)  # type: ignore[no-untyped-call]
    return out[None, ..., :size], None


AttentionInterface.register(NAME, attention)


@contextmanager
def switched_on(config: Any, tree: Plan | TreeCache) -> Iterator[None]:
    """Inside, the model of this config attends by `attention`, and `trim` knows what is wanted."""
    before = config._attn_implementation, _running[0], _config[0]
    config._attn_implementation, _running[0], _config[0] = NAME, tree, config
    try:
        yield
    finally:
        config._attn_implementation, _running[0], _config[0] = before


_running: list[Plan | TreeCache | None] = [None]  # what the pass that is under way runs
_config: list[Any] = [None]  # and the config of the model that runs it


def wanted(module: nn.Module) -> Tensor | None:
    """The tokens that a module runs alone, if `trim` has found it and this pass wants a few."""
    tree = _running[0]
    if not isinstance(tree, Plan) or _whole[0] or not getattr(module, "trimmed", False):
        return None
    return tree.wanted


@contextmanager
def whole() -> Iterator[None]:
    """Inside, the last block runs all tokens, as the others do: for counting."""
    _whole[0] = True
    try:
        yield
    finally:
        _whole[0] = False


_whole = [False]
# Modules of a block that work token by token, as the families of models name them. Keys and values
# are not among them: those of every token are looked at.
_TRIMMED = ("mlp", "q_proj", "o_proj", "dense", "attn.c_proj", "out_proj")


def trim(decoder: nn.Module) -> list[str]:
    """From now on the last block runs, of each packed tree, the wanted tokens alone where it can:
    its queries, the projection behind the attention, and the MLP. The names of these modules.

    The states of the other tokens come out wrong, and nobody asks for them.
    """
    block = _blocks(decoder)[-1]
    names = [n for n, _ in block.named_modules() if n.endswith(_TRIMMED)]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    for module in map(block.get_submodule, outer):
        if not getattr(module, "trimmed", False):  # of another policy around the same model
            module.trimmed = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_pick)
            module.register_forward_hook(_place)
    return outer


def _pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    picked = wanted(module)
    return None if picked is None else (args[0].index_select(1, picked), *args[1:])


def _place(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
    picked, tree = wanted(module), _running[0]
    if picked is None or not isinstance(tree, Plan):
        return None
    if not isinstance(out, Tensor):
        raise NotImplementedError(f"{type(module).__name__} gives more than a tensor")
    whole = out.new_zeros(out.shape[0], tree.size, out.shape[2])
    return whole.index_copy(1, picked, out)


# ---- all tokens at once, with gradients ------------------------------------------------------


class _TreeAttention(torch.autograd.Function):
    """`attend` and `attend_backward`, for autograd."""

    @staticmethod
    def forward(
        ctx: Any, tree: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, *past: Tensor
    ) -> Tensor:
        with without_autocast(q):
            out, lse = attend(tree, scale, q, k, v, past)
        ctx.save_for_backward(q, k, v, out, lse, *past)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *past = ctx.saved_tensors
        into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with without_autocast(q):
            older = attend_backward(ctx.tree, ctx.scale, grads[0], q, k, v, out, lse, past, into)
        return None, None, *into, *older


def attend(
    tree: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, past: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The output (N, heads, d) and log-sum-exp (N, heads) of queries (N, heads, d) over keys and
    values (N, fewer heads, d); `past` are those (M, fewer heads, d) of an earlier pass."""
    k, v, *past = _repeated(q, k, v, *past)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=q.device)
    if q.dtype == torch.float64:
        lse = lse.double()
    for part in tree.own:
        o, norm = _product(q, k, v, part, scale)
        _put(out, part.tokens, o)
        _put(lse, part.tokens, norm)
    for part in tree.above:
        above_k, above_v = past if part.earlier else (k, v)
        more = _product(q, above_k, above_v, part, scale)
        before = _take(out, part.tokens), _take(lse, part.tokens)
        _merge_into(*before, *more)
        if not isinstance(part.tokens, slice):  # these were copies
            _put(out, part.tokens, before[0])
            _put(lse, part.tokens, before[1])
    return out, lse


def attend_backward(
    tree: Plan,
    scale: float,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    past: Sequence[Tensor],
    into: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor]:
    """Write the gradients of q, k and v into `into`; returns those of `past`. The others are what
    `attend` took and gave, and the gradient (N, heads, d) of its output."""
    repeated = q.shape[1] != k.shape[1]
    fewer, fewer_past = into[1:], past
    k, v, *past = _repeated(q, k, v, *past)
    dq = into[0]
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if repeated else fewer
    for part in tree.own:  # which cover each token once
        gq, gk, gv = _part_grads(grad, q, k, v, out, lse, part, scale)
        _put(dq, part.tokens, _real(gq, part))
        _put(dk, part.tokens, _real(gk, part))
        _put(dv, part.tokens, _real(gv, part))
    older = [torch.zeros_like(x) for x in past]
    for part in tree.above:
        above_k, above_v = past if part.earlier else (k, v)
        sum_k, sum_v = older if part.earlier else (dk, dv)
        gq, gk, gv = _part_grads(grad, q, above_k, above_v, out, lse, part, scale)
        _add(dq, part.queries, _flat(gq))
        _add(sum_k, part.keys, _flat(gk))
        _add(sum_v, part.keys, _flat(gv))
    if repeated:  # heads that share keys are summed
        for small, large in zip(fewer, (dk, dv), strict=True):
            torch.sum(large.unflatten(1, (small.shape[1], -1)), 2, out=small)
        older = [
            x.unflatten(1, (few.shape[1], -1)).sum(2)
            for x, few in zip(older, fewer_past, strict=True)
        ]
    return older


def _repeated(q: Tensor, *pairs: Tensor) -> list[Tensor]:
    """Keys and values with as many heads as q has."""
    groups = q.shape[1] // pairs[0].shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in pairs]


def _part_grads(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    part: Part,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (rows, heads, length, d) of a part's queries, keys and values; 0 in the padding."""
    d_out, norm = _rows(grad, part.queries), _rows(lse, part.queries)
    if part.padded is not None:
        norm = norm.masked_fill(part.padded, math.inf)  # all weights of these queries are 0
    rows = _rows(q, part.queries), _rows(k, part.keys), _rows(v, part.keys)
    return _backward(d_out, *rows, _rows(out, part.queries), norm, part.causal, part.bias, scale)


def _take(x: Tensor, index: Index) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _put(x: Tensor, index: Index, values: Tensor) -> None:
    if isinstance(index, slice):
        x[index] = values
    else:
        x.index_copy_(0, index, values)


def _add(x: Tensor, index: Index, values: Tensor) -> None:
    if isinstance(index, slice):
        x[index] += values
    else:
        x.index_add_(0, index.flatten(), values)


def _rows(x: Tensor, index: Index) -> Tensor:
    """(N, heads, ...) and (rows, length) to (rows, heads, length, ...)."""
    if isinstance(index, slice):
        return x[index].transpose(0, 1)[None]
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(rows, heads, length, ...) to (rows · length, heads, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Output (n, heads, d) and log-sum-exp (n, heads) of the part's real queries."""
    rows = _rows(q, part.queries), _rows(k, part.keys), _rows(v, part.keys)
    out, lse = partial_attention(*rows, part.causal, part.bias, scale)
    return _real(out, part), _real(lse, part)


def _real(x: Tensor, part: Part) -> Tensor:
    """(rows, heads, length, ...) of queries to (n, heads, ...) of those that are no padding."""
    x = _flat(x)
    return x if part.real is None else x.index_select(0, part.real)


def _merge_into(out: Tensor, lse: Tensor, more: Tensor, norm: Tensor) -> None:
    """`merge` into the first two."""
    if out.dtype == lse.dtype:
        out.lerp_(more, torch.sigmoid(norm - lse)[..., None])
    else:
        out.copy_(merge(out, lse, more, norm))
    torch.logaddexp(lse, norm, out=lse)


def merge(out: Tensor, lse: Tensor, more: Tensor, norm: Tensor) -> Tensor:
    """Two attentions (…, d) of the same queries over different keys, as one over all of them.

    The second's share is exp(norm) / (exp(lse) + exp(norm)). In low precision the sum is rounded
    once.
    """
    share = torch.sigmoid(norm - lse)[..., None]
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share).to(out.dtype)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(s q kᵀ + bias) v and the log-sum-exp (rows, heads, queries).

    q, k, v (rows, heads, length, d); bias (rows, 1, 1, keys).
    """
    if q.device.type == FUSED_ON:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=None if bias is None else bias.to(q.dtype), scale=scale
        )
    scores = _scores(q, k, causal, bias, scale)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.to(lse.dtype)).to(v.dtype), lse


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least: a product of bf16 tensors would round what it has summed."""
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    scores = _wide(q) @ _wide(k).transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if bias is None else scores + bias


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp."""
    if q.device.type == FUSED_ON:
        mask = None if bias is None else bias.to(q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    weights = (_scores(q, k, causal, bias, scale) - lse[..., None]).exp()
    d_out = _wide(grad)
    d_weights = d_out @ _wide(v).transpose(-1, -2)
    inner = (d_out * _wide(out)).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - inner) * scale
    dq, dk = d_scores @ _wide(k), d_scores.transpose(-1, -2) @ _wide(q)
    dv = weights.transpose(-1, -2) @ d_out
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


# ---- one token a row, without gradients ------------------------------------------------------


class TreeCache:
    """Keys and values while decoding: each shared run once, and a buffer for each row.

    A row's buffer holds the rest of its prompt, right-padded, then its answer as it grows; nothing
    is copied from step to step. In the static form a step attends to whole buffers, what is not
    there yet masked, and the place of the next token is a tensor, `slot`: every step runs the same
    kernels on the same memory, so that it can be recorded.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        heads: Sequence[tuple[int, int]],
        tails: Sequence[tuple[int, int]],
        parents: Sequence[int],
        room: int,
        reach: int,
        static: bool = False,
        above: Sequence[tuple[Tensor, Tensor]] | None = None,
    ):
        """
        Args:
            layers: keys and values (N, heads, d) of each layer's packed tokens.
            heads: (start, length) of the shared runs, in the same tokens or in those of `above`.
            tails: (start, length) of each row's own tokens.
            parents: each row's shared run, -1 for none.
            room: how many tokens may follow.
            reach: how many positions there are with these.
            static: take the static form.
        """
        self.reach, self.static = reach, static
        device = layers[0][0].device
        index, real = _table(tails)
        index = index.to(device)
        self.width = index.shape[1]
        rows = len(tails)
        self.bias = torch.full((rows, 1, 1, self.width + room), -math.inf)
        self.bias[:, 0, 0, : self.width].masked_fill_(real, 0.0)
        if not static:
            self.bias[:, 0, 0, self.width :] = 0.0
        self.bias = self.bias.to(device)
        self.slot = torch.tensor([self.width], device=device)
        self.shared = [
            [(k[start : start + n], v[start : start + n]) for start, n in heads]
            for k, v in above or layers
        ]
        self.owners = [
            [r for r, p in enumerate(parents) if p == head] for head in range(len(heads))
        ]
        self._set_members()
        self.own = [(self._buffer(k, index, room), self._buffer(v, index, room)) for k, v in layers]
        self.used = self.width

    @staticmethod
    def _buffer(x: Tensor, index: Tensor, room: int) -> Tensor:
        (rows, width), (_, heads, size) = index.shape, x.shape
        buffer = x.new_zeros(rows, heads, width + room, size)
        buffer[:, :, :width] = _rows(x, index)
        return buffer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """One new token a row: q (rows, heads, d), k and v (rows, fewer heads, d)."""
        keys, values = self.own[layer]
        if self.static:
            keys.index_copy_(2, self.slot, k[:, :, None])
            values.index_copy_(2, self.slot, v[:, :, None])
            stop = keys.shape[2]
        else:
            keys[:, :, self.used], values[:, :, self.used] = k, v
            stop = self.used + 1
        groups = q.shape[1] // k.shape[1]
        rows = q[:, :, None]  # (rows, heads, 1, d)
        bias = self.bias[..., :stop]
        own_k, own_v = keys[:, :, :stop], values[:, :, :stop]
        if groups > 1:  # heads that share keys are further queries
            rows = q.unflatten(1, (k.shape[1], groups))
        out, lse = partial_attention(rows, own_k, own_v, False, bias, scale)
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:2])
        for members, (head_k, head_v) in zip(self.members, self.shared[layer], strict=True):
            all_rows = len(members) == len(q)
            if not len(members):
                continue
            asked = q if all_rows else q[members]
            more, norm = _against(asked, head_k, head_v, scale)
            if all_rows:
                out = merge(out, lse, more, norm)
            else:
                out[members] = merge(out[members], lse[members], more, norm)
        return out

    def step(self, decoder: nn.Module, token: Tensor, place: Tensor | None) -> Tensor:
        """Run one token a row, at its position; the last hidden states (rows, H)."""
        assert place is not None
        if self.static:
            self.bias.index_fill_(3, self.slot, 0.0)
        out = forward(decoder, token, place, self)
        if self.static:
            self.slot.add_(1)
        else:
            self.used += 1
        return out

    def keep(self, going: Sequence[int]) -> None:
        """Go on with these rows only."""
        assert not self.static
        rows = torch.tensor(going, device=self.bias.device)
        self.own = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.own]
        self.bias = self.bias.index_select(0, rows)
        place = {row: new for new, row in enumerate(going)}
        self.owners = [[place[r] for r in owned if r in place] for owned in self.owners]
        self._set_members()

    def _set_members(self) -> None:
        device = self.bias.device
        self.members = [
            torch.tensor(owned, device=device, dtype=torch.long) for owned in self.owners
        ]


def _against(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All of q (n, heads, d) against one run's k and v (length, fewer heads, d)."""
    n, heads, size = q.shape
    groups = heads // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], groups)).permute(1, 0, 2, 3).flatten(1, 2)[None]
    out, lse = partial_attention(
        rows, k.transpose(0, 1)[None], v.transpose(0, 1)[None], False, None, scale
    )
    back = out[0].unflatten(1, (n, groups)).permute(1, 0, 2, 3).reshape(n, heads, size)
    return back, lse[0].unflatten(1, (n, groups)).permute(1, 0, 2).reshape(n, heads)


def checkpoint_blocks(decoder: nn.Module) -> None:
    """From now on each block of the decoder keeps its input alone and is run again in the backward.

    transformers' own switch works in train mode only, which turns dropout on.
    """
    for block in _blocks(decoder):
        block.forward = MethodType(_recomputed, block)  # a copy of the block gets its own


def _blocks(decoder: nn.Module) -> nn.ModuleList:
    """The outermost list of modules: the decoder's blocks."""
    return next(module for module in decoder.modules() if isinstance(module, nn.ModuleList))


def _recomputed(block: nn.Module, *args: Any, **named: Any) -> Any:
    plain: Callable[..., Any] = MethodType(type(block).forward, block)
    tree, config = _running[0], _config[0]
    if not torch.is_grad_enabled() or not isinstance(tree, Plan):
        return plain(*args, **named)

    def again(*args: Any, **named: Any) -> Any:
        with switched_on(config, tree):  # the backward comes when it is off again
            return plain(*args, **named)

    return checkpoint(again, *args, use_reentrant=False, **named)


def forward(decoder: nn.Module, ids: Tensor, places: Tensor, tree: Plan | TreeCache) -> Tensor:
    """One forward of packed tokens (N,) at their positions; hidden states (N, H)."""
    with switched_on(decoder.config, tree):
        out = decoder(
            input_ids=ids[None],
            attention_mask=None,
            position_ids=places[None],
            use_cache=False,
            return_dict=True,
        )
    return out.last_hidden_state[0]

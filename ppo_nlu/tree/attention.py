"""Attention over a packed prefix tree: each token attends to its ancestors and to nothing else.

All tokens of a tree lie in one row without padding, so a decoder runs them in one forward. This
attention keeps the sequences apart. It has several parts: every run of tokens attends to itself
(causal), and to the run that it continues (all of it). The keys and values of a prefix are there
once; the queries of many runs meet them in one product. The results of the parts are merged by
their log-sum-exp, as in FlashAttention (arXiv 2205.14135, section 3.1) and cascade inference.

The weights are p = exp(s - L), where L is the log-sum-exp over all parts. So the backward of a part
needs only the merged output and L of the others: it is that of an attention of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_nlu.ops import without_autocast
from ppo_nlu.tree.plan import Index, Part, Plan

FUSED_ON = "cpu"  # the device with a fused kernel that gives and takes the log-sum-exp


Layers = list[tuple[Tensor, Tensor]]  # keys and values (N, heads, d) of each layer


@dataclass
class PackedPass:
    """One pass over a packed tree.

    `earlier` are the keys and values of an earlier pass, where the plan leads to its tokens. Those
    of this pass are appended to `kept`, layer by layer, unless it is None.
    """

    plan: Plan
    earlier: Layers | None = None
    kept: Layers | None = None

    @property
    def longest(self) -> int:
        """The longest sequence of the tree."""
        return self.plan.longest

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The attention (N, heads, d) of all tokens in this layer, with gradients."""
        if self.kept is not None:
            if layer != len(self.kept):
                raise NotImplementedError(
                    "the prefix tree needs one attention in each layer, in the layers' order"
                )
            self.kept.append((k, v))
        earlier = () if self.earlier is None else self.earlier[layer]
        return TreeAttention.apply(self.plan, scale, q, k, v, *earlier)  # type: ignore[no-any-return, no-untyped-call]


class Attended(NamedTuple):
    """Queries, keys and values (…, heads, …, d), their attention, and its log-sum-exp."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class TreeAttention(torch.autograd.Function):
    """`attend` and `attend_backward`, for autograd."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, *earlier: Tensor
    ) -> Tensor:
        with without_autocast(q):
            out, lse = attend(plan, scale, q, k, v, earlier)
        ctx.save_for_backward(q, k, v, out, lse, *earlier)
        ctx.plan, ctx.scale = plan, scale  # not the pass: what it keeps would never be freed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *earlier = ctx.saved_tensors
        done = Attended(q=q, k=k, v=v, out=out, lse=lse)
        with without_autocast(q):
            return None, None, *attend_backward(ctx.plan, ctx.scale, grads[0], done, earlier)


def attend(
    plan: Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, earlier: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The output (N, heads, d) and log-sum-exp (N, heads) of queries (N, heads, d) over keys and
    values (N, key heads, d), and over those (M, key heads, d) of an `earlier` pass."""
    k, v, *earlier = _for_all_heads(q, k, v, *earlier)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], device=q.device)
    if q.dtype == torch.float64:
        lse = lse.double()
    for part in plan.own:
        o, norm = _product(q, k, v, part, scale)
        _put(out, part.tokens, o)
        _put(lse, part.tokens, norm)
    for part in plan.ancestors:
        keys, values = earlier if part.earlier else (k, v)
        more = _product(q, keys, values, part, scale)
        before = _take(out, part.tokens), _take(lse, part.tokens)
        _merge_into(*before, *more)
        if not isinstance(part.tokens, slice):  # these were copies
            _put(out, part.tokens, before[0])
            _put(lse, part.tokens, before[1])
    return out, lse


def attend_backward(
    plan: Plan, scale: float, grad: Tensor, done: Attended, earlier: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of q, k, v and of the keys and values of an `earlier` pass, from `grad`
    (N, heads, d), that of the output."""
    fewer = [done.k, done.v, *earlier]
    k, v, *earlier = _for_all_heads(done.q, *fewer)
    done = done._replace(k=k, v=v)
    dq, dk, dv = torch.empty_like(done.q), torch.empty_like(k), torch.empty_like(v)
    for part in plan.own:  # these cover each token once, so nothing has to be added
        gq, gk, gv = _part_grads(grad, done, part, scale)
        _put(dq, part.tokens, _real(gq, part))
        _put(dk, part.tokens, _real(gk, part))
        _put(dv, part.tokens, _real(gv, part))
    older = [torch.zeros_like(x) for x in earlier]
    for part in plan.ancestors:
        keys, values = earlier if part.earlier else (k, v)
        sum_k, sum_v = older if part.earlier else (dk, dv)
        gq, gk, gv = _part_grads(grad, done._replace(k=keys, v=values), part, scale)
        _add(dq, part.queries, _flat(gq))
        _add(sum_k, part.keys, _flat(gk))
        _add(sum_v, part.keys, _flat(gv))
    return [dq, *map(_summed_over_heads, [dk, dv, *older], fewer)]


def _for_all_heads(q: Tensor, *pairs: Tensor) -> list[Tensor]:
    """Keys and values repeated so that each query head has its own."""
    groups = q.shape[1] // pairs[0].shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in pairs]


def _summed_over_heads(grad: Tensor, fewer: Tensor) -> Tensor:
    """The gradient of keys or values, summed over the query heads that share them."""
    if grad.shape[1] == fewer.shape[1]:
        return grad
    return torch.sum(grad.unflatten(1, (fewer.shape[1], -1)), 2, out=torch.empty_like(fewer))


def _part_grads(
    grad: Tensor, done: Attended, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (rows, heads, length, d) of a part's queries, keys and values; 0 on padding."""
    d_out, norm = rows_of(grad, part.queries), rows_of(done.lse, part.queries)
    if part.padded is not None:
        norm = norm.masked_fill(part.padded, math.inf)  # all weights of these queries are 0
    rows = Attended(
        q=rows_of(done.q, part.queries),
        k=rows_of(done.k, part.keys),
        v=rows_of(done.v, part.keys),
        out=rows_of(done.out, part.queries),
        lse=norm,
    )
    return partial_backward(d_out, rows, part.causal, part.bias, scale)


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


def rows_of(x: Tensor, index: Index) -> Tensor:
    """(N, heads, ...) and (rows, length) to (rows, heads, length, ...)."""
    if isinstance(index, slice):
        return x[index].transpose(0, 1)[None]
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """(rows, heads, length, ...) to (rows · length, heads, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _product(q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Output (n, heads, d) and log-sum-exp (n, heads) of the part's real queries."""
    rows = rows_of(q, part.queries), rows_of(k, part.keys), rows_of(v, part.keys)
    out, lse = partial_attention(*rows, part.causal, part.bias, scale)
    return _real(out, part), _real(lse, part)


def _real(x: Tensor, part: Part) -> Tensor:
    """(rows, heads, length, ...) of queries to (n, heads, ...) without the padding."""
    x = _flat(x)
    return x if part.real is None else x.index_select(0, part.real)


def _merge_into(out: Tensor, lse: Tensor, more: Tensor, norm: Tensor) -> None:
    """`merge`, written into `out` and `lse`."""
    if out.dtype == lse.dtype:
        out.lerp_(more, torch.sigmoid(norm - lse)[..., None])
    else:
        out.copy_(merge(out, lse, more, norm))
    torch.logaddexp(lse, norm, out=lse)


def merge(out: Tensor, lse: Tensor, more: Tensor, norm: Tensor) -> Tensor:
    """The attention (…, d) of queries over all keys, from those over two sets of them: `out` and
    `more`, with their log-sum-exps `lse` and `norm`.

    The share of `more` is exp(norm) / (exp(lse) + exp(norm)). In low precision the sum is rounded
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
    """At least fp32: a product of bf16 tensors would round its sums."""
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    scores = _wide(q) @ _wide(k).transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if bias is None else scores + bias


def partial_backward(
    grad: Tensor, done: Attended, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one part, given the merged output and log-sum-exp."""
    q, k, v, out, lse = done
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

"""A block of a Llama-like decoder over a packed tree as one autograd node, for the CPU.

    n = norm₁(x),  q, k, v = rotate(W_q n), rotate(W_k n), W_v n,  h = x + W_o attention(q, k, v)
    m = norm₂(h),  y = h + W_d (silu(W_g m) ∘ W_u m)

each W with its LoRA. As the forty modules and autograd nodes of a library a block of a small model
spends as long between its products as in them. Here the forward is written out, with the sums taken
into the products, and the backward with it; W and the norms' weights are constants. `attach` gives
the blocks of a model this forward; any other pass, dtype or device takes the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ppo_nlu import ops, tree_attention
from ppo_nlu.lora import LoraLinear
from ppo_nlu.norms import FrozenRMSNorm, gradient, normalise
from ppo_nlu.tree_attention import Plan, TreeCache

TYPES = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer")
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # the modules' names are these and _proj
Index: TypeAlias = "Tensor | None"


def attach(decoder: nn.Module) -> int:
    """Give every block of a kind that is known this forward, in place; returns how many."""
    blocks = [m for m in decoder.modules() if type(m).__name__ in TYPES and _known(m)]
    for block in blocks:
        block.__class__ = _packed(type(block))
    return len(blocks)


def detach(decoder: nn.Module) -> None:
    """Give the blocks the library's forward back."""
    for block in decoder.modules():
        if isinstance(block, PackedBlock):
            block.__class__ = type(block).__bases__[1]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _packed(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        _classes[kind] = type(f"Packed{kind.__name__}", (PackedBlock, kind), {})
    return _classes[kind]


def _empty(kind: type[nn.Module]) -> nn.Module:
    packed: Any = _packed(kind)
    return packed.__new__(packed)


def _known(block: Any) -> bool:
    """Whether the block is made of the parts that are written out here, and of no others."""
    around = {name for name, _ in block.named_children()}
    if around != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    parts = {name for part in (block.self_attn, block.mlp) for name, _ in part.named_children()}
    return (
        parts - {"act_fn"} == {f"{name}_proj" for name in LINEARS}
        and isinstance(block.input_layernorm, FrozenRMSNorm)
        and isinstance(block.post_attention_layernorm, FrozenRMSNorm)
        and type(block.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


class PackedBlock(nn.Module):
    """The forward that `attach` puts before that of the library's class."""

    def __reduce__(self) -> Any:
        return _empty, (type(self).__bases__[1],), self.__dict__  # the class itself has no address

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """(1, N, H) of a packed row, or of one token a row while decoding, to the same shape."""
        tree, rotary = tree_attention.running(), named.get("position_embeddings")
        block: Any = self
        if tree is None or rotary is None or rotary[0].shape[-1] != block.self_attn.head_dim:
            return super().forward(hidden_states, *args, **named)
        weights = _weights(block, hidden_states, tree.reach)
        if weights is None:
            return super().forward(hidden_states, *args, **named)
        cos, sin = (table[0, :, None, : table.shape[-1] // 2] for table in rotary)
        x = hidden_states[0]
        if isinstance(tree, TreeCache):
            return _forward(weights, x, cos, sin, tree, None, ()).y[None]
        wanted = tree_attention.wanted(block.mlp)
        past = () if tree.past is None else tree.past[weights.layer]
        trained = [t for linear in weights.linears for t in (linear.a, linear.b)]
        constants = weights, cos, sin, tree, wanted, len(past)
        y, k, v = _Block.apply(*constants, x, *past, *trained)  # type: ignore[no-untyped-call]
        if tree.keep is not None:
            # Without a graph, whose node holds q too, they are copied so that q can go.
            held = (k, v) if torch.is_grad_enabled() else (k.contiguous(), v.contiguous())
            tree.keep.append(held)
        return y[None]


class _Linear(NamedTuple):
    """y = x Wᵀ + bias + s · x Aᵀ Bᵀ; without A and B where there is no LoRA, or it is off."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    s: float = 0.0


class _Weights(NamedTuple):
    """What one pass through a block reads; `heads` are those of q, and of k and v."""

    layer: int
    linears: list[_Linear]
    norms: tuple[FrozenRMSNorm, FrozenRMSNorm]
    heads: tuple[int, int]
    scale: float


def _weights(block: Any, hidden: Tensor, reach: int) -> _Weights | None:
    """The block's weights as they are now; None where the pass is not one for this module."""
    attention, mlp = block.self_attn, block.mlp
    config = attention.config  # Qwen2 has a window for some layers, Mistral one for all
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    if hidden.device.type != "cpu" or hidden.dtype not in (torch.float32, torch.float64):
        return None
    if hidden.shape[0] != 1 or (window and window < reach):
        return None
    if attention.training and attention.attention_dropout:
        return None
    if torch.is_autocast_enabled("cpu") or ops.choose_backend(hidden) != "torch":
        return None
    # From the tables of the modules: as attributes they cost a tenth of a decode step.
    own = attention._modules | mlp._modules
    linears = []
    for name in LINEARS:
        linear = _linear(own[f"{name}_proj"], hidden.dtype)
        if linear is None:
            return None
        linears.append(linear)
    norms = block.input_layernorm, block.post_attention_layernorm
    if any(norm.weight.requires_grad or norm.weight.dtype != hidden.dtype for norm in norms):
        return None
    size = attention.head_dim
    heads = len(linears[0].weight) // size, len(linears[1].weight) // size
    return _Weights(attention.layer_idx, linears, norms, heads, float(attention.scaling))


def _linear(module: nn.Module, dtype: torch.dtype) -> _Linear | None:
    """A frozen layer with its LoRA as it is switched now; None for anything else."""
    base: Any = module
    a: Tensor | None = None
    b: Tensor | None = None
    s = 0.0
    if type(module) is LoraLinear:
        base, s = module._modules["base"], module.scaling
        switched_off = module.disabled
        if not switched_off and module.training and module.dropout_p:
            return None
        where = module._buffers if switched_off else module._parameters
        names = ("ref_a", "ref_b") if switched_off else ("lora_a", "lora_b")
        a, b = where[names[0]], where[names[1]]
    if type(base) is not nn.Linear:
        return None
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    frozen = (weight, bias) if a is None else (weight, bias, a, b)
    if any(t is not None and t.dtype != dtype for t in frozen):
        return None
    assert weight is not None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return _Linear(weight, bias, a, b, s)


# ---- forward ---------------------------------------------------------------------------------


class _Pass(NamedTuple):
    """What a forward leaves for its backward, and y. With `wanted` tokens the rows of `h` and of
    all that follows are theirs."""

    y: Tensor  # (N, H)
    x: Tensor
    n: Tensor  # norm₁(x)
    r1: Tensor  # 1 / root mean square of x, (N, 1)
    qkv: Tensor  # (N, heads, d), those of q before those of k and of v
    attended: Tensor  # (N, heads, d)
    lse: Tensor
    h: Tensor
    m: Tensor  # norm₂(h)
    r2: Tensor
    gate: Tensor  # W_g m
    up: Tensor
    act: Tensor  # silu(gate) ∘ up
    lows: list[Tensor | None]  # x Aᵀ of each linear layer


def _forward(
    w: _Weights,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    tree: Plan | TreeCache,
    wanted: Index,
    past: Sequence[Tensor],
) -> _Pass:
    q_, k_, v_, o_, gate_, up_, down_ = w.linears
    many, few = w.heads
    size = q_.weight.shape[0] // many
    n, r1 = _norm(x, w.norms[0])
    qkv = x.new_empty(len(x), many + 2 * few, size)
    q, k, v = qkv.split([many, few, few], dim=1)
    asked = n
    if wanted is None:
        low_q = _into(q, n, q_)
    else:
        asked = n.index_select(0, wanted)
        some = x.new_empty(len(asked), many, size)
        low_q = _into(some, asked, q_)
        q.zero_().index_copy_(0, wanted, some)
    lows = [low_q, _into(k, n, k_), _into(v, n, v_)]
    _rotate(qkv[:, : many + few], cos, sin)
    if isinstance(tree, TreeCache):
        attended, lse = tree.attend(w.layer, q, k, v, w.scale), r1
    else:
        attended, lse = tree_attention.attend(tree, w.scale, q, k, v, past)
    rows, before = attended.flatten(1), x
    if wanted is not None:
        rows, before = rows.index_select(0, wanted), x.index_select(0, wanted)
    h, low_o = _plus(before, rows, o_)
    m, r2 = _norm(h, w.norms[1])
    gate, low_gate = _apply(m, gate_)
    up, low_up = _apply(m, up_)
    act = F.silu(gate).mul_(up)
    y, low_down = _plus(h, act, down_)
    if wanted is not None:
        y = x.new_zeros(x.shape).index_copy_(0, wanted, y)
    lows += [low_o, low_gate, low_up, low_down]
    return _Pass(y, x, n, r1, qkv, attended, lse, h, m, r2, gate, up, act, lows)


def _norm(x: Tensor, norm: FrozenRMSNorm) -> tuple[Tensor, Tensor]:
    return normalise(x, norm.weight, norm.variance_epsilon)


def _apply(x: Tensor, linear: _Linear) -> tuple[Tensor, Tensor | None]:
    """y of a linear layer, and x Aᵀ."""
    return _added(F.linear(x, linear.weight, linear.bias), x, linear)


def _plus(before: Tensor, x: Tensor, linear: _Linear) -> tuple[Tensor, Tensor | None]:
    """before + y of a linear layer, and x Aᵀ."""
    out = torch.addmm(before, x, linear.weight.t())
    return _added(out if linear.bias is None else out.add_(linear.bias), x, linear)


def _into(out: Tensor, x: Tensor, linear: _Linear) -> Tensor | None:
    """Write y of a linear layer into heads (N, heads, d) of a wider tensor; returns x Aᵀ."""
    rows = out.flatten(1) if out.is_contiguous() else _joined(out)
    if linear.bias is None:
        torch.mm(x, linear.weight.t(), out=rows)
    else:
        torch.addmm(linear.bias, x, linear.weight.t(), out=rows)
    return _added(rows, x, linear)[1]


def _joined(heads: Tensor) -> Tensor:
    """(N, heads, d) of a wider tensor as (N, heads · d), without a copy."""
    count, many, size = heads.shape
    return heads.as_strided((count, many * size), (heads.stride(0), 1))


def _added(y: Tensor, x: Tensor, linear: _Linear) -> tuple[Tensor, Tensor | None]:
    if linear.a is None or linear.b is None:
        return y, None
    low = x @ linear.a.t()
    return y.addmm_(low, linear.b.t(), alpha=linear.s), low


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Rotary positions (arXiv 2104.09864) of (N, heads, d), in place; cos and sin (N, 1, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    sign = -1 if back else 1
    turned = (first * cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(first, sin, value=sign)
    first.copy_(turned)


# ---- forward and backward as one node --------------------------------------------------------


class _Block(torch.autograd.Function):
    """x (N, H) to y (N, H) and the keys and values (N, heads, d). `more` are the keys and values of
    an earlier pass, where `count` is 2, then A and B of each linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        w: _Weights,
        cos: Tensor,
        sin: Tensor,
        tree: Plan,
        wanted: Index,
        count: int,
        x: Tensor,
        *more: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        past = more[:count]
        done = _forward(w, x, cos, sin, tree, wanted, past)
        ctx.save_for_backward(cos, sin, *more, *done[1:-1], *done.lows)
        ctx.w, ctx.tree, ctx.wanted, ctx.count = w, tree, wanted, count
        ctx.set_materialize_grads(False)
        many, few = w.heads
        _, k, v = done.qkv.split([many, few, few], dim=1)
        return done.y, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, *saved = ctx.saved_tensors
        past, saved = saved[: ctx.count], saved[ctx.count :]
        trained, saved = saved[: 2 * len(LINEARS)], saved[2 * len(LINEARS) :]
        # As they were saved: autograd sees to it that they have not changed since.
        ab = zip(ctx.w.linears, trained[::2], trained[1::2], strict=True)
        w = ctx.w._replace(linears=[linear._replace(a=a, b=b) for linear, a, b in ab])
        size = len(_Pass._fields) - 2
        done = _Pass._make([saved[0], *saved[:size], saved[size:]])  # y is not looked at
        with torch.autocast("cpu", enabled=False):
            return (None,) * 6 + _gradients(ctx, w, done, cos, sin, past, grads)


def _gradients(
    ctx: Any,
    w: _Weights,
    f: _Pass,
    cos: Tensor,
    sin: Tensor,
    past: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the earlier keys and values, and of each A and B."""
    wanted: Index = ctx.wanted
    q_, k_, v_, o_, gate_, up_, down_ = w.linears
    low_q, low_k, low_v, low_o, low_gate, low_up, low_down = f.lows
    many, few = w.heads
    dy, dk_later, dv_later = grads
    dy = torch.zeros_like(f.x) if dy is None else dy
    if wanted is not None:
        dy = dy.index_select(0, wanted)
    # The MLP.
    d_act, of_down = _back(dy, f.act, low_down, down_)
    d_up = F.silu(f.gate).mul_(d_act)
    d_gate = d_act.mul_(f.up)
    torch.ops.aten.silu_backward.grad_input(d_gate, f.gate, grad_input=d_gate)
    dm, of_gate = _back(d_gate, f.m, low_gate, gate_)
    _, of_up = _back(d_up, f.m, low_up, up_, dm)
    del d_act, d_gate, d_up  # they are the widest
    dh = dy.clone() if wanted is None else dy
    dh = gradient(dm.mul_(w.norms[1].weight), f.h, f.r2, dh)
    del dm
    # The attention.
    rows = f.attended.flatten(1)
    rows = rows if wanted is None else rows.index_select(0, wanted)
    d_rows, of_o = _back(dh, rows, low_o, o_)
    if wanted is not None:
        d_rows = d_rows.new_zeros(f.attended.flatten(1).shape).index_copy_(0, wanted, d_rows)
        dh = dh.new_zeros(f.x.shape).index_copy_(0, wanted, dh)
    d_qkv = torch.empty_like(f.qkv)
    dq, dk, dv = d_qkv.split([many, few, few], dim=1)
    q, k, v = f.qkv.split([many, few, few], dim=1)
    d_past = tree_attention.attend_backward(
        ctx.tree, w.scale, d_rows.view_as(f.attended), q, k, v, f.attended, f.lse, past,
        (dq, dk, dv),
    )  # fmt: skip
    for own, later in ((dk, dk_later), (dv, dv_later)):
        if later is not None:
            own.add_(later)
    _rotate(d_qkv[:, : many + few], cos, sin, back=True)
    needs_x = bool(ctx.needs_input_grad[6])
    dq_rows, n_rows = _joined(dq), f.n
    if wanted is not None:
        dq_rows, n_rows = dq_rows.index_select(0, wanted), f.n.index_select(0, wanted)
    dn, of_k = _back(_joined(dk), f.n, low_k, k_, needs_x=needs_x)
    _, of_v = _back(_joined(dv), f.n, low_v, v_, dn, needs_x)
    into = dn if wanted is None else None
    d_asked, of_q = _back(dq_rows, n_rows, low_q, q_, into, needs_x)
    dx = None
    if needs_x:
        assert dn is not None and d_asked is not None
        if wanted is not None:
            dn.index_add_(0, wanted, d_asked)
        dx = gradient(dn.mul_(w.norms[0].weight), f.x, f.r1, dh)
    trained = (*of_q, *of_k, *of_v, *of_o, *of_gate, *of_up, *of_down)
    return dx, *d_past, *trained


def _back(
    dy: Tensor,
    x: Tensor,
    low: Tensor | None,
    linear: _Linear,
    into: Tensor | None = None,
    needs_x: bool = True,
) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
    """The gradient of a linear layer's x, added to `into` where it is given, and of A and B."""
    dx = None
    if needs_x:
        dx = dy @ linear.weight if into is None else into.addmm_(dy, linear.weight)
    if linear.a is None or linear.b is None or low is None:
        return dx, (None, None)
    d_low = dy @ linear.b
    if dx is not None:
        dx.addmm_(d_low, linear.a, alpha=linear.s)
    return dx, ((d_low.t() @ x).mul_(linear.s), (dy.t() @ low).mul_(linear.s))

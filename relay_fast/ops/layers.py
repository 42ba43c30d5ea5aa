"""The ops of a layer, one by one, for custom models: each is differentiable, and one node under
torch.compile(fullgraph=True).

All of them share one pair of custom ops, which takes the tensors as a list and everything else as a
string. The dispatcher costs about 20 µs a call, so the engine calls the implementations directly.
Rows: tokens of all sequences end to end.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, check_cu_seqlens
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import Ops, compute_dtype, launch_context, refuse_transforms, select

Gradients = dict[str, Callable[[], Tensor | None]]


class _LayerOp(NamedTuple):
    """The parts of an op's custom ops. t: its tensors by name (None if absent), o: its options."""

    forward: Callable[[Ops, Any, Any], list[Tensor]]  # the result, then tensors for the backward
    fake: Callable[[Any, Any], list[Tensor]]  # empty tensors like the forward's
    backward: Callable[[Ops, Tensor, Any, Any, list[Tensor]], Gradients]  # by tensor name
    unused_in_backward: frozenset[str]  # tensors whose values the backward does not read
    saves_output: bool  # whether the backward reads the result


def _weight_grad(ops: Ops, dy: Tensor, x: Tensor) -> Tensor:
    acc = torch.zeros(dy.shape[1], x.shape[1], dtype=upcast(x[:0]).dtype, device=x.device)
    ops.weight_grad(acc, dy, x)
    return acc


# norm_linear


def _norm_linear_fwd(ops: Ops, t: Any, o: Any) -> list[Tensor]:
    return [
        ops.norm_linear_fwd(
            t.x, t.norm_weight, t.norm_bias, t.weight, t.bias, t.cos, t.sin, o.rotary, o.eps, o.norm
        )
    ]


def _norm_linear_bwd(ops: Ops, g: Tensor, t: Any, o: Any, saved: list[Tensor]) -> Gradients:
    dx, dnorm_weight, dnorm_bias, dz, y = ops.norm_linear_bwd(
        g.clone() if o.rotary else g,  # the reference rotates in place
        t.x, t.norm_weight, t.norm_bias, t.weight, t.cos, t.sin, o.rotary, o.eps, o.norm,
    )  # fmt: skip
    return {
        "x": lambda: dx,
        "norm_weight": lambda: dnorm_weight,
        "norm_bias": lambda: dnorm_bias,
        "weight": lambda: _weight_grad(ops, dz, y),
        "bias": lambda: upcast(dz).sum(0),
    }


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary: int = 0,
    eps: float = 1e-6,
    norm: str = "rms",
    impl: str = "auto",
) -> Tensor:
    """norm(x) · weightᵀ + bias, with RoPE on the first `rotary` columns.

    Args:
        x: (rows, d).
        norm_weight: (d,).
        weight: (columns, d).
        norm_bias: (d,), of a LayerNorm.
        bias: (columns,).
        cos: (rows, head_dim / 2), fp32 RoPE table; needed if `rotary`.
        sin: like cos.
        rotary: number of columns that RoPE rotates, whole heads.
        eps: epsilon of the norm.
        norm: "rms" or "layer".
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        (rows, columns), in autocast's dtype if enabled, else the weight's.
    """
    _check_shape("x", x, ("rows", weight.shape[-1]))
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias, "cos": cos, "sin": sin}
    tensors |= _cast(weight=weight, bias=bias)
    return _call("norm_linear", tensors, impl, rotary=rotary, eps=eps, norm=norm)


# attention


@lru_cache(maxsize=64)
def _layout(offsets: bytes, device: torch.device) -> PaddedLayout:
    lengths = np.diff(np.frombuffer(offsets, np.int64))
    return Plan(lengths, np.ones_like(lengths), device).layout(0, len(lengths))


def _checked_layout(cu_seqlens: Tensor, rows: int, device: torch.device) -> PaddedLayout:
    return _layout(check_cu_seqlens(cu_seqlens, rows, "qkv").tobytes(), device)


def _attention_fwd(ops: Ops, t: Any, o: Any) -> list[Tensor]:
    layout = _checked_layout(t.cu_seqlens, len(t.qkv), t.qkv.device)
    out, lse = ops.attention_fwd(t.qkv, layout, o.heads, o.kv_heads, o.causal)
    if lse is None:  # the reference's backward does not need it
        lse = _attention_buffers(t, o)[1].zero_()
    return [out, lse]


def _attention_buffers(t: Any, o: Any) -> list[Tensor]:
    rows, columns = t.qkv.shape
    width = columns // (o.heads + 2 * o.kv_heads) * o.heads
    return [t.qkv.new_empty(rows, width), upcast(t.qkv[:0]).new_empty(rows, o.heads)]


def _attention_bwd(ops: Ops, g: Tensor, t: Any, o: Any, saved: list[Tensor]) -> Gradients:
    layout = _checked_layout(t.cu_seqlens, len(t.qkv), t.qkv.device)
    dqkv = ops.attention_bwd(g, t.qkv, *saved, layout, o.heads, o.kv_heads, o.causal)
    return {"qkv": lambda: dqkv}


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    heads: int,
    kv_heads: int | None = None,
    *,
    causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention within each packed sequence, scaled by head_dim^(−1/2).

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim), columns [q; k; v].
        cu_seqlens: (sequences + 1,) integer row offsets; on a GPU they are copied to the host.
        heads: number of query heads.
        kv_heads: number of key/value heads, a divisor of heads; default: heads.
        causal: whether a token attends to itself and earlier tokens only.
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        (rows, heads · head_dim).

    Raises:
        ValueError: if the columns do not match the heads, or if the offsets do not start at 0,
            decrease, or do not end at the number of rows.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _check_shape("qkv", qkv, ("rows", "columns"))
    if not 1 <= kv_heads <= heads or heads % kv_heads or qkv.shape[1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns, which do not fit heads = {heads} and kv_heads = "
            f"{kv_heads}: give (heads + 2 · kv_heads) · head_dim columns, with heads a multiple of "
            "kv_heads"
        )
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens, device="cpu")
    tensors = {"qkv": qkv, "cu_seqlens": cu_seqlens.cpu()}  # read once, for both passes
    return _call("attention", tensors, impl, heads=heads, kv_heads=kv_heads, causal=causal)


# linear_residual


def _linear_residual_fwd(ops: Ops, t: Any, o: Any) -> list[Tensor]:
    return [ops.linear_residual_fwd(t.a, t.weight, t.bias, t.residual)]


def _linear_residual_bwd(ops: Ops, g: Tensor, t: Any, o: Any, saved: list[Tensor]) -> Gradients:
    da, dbranch = ops.linear_residual_bwd(g, t.weight)
    return {
        "a": lambda: da,
        "residual": lambda: g.clone(),
        "weight": lambda: _weight_grad(ops, dbranch, t.a),
        "bias": lambda: upcast(dbranch).sum(0),
    }


def linear_residual(
    a: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """residual + a · weightᵀ + bias.

    Args:
        a: (rows, columns).
        weight: (d, columns).
        residual: (rows, d).
        bias: (d,).
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        (rows, d) in the residual's dtype.
    """
    _check_shape("a", a, ("rows", weight.shape[-1]))
    _check_shape("residual", residual, (len(a), len(weight)))
    tensors = {"residual": residual, **_cast(a=a, weight=weight, bias=bias)}
    return _call("linear_residual", tensors, impl)


# mlp


def _mlp_fwd(ops: Ops, t: Any, o: Any) -> list[Tensor]:
    out, up, gate, hidden = ops.mlp_fwd(
        t.x, t.norm_weight, t.norm_bias, t.up_weight, t.up_bias, t.gate_weight, t.gate_bias,
        t.down_weight, t.down_bias, o.activation, o.eps, o.norm,
    )  # fmt: skip
    return [out, up, hidden] if gate is None else [out, up, hidden, gate]


def _mlp_buffers(t: Any, o: Any) -> list[Tensor]:
    shape = (len(t.x), len(t.up_weight))
    inside = [t.up_weight.new_empty(shape) for _ in range(2 + (t.gate_weight is not None))]
    return [t.x.new_empty(t.x.shape), *inside]


def _mlp_bwd(ops: Ops, g: Tensor, t: Any, o: Any, saved: list[Tensor]) -> Gradients:
    up, hidden, *gate = saved
    dx, dnorm_weight, dnorm_bias, y, dup, dgate, dbranch = ops.mlp_bwd(
        g, t.x, up, gate[0] if gate else None, t.norm_weight, t.norm_bias, t.up_weight,
        t.gate_weight, t.down_weight, o.activation, o.eps, o.norm,
    )  # fmt: skip
    return {
        "x": lambda: dx + g,
        "norm_weight": lambda: dnorm_weight,
        "norm_bias": lambda: dnorm_bias,
        "up_weight": lambda: _weight_grad(ops, dup, y),
        "up_bias": lambda: upcast(dup).sum(0),
        "gate_weight": lambda: _weight_grad(ops, dgate, y),
        "gate_bias": lambda: upcast(dgate).sum(0),
        "down_weight": lambda: _weight_grad(ops, dbranch, hidden),
        "down_bias": lambda: upcast(dbranch).sum(0),
    }


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_weight: Tensor | None = None,
    *,
    norm_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    norm: str = "rms",
    impl: str = "auto",
) -> Tensor:
    """x + act(norm(x) · up_weightᵀ + up_bias) · down_weightᵀ + down_bias.

    With "swiglu", act is multiplied by the gate: silu(norm(x) · gate_weightᵀ + gate_bias) · up.

    Args:
        x: (rows, d).
        norm_weight: (d,).
        up_weight: (hidden, d).
        down_weight: (d, hidden).
        gate_weight: (hidden, d), for "swiglu" only.
        norm_bias: (d,), of a LayerNorm.
        up_bias: (hidden,).
        gate_bias: (hidden,).
        down_bias: (d,).
        activation: "gelu_tanh", "gelu", "relu2" or "swiglu".
        eps: epsilon of the norm.
        norm: "rms" or "layer".
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        (rows, d) in x's dtype.

    Raises:
        ValueError: if shapes do not fit, or if gate_weight does not match the activation.
    """
    _check_shape("x", x, ("rows", up_weight.shape[-1]))
    if (activation == "swiglu") != (gate_weight is not None):
        needs = "needs a" if activation == "swiglu" else "does not support a"
        raise ValueError(f"activation {activation!r} {needs} gate_weight")
    tensors = {"x": x, "norm_weight": norm_weight, "norm_bias": norm_bias}
    tensors |= _cast(
        up_weight=up_weight,
        up_bias=up_bias,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        down_weight=down_weight,
        down_bias=down_bias,
    )
    return _call("mlp", tensors, impl, activation=activation, eps=eps, norm=norm)


# The custom ops


_OPS = {
    "norm_linear": _LayerOp(
        _norm_linear_fwd,
        lambda t, o: [t.weight.new_empty(len(t.x), len(t.weight))],
        _norm_linear_bwd,
        frozenset({"bias"}),
        saves_output=False,
    ),
    "attention": _LayerOp(
        _attention_fwd, _attention_buffers, _attention_bwd, frozenset(), saves_output=True
    ),
    "linear_residual": _LayerOp(
        _linear_residual_fwd,
        lambda t, o: [t.residual.new_empty(t.residual.shape)],
        _linear_residual_bwd,
        frozenset({"residual", "bias"}),
        saves_output=False,
    ),
    "mlp": _LayerOp(
        _mlp_fwd,
        _mlp_buffers,
        _mlp_bwd,
        frozenset({"up_bias", "gate_bias", "down_bias"}),
        saves_output=False,
    ),
}


def _check_shape(name: str, t: Tensor, shape: tuple[int | str, ...]) -> None:
    fits = t.ndim == len(shape) and all(
        isinstance(n, str) or n == m for n, m in zip(shape, t.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(t.shape)}: give ({wanted})")


def _cast(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    """Casts the tensors to the dtype of GEMMs."""
    return {n: None if t is None else t.to(compute_dtype(t)) for n, t in tensors.items()}


_ARRAYS = (np.generic, np.ndarray, Tensor)  # a tuple, which torch.compile can trace


def _call(name: str, tensors: dict[str, Tensor | None], impl: str, **options) -> Tensor:
    present = {n: t for n, t in tensors.items() if t is not None}
    first, *others = (n for n in present if n != "cu_seqlens")  # offsets may be on the host
    for n in others:
        if present[n].device != present[first].device:
            raise ValueError(
                f"{first} is on {present[first].device} and {n} on {present[n].device}: move them "
                "to one device"
            )
    if not torch.compiler.is_compiling():
        refuse_transforms(*present.values())
    plain = lambda v: v.item() if isinstance(v, _ARRAYS) else v
    option_strings = [f"{n}={plain(v)!r}" for n, v in options.items()]
    return layer_op_fwd(
        list(present.values()), " ".join([name, impl, ",".join(present), *option_strings])
    )[0]


class _Namespace(dict):
    """Values as attributes, None if absent."""

    __getattr__ = dict.get


def _parse_call(
    tensors: list[Tensor], spec: str
) -> tuple[_LayerOp, Ops | None, _Namespace, _Namespace]:
    """Returns the op, its implementation, and its tensors and options by name."""
    name, impl, names, *option_strings = spec.split(" ")
    pairs = (text.split("=", 1) for text in option_strings)
    named = _Namespace(zip(names.split(","), tensors, strict=True))
    ops = select(impl, tensors[0].device)
    return _OPS[name], ops, named, _Namespace({n: ast.literal_eval(v) for n, v in pairs})


@torch.library.custom_op("relay_fast::layer_op_fwd", mutates_args=())
def layer_op_fwd(tensors: list[Tensor], spec: str) -> list[Tensor]:
    """Returns the op's result, then the tensors that its backward needs.

    spec: the op, impl, the tensors' names separated by commas, then options as name=value.
    """
    op, ops, t, o = _parse_call(tensors, spec)
    with launch_context(tensors[0]):
        return [made.contiguous() for made in op.forward(ops, t, o)]


@layer_op_fwd.register_fake
def _(tensors, spec):
    op, _, t, o = _parse_call(tensors, spec)
    return op.fake(t, o)


@torch.library.custom_op("relay_fast::layer_op_bwd", mutates_args=())
def layer_op_bwd(
    grad: Tensor, tensors: list[Tensor], saved: list[Tensor], needed: list[bool], spec: str
) -> list[Tensor]:
    """Returns the gradients of the tensors that need one, in their dtypes."""
    op, ops, t, o = _parse_call(tensors, spec)
    wanted = (n for n, need in zip(t, needed, strict=True) if need)
    with launch_context(grad):
        gradients = op.backward(ops, grad, t, o, saved)
        return [gradients[n]().to(t[n].dtype).contiguous() for n in wanted]


@layer_op_bwd.register_fake
def _(grad, tensors, saved, needed, spec):
    return [t.new_empty(t.shape) for t, need in zip(tensors, needed, strict=True) if need]


def _save(ctx, inputs, output) -> None:
    """Saves the tensors that the backward reads; the others may be changed in place or freed."""
    tensors, ctx.spec = inputs
    name, _, names, *_ = ctx.spec.split(" ")
    op = _OPS[name]
    ctx.needed = [t.requires_grad for t in tensors]
    unused = [n in op.unused_in_backward for n in names.split(",")]
    ctx.unused = [(t.shape, t.dtype) if u else None for t, u in zip(tensors, unused, strict=True)]
    used = (None if u else t for t, u in zip(tensors, unused, strict=True))
    ctx.save_for_backward(*used, *(output if op.saves_output else output[1:]))


def _backward(ctx, grads):
    count, kept, g = len(ctx.needed), ctx.saved_tensors, grads[0]
    tensors = [
        t if like is None else g.new_zeros((), dtype=like[1]).expand(like[0])
        for t, like in zip(kept[:count], ctx.unused, strict=True)
    ]
    found = iter(layer_op_bwd(g, tensors, list(kept[count:]), ctx.needed, ctx.spec))
    return [next(found) if need else None for need in ctx.needed], None


layer_op_fwd.register_autograd(_backward, setup_context=_save)

"""The ops of a layer, one by one, for custom models: each is differentiable, and one node under
torch.compile(fullgraph=True).

Each is a pair of custom ops (`relay_fast.ops.layer_ops`). The dispatcher costs about 20 µs a call,
so the engine calls the implementations directly. Rows: tokens of all sequences end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, check_cu_seqlens
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.kernels.mlp_ref import ACTIVATIONS
from relay_fast.kernels.norm_ref import NORMS, upcast
from relay_fast.ops.arguments import cast, check_shape, plain_float, plain_int
from relay_fast.ops.dispatch import Ops
from relay_fast.ops.flops import attention_flops, lengths_of, linear_flops
from relay_fast.ops.layer_ops import Gradients, LayerOp, LayerOpParts
from relay_fast.utils.arguments import (
    as_tensor,
    check_choice,
    check_optional,
    check_tensors,
    refuse_meta,
)


def _weight_grad(ops: Ops, dy: Tensor, x: Tensor) -> Tensor:
    acc = torch.zeros(dy.shape[1], x.shape[1], dtype=upcast(x[:0]).dtype, device=x.device)
    ops.weight_grad(acc, dy, x)
    return acc


# norm_linear


class NormLinear(NamedTuple):
    """Tensors of norm_linear."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


class NormLinearOptions(NamedTuple):
    rotary: int
    eps: float
    norm: str


def _norm_linear_fwd(ops: Ops, t: NormLinear, o: NormLinearOptions) -> list[Tensor]:
    return [
        ops.norm_linear_fwd(
            t.x, t.norm_weight, t.norm_bias, t.weight, t.bias, t.cos, t.sin, o.rotary, o.eps, o.norm
        )
    ]


def _norm_linear_bwd(
    ops: Ops, g: Tensor, t: NormLinear, o: NormLinearOptions, saved: list[Tensor]
) -> Gradients:
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
    check_tensors(x=x, norm_weight=norm_weight, weight=weight)
    check_optional(norm_bias=norm_bias, bias=bias, cos=cos, sin=sin)
    check_choice("norm", norm, NORMS)
    check_shape("x", x, ("rows", weight.shape[-1]))
    t = NormLinear(x, norm_weight, norm_bias, *cast(weight, bias), cos, sin)
    options = NormLinearOptions(plain_int("rotary", rotary), plain_float("eps", eps), norm)
    return _NORM_LINEAR(t, options, impl)


# attention


class Attention(NamedTuple):
    """Tensors of attention."""

    qkv: Tensor
    cu_seqlens: Tensor


class AttentionOptions(NamedTuple):
    heads: int
    kv_heads: int
    causal: bool


@lru_cache(maxsize=64)
def _layout(offsets: bytes, device: torch.device) -> PaddedLayout:
    lengths = np.diff(np.frombuffer(offsets, np.int64))
    return Plan(lengths, np.ones_like(lengths), device).layout(0, len(lengths))


def _checked_layout(cu_seqlens: Tensor, rows: int, device: torch.device) -> PaddedLayout:
    return _layout(check_cu_seqlens(cu_seqlens, rows, "qkv").tobytes(), device)


def _attention_fwd(ops: Ops, t: Attention, o: AttentionOptions) -> list[Tensor]:
    layout = _checked_layout(t.cu_seqlens, len(t.qkv), t.qkv.device)
    out, lse = ops.attention_fwd(t.qkv, layout, o.heads, o.kv_heads, o.causal)
    if lse is None:  # the reference's backward does not need it
        lse = _attention_buffers(t, o)[1].zero_()
    return [out, lse]


def _attention_buffers(t: Attention, o: AttentionOptions) -> list[Tensor]:
    rows, columns = t.qkv.shape
    width = columns // (o.heads + 2 * o.kv_heads) * o.heads
    return [t.qkv.new_empty(rows, width), upcast(t.qkv[:0]).new_empty(rows, o.heads)]


def _attention_bwd(
    ops: Ops, g: Tensor, t: Attention, o: AttentionOptions, saved: list[Tensor]
) -> Gradients:
    layout = _checked_layout(t.cu_seqlens, len(t.qkv), t.qkv.device)
    dqkv = ops.attention_bwd(g, t.qkv, *saved, layout, o.heads, o.kv_heads, o.causal)
    return {"qkv": lambda: dqkv}


def _attention_flops(t: Attention, o: AttentionOptions, backward: bool) -> int:
    width = t.qkv.shape[1] // (o.heads + 2 * o.kv_heads) * o.heads
    return attention_flops(lengths_of(t.cu_seqlens, len(t.qkv)), width, backward)


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
    heads = plain_int("heads", heads)
    kv_heads = heads if kv_heads is None else plain_int("kv_heads", kv_heads)
    check_tensors(qkv=qkv)
    check_shape("qkv", qkv, ("rows", "columns"))
    if not 1 <= kv_heads <= heads or heads % kv_heads or qkv.shape[1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns, which do not fit heads = {heads} and kv_heads = "
            f"{kv_heads}: give (heads + 2 · kv_heads) · head_dim columns, with heads a multiple of "
            "kv_heads"
        )
    if not isinstance(cu_seqlens, Tensor):
        cu_seqlens = as_tensor("cu_seqlens", cu_seqlens, device="cpu")
    refuse_meta("cu_seqlens", cu_seqlens)
    # The offsets are read once: forward and backward look the layout up by their values.
    options = AttentionOptions(heads, kv_heads, bool(causal))
    return _ATTENTION(Attention(qkv, cu_seqlens.cpu()), options, impl)


# linear_residual


class LinearResidual(NamedTuple):
    """Tensors of linear_residual."""

    residual: Tensor
    a: Tensor
    weight: Tensor
    bias: Tensor | None


class LinearResidualOptions(NamedTuple):
    pass


def _linear_residual_fwd(ops: Ops, t: LinearResidual, o: LinearResidualOptions) -> list[Tensor]:
    return [ops.linear_residual_fwd(t.a, t.weight, t.bias, t.residual)]


def _linear_residual_bwd(
    ops: Ops, g: Tensor, t: LinearResidual, o: LinearResidualOptions, saved: list[Tensor]
) -> Gradients:
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
    check_tensors(a=a, weight=weight, residual=residual)
    check_optional(bias=bias)
    check_shape("a", a, ("rows", weight.shape[-1]))
    check_shape("residual", residual, (len(a), len(weight)))
    t = LinearResidual(residual, *cast(a, weight, bias))
    return _LINEAR_RESIDUAL(t, LinearResidualOptions(), impl)


# mlp


class Mlp(NamedTuple):
    """Tensors of mlp."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


class MlpOptions(NamedTuple):
    activation: str
    eps: float
    norm: str


def _mlp_fwd(ops: Ops, t: Mlp, o: MlpOptions) -> list[Tensor]:
    out, up, gate, hidden = ops.mlp_fwd(
        t.x, t.norm_weight, t.norm_bias, t.up_weight, t.up_bias, t.gate_weight, t.gate_bias,
        t.down_weight, t.down_bias, o.activation, o.eps, o.norm,
    )  # fmt: skip
    return [out, up, hidden] if gate is None else [out, up, hidden, gate]


def _mlp_buffers(t: Mlp, o: MlpOptions) -> list[Tensor]:
    shape = (len(t.x), len(t.up_weight))
    inside = [t.up_weight.new_empty(shape) for _ in range(2 + (t.gate_weight is not None))]
    return [t.x.new_empty(t.x.shape), *inside]


def _mlp_bwd(ops: Ops, g: Tensor, t: Mlp, o: MlpOptions, saved: list[Tensor]) -> Gradients:
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
    check_tensors(x=x, norm_weight=norm_weight, up_weight=up_weight, down_weight=down_weight)
    check_optional(gate_weight=gate_weight, norm_bias=norm_bias)
    check_optional(up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias)
    check_choice("norm", norm, NORMS)
    check_choice("activation", activation, ACTIVATIONS)
    check_shape("x", x, ("rows", up_weight.shape[-1]))
    if (activation == "swiglu") != (gate_weight is not None):
        needs = "needs a" if activation == "swiglu" else "does not support a"
        raise ValueError(f"activation {activation!r} {needs} gate_weight")
    linears = cast(up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    t = Mlp(x, norm_weight, norm_bias, *linears)
    return _MLP(t, MlpOptions(activation, plain_float("eps", eps), norm), impl)


# The custom ops


_NORM_LINEAR = LayerOp(
    "norm_linear",
    LayerOpParts(
        NormLinear,
        NormLinearOptions,
        _norm_linear_fwd,
        lambda t, o: [t.weight.new_empty(len(t.x), len(t.weight))],
        _norm_linear_bwd,
        frozenset({"bias"}),
        False,
        lambda t, o, backward: (1 + backward) * linear_flops(len(t.x), [t.weight]),
    ),
)
_ATTENTION = LayerOp(
    "attention",
    LayerOpParts(
        Attention,
        AttentionOptions,
        _attention_fwd,
        _attention_buffers,
        _attention_bwd,
        frozenset(),
        True,
        _attention_flops,
    ),
)
_LINEAR_RESIDUAL = LayerOp(
    "linear_residual",
    LayerOpParts(
        LinearResidual,
        LinearResidualOptions,
        _linear_residual_fwd,
        lambda t, o: [t.residual.new_empty(t.residual.shape)],
        _linear_residual_bwd,
        frozenset({"residual", "bias"}),
        False,
        lambda t, o, backward: (1 + backward) * linear_flops(len(t.a), [t.weight]),
    ),
)
_MLP = LayerOp(
    "mlp",
    LayerOpParts(
        Mlp,
        MlpOptions,
        _mlp_fwd,
        _mlp_buffers,
        _mlp_bwd,
        frozenset({"up_bias", "gate_bias", "down_bias"}),
        False,
        lambda t, o, backward: (
            (1 + backward) * linear_flops(len(t.x), [t.up_weight, t.gate_weight, t.down_weight])
        ),
    ),
)

"""Norm + up + activation + down + residual, plain torch, forward and backward.

    y = norm(x);  u = y · Wuᵀ + bu;  a = act(u)  (SwiGLU: a = silu(y · Wgᵀ) · u)
    out = x + drop(a · Wdᵀ + bd)

| saved by the caller | recomputed in backward |
|---|---|
| x, u, (gate), a | norm(x) |

Under a recompute policy the caller runs the forward again from x, and passes its results to the
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_ref import Dropout
from .linear_residual_ref import linear_residual_bwd_ref, linear_residual_fwd_ref
from .norm_ref import add_residual_ref, norm_bwd_ref, norm_fwd_ref

ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu")


def activation_fwd_ref(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """Computes the hidden layer.

    Args:
        activation: Its name.
        up: Pre-activations (rows, hidden).
        gate: Those of the gate, or None.

    Returns:
        (rows, hidden).
    """
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(up, approximate="tanh")
    if activation == "gelu":
        return torch.nn.functional.gelu(up)
    if activation == "relu2":
        return up.relu().square()
    return torch.nn.functional.silu(gate) * up


def activation_bwd_ref(
    activation: str, da: Tensor, up: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Computes the gradients of the pre-activations.

    Args:
        activation: Its name.
        da: Gradient of the hidden layer, (rows, hidden).
        up: Pre-activations (rows, hidden).
        gate: Those of the gate, or None.

    Returns:
        dup and dgate (None without a gate), each (rows, hidden).
    """
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(da, up, approximate="tanh"), None
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, up), None
    if activation == "relu2":
        return da * up.relu().mul_(2), None
    dgate = torch.ops.aten.silu_backward(da * up, gate)
    return da * torch.nn.functional.silu(gate), dgate


def mlp_fwd_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
    dropout: Dropout | None = None,
    out: Tensor | None = None,
    keep: bool = True,
    residual: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes x + drop(act(norm(x) · Wuᵀ + bu) · Wdᵀ + bd).

    Args:
        x: (rows, d), in the state dtype.
        norm_weight: (d,).
        norm_bias: (d,), or None.
        up_weight: (hidden, d), in the compute dtype.
        up_bias: (hidden,), or None.
        gate_weight: (hidden, d) for SwiGLU, else None.
        gate_bias: (hidden,), or None.
        down_weight: (d, hidden).
        down_bias: (d,), or None.
        activation: one of ACTIVATIONS.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        dropout: the mask, or None.
        out: (rows, d), buffer of the result.
        keep: whether a backward follows.
        residual: whether x is added; if not, dropout and out are None, and the result has the
            weights' dtype.

    Returns:
        out (rows, d); u, gate (SwiGLU only) and a, each (rows, hidden), for the backward.
    """
    y = norm_fwd_ref(x, norm_weight, norm_bias, eps, kind, up_weight.dtype)
    up = torch.nn.functional.linear(y, up_weight, up_bias)
    gate = None if gate_weight is None else torch.nn.functional.linear(y, gate_weight, gate_bias)
    hidden = activation_fwd_ref(activation, up, gate)
    residue = x if residual else None
    out = linear_residual_fwd_ref(hidden, down_weight, down_bias, residue, dropout, out)
    return (out, up, gate, hidden) if keep else (out, None, None, None)


def mlp_bwd_ref(
    dout: Tensor,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up_weight: Tensor,
    gate_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
    dropout: Dropout | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Computes the backward of `mlp_fwd_ref`.

    Args:
        dout: (rows, d).
        x: (rows, d).
        up: (rows, hidden), u of the forward.
        gate: (rows, hidden), or None.
        norm_weight: (d,).
        norm_bias: (d,), or None.
        up_weight: (hidden, d).
        gate_weight: (hidden, d), or None.
        down_weight: (d, hidden).
        activation: one of ACTIVATIONS.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        dropout: the mask, or None.
        residual: (rows, d), added to dx: dout, where the gradient of x is wanted whole; or None.

    Returns:
        dx (rows, d) without the residual's own dout unless it is `residual`, dnorm_weight,
        dnorm_bias, and the weight gradients' operands y, dup, dgate, dbranch.
    """
    da, dbranch = linear_residual_bwd_ref(dout, down_weight, dropout)
    dup, dgate = activation_bwd_ref(activation, da, up, gate)
    dy = dup @ up_weight
    if dgate is not None:
        dy = dy.addmm_(dgate, gate_weight)
    dx, dnorm_weight, dnorm_bias, y = norm_bwd_ref(
        dy, x, norm_weight, norm_bias, eps, kind, up_weight.dtype
    )
    return add_residual_ref(dx, residual), dnorm_weight, dnorm_bias, y, dup, dgate, dbranch

"""Norm + projection (+ bias, + RoPE on the first columns), plain torch, forward and backward.

    z = norm(x) · Wᵀ + b;  out = [RoPE(z[:, :rotary]), z[:, rotary:]]

| saved by the caller | recomputed in backward | extra FLOPs |
|---|---|---|
| x | norm(x) | none in GEMMs |

The backward returns the operands of the weight gradient (dW = dzᵀ · y) instead of dW itself,
because the loop accumulates it over iterations (`weight_grad_ref`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_ref import add_residual_ref, norm_bwd_ref, norm_fwd_ref


def rotate_ref(z: Tensor, cos: Tensor, sin: Tensor, rotary: int, sign: float = 1.0) -> Tensor:
    """Applies half-split RoPE to the first `rotary` columns of z, in place.

    Args:
        z: (rows, columns).
        cos: (rows, head_dim / 2).
        sin: like cos.
        rotary: number of columns, whole heads.
        sign: −1 is the inverse rotation, as in the backward.
    """
    half = cos.shape[-1]
    pairs = z[:, :rotary].unflatten(-1, (-1, 2, half))  # (rows, heads, 2, half), a view
    swapped = torch.cat((pairs[:, :, 1:], pairs[:, :, :1]), dim=2)
    cos, sin = cos.unsqueeze(1).to(z.dtype), sin.unsqueeze(1).to(z.dtype)
    pairs.mul_(cos.unsqueeze(2))
    pairs[:, :, 0].addcmul_(swapped[:, :, 0], sin, value=-sign)
    pairs[:, :, 1].addcmul_(swapped[:, :, 1], sin, value=sign)
    return z


def norm_linear_fwd_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary: int = 0,
    eps: float = 1e-6,
    kind: str = "rms",
) -> Tensor:
    """Computes norm(x) · Wᵀ + b, with RoPE on the first columns.

    Args:
        x: (rows, d).
        norm_weight: (d,).
        norm_bias: (d,), or None.
        weight: (columns, d), in the compute dtype.
        bias: (columns,), or None.
        cos: (rows, head_dim / 2), or None.
        sin: like cos.
        rotary: columns that RoPE rotates, (query heads + key heads) · head_dim.
        eps: epsilon of the norm.
        kind: "rms" or "layer".

    Returns:
        out (rows, columns) in the weight's dtype.
    """
    y = norm_fwd_ref(x, norm_weight, norm_bias, eps, kind, weight.dtype)
    out = torch.nn.functional.linear(y, weight, bias)
    return rotate_ref(out, cos, sin, rotary) if rotary else out


def norm_linear_bwd_ref(
    dout: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary: int = 0,
    eps: float = 1e-6,
    kind: str = "rms",
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the backward of `norm_linear_fwd_ref`.

    Args:
        dout: (rows, columns); its rotary columns are overwritten.
        x: (rows, d).
        norm_weight: (d,).
        norm_bias: (d,), or None.
        weight: (columns, d), in the compute dtype.
        cos: (rows, head_dim / 2), or None.
        sin: like cos.
        rotary: columns that RoPE rotates, (query heads + key heads) · head_dim.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        residual: (rows, d), added to dx: the gradient of x on another way; or None.
        out: (rows, d), the buffer of dx; None: a new one.

    Returns:
        dx, dnorm_weight, dnorm_bias, and the weight gradient's operands dz (rows, columns), y
        (rows, d).
    """
    dz = rotate_ref(dout, cos, sin, rotary, -1.0) if rotary else dout
    dx, dnorm_weight, dnorm_bias, y = norm_bwd_ref(
        dz @ weight, x, norm_weight, norm_bias, eps, kind, weight.dtype
    )
    dx = add_residual_ref(dx, residual)
    return dx if out is None else out.copy_(dx), dnorm_weight, dnorm_bias, dz, y

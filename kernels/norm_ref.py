"""RMSNorm and LayerNorm over the last dimension, plain torch, forward and hand-written backward.

    x̂ = (x − μ) · r,  μ = 0 for RMSNorm,  r = (mean((x − μ)²) + eps)^(−1/2),  y = x̂ · weight +
    bias
    dx = r · (g − [mean(g)] − x̂ · mean(g · x̂)),  g = dy · weight   (the bracket only for
    LayerNorm)

Nothing is saved: x̂ and r are recomputed from x, which the caller holds anyway.
Statistics are taken in fp32 (fp64 for fp64 inputs); y has the dtype that the caller asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("rms", "layer")


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which sums are taken: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def normalize(x: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """x̂ (rows, d) and r (rows, 1) of the rows of x."""
    x = wide(x)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def norm_fwd_ref(
    x: Tensor,  # (rows, d)
    weight: Tensor,  # (d,)
    bias: Tensor | None,  # (d,)
    eps: float,
    kind: str = "rms",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y (rows, d) in `dtype` (default: x's)."""
    y, _ = normalize(x, eps, kind)
    y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(dtype or x.dtype)


def norm_bwd_ref(
    dy: Tensor,  # (rows, d)
    x: Tensor,  # (rows, d)
    weight: Tensor,  # (d,)
    eps: float,
    kind: str = "rms",
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (rows, d), dweight (d,) and dbias (d,), all in the wide dtype."""
    dy = wide(dy)
    x_hat, rstd = normalize(x, eps, kind)
    g = dy * wide(weight)
    inner = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if kind == "layer":
        inner = inner - g.mean(-1, keepdim=True)
    return inner * rstd, (dy * x_hat).sum(0), dy.sum(0)

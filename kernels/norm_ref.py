"""RMSNorm and LayerNorm over the last dimension, plain torch, forward and hand-written backward.

    x̂ = (x − μ) · r,  μ = 0 for RMSNorm,  r = (mean((x − μ)²) + eps)^(−1/2),  y = x̂ · weight + bias
    dx = r · (g − [mean(g)] − x̂ · mean(g · x̂)),  g = dy · weight   ([…] only for LayerNorm)

Nothing is saved: x̂ and r are recomputed from x, which the caller keeps. Statistics are computed in
fp32 (fp64 for fp64 inputs); y has the dtype that the caller requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("rms", "layer")


def upcast(x: Tensor) -> Tensor:
    """Returns x in the dtype of sums: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def upcast_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns the dtype of sums over these tensors: fp32, or fp64 if one of them is."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def normalize(x: Tensor, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """Normalises rows. With eps = 0, constant (RMSNorm: zero) rows give 0.

    Args:
        x: (rows, d).
        eps: Added to the mean square.
        kind: "rms" or "layer".

    Returns:
        x̂ (rows, d) and r (rows, 1).
    """
    x = upcast(x)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if eps == 0:
        rstd.masked_fill_(rstd == float("inf"), 0)
    return x * rstd, rstd


def norm_fwd_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str = "rms",
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes the norm.

    Args:
        x: (rows, d).
        weight: (d,).
        bias: (d,), or None.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        dtype: dtype of the result; default: x's.
        out: (rows, d), buffer of the result.

    Returns:
        y (rows, d).
    """
    x_hat, _ = normalize(x, eps, kind)
    y = _scale(x_hat, weight, bias).to(dtype or x.dtype)
    return y if out is None else out.copy_(y)


def _scale(x_hat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x_hat * upcast(weight)
    return y if bias is None else y.add_(upcast(bias))


def add_residual_ref(dx: Tensor, residual: Tensor | None) -> Tensor:
    """Returns dx + residual; dx itself without one."""
    return dx if residual is None else residual + dx


def norm_bwd_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str = "rms",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the norm's backward.

    Args:
        dy: (rows, d).
        x: (rows, d).
        weight: (d,).
        bias: (d,), or None.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        dtype: dtype of y; default: x's.

    Returns:
        dx (rows, d), dweight (d,) and dbias (d,) (zeros without a bias) in fp32 or fp64; and y, an
        operand of the next projection's weight gradient.
    """
    sums = upcast_dtype(dy, x, weight)
    dy, scale = dy.to(sums), weight.to(sums)
    x_hat, rstd = normalize(x.to(sums), eps, kind)
    y = _scale(x_hat, weight, bias).to(dtype or x.dtype)
    product = dy * x_hat
    dweight = product.sum(0)
    inner = (product @ scale).div_(-x.shape[-1]).unsqueeze(-1)  # −mean(g · x̂)
    g = dy * scale
    if kind == "layer":
        g.sub_(g.mean(-1, keepdim=True))
    dx = g.addcmul_(x_hat, inner).mul_(rstd)
    return dx, dweight, torch.zeros_like(dweight) if bias is None else dy.sum(0), y


def norm_grads_ref(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    kind: str = "rms",
    has_bias: bool = True,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns dx, dweight and dbias (None unless `has_bias`) of `norm_bwd_ref`.

    Args:
        residual: (rows, d), added to dx: the gradient of x on another way; or None.
        out: (rows, d), the buffer of dx; None: a new one.
        others: as `norm_bwd_ref`.
    """
    bias = torch.zeros_like(weight) if has_bias else None
    dx, dweight, dbias, _ = norm_bwd_ref(dy, x, weight, bias, eps, kind)
    dx = add_residual_ref(dx, residual)
    return dx if out is None else out.copy_(dx), dweight, dbias if has_bias else None

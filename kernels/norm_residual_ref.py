"""Norm of a branch, added to the residual stream, plain torch: out = residual + drop(norm(branch)).

Saved: branch. Recomputed in backward: the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_ref import Dropout, dropout_mask_ref
from .norm_ref import norm_bwd_ref, norm_fwd_ref, upcast_dtype


def norm_residual_fwd_ref(
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    residual: Tensor,
    eps: float,
    kind: str = "rms",
    dropout: Dropout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes residual + drop(norm(branch)).

    Args:
        branch: (rows, d), in the compute dtype.
        norm_weight: (d,).
        norm_bias: (d,), or None.
        residual: (rows, d), in the state dtype.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        dropout: the mask, or None.
        out: (rows, d), buffer of the result.

    Returns:
        (rows, d) in the residual's dtype.
    """
    wide = upcast_dtype(branch, residual)
    y = norm_fwd_ref(branch, norm_weight, norm_bias, eps, kind, wide)
    if dropout is not None:
        y = y * dropout_mask_ref(dropout, y.shape[1], y.dtype)
    return torch.add(residual, y.to(residual.dtype), out=out)


def norm_residual_bwd_ref(
    dout: Tensor,
    branch: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    kind: str = "rms",
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the backward of `norm_residual_fwd_ref`; the residual's gradient is dout itself.

    Args:
        dout: (rows, d).
        branch, norm_weight, norm_bias, eps, kind, dropout: as in the forward.

    Returns:
        dbranch (rows, d), dnorm_weight (d,) and dnorm_bias (d,) (zeros without a bias) in fp32 or
        fp64.
    """
    if dropout is not None:
        wide = upcast_dtype(dout, branch)
        dout = dout.to(wide) * dropout_mask_ref(dropout, dout.shape[1], wide)
    dx, dweight, dbias, _ = norm_bwd_ref(dout, branch, norm_weight, norm_bias, eps, kind)
    return dx, dweight, dbias

"""Output projection added to the residual stream, plain torch: out = residual + drop(a · Wᵀ +
b)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_ref import Dropout, dropout_mask_ref


def linear_residual_fwd_ref(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout: Dropout | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Computes residual + drop(a · Wᵀ + b).

    Args:
        a: (rows, columns), in the compute dtype.
        weight: (d, columns), in the compute dtype.
        bias: (d,), or None.
        residual: (rows, d), in the state dtype; None: nothing is added, and dropout and out are
            None too.
        dropout: the mask, or None.
        out: (rows, d), buffer of the result.

    Returns:
        (rows, d) in the residual's dtype; without one, in a's.
    """
    if residual is None:
        return torch.nn.functional.linear(a, weight, bias)
    if dropout is None and bias is None and a.dtype == residual.dtype:
        return torch.addmm(residual, a, weight.t(), out=out)
    branch = torch.nn.functional.linear(a, weight, bias)
    if dropout is not None:
        branch = branch * dropout_mask_ref(dropout, branch.shape[1], branch.dtype)
    return torch.add(residual, branch.to(residual.dtype), out=out)


def linear_residual_bwd_ref(
    dout: Tensor,
    weight: Tensor,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the backward of `linear_residual_fwd_ref`; the residual's gradient is dout itself.

    Args:
        dout: (rows, d).
        weight: (d, columns).
        dropout: the mask, or None.

    Returns:
        da (rows, columns) and dbranch (rows, d), an operand of dW = dbranchᵀ · a, in the compute
        dtype.
    """
    dbranch = dout.to(weight.dtype)
    if dropout is not None:
        dbranch = dbranch * dropout_mask_ref(dropout, dbranch.shape[1], dbranch.dtype)
    return dbranch @ weight, dbranch

"""Output projection added to the residual stream, plain torch: out = residual + drop(a · Wᵀ +
b)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout_ref import Dropout, dropout_mask_ref


def linear_residual_fwd_ref(
    a: Tensor,  # (rows, columns), in the compute dtype
    weight: Tensor,  # (d, columns), in the compute dtype
    bias: Tensor | None,  # (d,)
    residual: Tensor,  # (rows, d), in the state dtype
    dropout: Dropout | None = None,
    out: Tensor | None = None,  # (rows, d), buffer of the result
) -> Tensor:
    """Returns residual + drop(a · Wᵀ + b) (rows, d) in the residual's dtype."""
    if dropout is None and bias is None and a.dtype == residual.dtype:
        return torch.addmm(residual, a, weight.t(), out=out)
    branch = torch.nn.functional.linear(a, weight, bias)
    if dropout is not None:
        branch = branch * dropout_mask_ref(dropout, branch.shape[1], branch.dtype)
    return torch.add(residual, branch.to(residual.dtype), out=out)


def linear_residual_bwd_ref(
    dout: Tensor,  # (rows, d)
    weight: Tensor,  # (d, columns)
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns da (rows, columns) and dbranch (rows, d), an operand of dW = dbranchᵀ · a.

    Both are in the compute dtype. The residual's gradient is dout itself.
    """
    dbranch = dout.to(weight.dtype)
    if dropout is not None:
        dbranch = dbranch * dropout_mask_ref(dropout, dbranch.shape[1], dbranch.dtype)
    return dbranch @ weight, dbranch

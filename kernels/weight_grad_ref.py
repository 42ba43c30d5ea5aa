"""Weight gradient accumulated into a wide buffer, plain torch: acc += dyᵀ · x (beta = 1)."""

from __future__ import annotations

from torch import Tensor


def weight_grad_ref(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """acc (columns, d) in fp32 or fp64 += dy (rows, columns)ᵀ · x (rows, d), summed in acc's
    dtype."""
    acc.addmm_(dy.to(acc.dtype).t(), x.to(acc.dtype))

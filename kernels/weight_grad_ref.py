"""Weight gradient accumulated into a wide buffer, plain torch: acc += dyᵀ · x (beta = 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_grad_ref(acc: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> None:
    """acc (columns, d) in fp32 or fp64 += dy (rows, columns)ᵀ · x (rows, d), summed in acc's
    dtype. fresh: acc holds nothing yet, and is written."""
    dy, x = dy.to(acc.dtype).t(), x.to(acc.dtype)
    if fresh:
        torch.mm(dy, x, out=acc)
    else:
        acc.addmm_(dy, x)

"""Weight gradient accumulated into an fp32 or fp64 buffer, plain torch: acc += dyᵀ · x (beta =
1)."""

from __future__ import annotations

import torch
from torch import Tensor


def weight_grad_ref(acc: Tensor, dy: Tensor, x: Tensor, *, fresh: bool = False) -> None:
    """acc += dyᵀ · x, summed in acc's dtype.

    Args:
        acc: (columns, d), fp32 or fp64.
        dy: (rows, columns).
        x: (rows, d).
        fresh: whether acc is uninitialised and is overwritten.
    """
    dy, x = dy.to(acc.dtype).t(), x.to(acc.dtype)
    if fresh:
        torch.mm(dy, x, out=acc)
    else:
        acc.addmm_(dy, x)

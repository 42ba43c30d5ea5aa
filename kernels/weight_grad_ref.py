"""Weight gradient accumulated into an fp32 or fp64 buffer, plain torch: acc += dyᵀ · x (beta =
1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weight_grad_ref(
    acc: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    fresh: bool = False,
    bias: Tensor | None = None,
    more: Sequence[tuple[Tensor, Tensor, None]] = (),
    sums: dict[str, Tensor] | None = None,
) -> None:
    """acc += dyᵀ · x, summed in acc's dtype.

    Args:
        acc: (columns, d), fp32 or fp64.
        dy: (rows, columns).
        x: (rows, d).
        fresh: whether acc is uninitialised and is overwritten.
        bias: (columns,), fp32 or fp64, to which the sum of dy over its rows is added, or None.
        more: further dy, x and None, which are added too.
        sums: stays empty.
    """
    del sums
    dy, x = dy.to(acc.dtype), x.to(acc.dtype)
    if fresh:
        torch.mm(dy.t(), x, out=acc)
    else:
        acc.addmm_(dy.t(), x)
    if bias is not None:
        bias.add_(dy.sum(0))
    for dy, x, _ in more:
        weight_grad_ref(acc, dy, x, bias=bias)

"""What enters the first layer of an iteration, plain torch: out = h + x + line.

h: the state; x: the input that injection adds; line: the iteration's embedding. Nothing is saved.
"""

from __future__ import annotations

from torch import Tensor


def state_input_fwd_ref(h: Tensor, x: Tensor | None, line: Tensor | None) -> Tensor:
    """Computes h + x + line.

    Args:
        h: (rows, d).
        x: (rows, d), or None.
        line: (d,), or None.

    Returns:
        (rows, d) in h's dtype; h itself with neither.
    """
    if x is not None:
        h = h + x
    return h if line is None else h + line.to(h.dtype)


def state_input_bwd_ref(g: Tensor, x_grad: Tensor | None, line_grad: Tensor | None) -> None:
    """Adds the gradient of `state_input_fwd_ref` to the accumulators; that of h is g itself.

    Args:
        g: (rows, d).
        x_grad: (rows, d), fp32 or fp64, or None.
        line_grad: (d,), fp32 or fp64, or None.
    """
    if line_grad is not None:
        line_grad.add_(g.sum(0))
    if x_grad is not None:
        x_grad += g

"""Public ops: the ops of a layer, the readout's cross-entropy, and the choice of their
implementation (`relay_fast.ops.dispatch`)."""

from __future__ import annotations

from relay_fast.ops.cross_entropy import (
    SMALL_VOCABULARY,
    iteration_cross_entropy,
    row_cross_entropy,
)
from relay_fast.ops.dispatch import (
    IMPLS,
    REFERENCE,
    TORCH,
    Ops,
    compute_dtype,
    differentiable_once,
    explain,
    select,
    supports,
)
from relay_fast.ops.layers import attention, linear_residual, mlp, norm_linear

__all__ = [
    "IMPLS",
    "REFERENCE",
    "SMALL_VOCABULARY",
    "TORCH",
    "Ops",
    "attention",
    "compute_dtype",
    "differentiable_once",
    "explain",
    "iteration_cross_entropy",
    "linear_residual",
    "mlp",
    "norm_linear",
    "row_cross_entropy",
    "select",
    "supports",
]

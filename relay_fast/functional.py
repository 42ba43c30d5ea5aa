"""Public ops and the choice between their implementations.

`impl = "auto" | "triton" | "torch"`: `auto` takes the Triton kernels where they support the call
and plain torch otherwise, `"triton"` raises with the reason where they do not, `"torch"` is the
reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from relay_fast.gradients import GradientBuffers
from relay_fast.kernels.attention_ref import attention_bwd_ref, attention_fwd_ref
from relay_fast.kernels.cross_entropy_ref import (
    argmax_ref,
    cross_entropy_bwd_ref,
    cross_entropy_fwd_ref,
)
from relay_fast.kernels.linear_residual_ref import linear_residual_bwd_ref, linear_residual_fwd_ref
from relay_fast.kernels.mlp_ref import mlp_bwd_ref, mlp_fwd_ref
from relay_fast.kernels.norm_linear_ref import norm_linear_bwd_ref, norm_linear_fwd_ref
from relay_fast.kernels.weight_grad_ref import weight_grad_ref

IMPLS = ("auto", "triton", "torch")


class Ops(NamedTuple):
    """One implementation of every op of the block, forward and backward."""

    norm_linear_fwd: Callable
    norm_linear_bwd: Callable
    attention_fwd: Callable
    attention_bwd: Callable
    linear_residual_fwd: Callable
    linear_residual_bwd: Callable
    mlp_fwd: Callable
    mlp_bwd: Callable
    cross_entropy_fwd: Callable
    cross_entropy_bwd: Callable
    argmax: Callable
    weight_grad: Callable


TORCH = Ops(
    norm_linear_fwd_ref,
    norm_linear_bwd_ref,
    attention_fwd_ref,
    attention_bwd_ref,
    linear_residual_fwd_ref,
    linear_residual_bwd_ref,
    mlp_fwd_ref,
    mlp_bwd_ref,
    cross_entropy_fwd_ref,
    cross_entropy_bwd_ref,
    argmax_ref,
    weight_grad_ref,
)


def supports(device: torch.device | str = "cuda") -> str | None:
    """Why the Triton implementation cannot be used on `device`; None if it can."""
    return f"this version of relay_fast has no Triton kernels yet (asked for {device})"


def explain(device: torch.device | str = "cuda") -> str:
    """One sentence on which implementation `impl="auto"` takes on `device`, and why."""
    reason = supports(device)
    return f"torch: {reason}" if reason else "triton"


def select(impl: str = "auto", device: torch.device | str = "cpu") -> Ops:
    """The ops of an implementation; the environment variable RELAY_FAST_IMPL overrides `"auto"`.

    Raises ValueError for an unknown name, RuntimeError where "triton" was asked for and cannot be
    had.
    """
    if impl == "auto":
        impl = os.environ.get("RELAY_FAST_IMPL", "auto")
    if impl not in IMPLS:
        raise ValueError(f"impl = {impl!r} is unknown: use one of {IMPLS}")
    if impl == "triton":
        raise RuntimeError(
            f'impl="triton" cannot be used: {supports(device)}; use impl="torch" or "auto"'
        )
    return TORCH


class _RowCrossEntropy(torch.autograd.Function):
    """Row losses of a flat list of state rows; saves the log-sum-exp only."""

    @staticmethod
    def forward(ctx, ops, options, rows, targets, states, norm_weight, norm_bias, head):
        loss, lse, correct = ops.cross_entropy_fwd(
            states, targets, norm_weight, norm_bias, head, rows, **options
        )
        ctx.ops, ctx.options = ops, options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(rows, targets, lse, states, norm_weight, norm_bias, head)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss, _):
        rows, targets, lse, states, norm_weight, norm_bias, head = ctx.saved_tensors
        parameters = (norm_weight, norm_bias, head)
        grads = GradientBuffers(parameters, ctx.needs_input_grad[5:], ctx.ops.weight_grad)
        dstates = None
        if g_loss is not None:
            dh = ctx.ops.cross_entropy_bwd(
                g_loss, states, targets, lse, *parameters,
                grads.buffer(2), grads.buffer(0), grads.buffer(1), rows, **ctx.options,
            )  # fmt: skip
            if ctx.needs_input_grad[4]:
                dstates = torch.zeros_like(states)
                dstates.index_add_(0, rows, dh.to(states.dtype))
        return None, None, None, None, dstates, *grads.results()


def row_cross_entropy(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(norm(states[rows]) · headᵀ)` against `targets`, row by row.

    states (N, d): for all iterations at once, the states of every iteration end to end; rows (R,)
    int64, each at most once; targets (R,) int64, negative ones are ignored; head (V, d). No
    logits of more than a chunk of rows ever exist. Returns loss (R,) and correct (R,) bool (the
    argmax is the target). Raises ValueError where shapes do not fit together.
    """
    if rows.shape != targets.shape or rows.ndim != 1:
        raise ValueError(
            f"rows {tuple(rows.shape)} and targets {tuple(targets.shape)} must both be (R,)"
        )
    if states.ndim != 2 or head.ndim != 2 or states.shape[1] != head.shape[1]:
        raise ValueError(
            f"states {tuple(states.shape)} must be (N, d) and head {tuple(head.shape)} (V, d) "
            f"with one d"
        )
    options = {"eps": eps, "kind": norm, "label_smoothing": label_smoothing, "z_loss": z_loss}
    ops = select(impl, states.device)
    head = head.to(compute_dtype(head))
    return _RowCrossEntropy.apply(ops, options, rows, targets, states, norm_weight, norm_bias, head)


def iteration_cross_entropy(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    norm_bias: Tensor | None = None,
    **options,
) -> Tensor:
    """Weighted sum of `row_cross_entropy` over all iterations' rows: one call for the whole loop.

    weights (R,): w_task · λ / (B · T_i · |M_t|) of each row gives RELAY's loss
    (`PackedBatch.weights`). Returns a scalar.
    """
    loss, _ = row_cross_entropy(states, rows, targets, norm_weight, head, norm_bias, **options)
    return (loss * weights).sum()


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that GEMMs run in: autocast's where it is on, else the parameter's."""
    kind = parameter.device.type
    if parameter.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return parameter.dtype

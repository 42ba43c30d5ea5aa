"""Public ops: those of a layer one by one, the readout's cross-entropy, and what takes which
implementation (`relay_fast.dispatch`)."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.dispatch import (
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
from relay_fast.gradients import GradientBuffers
from relay_fast.layer_ops import attention, linear_residual, mlp, norm_linear

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
SMALL_VOCABULARY = 1024  # up to it the logits are cheaper to recompute than to keep in memory


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
    @differentiable_once
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


class _WeightedCrossEntropy(torch.autograd.Function):
    """Σ weights · row losses; the gradient is formed in forward, from the same logits."""

    @staticmethod
    def forward(ctx, ops, options, rows, targets, weights, states, norm_weight, norm_bias, head):
        parameters = (norm_weight, norm_bias, head)
        grads = GradientBuffers(parameters, ctx.needs_input_grad[6:], ops.weight_grad)
        loss, dh = ops.cross_entropy_grad(
            weights, states, targets, *parameters,
            grads.buffer(2), grads.buffer(0), grads.buffer(1), rows, **options,
        )  # fmt: skip
        if not ctx.needs_input_grad[5]:
            dh = None
        ctx.shape, ctx.dtype = states.shape, states.dtype
        ctx.save_for_backward(rows, loss, dh, *grads.results())
        return (loss * weights).sum()

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        rows, loss, dh, *parameters = ctx.saved_tensors
        dstates = dweights = None
        if dh is not None:
            dstates = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dh.device)
            dstates.index_add_(0, rows, (dh * g).to(ctx.dtype))
        if ctx.needs_input_grad[4]:
            dweights = loss * g
        scaled = (None if p is None else p * g.to(p.dtype) for p in parameters)
        return None, None, None, None, dweights, dstates, *scaled


def _check_rows(states: Tensor, rows: Tensor, targets: Tensor, head: Tensor) -> None:
    if rows.shape != targets.shape or rows.ndim != 1:
        raise ValueError(
            f"rows {tuple(rows.shape)} and targets {tuple(targets.shape)} must both be (R,)"
        )
    if states.ndim != 2 or head.ndim != 2 or states.shape[1] != head.shape[1]:
        raise ValueError(
            f"states {tuple(states.shape)} must be (N, d) and head {tuple(head.shape)} (V, d) "
            f"with one d"
        )


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
    _check_rows(states, rows, targets, head)
    options = {"eps": eps, "kind": norm, "label_smoothing": label_smoothing, "z_loss": z_loss}
    head = head.to(compute_dtype(head))
    if torch.compiler.is_compiling():
        from relay_fast.compiled_loss import row_cross_entropy_fwd

        loss, _, correct = row_cross_entropy_fwd(
            states, rows, targets, norm_weight, norm_bias, head, *options.values(), impl
        )
        return loss, correct
    ops = select(impl, states.device)
    return _RowCrossEntropy.apply(ops, options, rows, targets, states, norm_weight, norm_bias, head)


def iteration_cross_entropy(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Weighted sum of `row_cross_entropy` over all iterations' rows: one call for the whole loop.

    weights (R,): w_task · λ / (B · T_i · |M_t|) of each row gives RELAY's loss
    (`PackedBatch.weights`). Returns a scalar. The weights being known beforehand, the gradient of a
    vocabulary over SMALL_VOCABULARY is formed in forward, where one is wanted: the logits, a chunk
    of rows at a time, are computed once.
    """
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (states, norm_weight, norm_bias, head)
    )
    if not wanted or head.shape[0] <= SMALL_VOCABULARY or torch.compiler.is_compiling():
        loss, _ = row_cross_entropy(
            states, rows, targets, norm_weight, head, norm_bias, eps=eps, norm=norm,
            label_smoothing=label_smoothing, z_loss=z_loss, impl=impl,
        )  # fmt: skip
        return (loss * weights).sum()
    _check_rows(states, rows, targets, head)
    if weights.shape != rows.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} must be (R,) like rows {tuple(rows.shape)}"
        )
    options = {"eps": eps, "kind": norm, "label_smoothing": label_smoothing, "z_loss": z_loss}
    return _WeightedCrossEntropy.apply(
        select(impl, states.device), options, rows, targets, weights, states, norm_weight,
        norm_bias, head.to(compute_dtype(head)),
    )  # fmt: skip

"""The readout's cross-entropy, as autograd Functions and as custom ops.

Under torch.compile(fullgraph=True) the custom ops are one node each; their fakes only allocate.
Eager calls use plain autograd Functions, which cost 5 µs a call; the dispatcher costs 21 µs with
autograd registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import NORMS, upcast_dtype
from relay_fast.ops.dispatch import (
    chosen_ops,
    compute_dtype,
    differentiable_once,
    launch_context,
    refuse_transforms,
    requested_impl,
    select,
)
from relay_fast.ops.gradients import GradientBuffers
from relay_fast.utils.arguments import (
    check_choice,
    check_one_device,
    check_optional,
    check_tensors,
)
from relay_fast.utils.numbers import as_float

SMALL_VOCABULARY = 1024  # up to this size, recomputing the logits is cheaper than storing them


class _RowCrossEntropy(torch.autograd.Function):
    """Row losses of a flat list of state rows; saves only the log-sum-exp."""

    @staticmethod
    def forward(ctx, ops, options, dtype, rows, targets, states, norm_weight, norm_bias, head):
        with launch_context(states):
            loss, lse, correct = ops.cross_entropy_fwd(
                states, targets, norm_weight, norm_bias, head.to(dtype), rows, **options
            )
        ctx.ops, ctx.options, ctx.dtype = ops, options, dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(rows, targets, lse, states, norm_weight, norm_bias, head)
        return loss, correct

    @staticmethod
    @differentiable_once
    def backward(ctx, g_loss, _):
        rows, targets, lse, states, norm_weight, norm_bias, head = ctx.saved_tensors
        parameters = (norm_weight, norm_bias, head)
        grads = GradientBuffers(parameters, ctx.needs_input_grad[6:], ctx.ops.weight_grad)
        dstates = None
        if g_loss is not None:
            dh = ctx.ops.cross_entropy_bwd(
                g_loss, states, targets, lse, norm_weight, norm_bias, head.to(ctx.dtype),
                grads.buffer(2), grads.buffer(0), grads.buffer(1), rows, **ctx.options,
            )  # fmt: skip
            if ctx.needs_input_grad[5]:
                dstates = _scatter(rows, dh, states.shape, states.dtype)
        return None, None, None, None, None, dstates, *grads.results()


class _WeightedCrossEntropy(torch.autograd.Function):
    """Σ weights · row losses. The forward computes the gradient from the same logits, and keeps it
    in the upcast dtype until the backward has scaled it: unscaled, 16 bits may not hold it."""

    @staticmethod
    def forward(
        ctx, ops, options, dtype, rows, targets, weights, states, norm_weight, norm_bias, head
    ):
        parameters = (norm_weight, norm_bias, head)
        grads = GradientBuffers(parameters, ctx.needs_input_grad[7:], ops.weight_grad)
        wide = [grads.buffer(i) for i in range(3)]
        with launch_context(states):
            loss, dh = ops.cross_entropy_grad(
                weights, states, targets, norm_weight, norm_bias, head.to(dtype),
                wide[2], wide[0], wide[1], rows, **options,
            )  # fmt: skip
        if not ctx.needs_input_grad[6]:
            dh = None
        ctx.shape = states.shape
        inputs = (weights, states, *parameters)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        ctx.save_for_backward(rows, loss, dh, *wide)
        return weighted_losses(loss, weights, targets).sum()

    @staticmethod
    @differentiable_once
    def backward(ctx, g):
        rows, loss, dh, *parameters = ctx.saved_tensors
        dstates = dweights = None
        of_weights, of_states, *dtypes = ctx.dtypes
        if dh is not None:
            dstates = _scatter(rows, dh * g, ctx.shape, of_states)
        if ctx.needs_input_grad[5]:
            dweights = (loss * g).to(of_weights)
        scaled = (
            None if p is None else (p * g).to(dtype)
            for p, dtype in zip(parameters, dtypes, strict=True)
        )
        return None, None, None, None, None, dweights, dstates, *scaled


def _scatter(rows: Tensor, dh: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the gradient of all states, given that of some rows."""
    dstates = torch.zeros(shape, dtype=dtype, device=dh.device)
    return dstates.index_add_(0, rows, dh.to(dtype))


def weighted_losses(loss: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Weights losses.

    Args:
        loss: (R,) losses of rows.
        weights: (R,) their weights.
        targets: (R,) their targets; negative ones are ignored.

    Returns:
        loss · weights (R,) in the losses' dtype, 0 for ignored targets whatever their weight.
    """
    return (loss * weights.to(loss.dtype)).masked_fill(targets < 0, 0)


def _check_rows(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
) -> None:
    check_tensors(states=states, rows=rows, targets=targets, norm_weight=norm_weight, head=head)
    check_optional(norm_bias=norm_bias)
    lists = {"rows": rows, "targets": targets}
    check_one_device(
        states=states, norm_weight=norm_weight, norm_bias=norm_bias, head=head, **lists
    )
    for name, t in (("rows", rows), ("targets", targets)):
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} are of {t.dtype}: give int64")
    if rows.shape != targets.shape or rows.ndim != 1:
        raise ValueError(
            f"rows {tuple(rows.shape)} and targets {tuple(targets.shape)} must both be (R,)"
        )
    if states.ndim != 2 or head.ndim != 2 or states.shape[1] != head.shape[1]:
        raise ValueError(
            f"states {tuple(states.shape)} must be (N, d) and head {tuple(head.shape)} (V, d) "
            f"with one d"
        )
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and t.shape != states.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: give ({states.shape[1]},)")


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

    Only a chunk of rows has its logits in memory at a time. The states of ignored rows may hold
    anything, including NaN.

    Args:
        states: (N, d); for all iterations at once, their states end to end.
        rows: (R,) int64, each at most once.
        targets: (R,) int64; negative ones are ignored.
        norm_weight: (d,), of the final norm.
        head: (V, d).
        norm_bias: (d,), of a LayerNorm.
        eps: epsilon of the norm.
        norm: "rms" or "layer".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: weight of the squared log-sum-exp.
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        loss (R,), fp32, or fp64 if the states or the head are; and correct (R,) bool, whether the
        argmax is the target. Each gradient has its tensor's dtype.

    Raises:
        ValueError: if shapes do not fit together, and for rows and targets out of range if they are
            on the host. On a GPU the check would synchronise: there such a target causes a device
            error, or makes its loss and the gradients NaN.
    """
    _check_rows(states, rows, targets, norm_weight, norm_bias, head)
    options = _options(eps, norm, label_smoothing, z_loss)
    dtype = compute_dtype(head)
    if torch.compiler.is_compiling():
        impl = requested_impl(impl)
        loss, _, correct = row_cross_entropy_fwd(
            states, rows, targets, norm_weight, norm_bias, head.to(dtype), *options.values(), impl
        )
        return loss, correct
    differentiable = (states, norm_weight, norm_bias, head)
    refuse_transforms(*differentiable)
    ops = select(impl, states.device)
    return _RowCrossEntropy.apply(ops, options, dtype, rows, targets, *differentiable)


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
    """Weighted sum of `row_cross_entropy` over the rows of all iterations, in one call.

    For a vocabulary above SMALL_VOCABULARY the forward also computes the gradient, if needed, from
    the same logits, and keeps it in fp32 (fp64) until the backward has scaled it.

    Args:
        states: (N, d), the states of all iterations end to end.
        rows: (R,) int64, each at most once.
        targets: (R,) int64; negative ones are ignored.
        weights: (R,); RELAY's are w_task · λ / (B · T_i · |M_t|) (`PackedBatch.weights`).
        norm_weight: (d,), of the final norm.
        head: (V, d).
        norm_bias: (d,), of a LayerNorm.
        eps: epsilon of the norm.
        norm: "rms" or "layer".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: weight of the squared log-sum-exp.
        impl: "auto", "triton" or "torch" (see `relay_fast.ops.dispatch`).

    Returns:
        A scalar.

    Raises:
        ValueError: as `row_cross_entropy`, and for weights of another shape than rows.
    """
    check_tensors(weights=weights)
    _check_rows(states, rows, targets, norm_weight, norm_bias, head)
    if weights.shape != rows.shape:
        raise ValueError(
            f"weights {tuple(weights.shape)} must be (R,) like rows {tuple(rows.shape)}"
        )
    differentiable = (states, norm_weight, norm_bias, head)
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    if not wanted or head.shape[0] <= SMALL_VOCABULARY or torch.compiler.is_compiling():
        constants = {"label_smoothing": label_smoothing, "z_loss": z_loss, "impl": impl}
        loss, _ = row_cross_entropy(
            states, rows, targets, norm_weight, head, norm_bias, eps=eps, norm=norm, **constants
        )
        return weighted_losses(loss, weights, targets).sum()
    options, dtype = _options(eps, norm, label_smoothing, z_loss), compute_dtype(head)
    refuse_transforms(weights, *differentiable)
    ops = select(impl, states.device)
    return _WeightedCrossEntropy.apply(ops, options, dtype, rows, targets, weights, *differentiable)


def _options(eps: float, norm: str, label_smoothing: float, z_loss: float) -> dict:
    check_choice("norm", norm, NORMS)
    return {
        "eps": as_float("eps", eps),
        "kind": norm,
        "label_smoothing": as_float("label_smoothing", label_smoothing),
        "z_loss": as_float("z_loss", z_loss),
    }


@torch.library.custom_op("relay_fast::row_cross_entropy_fwd", mutates_args=())
def row_cross_entropy_fwd(
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    eps: float,
    kind: str,
    label_smoothing: float,
    z_loss: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of the compiled op: norm, head and cross-entropy of rows.

    Args:
        states: (N, d).
        rows: (R,) the rows with a target.
        targets: (R,) token ids; negative ones are ignored.
        norm_weight: (d,).
        norm_bias: (d,) or None.
        head: (V, d).
        eps: Added to the mean square in the norm.
        kind: "rms" or "layer".
        label_smoothing: Share of the target's probability that is spread evenly.
        z_loss: Weight of the squared log-partition function.
        impl: What `requested_impl` returned.

    Returns:
        Loss and lse (R,), fp32 or fp64, and correct (R,) bool.
    """
    options = _options(eps, kind, label_smoothing, z_loss)
    ops = chosen_ops(impl, states.device)
    with launch_context(states):
        return ops.cross_entropy_fwd(states, targets, norm_weight, norm_bias, head, rows, **options)


@row_cross_entropy_fwd.register_fake
def _(states, rows, targets, norm_weight, norm_bias, head, *_):
    loss = states.new_empty(targets.shape, dtype=upcast_dtype(states, head))
    return loss, torch.empty_like(loss), torch.empty_like(targets, dtype=torch.bool)


@torch.library.custom_op("relay_fast::row_cross_entropy_bwd", mutates_args=())
def row_cross_entropy_bwd(
    grad: Tensor,
    states: Tensor,
    rows: Tensor,
    targets: Tensor,
    lse: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    eps: float,
    kind: str,
    label_smoothing: float,
    z_loss: float,
    impl: str,
    needed: list[bool],
) -> list[Tensor]:
    """The backward of the compiled op.

    Args:
        grad: (R,) gradient of the losses.
        states: As in the forward, and so are the others but these:
        lse: (R,) what the forward returned.
        needed: Which of states, norm weight, norm bias and head need a gradient.

    Returns:
        The gradients that are needed, in that order.
    """
    ops, parameters = chosen_ops(impl, states.device), (norm_weight, norm_bias, head)
    grads = GradientBuffers(parameters, needed[1:], ops.weight_grad)
    with launch_context(states):
        dh = ops.cross_entropy_bwd(
            grad, states, targets, lse, *parameters,
            grads.buffer(2), grads.buffer(0), grads.buffer(1),
            rows, **_options(eps, kind, label_smoothing, z_loss),
        )  # fmt: skip
        dstates = []
        if needed[0]:
            dstates = [states.new_zeros(states.shape).index_add_(0, rows, dh.to(states.dtype))]
        return dstates + [g.contiguous() for g in grads.results() if g is not None]


@row_cross_entropy_bwd.register_fake
def _(grad, states, rows, targets, lse, norm_weight, norm_bias, head, e, k, s, z, impl, needed):
    inputs = (states, norm_weight, norm_bias, head)
    return [t.new_empty(t.shape) for t, wanted in zip(inputs, needed, strict=True) if wanted]


def _save(ctx, inputs, output) -> None:
    states, rows, targets, norm_weight, norm_bias, head, *ctx.options = inputs
    loss, lse, correct = output
    ctx.mark_non_differentiable(lse, correct)
    ctx.save_for_backward(states, rows, targets, lse, norm_weight, norm_bias, head)


def _backward(ctx, grad, _lse, _correct):
    needs = ctx.needs_input_grad
    needed = [needs[0], needs[3], needs[4], needs[5]]
    gradients = iter(
        torch.ops.relay_fast.row_cross_entropy_bwd(
            grad, *ctx.saved_tensors, *ctx.options, needed=needed
        )
    )
    states, *parameters = (next(gradients) if wanted else None for wanted in needed)
    return states, None, None, *parameters, *(None for _ in ctx.options)


row_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)

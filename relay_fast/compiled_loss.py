"""The row cross-entropy as custom ops, so that torch.compile(fullgraph=True) takes it as one node.

Eager calls do not come here: the dispatcher costs 21 µs a call with autograd registered, a plain
autograd Function 5. The fakes repeat the allocations, not the math.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.dispatch import select, undisturbed
from relay_fast.gradients import GradientBuffers
from relay_fast.kernels.norm_ref import wide_dtype


def _options(eps: float, kind: str, label_smoothing: float, z_loss: float) -> dict:
    return {"eps": eps, "kind": kind, "label_smoothing": label_smoothing, "z_loss": z_loss}


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
    """loss, lse (R,) wide and correct (R,) bool."""
    options = _options(eps, kind, label_smoothing, z_loss)
    ops = select(impl, states.device)
    with undisturbed(states):
        return ops.cross_entropy_fwd(states, targets, norm_weight, norm_bias, head, rows, **options)


@row_cross_entropy_fwd.register_fake
def _(states, rows, targets, norm_weight, norm_bias, head, *_):
    loss = states.new_empty(targets.shape, dtype=wide_dtype(states, head))
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
    """Gradients of states, norm weight, norm bias and head, as far as they are needed."""
    ops, parameters = select(impl, states.device), (norm_weight, norm_bias, head)
    grads = GradientBuffers(parameters, needed[1:], ops.weight_grad)
    with undisturbed(states):
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

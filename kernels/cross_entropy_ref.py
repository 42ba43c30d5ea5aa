"""Final norm + head + cross-entropy of the rows that carry a target, plain torch, forward and
backward.

    y = norm(h);  l = y · Wᵀ;  lse = log Σ exp(l)
    loss = lse − (1 − s) · l[target] − s · mean(l) + z · lse²
    dl = g · ((1 + 2·z·lse) · softmax(l) − (1 − s) · onehot − s / V)

Only lse is saved; the backward recomputes the logits. Where each row's g is known beforehand, one
pass forms loss and gradient from the same logits. Rows are taken in chunks, so that no more than
`CHUNK_LOGITS` logits exist at a time. Rows with target < 0 are ignored: loss 0, gradient 0,
never correct.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_ref import norm_bwd_ref, norm_fwd_ref, wide
from .weight_grad_ref import weight_grad_ref

CHUNK_LOGITS = 1 << 22  # logits alive at once


def _chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // max(1, vocabulary))


def readout_ref(
    h: Tensor,  # (rows, d)
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,  # (V, d), in the compute dtype
    eps: float = 1e-6,
    kind: str = "rms",
) -> Tensor:
    """Logits (rows, V) in the head's dtype."""
    return norm_fwd_ref(h, norm_weight, norm_bias, eps, kind, head.dtype) @ head.t()


def argmax_ref(h, norm_weight, norm_bias, head, eps=1e-6, kind="rms") -> Tensor:
    """Token ids (rows,) int64 of the largest logit, without keeping the logits of all rows."""
    chunks = h.split(_chunk_rows(head.shape[0]))
    ids = [readout_ref(c, norm_weight, norm_bias, head, eps, kind).argmax(-1) for c in chunks]
    return torch.cat(ids)


def _row_losses(
    logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and correct of rows of logits in the wide dtype."""
    valid = target >= 0
    chosen = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    lse = logits.logsumexp(-1)
    loss = lse - chosen
    if label_smoothing:
        loss = loss + label_smoothing * (chosen - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss * valid, lse, (logits.argmax(-1) == target) & valid


def _logit_grads_(
    logits: Tensor, lse: Tensor, target: Tensor, g: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """dl in the place of the logits."""
    weight = wide(g) * (target >= 0)
    dlogits = logits.sub_(lse.unsqueeze(1)).exp_()
    dlogits.mul_((weight * (1 + 2 * z_loss * lse)).unsqueeze(1))
    chosen = (-(1 - label_smoothing) * weight).unsqueeze(1)
    dlogits.scatter_add_(1, target.clamp(min=0).unsqueeze(1), chosen)
    if label_smoothing:
        dlogits.sub_((label_smoothing / logits.shape[1] * weight).unsqueeze(1))
    return dlogits


def _input_grad(
    dlogits, y, states, norm_weight, norm_bias, head, head_grad, norm_grad, norm_bias_grad, eps,
    kind,
) -> Tensor:  # fmt: skip
    """dh of the rows of dl (in the head's dtype); the parameters' gradients are added up."""
    if head_grad is not None:
        weight_grad_ref(head_grad, dlogits, y)
    dx, dweight, dbias, _ = norm_bwd_ref(dlogits @ head, states, norm_weight, norm_bias, eps, kind)
    if norm_grad is not None:
        norm_grad.add_(dweight)
    if norm_bias_grad is not None:
        norm_bias_grad.add_(dbias)
    return dx


def cross_entropy_fwd_ref(
    h: Tensor,  # (rows, d) states, or with `index` the buffer that holds them
    targets: Tensor,  # (rows,) int64
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,  # (V, d)
    index: Tensor | None = None,  # (rows,) which rows of h
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (rows,), lse (rows,) in the wide dtype, and correct (rows,) bool (argmax equals
    target)."""
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=wide(h[:0]).dtype, device=h.device)
    lse = torch.empty_like(loss)
    correct = torch.empty(rows, dtype=torch.bool, device=h.device)
    step = _chunk_rows(head.shape[0])
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        states = h[part] if index is None else h.index_select(0, index[part])
        logits = wide(readout_ref(states, norm_weight, norm_bias, head, eps, kind))
        loss[part], lse[part], correct[part] = _row_losses(
            logits, targets[part], label_smoothing, z_loss
        )
    return loss, lse, correct


def cross_entropy_bwd_ref(
    grad: Tensor,  # (rows,) gradient of each row's loss
    h: Tensor,
    targets: Tensor,
    lse: Tensor,  # (rows,)
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    head_grad: Tensor | None,  # (V, d) wide accumulator, or None if the head is frozen
    norm_grad: Tensor | None,  # (d,) wide accumulator
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """dh (rows, d) of the rows named by `index` (all rows of h without it), in the wide dtype."""
    rows, vocabulary = targets.shape[0], head.shape[0]
    dh = torch.empty(rows, h.shape[1], dtype=lse.dtype, device=h.device)
    step = _chunk_rows(vocabulary)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        states = h[part] if index is None else h.index_select(0, index[part])
        y = norm_fwd_ref(states, norm_weight, norm_bias, eps, kind, head.dtype)
        dlogits = _logit_grads_(
            wide(y @ head.t()), lse[part], targets[part], grad[part], label_smoothing, z_loss
        )
        dh[part] = _input_grad(
            dlogits.to(head.dtype), y, states, norm_weight, norm_bias, head, head_grad, norm_grad,
            norm_bias_grad, eps, kind,
        )  # fmt: skip
    return dh


def cross_entropy_grad_ref(
    grad: Tensor,  # (rows,) gradient of each row's loss, known before the forward
    h: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    head_grad: Tensor | None,  # accumulators as in `cross_entropy_bwd_ref`
    norm_grad: Tensor | None,
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """loss (rows,) and dh (rows, d), forward and backward from one pass over the logits."""
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=wide(h[:0]).dtype, device=h.device)
    dh = torch.empty(rows, h.shape[1], dtype=loss.dtype, device=h.device)
    step = _chunk_rows(head.shape[0])
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        states = h[part] if index is None else h.index_select(0, index[part])
        y = norm_fwd_ref(states, norm_weight, norm_bias, eps, kind, head.dtype)
        logits = wide(y @ head.t())
        loss[part], lse, _ = _row_losses(logits, targets[part], label_smoothing, z_loss)
        dlogits = _logit_grads_(logits, lse, targets[part], grad[part], label_smoothing, z_loss)
        dh[part] = _input_grad(
            dlogits.to(head.dtype), y, states, norm_weight, norm_bias, head, head_grad, norm_grad,
            norm_bias_grad, eps, kind,
        )  # fmt: skip
    return loss, dh

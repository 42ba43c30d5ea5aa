"""Final norm + head + cross-entropy of the rows that carry a target, plain torch, forward and
backward.

    y = norm(h);  l = y · Wᵀ;  lse = log Σ exp(l)
    loss = lse − (1 − s) · l[target] − s · mean(l) + z · lse²
    dl = g · ((1 + 2·z·lse) · softmax(l) − (1 − s) · onehot − s / V)

Only lse is saved; the backward recomputes the logits. Where each row's g is known beforehand, one
pass forms loss and gradient from the same logits. Rows are taken in chunks, so that no more than
`CHUNK_LOGITS` logits exist at a time.

Rows with target < 0 are ignored: loss 0, gradient 0, never correct, whatever their states hold
(rows that nobody wrote may be NaN): these are taken as zeros, losses and gradients selected away.
Losses, lse and dh are fp32, or fp64 where the states or the head are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .norm_ref import norm_bwd_ref, norm_fwd_ref, wide_dtype
from .weight_grad_ref import weight_grad_ref

CHUNK_LOGITS = 1 << 22  # logits alive at once
# dl for a row's gradient of 1 is small where the vocabulary is large: what it is multiplied by in
# fp16, whose smallest numbers are 6e-8.
UNIT = {torch.float16: 64.0}


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


def check_lists(
    targets: Tensor, vocabulary: int, index: Tensor | None = None, states: int = 0
) -> None:
    """Raises ValueError for targets at or beyond the vocabulary, and for entries of `index` that
    name none of the `states`. Reads the lists, which have to be on the host."""
    largest = int(targets.max()) if targets.numel() else -1
    if largest >= vocabulary:
        raise ValueError(
            f"target {largest} is outside of the vocabulary of {vocabulary}: targets are below it, "
            "negative ones are ignored"
        )
    if index is not None and index.numel():
        low, high = (int(t) for t in index.aminmax())
        if low < 0 or high >= states:
            raise ValueError(
                f"row {low if low < 0 else high} is none of the {states} states: rows are "
                f"0..{states - 1}"
            )


@contextmanager
def _named_ranges(targets: Tensor, head: Tensor, index: Tensor | None, h: Tensor) -> Iterator[None]:
    """Says which target or row was out of range where PyTorch has found one. On other devices it
    fails there by itself."""
    try:
        yield
    except (IndexError, RuntimeError):
        if targets.is_cpu:
            check_lists(targets, head.shape[0], index, h.shape[0])
        raise


def masked_states(h: Tensor, index: Tensor | None, part: slice, target: Tensor) -> Tensor:
    """The states of a part of the list, zeros where the target is ignored."""
    ignored = (target < 0).unsqueeze(1)
    if index is None:
        return h[part].masked_fill(ignored, 0)
    return h.index_select(0, index[part]).masked_fill_(ignored, 0)


def _row_losses(
    logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and correct of rows of logits in the wide dtype."""
    ignored = target < 0
    chosen = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    lse = logits.logsumexp(-1)
    loss = lse - chosen
    if label_smoothing:
        loss = loss + label_smoothing * (chosen - logits.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0), lse, (logits.argmax(-1) == target) & ~ignored


def _logit_grads_(
    logits: Tensor, lse: Tensor, target: Tensor, g: Tensor, label_smoothing: float, z_loss: float
) -> Tensor:
    """dl in the place of the logits."""
    weight = g.to(logits.dtype).masked_fill(target < 0, 0)
    dlogits = logits.sub_(lse.unsqueeze(1)).exp_()
    dlogits.mul_((weight * (1 + 2 * z_loss * lse)).unsqueeze(1))
    chosen = (-(1 - label_smoothing) * weight).unsqueeze(1)
    dlogits.scatter_add_(1, target.clamp(min=0).unsqueeze(1), chosen)
    if label_smoothing:
        dlogits.sub_((label_smoothing / logits.shape[1] * weight).unsqueeze(1))
    return dlogits


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
    target). Raises ValueError for targets and rows out of range, where they are on the host."""
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=wide_dtype(h, head), device=h.device)
    lse = torch.empty_like(loss)
    correct = torch.empty(rows, dtype=torch.bool, device=h.device)
    step = _chunk_rows(head.shape[0])
    with _named_ranges(targets, head, index, h):
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            states = masked_states(h, index, part, targets[part])
            logits = readout_ref(states, norm_weight, norm_bias, head, eps, kind).to(loss.dtype)
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
        states = masked_states(h, index, part, targets[part])
        y = norm_fwd_ref(states, norm_weight, norm_bias, eps, kind, head.dtype)
        dlogits = _logit_grads_(
            (y @ head.t()).to(lse.dtype), lse[part], targets[part], grad[part], label_smoothing,
            z_loss,
        )  # fmt: skip
        dlogits = dlogits.to(head.dtype)
        if head_grad is not None:
            weight_grad_ref(head_grad, dlogits, y)
        dh[part], dweight, dbias, _ = norm_bwd_ref(
            dlogits @ head, states, norm_weight, norm_bias, eps, kind
        )
        if norm_grad is not None:
            norm_grad.add_(dweight)
        if norm_bias_grad is not None:
            norm_bias_grad.add_(dbias)
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
    """loss (rows,) and dh (rows, d), forward and backward from one pass over the logits.

    dl is formed for a gradient of 1 and each row's own applied in the wide dtype behind the GEMMs:
    in 16 bits small ones would be lost."""
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=wide_dtype(h, head), device=h.device)
    dh = torch.empty(rows, h.shape[1], dtype=loss.dtype, device=h.device)
    unit = UNIT.get(head.dtype, 1.0)
    step = _chunk_rows(head.shape[0])
    with _named_ranges(targets, head, index, h):
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            target = targets[part]
            states = masked_states(h, index, part, target)
            y = norm_fwd_ref(states, norm_weight, norm_bias, eps, kind, head.dtype)
            logits = (y @ head.t()).to(loss.dtype)
            loss[part], lse, _ = _row_losses(logits, target, label_smoothing, z_loss)
            units = torch.full_like(lse, unit)
            dlogits = _logit_grads_(logits, lse, target, units, label_smoothing, z_loss)
            dlogits = dlogits.to(head.dtype)
            weight = (grad[part].to(loss.dtype) / unit).masked_fill_(target < 0, 0).unsqueeze(1)
            if head_grad is not None:
                weight_grad_ref(head_grad, dlogits, y * weight)
            dh[part], dweight, dbias, _ = norm_bwd_ref(
                (dlogits @ head) * weight, states, norm_weight, norm_bias, eps, kind
            )
            if norm_grad is not None:
                norm_grad.add_(dweight)
            if norm_bias_grad is not None:
                norm_bias_grad.add_(dbias)
    return loss, dh

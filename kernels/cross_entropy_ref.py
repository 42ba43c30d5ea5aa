"""Final norm + head + cross-entropy of the rows that carry a target, plain torch, forward and
backward.

    y = norm(h);  l = y · Wᵀ;  lse = log Σ exp(l)
    loss = lse − (1 − s) · l[target] − s · mean(l) + z · lse²
    dl = g · ((1 + 2·z·lse) · softmax(l) − (1 − s) · onehot − s / V)

Only lse is saved; the backward recomputes the logits. If each row's g is known beforehand, one pass
computes loss and gradient from the same logits. Rows are processed in chunks of at most
`CHUNK_LOGITS` logits.

Rows with target < 0 are ignored: loss 0, gradient 0, never correct. Their states may hold anything,
including NaN: they are read as zeros, and their losses and gradients are masked. Losses, lse and dh
are fp32, or fp64 if the states or the head are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .norm_ref import norm_bwd_ref, norm_fwd_ref, upcast_dtype
from .weight_grad_ref import weight_grad_ref

CHUNK_LOGITS = 1 << 22  # logits alive at once
# Factor of dl in fp16, whose smallest number is 6e-8: for large vocabularies dl is small.
UNIT = {torch.float16: 64.0}


def _chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // max(1, vocabulary))


def readout_ref(
    h: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    eps: float = 1e-6,
    kind: str = "rms",
) -> Tensor:
    """Computes the logits.

    Args:
        h: (rows, d).
        norm_weight: (d,), of the final norm.
        norm_bias: (d,), or None.
        head: (V, d), in the compute dtype.
        eps: epsilon of the norm.
        kind: "rms" or "layer".

    Returns:
        (rows, V) in the head's dtype.
    """
    return norm_fwd_ref(h, norm_weight, norm_bias, eps, kind, head.dtype) @ head.t()


def argmax_ref(h, norm_weight, norm_bias, head, eps=1e-6, kind="rms") -> Tensor:
    """Returns token ids (rows,) int64 of the largest logit.

    The logits of one chunk of rows are in memory at a time.

    Args:
        h: States (rows, d).
        norm_weight: (d,).
        norm_bias: (d,) or None.
        head: (V, d).
        eps: Added to the mean square in the norm.
        kind: "rms" or "layer".
    """
    chunks = h.split(_chunk_rows(head.shape[0]))
    ids = [readout_ref(c, norm_weight, norm_bias, head, eps, kind).argmax(-1) for c in chunks]
    return torch.cat(ids)


def check_lists(
    targets: Tensor, vocabulary: int, index: Tensor | None = None, states: int = 0
) -> None:
    """Checks targets and rows, which must be on the host.

    Args:
        targets: Token ids.
        vocabulary: Number of tokens.
        index: Rows of the states, or None.
        states: Number of states.

    Raises:
        ValueError: A target is ≥ vocabulary, or an entry of `index` outside 0..states − 1.
    """
    largest = int(targets.max()) if targets.numel() else -1
    if largest >= vocabulary:
        raise ValueError(
            f"target {largest} is outside of the vocabulary of {vocabulary}: give smaller "
            "targets, or negative ones to ignore rows"
        )
    if index is not None and index.numel():
        low, high = (int(t) for t in index.aminmax())
        if low < 0 or high >= states:
            raise ValueError(
                f"row {low if low < 0 else high} is none of the {states} states: give rows in "
                f"0..{states - 1}"
            )


@contextmanager
def _named_ranges(targets: Tensor, head: Tensor, index: Tensor | None, h: Tensor) -> Iterator[None]:
    """Replaces PyTorch's index error on a CPU by one that names the target or row out of range;
    other devices raise their own."""
    try:
        yield
    except (IndexError, RuntimeError):
        if targets.is_cpu:
            check_lists(targets, head.shape[0], index, h.shape[0])
        raise


def masked_states(h: Tensor, index: Tensor | None, part: slice, target: Tensor) -> Tensor:
    """Returns the states of a part of the list, zeros where the target is ignored.

    Args:
        h: All states.
        index: The states of the list, or None for all.
        part: The part of the list.
        target: The targets of the part.
    """
    ignored = (target < 0).unsqueeze(1)
    if index is None:
        return h[part].masked_fill(ignored, 0)
    return h.index_select(0, index[part]).masked_fill_(ignored, 0)


def _row_losses(
    logits: Tensor, target: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, lse and correct of rows of fp32 or fp64 logits."""
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
    """Overwrites the logits with dl."""
    weight = g.to(logits.dtype).masked_fill(target < 0, 0)
    dlogits = logits.sub_(lse.unsqueeze(1)).exp_()
    dlogits.mul_((weight * (1 + 2 * z_loss * lse)).unsqueeze(1))
    chosen = (-(1 - label_smoothing) * weight).unsqueeze(1)
    dlogits.scatter_add_(1, target.clamp(min=0).unsqueeze(1), chosen)
    if label_smoothing:
        dlogits.sub_((label_smoothing / logits.shape[1] * weight).unsqueeze(1))
    return dlogits


def cross_entropy_fwd_ref(
    h: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the row losses.

    Args:
        h: (rows, d) states, or with `index` the buffer that holds them.
        targets: (rows,) int64; negative ones are ignored.
        norm_weight: (d,), of the final norm.
        norm_bias: (d,), or None.
        head: (V, d), in the compute dtype.
        index: (rows,), the rows of h; None: all.
        eps: epsilon of the norm.
        kind: "rms" or "layer".
        label_smoothing: weight s of the uniform distribution in the target.
        z_loss: weight z of lse².

    Returns:
        loss (rows,) and lse (rows,) in fp32 or fp64, and correct (rows,) bool (argmax equals
        target).

    Raises:
        ValueError: for targets and rows out of range, if they are on the host.
    """
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=upcast_dtype(h, head), device=h.device)
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
    grad: Tensor,
    h: Tensor,
    targets: Tensor,
    lse: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    head_grad: Tensor | None,
    norm_grad: Tensor | None,
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Computes the backward of `cross_entropy_fwd_ref`, and adds to the accumulators.

    Args:
        grad: (rows,), gradient of each row's loss.
        lse: (rows,), from the forward.
        head_grad: (V, d) fp32 or fp64 accumulator, or None if the head is frozen.
        norm_grad: (d,) accumulator, or None.
        norm_bias_grad: (d,) accumulator, or None.
        others: as `cross_entropy_fwd_ref`.

    Returns:
        dh (rows, d) in fp32 or fp64.
    """
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
    grad: Tensor,
    h: Tensor,
    targets: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    head_grad: Tensor | None,
    norm_grad: Tensor | None,
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes loss and gradient in one pass over the logits, and adds to the accumulators.

    dl is computed for a gradient of 1; each row's own gradient is applied after the GEMMs in fp32
    or fp64, since small ones would underflow in 16 bits.

    Args: as `cross_entropy_bwd_ref`.

    Returns:
        loss (rows,) and dh (rows, d) in fp32 or fp64.
    """
    rows = targets.shape[0]
    loss = torch.empty(rows, dtype=upcast_dtype(h, head), device=h.device)
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

"""Final norm + head + cross-entropy for row gradients that are known before the forward: computes
loss and gradient in one pass over the logits, for large vocabularies.

    y = norm(h);  l = y · Wᵀ;  loss as in `cross_entropy`;  dl as in `cross_entropy_bwd`, for g = 1
    dy = g · (dl · W);  dW += dlᵀ · (g · y)

dl is stored in 16 bits for a row gradient of 1 (in fp16 times `UNIT`, against underflow). The rows'
own gradients, which may be small, are applied to dy in fp32 and to y. In fp16 the largest of them
is factored out of y and multiplied into dW.

The logits of one chunk of rows (`CHUNK_LOGITS` logits, 128 MB in 16 bits) are in memory at a time:
one GEMM computes them, a row kernel overwrites them with dl and writes the loss, two GEMMs consume
dl. Compared with `cross_entropy` and its backward this saves the second pass over the head, 2 · d ·
V of 8 · d · V FLOPs per row, for 8 · V bytes per row.

The row kernel reads its logits twice and writes them once: 6 · V bytes per row, memory bound.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import block_of, contiguous_columns, jit_kernel
from .cross_entropy import check_readout
from .cross_entropy_ref import UNIT, masked_states
from .norm import norm_bwd, norm_fwd
from .weight_grad import weight_grad

CHUNK_LOGITS = 1 << 26


@jit_kernel
def _logit_grad_kernel(
    # pointers
    logits_ptr, target_ptr, loss_ptr,
    # sizes
    V,
    # flags and blocks
    UNIT: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(target_ptr + row).to(tl.int64)
    grad = tl.where(target < V, UNIT, float("nan"))
    chosen = tl.load(
        logits_ptr + tl.maximum(target, 0), mask=target < V, other=float("nan")
    ).to(tl.float32)  # fmt: skip
    best = float("-inf")
    summed = 0.0
    total = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        new_best = tl.maximum(best, tl.max(logits, 0))
        summed = summed * tl.exp(best - new_best) + tl.sum(tl.exp(logits - new_best), 0)
        best = new_best
        if SMOOTHING != 0.0:
            total += tl.sum(tl.where(at < V, logits, 0.0), 0)
    lse = best + tl.log(summed)
    loss = lse - (1.0 - SMOOTHING) * chosen - SMOOTHING * (total / V) + Z_LOSS * lse * lse
    tl.store(loss_ptr + row, tl.where(target >= 0, loss, 0.0))
    soft = grad * (1.0 + 2.0 * Z_LOSS * lse)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        dlogits = soft * tl.exp(logits - lse) - SMOOTHING / V * grad
        dlogits -= tl.where(at == target, (1.0 - SMOOTHING) * grad, 0.0)
        dlogits = tl.where(target >= 0, dlogits, 0.0)
        tl.store(logits_ptr + at, dlogits.to(logits_ptr.dtype.element_ty), mask=at < V)


def cross_entropy_grad(
    grad: Tensor,  # (rows,) gradient of each row's loss
    h: Tensor,  # (rows, d) states, or with `index` the buffer that holds them
    targets: Tensor,  # (rows,) int64
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,  # (V, d)
    head_grad: Tensor | None,  # (V, d) fp32, zeros, or None if the head is frozen
    norm_grad: Tensor | None,  # (d,) fp32 accumulator
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,  # (rows,) which rows of h
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns loss (rows,) and dh (rows, d), both in fp32.

    Args: as `cross_entropy_grad_ref`; head_grad must be zero.
    """
    check_readout(h, norm_weight, norm_bias, head, kind, None, targets, index, grad)
    h, targets = contiguous_columns(h), targets.contiguous()
    rows, (vocabulary, d) = targets.shape[0], head.shape
    loss = torch.empty(rows, dtype=torch.float32, device=h.device)
    dh = torch.empty(rows, d, dtype=torch.float32, device=h.device)
    step, unit = max(1, CHUNK_LOGITS // vocabulary), UNIT.get(head.dtype, 1.0)
    weights = (grad.float() / unit).masked_fill_(targets < 0, 0).unsqueeze(1)
    largest = None
    if head.dtype == torch.float16 and rows:
        largest = weights.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        states = masked_states(h, index, part, targets[part])
        y = norm_fwd(states, norm_weight, norm_bias, eps, kind, head.dtype)
        logits = y @ head.t()
        _logit_grad_kernel[(part.stop - start,)](
            logits, targets[part], loss[part], V=vocabulary, UNIT=unit,
            SMOOTHING=label_smoothing, Z_LOSS=z_loss, BLOCK=min(4096, block_of(vocabulary)),
            num_warps=8,
        )  # fmt: skip
        weight = weights[part]
        if head_grad is not None:
            share = weight if largest is None else weight / largest
            weight_grad(head_grad, logits, (y * share).to(y.dtype))
        dh[part], dweight, dbias = norm_bwd(
            (logits @ head) * weight, states, norm_weight, eps, kind, norm_bias_grad is not None
        )
        if norm_grad is not None:
            norm_grad.add_(dweight)
        if norm_bias_grad is not None:
            norm_bias_grad.add_(dbias)
    if head_grad is not None and largest is not None:
        head_grad.mul_(largest)
    return loss, dh

"""Final norm + head + cross-entropy: backward of `cross_entropy.py`.

    dl = g · ((1 + 2·z·lse) · softmax(l) − (1 − s) · onehot − s / V);  dy = dl · W;  dW += dlᵀ · y

The logits are recomputed tile by tile; the same sweep computes d(state), with the norm's backward
fused. dl (rows, V) and y are written, in the compute dtype, only if the head needs a gradient: for
a chunk of rows at a time (at most `CHUNK_LOGITS` elements), which weight_grad reduces at once.

FLOPs per row: 4 · d · V, plus 2 · d · V in weight_grad. Bytes per row: 12 · d + 2 · V.
Above d = 512 (fp32: 256) cuBLAS runs the GEMMs, through the reference.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import block_of, cdiv, contiguous_columns, counted_rows, dot, jit_kernel
from .cross_entropy import check_readout, load_states, readout_config
from .cross_entropy_ref import cross_entropy_bwd_ref
from .norm import (
    NormPartials,
    norm_input_grad,
    norm_partial_buffers,
    normalize,
    scale_shift,
    store_norm_partials,
)
from .supports import norm_is_fused
from .weight_grad import weight_grad

CHUNK_LOGITS = 1 << 26  # elements of dl in memory at a time
CHUNK_ROWS = 256  # lower bound of the rows of a chunk


@jit_kernel
def _cross_entropy_bwd_kernel(
    # pointers
    grad_ptr, h_ptr, index_ptr, target_ptr, lse_ptr, norm_weight_ptr, norm_bias_ptr, head_ptr,
    dh_ptr, dlogits_ptr, y_ptr, dnorm_weight_ptr, dnorm_bias_ptr, count_ptr,
    # strides
    stride_g, stride_hm, stride_vn,
    # sizes, scalars
    M, V, offset, listed,
    # flags
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr, offset)
    program = tl.program_id(0).to(tl.int64)
    base = program * BLOCK_M
    inside = tl.arange(0, BLOCK_D)
    if base >= M:
        return
    at = base + tl.arange(0, BLOCK_M)
    row_mask = at < M
    mask = row_mask[:, None] & (inside < D)[None, :]
    target = tl.load(target_ptr + at, mask=row_mask, other=-1).to(tl.int64)
    wanted = target >= 0
    h = load_states(h_ptr, index_ptr, listed, stride_hm, at, wanted, inside, D)
    x_hat, _ = normalize(h, inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    y = y.to(head_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    if y_ptr is not None:
        tl.store(y_ptr + at[:, None] * D + inside[None, :], y, mask=mask)
    lse = tl.load(lse_ptr + at, mask=wanted, other=0.0)
    grad = tl.load(grad_ptr + at * stride_g, mask=wanted, other=0.0).to(tl.float32)
    grad = tl.where(target < V, grad, float("nan"))
    soft = grad * (1.0 + 2.0 * Z_LOSS * lse)
    dy = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, V, BLOCK_V):
        tokens = start + tl.arange(0, BLOCK_V)
        head = tl.load(
            head_ptr + tokens[:, None].to(tl.int64) * stride_vn + inside[None, :],
            mask=(tokens < V)[:, None] & (inside < D)[None, :], other=0.0,
        )  # [BLOCK_V, BLOCK_D]  # fmt: skip
        logits = dot(y, tl.trans(head), tl.zeros((BLOCK_M, BLOCK_V), tl.float32))
        dlogits = soft[:, None] * tl.exp(logits - lse[:, None])
        hit = tokens[None, :] == target[:, None]
        dlogits -= tl.where(hit, ((1.0 - SMOOTHING) * grad)[:, None], 0.0)
        if SMOOTHING != 0.0:
            dlogits -= (SMOOTHING / V * grad)[:, None]
        # Ignored rows may hold anything; columns outside are multiplied by zero head rows.
        dlogits = tl.where(wanted[:, None], dlogits, 0.0).to(y.dtype)
        if dlogits_ptr is not None:
            tl.store(
                dlogits_ptr + at[:, None] * V + tokens[None, :], dlogits,
                mask=row_mask[:, None] & (tokens < V)[None, :],
            )  # fmt: skip
        dy = dot(dlogits, head, dy)
    h = load_states(h_ptr, index_ptr, listed, stride_hm, at, wanted, inside, D)
    x_hat, rstd = normalize(h, inside, D, EPS, IS_LAYER)
    store_norm_partials(dy, x_hat, dnorm_weight_ptr, dnorm_bias_ptr, program, inside, D, True)
    dh = norm_input_grad(dy, x_hat, rstd, norm_weight_ptr, inside, D, IS_LAYER)
    tl.store(dh_ptr + at[:, None] * D + inside[None, :], dh, mask=mask)


# Long: the signature and its description are half of it.
def cross_entropy_bwd(
    grad: Tensor,  # (rows,) gradient of each row's loss
    h: Tensor,
    targets: Tensor,
    lse: Tensor,  # (rows,)
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,
    head_grad: Tensor | None,  # (V, d) fp32 accumulator, or None if the head is frozen
    norm_grad: Tensor | None,  # (d,) fp32 accumulator
    norm_bias_grad: Tensor | None,
    index: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    row_count: Tensor | None = None,
    partials: NormPartials | None = None,
    operands: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Returns dh (rows, d) in fp32.

    Args: as `cross_entropy_bwd_ref`; row_count: see `_runtime`; partials: see `norm_grad_buffers`,
    instead of the norm's accumulators; operands: gets dl and y, instead of head_grad their product.
    """
    check_readout(h, norm_weight, norm_bias, head, kind, row_count, targets, index, grad, lse)
    if not norm_is_fused(h.shape[1], head.dtype):
        return cross_entropy_bwd_ref(
            grad, h, targets, lse, norm_weight, norm_bias, head, head_grad, norm_grad,
            norm_bias_grad, index, eps, kind, label_smoothing, z_loss,
        )  # fmt: skip
    h, targets, lse = contiguous_columns(h), targets.contiguous(), lse.contiguous()
    index = None if index is None else index.contiguous()
    rows, (vocabulary, d) = targets.shape[0], head.shape
    new = torch.empty if row_count is None else torch.zeros
    dh = new(rows, d, dtype=torch.float32, device=h.device)
    step = rows if head_grad is None else max(CHUNK_ROWS, CHUNK_LOGITS // vocabulary)
    for start in range(0, rows, max(1, step)):
        part = slice(start, min(rows, start + step))
        count = part.stop - start
        config = readout_config(count, d, head.dtype, h.device)
        programs = cdiv(count, config.block_m)
        sums = partials
        if sums is None:  # zeros, so that one variant of the kernel serves both
            zeros = torch.zeros(2, programs, d, dtype=torch.float32, device=h.device)
            sums = zeros[0], None if norm_bias_grad is None else zeros[1]
        dnw, dnb = norm_partial_buffers(h, programs, sums[1] is not None, sums)
        widths = (vocabulary, d) if head_grad is not None else ()
        kept = [torch.empty(count, n, dtype=head.dtype, device=h.device) for n in widths]
        dlogits, y = kept or (None, None)
        _cross_entropy_bwd_kernel[(programs,)](
            grad[part], h if index is not None else h[part],
            (targets if index is None else index)[part], targets[part], lse[part],
            norm_weight, norm_bias, head, dh[part], dlogits, y, dnw, dnb, row_count,
            stride_g=grad.stride(0), stride_hm=h.stride(0), stride_vn=head.stride(0),
            M=count, V=vocabulary, offset=start, listed=int(index is not None), D=d, EPS=eps,
            IS_LAYER=kind == "layer", SMOOTHING=label_smoothing, Z_LOSS=z_loss,
            BLOCK_M=config.block_m, BLOCK_V=config.block_n, BLOCK_D=block_of(d), **config.launch,
        )  # fmt: skip
        if operands is not None and head_grad is not None:
            operands.append((dlogits, y))
        elif head_grad is not None:
            weight_grad(head_grad, dlogits, y, row_count=row_count, offset=start)
        if partials is None:
            _add_norm_grads(norm_grad, norm_bias_grad, dnw, dnb)
    return dh


def _add_norm_grads(
    norm_grad: Tensor | None, norm_bias_grad: Tensor | None, dnw: Tensor, dnb: Tensor | None
) -> None:
    for total, parts in ((norm_grad, dnw), (norm_bias_grad, dnb)):
        if total is not None:
            total.add_(parts.sum(0))

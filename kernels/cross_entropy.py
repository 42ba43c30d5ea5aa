"""Final norm + head + cross-entropy of the rows that carry a target: forward, and argmax.

    y = norm(h);  l = y · Wᵀ;  lse = log Σ exp(l)
    loss = lse − (1 − s) · l[target] − s · mean(l) + z · lse²

Shapes: h (rows, d), or with `index` (rows,) the buffer that holds the rows; W (V, d); loss, lse
(rows,) fp32; correct (rows,) bool. A program keeps norm(h) of its rows and iterates over the
vocabulary in tiles with an online log-sum-exp: logits stay on the SM. If rows are few and the
vocabulary is large, several programs share the vocabulary and their parts are combined afterwards.
Only lse is saved. Rows with target < 0 are not read. A target ≥ V makes its loss and the gradients
NaN: raising an error would need a synchronisation.

FLOPs per row: 2 · d · V. Bytes per row (fp32 state): 4 · d + 16; at d = 256, V = 320: 160 FLOP per
byte, near the ridge; the head (164 kB) stays in L2. Above d = 512 (fp32: 256) cuBLAS computes the
logits of a chunk of rows, through the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Config,
    block_of,
    cdiv,
    contiguous_columns,
    counted_rows,
    device_props,
    dot,
    jit_kernel,
)
from .cross_entropy_ref import argmax_ref, check_lists, cross_entropy_fwd_ref
from .norm import normalize, scale_shift
from .supports import (
    list_reason,
    norm_is_fused,
    norm_reason,
    require,
    row_count_reason,
    shapes_reason,
    vocabulary_reason,
    weights_reason,
)
from .tuning import pick


@triton.jit
def load_states(
    h_ptr, index_ptr, listed, stride_hm, at, wanted, columns, D: tl.constexpr,
):  # fmt: skip
    """Loads the states [BLOCK_M, BLOCK_D] of list entries `at` in fp32, zeros if not wanted. They
    are the rows `at` if not `listed`, which a kernel compiled for a list serves too."""
    rows = at
    if index_ptr is not None:
        own = tl.load(index_ptr + at, mask=wanted & (listed != 0), other=0).to(tl.int64)
        rows = tl.where(listed != 0, own, at)
    mask = wanted[:, None] & (columns < D)[None, :]
    h = tl.load(h_ptr + rows[:, None] * stride_hm + columns[None, :], mask=mask, other=0.0)
    return h.to(tl.float32)


@jit_kernel
def _cross_entropy_fwd_kernel(
    # pointers
    h_ptr, index_ptr, target_ptr, norm_weight_ptr, norm_bias_ptr, head_ptr,
    loss_ptr, lse_ptr, correct_ptr, best_ptr, id_ptr, chosen_ptr, total_ptr, count_ptr,
    # strides
    stride_hm, stride_vn,
    # sizes, scalars
    M, V, each, listed,
    # flags
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    at = base + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    part = split.to(tl.int64) * M + at
    M = counted_rows(M, count_ptr)
    if base >= M:
        return
    row_mask = at < M
    inside = tl.arange(0, BLOCK_D)
    wanted = row_mask
    target = tl.full((BLOCK_M,), -1, tl.int64)
    if target_ptr is not None:
        target = tl.load(target_ptr + at, mask=row_mask, other=-1).to(tl.int64)
        wanted = target >= 0
    h = load_states(h_ptr, index_ptr, listed, stride_hm, at, wanted, inside, D)
    x_hat, _ = normalize(h, inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    y = y.to(head_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK_M,), tl.int32)
    summed = tl.zeros((BLOCK_M,), tl.float32)
    chosen = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(split * each, tl.minimum((split + 1) * each, V), BLOCK_V):
        tokens = start + tl.arange(0, BLOCK_V)
        head = tl.load(
            head_ptr + tokens[None, :].to(tl.int64) * stride_vn + inside[:, None],
            mask=(tokens < V)[None, :] & (inside < D)[:, None], other=0.0,
        )  # [BLOCK_D, BLOCK_V]  # fmt: skip
        logits = dot(y, head, tl.zeros((BLOCK_M, BLOCK_V), tl.float32))
        logits = tl.where((tokens < V)[None, :], logits, float("-inf"))
        top, top_at = tl.max(logits, 1, return_indices=True)
        ids = tl.where(top > best, top_at + start, ids)
        if target_ptr is not None:
            new_best = tl.maximum(best, top)
            summed *= tl.exp(best - new_best)
            summed += tl.sum(tl.exp(logits - new_best[:, None]), 1)
            hit = tokens[None, :] == target[:, None]
            chosen += tl.sum(tl.where(hit, logits, 0.0), 1)
            if SMOOTHING != 0.0:
                total += tl.sum(tl.where((tokens < V)[None, :], logits, 0.0), 1)
        best = tl.maximum(best, top)
    if loss_ptr is not None:
        lse = best + tl.log(summed)
        loss = lse - (1.0 - SMOOTHING) * chosen - SMOOTHING * (total / V) + Z_LOSS * lse * lse
        loss = tl.where(target < V, loss, float("nan"))
        tl.store(loss_ptr + at, tl.where(target >= 0, loss, 0.0), mask=row_mask)
        tl.store(lse_ptr + at, lse, mask=row_mask)
        correct = (ids == target) & (target >= 0)
        tl.store(correct_ptr + at, correct.to(tl.int8), mask=row_mask)
    else:
        tl.store(id_ptr + part, ids.to(tl.int64), mask=row_mask)
        if best_ptr is not None:
            tl.store(best_ptr + part, best, mask=row_mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + part, best + tl.log(summed), mask=row_mask)
            tl.store(chosen_ptr + part, chosen, mask=row_mask)
            tl.store(total_ptr + part, total, mask=row_mask)


def readout_config(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Returns the configuration of forward and backward; block_n is the size of a vocabulary tile.

    Args:
        rows: Number of rows.
        d: Width of the states.
        dtype: Their dtype.
        device: Where they are.
    """
    return pick("readout", dtype, d, rows, device)


def check_readout(
    h, norm_weight, norm_bias, head, kind, row_count, targets=None, index=None, *per_row
) -> None:
    """Checks that the kernels support a call; the arguments are those of `cross_entropy_fwd`.

    Args:
        h: States.
        norm_weight: (d,).
        norm_bias: (d,) or None.
        head: (V, d).
        kind: "rms" or "layer".
        row_count: Number of live rows on the device, or None.
        targets: (rows,) or None.
        index: (rows,) the states of the rows, or None.
        per_row: Further tensors (rows,).

    Raises:
        Unsupported: The kernels do not support the call.
        ValueError: Targets or rows in lists on the host are out of range.
    """
    require(norm_reason(h, norm_weight, norm_bias, head, *per_row, kind=kind))
    d = h.shape[1]
    reason = row_count_reason(row_count, h)
    if row_count is not None and not norm_is_fused(d, head.dtype):
        reason = f"a readout of width {d} does not support row_count, since cuBLAS runs its GEMMs"
    require(
        reason
        or shapes_reason(
            ("the norm's weight", norm_weight, (d,)),
            ("its bias", norm_bias, (d,)),
            ("head", head, (head.shape[0], d)),
        )  # fmt: skip
        or weights_reason(head)
        or vocabulary_reason(head.shape[0])
    )
    if targets is not None:
        rows = (h if index is None else index).shape[:1]
        require(list_reason("targets", targets, rows, h) or list_reason("index", index, rows, h))
        wrong = [tuple(t.shape) for t in per_row if t.shape != rows]
        require(f"grad or lse is {wrong[0]} instead of {tuple(rows)}" if wrong else None)
        if targets.is_cpu:  # interpreted: rows beyond the count hold anything
            counted = slice(None if row_count is None else int(row_count))
            index = None if index is None else index[counted]
            check_lists(targets[counted], head.shape[0], index, h.shape[0])


def _splits(rows: int, vocabulary: int, config: Config, device: torch.device) -> tuple[int, int]:
    """Returns how many programs share the vocabulary, and how many tokens each takes."""
    tiles = cdiv(vocabulary, config.block_n)
    if vocabulary <= 1024:
        return 1, tiles * config.block_n
    wanted = max(1, 2 * device_props(device).processors // cdiv(rows, config.block_m))
    each = cdiv(tiles, min(tiles, wanted)) * config.block_n
    return cdiv(vocabulary, each), each


def _launch(
    h, index, targets, norm_weight, norm_bias, head, eps, kind, row_count, outputs, splits, options
):  # fmt: skip
    rows, d = (h.shape[0] if index is None else index.shape[0]), h.shape[1]
    config = readout_config(rows, d, head.dtype, h.device)
    _cross_entropy_fwd_kernel[(cdiv(rows, config.block_m), splits[0])](
        h, targets if index is None else index, targets, norm_weight, norm_bias, head, *outputs,
        row_count, stride_hm=h.stride(0), stride_vn=head.stride(0), M=rows, V=head.shape[0],
        each=splits[1], listed=int(index is not None), D=d, EPS=eps, IS_LAYER=kind == "layer",
        **options, BLOCK_M=config.block_m, BLOCK_V=config.block_n, BLOCK_D=block_of(d),
        **config.launch,
    )  # fmt: skip


def _allocator(h: Tensor, row_count: Tensor | None) -> Callable[..., Tensor]:
    """Returns a function that allocates buffers on h's device, filled with 0 if there is a row
    count."""
    new = torch.empty if row_count is None else torch.zeros

    def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return new(shape, dtype=dtype, device=h.device)

    return allocate


def argmax(
    h: Tensor,  # (rows, d)
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head: Tensor,  # (V, d)
    eps: float = 1e-6,
    kind: str = "rms",
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns token ids (rows,) int64 of the largest logit, the first one among equals; logits are
    not stored.

    Args: as `readout_ref`; row_count: see `_runtime`.
    """
    check_readout(h, norm_weight, norm_bias, head, kind, row_count)
    if not norm_is_fused(h.shape[1], head.dtype) and h.shape[0]:
        return argmax_ref(h, norm_weight, norm_bias, head, eps, kind)
    h, rows = contiguous_columns(h), h.shape[0]
    if rows == 0:
        return torch.empty(0, dtype=torch.int64, device=h.device)
    config = readout_config(rows, h.shape[1], head.dtype, h.device)
    splits = _splits(rows, head.shape[0], config, h.device)
    empty = _allocator(h, row_count)
    ids = empty(splits[0], rows, dtype=torch.int64)
    best = empty(splits[0], rows) if splits[0] > 1 else None
    outputs = (None, None, None, best, ids, None, None)
    options = {"SMOOTHING": 0.0, "Z_LOSS": 0.0}
    shared = (h, None, None, norm_weight, norm_bias, head, eps, kind, row_count)
    _launch(*shared, outputs, splits, options)
    return ids[0] if best is None else ids.gather(0, best.argmax(0, keepdim=True))[0]


def cross_entropy_fwd(
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
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (rows,) and lse (rows,) in fp32, and correct (rows,) bool (argmax equals
    target).

    Args: as `cross_entropy_fwd_ref`; row_count: see `_runtime`.
    """
    check_readout(h, norm_weight, norm_bias, head, kind, row_count, targets, index)
    if not norm_is_fused(h.shape[1], head.dtype):
        return cross_entropy_fwd_ref(
            h, targets, norm_weight, norm_bias, head, index, eps, kind, label_smoothing, z_loss
        )
    h, rows, vocabulary = contiguous_columns(h), targets.shape[0], head.shape[0]
    index = None if index is None else index.contiguous()
    targets = targets.contiguous()
    empty = _allocator(h, row_count)
    if rows == 0:
        return empty(0), empty(0), empty(0, dtype=torch.bool)
    splits = _splits(
        rows, vocabulary, readout_config(rows, h.shape[1], head.dtype, h.device), h.device
    )
    options = {"SMOOTHING": label_smoothing, "Z_LOSS": z_loss}
    shared = (h, index, targets, norm_weight, norm_bias, head, eps, kind, row_count)
    if splits[0] == 1:
        loss, lse, correct = empty(rows), empty(rows), empty(rows, dtype=torch.bool)
        outputs = (loss, lse, correct.view(torch.int8), None, None, None, None)
        _launch(*shared, outputs, splits, options)
        return loss, lse, correct
    best, lse, chosen, total = (empty(splits[0], rows) for _ in range(4))
    ids = empty(splits[0], rows, dtype=torch.int64)
    _launch(*shared, (None, lse, None, best, ids, chosen, total), splits, options)
    ids = ids.gather(0, best.argmax(0, keepdim=True))[0]
    lse, valid = lse.logsumexp(0), targets >= 0
    if row_count is not None:
        valid &= torch.arange(rows, device=h.device) < row_count
    loss = lse - (1 - label_smoothing) * chosen.sum(0) + z_loss * lse.square()
    if label_smoothing:
        loss = loss - label_smoothing / vocabulary * total.sum(0)
    loss = loss.masked_fill(targets >= vocabulary, float("nan")).masked_fill(~valid, 0)
    return loss, lse, (ids == targets) & valid

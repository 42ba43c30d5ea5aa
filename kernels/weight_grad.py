"""Weight gradient accumulated into an fp32 buffer: acc += dyᵀ · x (beta = 1), deterministic.

Shapes: acc (columns, d), dy (rows, columns), x (rows, d). The sum over rows is long and the output
small (768 × 256: 12 tiles for 132 processors), so the rows are split over programs. Each writes an
fp32 partial, and a second kernel adds the partials to acc in a fixed order: no float atomics, and
the same bits in every run on one machine.

FLOPs: 2 · rows · columns · d. Bytes: 2 · rows · (columns + d) + 8 · splits · columns · d; the
partials (8.6 MB at 768 × 256 and 11 splits) stay in L2.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import (
    Config,
    cdiv,
    contiguous_columns,
    counted_rows,
    device_props,
    dot,
    jit_kernel,
)
from .supports import norm_reason, require, row_count_reason, shapes_reason, weights_reason
from .tuning import pick

# Rows summed in the tensor cores' accumulators, which truncate: on an H200 the error of a sum grows
# linearly, 1.1e-9 of its size a row. Chains are added up in fp32, which rounds.
CHAIN = 512


@jit_kernel
def _weight_grad_kernel(
    # pointers
    acc_ptr, dy_ptr, x_ptr, count_ptr,
    # strides
    stride_as, stride_an, stride_dm, stride_xm,
    # sizes, scalars
    M, N, D, rows_each, offset,
    # flags and blocks
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr, offset)
    split = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = split * rows_each
    last = tl.minimum(first + rows_each, M)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for chain in range(first, last, CHAIN):
        part = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(chain, tl.minimum(chain + CHAIN, last), BLOCK_K):
            rows = start + tl.arange(0, BLOCK_K)
            dy = tl.load(
                dy_ptr + rows[:, None] * stride_dm + columns[None, :],
                mask=(rows < last)[:, None] & (columns < N)[None, :], other=0.0,
            )  # [BLOCK_K, BLOCK_N]  # fmt: skip
            x = tl.load(
                x_ptr + rows[:, None] * stride_xm + inside[None, :],
                mask=(rows < last)[:, None] & (inside < D)[None, :], other=0.0,
            )  # [BLOCK_K, BLOCK_D]  # fmt: skip
            part = dot(tl.trans(dy), x, part)
        total += part
    at = acc_ptr + split * stride_as + columns[:, None] * stride_an + inside[None, :]
    mask = (columns < N)[:, None] & (inside < D)[None, :]
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total, mask=mask)


@jit_kernel
def _weight_grad_sum_kernel(
    # pointers
    acc_ptr, partial_ptr,
    # strides, sizes
    stride_an, N, D, splits,
    # blocks
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N * D
    acc = acc_ptr + at // D * stride_an + at % D
    total = tl.load(acc, mask=mask, other=0.0)
    partial = partial_ptr + at
    for _ in range(0, splits):
        total += tl.load(partial, mask=mask, other=0.0)
        partial += N * D
    tl.store(acc, total, mask=mask)


def _config(columns: int, d: int, dtype: torch.dtype, device: torch.device) -> Config:
    """Returns a configuration; block_m is the size of a tile along d."""
    return pick("weight_grad", dtype, min(columns, d), 0, device)


def weight_grad(
    acc: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    fresh: bool = False,
    row_count: Tensor | None = None,
    offset: int = 0,
) -> None:
    """acc += dyᵀ · x, summed in fp32.

    Args:
        acc: (columns, d) fp32.
        dy: (rows, columns).
        x: (rows, d).
        fresh: whether acc is uninitialised and must be zeroed first.
        row_count: (1,) int32 on the device, the number of rows that count; None: all.
        offset: index of dy's first row among the rows that `row_count` counts.
    """
    reason = (
        norm_reason(x, acc, dy)
        or shapes_reason(("acc", acc, (dy.shape[-1], x.shape[1])), ("dy", dy, (len(x), len(acc))))
        or weights_reason(acc)
        or row_count_reason(row_count, x)
    )
    if reason is None and (acc.dtype != torch.float32 or acc.stride(-1) != 1):
        reason = "the accumulator must be fp32 with contiguous columns"
    require(reason)
    if fresh:
        acc.zero_()
    if dy.dtype != x.dtype:
        dtype = torch.promote_types(dy.dtype, x.dtype)
        dy, x = dy.to(dtype), x.to(dtype)
    dy, x = contiguous_columns(dy), contiguous_columns(x)
    rows, (columns, d) = x.shape[0], acc.shape
    if rows == 0:
        return
    config = _config(columns, d, x.dtype, x.device)
    block_k = 32 if x.dtype == torch.float32 else 64
    grid = (cdiv(d, config.block_m), cdiv(columns, config.block_n))
    splits = max(
        1, min(cdiv(rows, 4 * block_k), device_props(x.device).processors // (grid[0] * grid[1]))
    )
    rows_each = cdiv(cdiv(rows, splits), block_k) * block_k
    splits = cdiv(rows, rows_each)
    target = acc
    if splits > 1:
        target = torch.empty(splits, columns, d, dtype=acc.dtype, device=acc.device)
    _weight_grad_kernel[(*grid, splits)](
        target, dy, x, row_count, stride_as=0 if splits == 1 else target.stride(0),
        stride_an=target.stride(-2), stride_dm=dy.stride(0), stride_xm=x.stride(0),
        M=rows, N=columns, D=d, rows_each=rows_each, offset=offset, ADD=splits == 1,
        BLOCK_N=config.block_n, BLOCK_D=config.block_m, BLOCK_K=block_k, CHAIN=CHAIN,
        **config.launch,
    )  # fmt: skip
    if splits > 1:
        _weight_grad_sum_kernel[(cdiv(columns * d, 1024),)](
            acc, target, stride_an=acc.stride(0), N=columns, D=d, splits=splits, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip

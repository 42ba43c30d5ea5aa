"""Output projection added to the residual stream: out = residual + drop(a · Wᵀ + b).

Shapes: a (rows, columns), W (d, columns), residual and out (rows, d).
Backward: da = dbranch · W with dbranch = drop(dout) in the compute dtype, which is also an operand
of the weight gradient (dW = dbranchᵀ · a); the residual's gradient is dout itself. Nothing is
saved.

FLOPs per row: 2 · d · columns in each direction. Bytes per row (16-bit, fp32 state, d = columns =
256): forward 2·columns + 8d = 2.6 kB, backward 6d + 2·columns = 2 kB: memory bound.
Above d = 512 cuBLAS runs the GEMM (`addmm`), which is the reference itself.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import Config, cdiv, contiguous_columns, counted_rows, dot, jit_kernel
from .dropout import dropout_arguments, dropout_scale
from .dropout_ref import Dropout
from .linear_residual_ref import linear_residual_bwd_ref, linear_residual_fwd_ref
from .supports import (
    FUSED_WIDTH,
    norm_reason,
    require,
    row_count_reason,
    shapes_reason,
    weights_reason,
)
from .tuning import pick


@jit_kernel
def _linear_residual_fwd_kernel(
    # pointers
    a_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, count_ptr, seed_ptr, tokens_ptr,
    # strides
    stride_am, stride_wn, stride_rm, stride_om,
    # sizes, scalars
    M, N, K, column_blocks, counter,
    # flags and blocks
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    base = program // column_blocks * BLOCK_M
    if base >= M:
        return
    rows = base + tl.arange(0, BLOCK_M)
    columns = (program % column_blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    branch = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_ptr + rows[:, None] * stride_am + inside[None, :],
            mask=row_mask[:, None] & (inside < K)[None, :], other=0.0,
        )  # [BLOCK_M, BLOCK_K]  # fmt: skip
        w = tl.load(
            weight_ptr + columns[None, :] * stride_wn + inside[:, None],
            mask=(columns < N)[None, :] & (inside < K)[:, None], other=0.0,
        )  # [BLOCK_K, BLOCK_N]  # fmt: skip
        branch = dot(a, w, branch)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
        branch += bias.to(tl.float32)[None, :]
    if seed_ptr is not None:
        branch *= dropout_scale(
            seed_ptr, tokens_ptr, counter, rows, row_mask, columns, THRESHOLD, SCALE
        )
    mask = row_mask[:, None] & (columns < N)[None, :]
    if residual_ptr is not None:
        residual = tl.load(
            residual_ptr + rows[:, None] * stride_rm + columns[None, :], mask=mask, other=0.0
        )
        branch += residual.to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * stride_om + columns[None, :],
        branch.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


def _config(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> Config:
    return pick("linear_residual", dtype, d, rows, device)


def _block_k(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 64


def linear_residual_fwd(
    a: Tensor,  # (rows, columns), in the compute dtype
    weight: Tensor,  # (d, columns), in the compute dtype
    bias: Tensor | None,  # (d,)
    residual: Tensor | None,  # (rows, d), in the state dtype
    dropout: Dropout | None = None,
    out: Tensor | None = None,  # (rows, d), buffer of the result
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns residual + drop(a · Wᵀ + b) (rows, d) in the residual's dtype; without a residual, in
    a's.

    Args: as `linear_residual_fwd_ref`; row_count: see `_runtime`.
    """
    require(norm_reason(a, weight, bias, residual, out))
    (rows, columns), d = a.shape, weight.shape[0]
    require(
        shapes_reason(
            ("weight", weight, (d, columns)),
            ("bias", bias, (d,)),
            ("residual", residual, (rows, d)),
            ("out", out, (rows, d)),
        )  # fmt: skip
        or weights_reason(weight)
        or row_count_reason(row_count, a)
        or (None if a.dtype == weight.dtype else f"a is {a.dtype} and the weight {weight.dtype}")
    )
    if d > FUSED_WIDTH:
        return linear_residual_fwd_ref(a, weight, bias, residual, dropout, out)
    a, like = contiguous_columns(a), a if residual is None else residual
    residual = None if residual is None else contiguous_columns(residual)
    if out is None:
        out = torch.empty(rows, d, dtype=like.dtype, device=a.device)
    require("out needs contiguous columns" if out.stride(-1) != 1 else None)
    if rows:
        config = _config(rows, d, weight.dtype, a.device)
        column_blocks = cdiv(d, config.block_n)
        _linear_residual_fwd_kernel[(column_blocks * cdiv(rows, config.block_m),)](
            a, weight, bias, residual, out, row_count, **dropout_arguments(dropout),
            stride_am=a.stride(0), stride_wn=weight.stride(0), 
            stride_rm=0 if residual is None else residual.stride(0),
            stride_om=out.stride(0), M=rows, N=d, K=columns,
            column_blocks=column_blocks,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=_block_k(weight.dtype),
            **config.launch,
        )  # fmt: skip
    return out


@jit_kernel
def _linear_residual_bwd_kernel(
    # pointers
    dout_ptr, weight_ptr, da_ptr, dbranch_ptr, count_ptr, seed_ptr, tokens_ptr,
    # strides
    stride_dm, stride_wn,
    # sizes, scalars
    M, N, K, column_blocks, counter,
    # flags and blocks
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    base = program // column_blocks * BLOCK_M
    if base >= M:
        return
    rows = base + tl.arange(0, BLOCK_M)
    columns = (program % column_blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < M
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (inside < K)[None, :]
        g = tl.load(
            dout_ptr + rows[:, None] * stride_dm + inside[None, :], mask=mask, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        if seed_ptr is not None:
            g = g.to(tl.float32) * dropout_scale(
                seed_ptr, tokens_ptr, counter, rows, row_mask, inside, THRESHOLD, SCALE
            )
        g = g.to(weight_ptr.dtype.element_ty)
        if dbranch_ptr is not None:
            # Only the first column block writes it.
            tl.store(
                dbranch_ptr + rows[:, None] * K + inside[None, :], g,
                mask=mask & (program % column_blocks == 0),
            )  # fmt: skip
        w = tl.load(
            weight_ptr + inside[:, None] * stride_wn + columns[None, :],
            mask=(inside < K)[:, None] & (columns < N)[None, :], other=0.0,
        )  # [BLOCK_K, BLOCK_N]  # fmt: skip
        da = dot(g, w, da)
    tl.store(
        da_ptr + rows[:, None] * N + columns[None, :], da.to(da_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (columns < N)[None, :],
    )  # fmt: skip


def linear_residual_bwd(
    dout: Tensor,  # (rows, d)
    weight: Tensor,  # (d, columns)
    dropout: Dropout | None = None,
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns da (rows, columns) and dbranch (rows, d), an operand of dW = dbranchᵀ · a, in the
    compute dtype; dbranch is dout itself if it needs neither a cast nor dropout.

    Args: as `linear_residual_bwd_ref`; row_count: see `_runtime`.
    """
    require(
        norm_reason(dout, weight)
        or shapes_reason(("weight", weight, (dout.shape[1], weight.shape[-1])))
        or weights_reason(weight)
        or row_count_reason(row_count, dout)
    )
    (rows, d), columns = dout.shape, weight.shape[1]
    if d > FUSED_WIDTH:
        return linear_residual_bwd_ref(dout, weight, dropout)
    dout = contiguous_columns(dout)
    da = torch.empty(rows, columns, dtype=weight.dtype, device=dout.device)
    same = dropout is None and dout.dtype == weight.dtype
    dbranch = dout if same else torch.empty(rows, d, dtype=weight.dtype, device=dout.device)
    if rows:
        config = _config(rows, d, weight.dtype, dout.device)
        column_blocks = cdiv(columns, config.block_n)
        _linear_residual_bwd_kernel[(column_blocks * cdiv(rows, config.block_m),)](
            dout, weight, da, None if same else dbranch, row_count, **dropout_arguments(dropout),
            stride_dm=dout.stride(0), stride_wn=weight.stride(0), M=rows, N=columns, K=d,
            column_blocks=column_blocks,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=_block_k(weight.dtype),
            **config.launch,
        )  # fmt: skip
    return da, dbranch

"""Norm of a branch, added to the residual stream, forward and backward: out = residual +
drop(norm(branch)).

Shapes: branch, residual, out (rows, d). Backward: g = drop(dout), then the norm's backward; the
residual's gradient is dout itself. Saved by the caller: branch. Recomputed: the norm and the mask.
Bytes per row: forward d · (branch + 2 · residual), backward d · (branch + dout + 4): memory bound.
The branch comes from a GEMM whose tiles hold a part of its columns only, hence a kernel of its own.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import (
    block_of,
    cdiv,
    contiguous_columns,
    counted_rows,
    jit_kernel,
)
from .dropout import dropout_arguments, dropout_scale
from .dropout_ref import Dropout
from .norm import (
    MOST_PROGRAMS,
    block_rows,
    norm_grad_buffers,
    norm_input_grad,
    normalize,
    scale_shift,
)
from .supports import norm_reason, require, row_count_reason, shapes_reason


@jit_kernel
def _norm_residual_fwd_kernel(
    # pointers
    branch_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, count_ptr, seed_ptr, tokens_ptr,
    # strides, sizes, scalars
    stride_xm, stride_rm, stride_om, M, counter,
    # flags and blocks
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    rows = base + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    row_mask = rows < M
    mask = row_mask[:, None] & (columns < D)[None, :]
    x = tl.load(branch_ptr + rows[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
    x_hat, _ = normalize(x.to(tl.float32), columns, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, weight_ptr, bias_ptr, columns, D)
    if seed_ptr is not None:
        y *= dropout_scale(seed_ptr, tokens_ptr, counter, rows, row_mask, columns, THRESHOLD, SCALE)
    residual = tl.load(
        residual_ptr + rows[:, None] * stride_rm + columns[None, :], mask=mask, other=0.0
    )
    y += residual.to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * stride_om + columns[None, :],
        y.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


@jit_kernel
def _norm_residual_bwd_kernel(
    # pointers
    dout_ptr, branch_ptr, weight_ptr, dbranch_ptr, dweight_ptr, dbias_ptr, count_ptr, seed_ptr,
    tokens_ptr,
    # strides, sizes, scalars
    stride_dm, stride_xm, M, counter,
    # flags and blocks
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        mask = row_mask[:, None] & (columns < D)[None, :]
        x = tl.load(branch_ptr + rows[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
        dy = tl.load(dout_ptr + rows[:, None] * stride_dm + columns[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        if seed_ptr is not None:
            dy *= dropout_scale(
                seed_ptr, tokens_ptr, counter, rows, row_mask, columns, THRESHOLD, SCALE
            )
        x_hat, rstd = normalize(x.to(tl.float32), columns, D, EPS, IS_LAYER)
        dx = norm_input_grad(dy, x_hat, rstd, weight_ptr, columns, D, IS_LAYER)
        tl.store(dbranch_ptr + rows[:, None] * D + columns[None, :], dx, mask=mask)
        dweight += tl.sum(dy * x_hat, 0)
        dbias += tl.sum(dy, 0)
    tl.store(dweight_ptr + program * D + columns, dweight, mask=columns < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + columns, dbias, mask=columns < D)


def norm_residual_fwd(
    branch: Tensor,  # (rows, d), in the compute dtype
    norm_weight: Tensor,  # (d,)
    norm_bias: Tensor | None,  # (d,)
    residual: Tensor,  # (rows, d), in the state dtype
    eps: float,
    kind: str = "rms",
    dropout: Dropout | None = None,
    out: Tensor | None = None,  # (rows, d), buffer of the result
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns residual + drop(norm(branch)) (rows, d) in the residual's dtype.

    Args: as `norm_residual_fwd_ref`; row_count: see `_runtime`.
    """
    require(norm_reason(branch, norm_weight, norm_bias, residual, out, kind=kind))
    rows, d = branch.shape
    require(
        shapes_reason(
            ("the norm's weight", norm_weight, (d,)), ("its bias", norm_bias, (d,)),
            ("residual", residual, (rows, d)), ("out", out, (rows, d)),
        )
        or row_count_reason(row_count, branch)
    )  # fmt: skip
    branch, residual = contiguous_columns(branch), contiguous_columns(residual)
    if out is None:
        out = torch.empty(rows, d, dtype=residual.dtype, device=branch.device)
    require("out needs contiguous columns" if out.stride(-1) != 1 else None)
    if rows:
        block = block_rows(d)
        _norm_residual_fwd_kernel[(cdiv(rows, block),)](
            branch, norm_weight, norm_bias, residual, out, row_count, **dropout_arguments(dropout),
            stride_xm=branch.stride(0), stride_rm=residual.stride(0), stride_om=out.stride(0),
            M=rows, D=d, EPS=eps, IS_LAYER=kind == "layer", BLOCK_M=block, BLOCK_D=block_of(d),
            num_warps=4,
        )  # fmt: skip
    return out


def norm_residual_bwd(
    dout: Tensor,  # (rows, d)
    branch: Tensor,  # (rows, d)
    norm_weight: Tensor,  # (d,)
    norm_bias: Tensor | None,
    eps: float,
    kind: str = "rms",
    dropout: Dropout | None = None,
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns dbranch (rows, d), dnorm_weight (d,) and dnorm_bias (d,) (None without a bias), all
    in fp32.

    Args: as `norm_residual_bwd_ref`; row_count: see `_runtime`.
    """
    require(norm_reason(branch, norm_weight, norm_bias, dout, kind=kind))
    rows, d = branch.shape
    require(
        shapes_reason(
            ("the norm's weight", norm_weight, (d,)), ("its bias", norm_bias, (d,)),
            ("dout", dout, (rows, d)),
        )
        or row_count_reason(row_count, branch)
    )  # fmt: skip
    branch, dout = contiguous_columns(branch), contiguous_columns(dout)
    block = block_rows(d)
    programs = min(cdiv(rows, block), MOST_PROGRAMS)
    dbranch, dweight, dbias = norm_grad_buffers(branch, programs, norm_bias is not None)
    if rows:
        _norm_residual_bwd_kernel[(programs,)](
            dout, branch, norm_weight, dbranch, dweight, dbias, row_count,
            **dropout_arguments(dropout), stride_dm=dout.stride(0), stride_xm=branch.stride(0),
            M=rows, D=d, EPS=eps, IS_LAYER=kind == "layer", BLOCK_M=block, BLOCK_D=block_of(d),
            num_warps=4,
        )  # fmt: skip
    return dbranch, dweight.sum(0), None if dbias is None else dbias.sum(0)

"""What enters the first layer of an iteration, as row kernels: out = h + x + line.

Shapes: h, x, out (rows, d), line (d,). Backward: x_grad += g, line_grad += Σ rows of g, from one
fp32 partial per program, in a fixed order: no float atomics. Bytes per row: forward d · (h + x +
out), backward d · (g + 8): memory bound. As sums of torch they would take all rows of a capacity.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._runtime import block_of, cdiv, contiguous_columns, counted_rows, jit_kernel
from .norm import MOST_PROGRAMS, add_tile, block_rows
from .supports import norm_reason, require, row_count_reason, shapes_reason
from .weight_grad import add_partials


@jit_kernel
def _state_input_fwd_kernel(
    # pointers
    h_ptr, x_ptr, line_ptr, out_ptr, count_ptr,
    # strides, sizes
    stride_hm, stride_xm, M,
    # blocks
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    rows = base + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    h = tl.load(h_ptr + rows[:, None] * stride_hm + columns[None, :], mask=mask, other=0.0)
    out = add_tile(h.to(tl.float32), x_ptr, stride_xm, rows, columns, mask)
    if line_ptr is not None:
        out += tl.load(line_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * D + columns[None, :],
        out.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


@jit_kernel
def _state_input_bwd_kernel(
    # pointers
    g_ptr, x_grad_ptr, partial_ptr, count_ptr,
    # strides, sizes
    stride_gm, stride_xm, M,
    # blocks
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < D)[None, :]
        g = tl.load(g_ptr + rows[:, None] * stride_gm + columns[None, :], mask=mask, other=0.0)
        g = g.to(tl.float32)
        if x_grad_ptr is not None:
            summed = add_tile(g, x_grad_ptr, stride_xm, rows, columns, mask)
            tl.store(x_grad_ptr + rows[:, None] * stride_xm + columns[None, :], summed, mask=mask)
        total += tl.sum(g, 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * D + columns, total, mask=columns < D)


def state_input_fwd(
    h: Tensor,  # (rows, d)
    x: Tensor | None,  # (rows, d)
    line: Tensor | None,  # (d,)
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns h + x + line (rows, d) in h's dtype; h itself with neither.

    Args: as `state_input_fwd_ref`; row_count: see `_runtime`.
    """
    if x is None and line is None:
        return h
    require(
        norm_reason(h, x, line)
        or shapes_reason(("x", x, h.shape), ("line", line, h.shape[1:]))
        or row_count_reason(row_count, h)
    )
    h, x = contiguous_columns(h), None if x is None else contiguous_columns(x)
    rows, d = h.shape
    out = torch.empty(rows, d, dtype=h.dtype, device=h.device)
    if rows:
        block = block_rows(d)
        _state_input_fwd_kernel[(cdiv(rows, block),)](
            h, x, line, out, row_count, stride_hm=h.stride(0),
            stride_xm=0 if x is None else x.stride(0), M=rows, D=d, BLOCK_M=block,
            BLOCK_D=block_of(d), num_warps=4,
        )  # fmt: skip
    return out


def state_input_bwd(
    g: Tensor,  # (rows, d)
    x_grad: Tensor | None,  # (rows, d) fp32 accumulator
    line_grad: Tensor | None,  # (d,) fp32 accumulator
    *,
    row_count: Tensor | None = None,
) -> None:
    """Adds the gradients of x and line to the accumulators.

    Args: as `state_input_bwd_ref`; row_count: see `_runtime`.
    """
    wanted = [t for t in (x_grad, line_grad) if t is not None]
    reason = (
        norm_reason(g, *wanted)
        or shapes_reason(("x_grad", x_grad, g.shape), ("line_grad", line_grad, g.shape[1:]))
        or row_count_reason(row_count, g)
    )
    if reason is None and any(t.dtype != torch.float32 or t.stride(-1) != 1 for t in wanted):
        reason = "the accumulators must be fp32 with contiguous columns"
    require(reason)
    g, (rows, d) = contiguous_columns(g), g.shape
    if not (rows and wanted):
        return
    block = block_rows(d)
    programs = min(cdiv(rows, block), MOST_PROGRAMS)
    partials = None
    if line_grad is not None:
        partials = torch.empty(programs, 1, d, dtype=torch.float32, device=g.device)
    _state_input_bwd_kernel[(programs,)](
        g, x_grad, partials, row_count, stride_gm=g.stride(0),
        stride_xm=0 if x_grad is None else x_grad.stride(0), M=rows, D=d, BLOCK_M=block,
        BLOCK_D=block_of(d), num_warps=4,
    )  # fmt: skip
    if line_grad is not None:
        add_partials(line_grad.unsqueeze(0), partials)

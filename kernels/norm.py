"""RMSNorm and LayerNorm over the last dimension as row kernels, and as parts of other kernels.

    x̂ = (x − μ) · r,  μ = 0 for RMSNorm,  r = (mean((x − μ)²) + eps)^(−1/2),  y = x̂ · weight + bias
    dx = r · (g − [mean(g)] − x̂ · mean(g · x̂)),  g = dy · weight   ([…] only for LayerNorm)

Shapes: x, y, dy, dx (rows, d), weight and bias (d,). Nothing is saved; x̂ and r are recomputed.
dweight and dbias are summed from one fp32 partial per program, in a fixed order: no float atomics.

Bytes per row: forward d · (x + y), backward d · (x + dy + 4): memory bound everywhere. The row
kernels are used for d > 512, where cuBLAS runs the GEMM next to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import block_of, cdiv, contiguous_columns, counted_rows, jit_kernel
from .supports import norm_reason, require, row_count_reason, shapes_reason, tensor_reason


@triton.jit
def normalize(x, columns, D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr):
    """Returns x̂ [BLOCK_M, BLOCK_D] and r [BLOCK_M] in fp32, with zeros beyond column D."""
    if IS_LAYER:
        x = tl.where(columns[None, :] < D, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    if EPS == 0.0:  # rows of zeros, and rows outside
        rstd = tl.where(rstd == float("inf"), 0.0, rstd)
    return x * rstd[:, None], rstd


@triton.jit
def scale_shift(x_hat, weight_ptr, bias_ptr, columns, D: tl.constexpr):
    """Returns x̂ · weight + bias [BLOCK_M, BLOCK_D] in fp32, with zeros beyond column D."""
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = x_hat * weight[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
        y += bias[None, :]
    return y


@triton.jit
def norm_input_grad(dy, x_hat, rstd, weight_ptr, columns, D: tl.constexpr, IS_LAYER: tl.constexpr):
    """Returns dx [BLOCK_M, BLOCK_D] in fp32; dy must be zero beyond column D."""
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    g = dy * weight[None, :]
    inner = g - x_hat * (tl.sum(g * x_hat, 1) / D)[:, None]
    if IS_LAYER:
        inner -= (tl.sum(g, 1) / D)[:, None]
    return inner * rstd[:, None]


@triton.jit
def _store_partial(ptr, value, program, columns, D: tl.constexpr, ADD: tl.constexpr):
    mask = columns < D
    if ADD:
        value += tl.load(ptr + program * D + columns, mask=mask, other=0.0)
    tl.store(ptr + program * D + columns, value, mask=mask)


@triton.jit
def store_norm_partials(
    dy, x_hat, dweight_ptr, dbias_ptr, program, columns, D: tl.constexpr, ADD: tl.constexpr
):
    """Stores this program's part of dweight and dbias, or adds it to those of earlier launches; dy
    must be zero in rows beyond M."""
    _store_partial(dweight_ptr, tl.sum(dy * x_hat, 0), program, columns, D, ADD)
    if dbias_ptr is not None:
        _store_partial(dbias_ptr, tl.sum(dy, 0), program, columns, D, ADD)


@triton.jit
def clear_norm_partials(
    dweight_ptr, dbias_ptr, program, columns, D: tl.constexpr, ADD: tl.constexpr
):
    """Stores zeros as the part of a program without rows, unless parts are added up."""
    if not ADD:
        mask = columns < D
        tl.store(dweight_ptr + program * D + columns, 0.0, mask=mask)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + program * D + columns, 0.0, mask=mask)


@triton.jit
def add_tile(value, ptr, stride, rows, columns, mask):
    """Returns value + a tile of another tensor, if there is one."""
    if ptr is not None:
        other = tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        value += other.to(tl.float32)
    return value


@jit_kernel
def _norm_fwd_kernel(
    # pointers
    x_ptr, weight_ptr, bias_ptr, y_ptr, count_ptr,
    # strides, sizes
    stride_xm, stride_ym, M,
    # flags and blocks
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    rows = base + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
    x_hat, _ = normalize(x.to(tl.float32), columns, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, weight_ptr, bias_ptr, columns, D)
    tl.store(
        y_ptr + rows[:, None] * stride_ym + columns[None, :],
        y.to(y_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


@jit_kernel
def _norm_bwd_kernel(
    # pointers
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, residual_ptr, count_ptr,
    # strides, sizes
    stride_dm, stride_xm, stride_rm, M,
    # flags and blocks
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(program, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dm + columns[None, :], mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        x_hat, rstd = normalize(x.to(tl.float32), columns, D, EPS, IS_LAYER)
        dx = norm_input_grad(dy, x_hat, rstd, weight_ptr, columns, D, IS_LAYER)
        dx = add_tile(dx, residual_ptr, stride_rm, rows, columns, mask)
        tl.store(dx_ptr + rows[:, None] * D + columns[None, :], dx, mask=mask)
        dweight += tl.sum(dy * x_hat, 0)
        dbias += tl.sum(dy, 0)
    _store_partial(dweight_ptr, dweight, program, columns, D, ADD)
    if dbias_ptr is not None:
        _store_partial(dbias_ptr, dbias, program, columns, D, ADD)


NormPartials = tuple[Tensor, Tensor | None]  # of dweight and dbias, (programs, d) fp32 each
MOST_PROGRAMS = 256  # of a row kernel's backward


def block_rows(d: int) -> int:
    """Returns how many rows a program of a row kernel takes at once."""
    return max(1, 4096 // block_of(d))


def norm_fwd(
    x: Tensor,  # (rows, d)
    weight: Tensor,  # (d,)
    bias: Tensor | None,  # (d,)
    eps: float,
    kind: str = "rms",
    dtype: torch.dtype | None = None,
    row_count: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns y (rows, d) in `dtype` (default: x's), or in `out` if it is given.

    Args: as `norm_fwd_ref`; row_count: see `_runtime`.
    """
    require(
        norm_reason(x, weight, bias, out, kind=kind)
        or shapes_reason(
            ("the norm's weight", weight, x.shape[1:]),
            ("its bias", bias, x.shape[1:]),
            ("out", out, x.shape),
        )  # fmt: skip
        or row_count_reason(row_count, x)
    )
    x = contiguous_columns(x)
    rows, d = x.shape
    if out is None:
        out = torch.empty(rows, d, dtype=dtype or x.dtype, device=x.device)
    require("out needs contiguous columns" if out.stride(-1) != 1 else None)
    if rows:
        block = block_rows(d)
        _norm_fwd_kernel[(cdiv(rows, block),)](
            x, weight, bias, out, row_count, stride_xm=x.stride(0), stride_ym=out.stride(0),
            M=rows, D=d, EPS=eps, IS_LAYER=kind == "layer", BLOCK_M=block, BLOCK_D=block_of(d),
            num_warps=4,
        )  # fmt: skip
    return out


def norm_bwd(
    dy: Tensor,  # (rows, d)
    x: Tensor,  # (rows, d)
    weight: Tensor,  # (d,)
    eps: float,
    kind: str = "rms",
    has_bias: bool = True,
    row_count: Tensor | None = None,
    partials: NormPartials | None = None,
    residual: Tensor | None = None,  # (rows, d), added to dx
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns dx (rows, d), dweight (d,) and dbias (d,) (None unless `has_bias`), all in fp32.

    Args: as `norm_bwd_ref`; row_count: see `_runtime`; partials, out: see `norm_grad_buffers`.
    """
    require(
        norm_reason(x, weight, dy, residual, kind=kind)
        or shapes_reason(
            ("the norm's weight", weight, x.shape[1:]),
            ("dy", dy, x.shape),
            ("residual", residual, x.shape),
        )  # fmt: skip
        or row_count_reason(row_count, x)
    )
    residual = None if residual is None else contiguous_columns(residual)
    x, dy = contiguous_columns(x), contiguous_columns(dy)
    rows, d = x.shape
    block = block_rows(d)
    programs = min(cdiv(rows, block), MOST_PROGRAMS)
    dx, dweight, dbias = norm_grad_buffers(x, programs, has_bias, partials, out)
    if rows:
        _norm_bwd_kernel[(programs,)](
            dy, x, weight, dx, dweight, dbias, residual, row_count,
            stride_dm=dy.stride(0), stride_xm=x.stride(0),
            stride_rm=0 if residual is None else residual.stride(0), M=rows,
            D=d, EPS=eps, IS_LAYER=kind == "layer", ADD=partials is not None,
            BLOCK_M=block, BLOCK_D=block_of(d), num_warps=4,
        )  # fmt: skip
    return dx, *sum_norm_partials(dweight, dbias, partials)


def norm_grad_buffers(
    x: Tensor,
    programs: int,
    has_bias: bool,
    partials: NormPartials | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Allocates dx (rows, d) and the partials (programs, d) of dweight and dbias in fp32.

    Args:
        x: (rows, d).
        programs: number of programs of the launch.
        has_bias: whether there is a bias.
        partials: sums (at least programs, d) of dweight and dbias over earlier launches, to which
            the programs add their parts; None: the parts are stored, and summed by the launcher.
        out: (rows, d) fp32, contiguous, the buffer of dx; it may be one that the launch reads, row
            by row as it writes. None: a new one.
    """
    if out is not None:
        reason = tensor_reason(x, out) or shapes_reason(("out", out, x.shape))
        if reason is None and not (out.dtype == torch.float32 and out.is_contiguous()):
            reason = "out must be fp32 and contiguous"
        require(reason)
    dx = torch.empty(x.shape, dtype=torch.float32, device=x.device) if out is None else out
    return dx, *norm_partial_buffers(x, programs, has_bias, partials)


def norm_partial_buffers(
    x: Tensor, programs: int, has_bias: bool, partials: NormPartials | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the buffers for partial sums of `norm_grad_buffers`.

    Args:
        x: The rows that are normalised.
        programs: Programs of the launch, each with a partial sum.
        has_bias: Whether the norm has a bias.
        partials: Buffers that several launches share, or None for new ones.

    Returns:
        (programs, d) for the weight's gradient, and for the bias's, None without one.
    """
    d = x.shape[1]
    if partials is None:
        own = [torch.empty(programs, d, dtype=torch.float32, device=x.device) for _ in "wb"]
        return own[0], own[1] if has_bias else None
    for part in partials:
        if part is not None and (part.shape[0] < programs or part.shape[1:] != (d,)):
            require(f"partial sums of shape {tuple(part.shape)} do not hold {programs} × {d}")
    return partials[0][:programs], partials[1][:programs] if has_bias else None


def sum_norm_partials(
    dweight: Tensor, dbias: Tensor | None, partials: NormPartials | None
) -> tuple[Tensor | None, Tensor | None]:
    """Sums the partial gradients of a norm.

    Args:
        dweight: Partial sums of the weight's gradient.
        dbias: Those of the bias, or None.
        partials: Buffers that several launches share, or None.

    Returns:
        dweight (d,) and dbias (d,); None where later launches add to `partials`.
    """
    if partials is not None:
        return None, None
    return dweight.sum(0), None if dbias is None else dbias.sum(0)

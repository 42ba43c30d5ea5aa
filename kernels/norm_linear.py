"""Norm + projection (+ bias, + RoPE on the first columns), forward and backward.

    z = norm(x) · Wᵀ + b;  out = [RoPE(z[:, :rotary]), z[:, rotary:]]
    dz = RoPE⁻¹(dout);  dy = dz · W;  dx by the norm's backward

Shapes: x (rows, d), W (columns, d), out and dz (rows, columns). A program keeps norm(x) of its rows
on the SM and iterates over the columns two half-tiles at a time: column c of a head's first half
and column c + head_dim / 2 have the same place in two accumulators, so RoPE is elementwise.

| saved by the caller | recomputed in backward | written for weight_grad |
|---|---|---|
| x | norm(x), its statistics | norm(x), dz (dout itself without RoPE) |

FLOPs per row: 2 · d · columns forward, the same backward. Bytes per row (16-bit, fp32 state; d =
256, columns = 768): forward 4d + 2·columns = 2.6 kB, backward 4d + 4·columns + 6d = 5.6 kB: about
100 FLOP per byte each, below the H200's 180, so memory bound.
Above d = 512 (fp32: 256) it is a row kernel for the norm, a cuBLAS GEMM, and an in-place RoPE
kernel.
"""

from __future__ import annotations

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
    dot,
    jit_kernel,
    rows_left,
    split_columns,
)
from .norm import (
    NormPartials,
    add_tile,
    clear_norm_partials,
    norm_bwd,
    norm_fwd,
    norm_grad_buffers,
    norm_input_grad,
    normalize,
    scale_shift,
    store_norm_partials,
    sum_norm_partials,
)
from .supports import (
    norm_is_fused,
    norm_reason,
    require,
    rope_reason,
    row_count_reason,
    shapes_reason,
    weights_reason,
)
from .tuning import pick


@triton.jit
def _pair_columns(tile, HALF: tl.constexpr, BLOCK_P: tl.constexpr):
    """Returns the columns [BLOCK_P] of the first halves of a tile's pairs; their partners are HALF
    further."""
    pair = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return pair // HALF * (2 * HALF) + pair % HALF


@triton.jit
def _rope_tables(
    cos_ptr, sin_ptr, stride_cm, rows, row_mask, first, rotary, HALF: tl.constexpr
):  # fmt: skip
    """Loads cos and sin [BLOCK_M, BLOCK_P] in fp32; 1 and 0 on columns without RoPE."""
    at = rows[:, None] * stride_cm + (first % (2 * HALF))[None, :]
    mask = row_mask[:, None] & (first < rotary)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=1.0)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0)


@jit_kernel
def _norm_linear_fwd_kernel(
    # pointers
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, out_ptr,
    count_ptr,
    # strides
    stride_xm, stride_wn, stride_cm, stride_om,
    # sizes, scalars
    M, N, rotary, tiles, tiles_each, column_blocks,
    # flags
    D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0)
    base = (program // column_blocks).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    x_ptr += base * stride_xm
    out_ptr += base * stride_om
    if cos_ptr is not None:
        cos_ptr += base * stride_cm
        sin_ptr += base * stride_cm
    rows = tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_D)
    row_mask = rows < rows_left(M, base, BLOCK_M)
    d_mask = inside < D
    mask = row_mask[:, None] & d_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + inside[None, :], mask=mask, other=0.0)
    x_hat, _ = normalize(x.to(tl.float32), inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    y = y.to(weight_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]

    start = program % column_blocks * tiles_each
    for tile in range(start, tl.minimum(start + tiles_each, tiles)):
        first = _pair_columns(tile, HALF, BLOCK_P)
        second = first + HALF
        w_first = tl.load(
            weight_ptr + first[None, :] * stride_wn + inside[:, None],
            mask=(first < N)[None, :] & d_mask[:, None], other=0.0,
        )  # [BLOCK_D, BLOCK_P]  # fmt: skip
        w_second = tl.load(
            weight_ptr + second[None, :] * stride_wn + inside[:, None],
            mask=(second < N)[None, :] & d_mask[:, None], other=0.0,
        )  # fmt: skip
        a = dot(y, w_first, tl.zeros((BLOCK_M, BLOCK_P), tl.float32))
        b = dot(y, w_second, tl.zeros((BLOCK_M, BLOCK_P), tl.float32))
        if bias_ptr is not None:
            a += tl.load(bias_ptr + first, mask=first < N, other=0.0).to(tl.float32)[None, :]
            b += tl.load(bias_ptr + second, mask=second < N, other=0.0).to(tl.float32)[None, :]
        if cos_ptr is not None:
            cos, sin = _rope_tables(
                cos_ptr, sin_ptr, stride_cm, rows, row_mask, first, rotary, HALF
            )
            a, b = a * cos - b * sin, b * cos + a * sin
        out = out_ptr + rows[:, None] * stride_om
        tl.store(
            out + first[None, :], a.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (first < N)[None, :],
        )  # fmt: skip
        tl.store(
            out + second[None, :], b.to(out_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (second < N)[None, :],
        )  # fmt: skip


@jit_kernel
def _rope_kernel(
    # pointers
    z_ptr, cos_ptr, sin_ptr, count_ptr,
    # strides, sizes
    stride_zm, stride_cm, M, rotary,
    # flags and blocks
    SIGN: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    first = _pair_columns(tl.program_id(1), HALF, BLOCK_P)
    mask = row_mask[:, None] & (first < rotary)[None, :]
    cos, sin = _rope_tables(cos_ptr, sin_ptr, stride_cm, rows, row_mask, first, rotary, HALF)
    at = z_ptr + rows[:, None] * stride_zm + first[None, :]
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (a * cos - SIGN * b * sin).to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (b * cos + SIGN * a * sin).to(z_ptr.dtype.element_ty), mask=mask)


def _rope(
    z: Tensor, cos: Tensor, sin: Tensor, rotary: int, sign: float, row_count: Tensor | None
) -> Tensor:
    """Rotates the first `rotary` columns of z in place."""
    half = cos.shape[1]
    if z.shape[0]:
        _rope_kernel[(cdiv(z.shape[0], 16), cdiv(rotary // 2, 64))](
            z, cos, sin, row_count, stride_zm=z.stride(0), stride_cm=cos.stride(0), M=z.shape[0],
            rotary=rotary, SIGN=sign, HALF=half, BLOCK_M=16, BLOCK_P=64, num_warps=4,
        )  # fmt: skip
    return z


def _config(rows: int, d: int, dtype: torch.dtype, device: torch.device, back: bool) -> Config:
    """Returns a configuration; block_n is the number of column pairs per tile."""
    return pick("norm_linear_bwd" if back else "norm_linear_fwd", dtype, d, rows, device)


def _check(
    x, norm_weight, norm_bias, weight, bias, dout, cos, sin, rotary, kind, row_count
) -> None:
    reason = norm_reason(x, norm_weight, norm_bias, weight, bias, dout, cos, sin, kind=kind)
    if reason is None:
        (rows, d), columns = x.shape, weight.shape[0]
        reason = shapes_reason(
            ("the norm's weight", norm_weight, (d,)), ("its bias", norm_bias, (d,)),
            ("weight", weight, (columns, d)), ("bias", bias, (columns,)),
            ("dout", dout, (rows, columns)),
        )  # fmt: skip
    require(
        reason
        or weights_reason(weight)
        or rope_reason(x.shape[0], weight.shape[0], rotary, cos, sin)
        or row_count_reason(row_count, x)
    )


def norm_linear_fwd(
    x: Tensor,  # (rows, d)
    norm_weight: Tensor,  # (d,)
    norm_bias: Tensor | None,  # (d,)
    weight: Tensor,  # (columns, d), in the compute dtype
    bias: Tensor | None,  # (columns,)
    cos: Tensor | None = None,  # (rows, head_dim / 2)
    sin: Tensor | None = None,
    rotary: int = 0,
    eps: float = 1e-6,
    kind: str = "rms",
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns out (rows, columns) in the weight's dtype.

    Args: as `norm_linear_fwd_ref`; row_count: see `_runtime`.
    """
    _check(x, norm_weight, norm_bias, weight, bias, None, cos, sin, rotary, kind, row_count)
    x = contiguous_columns(x)
    (rows, d), columns = x.shape, weight.shape[0]
    if not norm_is_fused(d, weight.dtype):
        y = norm_fwd(x, norm_weight, norm_bias, eps, kind, weight.dtype, row_count)
        z = torch.nn.functional.linear(y, weight, bias)
        return _rope(z, cos, sin, rotary, 1.0, row_count) if rotary else z
    out = torch.empty(rows, columns, dtype=weight.dtype, device=x.device)
    if rows == 0:
        return out
    config = _config(rows, d, weight.dtype, x.device, back=False)
    row_blocks, tiles = cdiv(rows, config.block_m), cdiv(columns, 2 * config.block_n)
    tiles_each, column_blocks = split_columns(tiles, row_blocks, x.device)
    _norm_linear_fwd_kernel[(column_blocks * row_blocks,)](
        x, norm_weight, norm_bias, weight, bias, cos if rotary else None, sin if rotary else None,
        out, row_count, stride_xm=x.stride(0), stride_wn=weight.stride(0),
        stride_cm=cos.stride(0) if rotary else 0, stride_om=columns,
        M=rows, N=columns, rotary=rotary, tiles=tiles, tiles_each=tiles_each,
        column_blocks=column_blocks,
        D=d, HALF=cos.shape[1] if rotary else config.block_n, EPS=eps, IS_LAYER=kind == "layer",
        BLOCK_M=config.block_m, BLOCK_P=config.block_n, BLOCK_D=block_of(d), **config.launch,
    )  # fmt: skip
    return out


@jit_kernel
def _norm_linear_bwd_kernel(
    # pointers
    dout_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, cos_ptr, sin_ptr,
    dz_ptr, y_ptr, dx_ptr, dnorm_weight_ptr, dnorm_bias_ptr, residual_ptr, count_ptr,
    # strides
    stride_dm, stride_xm, stride_wn, stride_cm, stride_zm, stride_rm,
    # sizes, scalars
    M, N, rotary, tiles,
    # flags
    D: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr,
    ADD: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0).to(tl.int64)
    base = program * BLOCK_M
    inside = tl.arange(0, BLOCK_D)
    if base >= M:
        clear_norm_partials(dnorm_weight_ptr, dnorm_bias_ptr, program, inside, D, ADD)
        return
    if residual_ptr is not None:
        residual_ptr += base * stride_rm
    dout_ptr += base * stride_dm
    x_ptr += base * stride_xm
    y_ptr += base * D
    dx_ptr += base * D
    if dz_ptr is not None:
        dz_ptr += base * stride_zm
    if cos_ptr is not None:
        cos_ptr += base * stride_cm
        sin_ptr += base * stride_cm
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < rows_left(M, base, BLOCK_M)
    d_mask = inside < D
    dy = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(0, tiles):
        first = _pair_columns(tile, HALF, BLOCK_P)
        second = first + HALF
        first_mask = row_mask[:, None] & (first < N)[None, :]
        second_mask = row_mask[:, None] & (second < N)[None, :]
        dout = dout_ptr + rows[:, None] * stride_dm
        a = tl.load(dout + first[None, :], mask=first_mask, other=0.0)  # [BLOCK_M, BLOCK_P]
        b = tl.load(dout + second[None, :], mask=second_mask, other=0.0)
        if cos_ptr is not None:
            cos, sin = _rope_tables(
                cos_ptr, sin_ptr, stride_cm, rows, row_mask, first, rotary, HALF
            )
            a, b = a.to(tl.float32), b.to(tl.float32)
            a, b = a * cos + b * sin, b * cos - a * sin
        a = a.to(weight_ptr.dtype.element_ty)
        b = b.to(weight_ptr.dtype.element_ty)
        if dz_ptr is not None:
            dz = dz_ptr + rows[:, None] * stride_zm
            tl.store(dz + first[None, :], a, mask=first_mask)
            tl.store(dz + second[None, :], b, mask=second_mask)
        w_first = tl.load(
            weight_ptr + first[:, None] * stride_wn + inside[None, :],
            mask=(first < N)[:, None] & d_mask[None, :], other=0.0,
        )  # [BLOCK_P, BLOCK_D]  # fmt: skip
        w_second = tl.load(
            weight_ptr + second[:, None] * stride_wn + inside[None, :],
            mask=(second < N)[:, None] & d_mask[None, :], other=0.0,
        )  # fmt: skip
        dy = dot(a, w_first, dy)
        dy = dot(b, w_second, dy)

    mask = row_mask[:, None] & d_mask[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + inside[None, :], mask=mask, other=0.0)
    x_hat, rstd = normalize(x.to(tl.float32), inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    out = rows[:, None] * D + inside[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    store_norm_partials(dy, x_hat, dnorm_weight_ptr, dnorm_bias_ptr, program, inside, D, ADD)
    dx = norm_input_grad(dy, x_hat, rstd, norm_weight_ptr, inside, D, IS_LAYER)
    dx = add_tile(dx, residual_ptr, stride_rm, rows, inside, mask)
    tl.store(dx_ptr + out, dx, mask=mask)


def norm_linear_bwd(
    dout: Tensor,  # (rows, columns)
    x: Tensor,  # (rows, d)
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,  # (columns, d)
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotary: int = 0,
    eps: float = 1e-6,
    kind: str = "rms",
    residual: Tensor | None = None,  # (rows, d)
    *,
    row_count: Tensor | None = None,
    partials: NormPartials | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Returns dx, dnorm_weight, dnorm_bias (None without a bias), and the weight gradient's
    operands dz (rows, columns), y (rows, d).

    Args: as `norm_linear_bwd_ref`; row_count: see `_runtime`; partials, out: see
    `norm_grad_buffers`.
    """
    require(norm_reason(x, residual) or shapes_reason(("residual", residual, x.shape)))
    residual = None if residual is None else contiguous_columns(residual)
    _check(x, norm_weight, norm_bias, weight, None, dout, cos, sin, rotary, kind, row_count)
    (rows, d), columns = x.shape, weight.shape[0]
    x, dout = contiguous_columns(x), contiguous_columns(dout)
    if not norm_is_fused(d, weight.dtype):
        dz = _rope(dout.clone(), cos, sin, rotary, -1.0, row_count) if rotary else dout
        y = norm_fwd(x, norm_weight, norm_bias, eps, kind, weight.dtype, row_count)
        has_bias = norm_bias is not None
        dx, dnw, dnb = norm_bwd(
            dz @ weight, x, norm_weight, eps, kind, has_bias, row_count, partials, residual, out
        )
        return dx, dnw, dnb, dz, y
    # Not in place: other threads may still read the same elements.
    dz = torch.empty(dout.shape, dtype=dout.dtype, device=x.device) if rotary else dout
    y = torch.empty(rows, d, dtype=weight.dtype, device=x.device)
    config = _config(rows, d, weight.dtype, x.device, back=True)
    programs = cdiv(rows, config.block_m)
    dx, dnw, dnb = norm_grad_buffers(x, programs, norm_bias is not None, partials, out)
    if rows:
        _norm_linear_bwd_kernel[(programs,)](
            dout, x, norm_weight, norm_bias, weight, cos if rotary else None,
            sin if rotary else None, dz if rotary else None, y, dx, dnw, dnb, residual, row_count,
            stride_dm=dout.stride(0), stride_xm=x.stride(0), stride_wn=weight.stride(0),
            stride_cm=cos.stride(0) if rotary else 0, stride_zm=dz.stride(0),
            stride_rm=0 if residual is None else residual.stride(0),
            M=rows, N=columns, rotary=rotary, tiles=cdiv(columns, 2 * config.block_n),
            D=d, HALF=cos.shape[1] if rotary else config.block_n, EPS=eps,
            IS_LAYER=kind == "layer", ADD=partials is not None,
            BLOCK_M=config.block_m, BLOCK_P=config.block_n, BLOCK_D=block_of(d), **config.launch,
        )  # fmt: skip
    return dx, *sum_norm_partials(dnw, dnb, partials), dz, y

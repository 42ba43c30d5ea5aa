"""Norm + up + activation + down + residual: backward of `mlp.py`.

    dbranch = drop(dout);  da = dbranch · Wd;  (dup, dgate) = act'(u, gate) · da
    dy = dup · Wu (+ dgate · Wg);  dx by the norm's backward, without the residual's own dout

One program per block of rows iterates over the hidden layer in tiles; da stays on the SM. dup,
dgate, dbranch and norm(x) are written once, as operands of weight_grad; the norm's gradients are
summed from one partial per program, in a fixed order.

FLOPs per row: 4 · d · hidden (SwiGLU 6). Bytes per row (16-bit, fp32 gradient): 4 · hidden + 16 · d
(SwiGLU 8 · hidden): 131 FLOP per byte at d = 256, hidden = 1,024, just memory bound.
Above d = 256: linear_residual's backward, an elementwise kernel, norm_linear's backward.
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
    dot,
    jit_kernel,
    rows_left,
)
from .activation import activate_grad, activation_bwd
from .dropout import dropout_arguments, dropout_scale
from .dropout_ref import Dropout
from .linear_residual import linear_residual_bwd
from .mlp import check_mlp, mlp_config
from .mlp_up import load_weight
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
from .norm_linear import norm_linear_bwd
from .supports import mlp_is_fused, norm_reason, require, shapes_reason


@jit_kernel
def _mlp_bwd_kernel(
    # pointers
    dout_ptr, x_ptr, up_ptr, gate_ptr, norm_weight_ptr, norm_bias_ptr, up_weight_ptr,
    gate_weight_ptr, down_weight_ptr, dx_ptr, dnorm_weight_ptr, dnorm_bias_ptr, y_ptr, dup_ptr,
    dgate_ptr, dbranch_ptr, residual_ptr, count_ptr, seed_ptr, tokens_ptr,
    # strides
    stride_om, stride_xm, stride_pm, stride_qm, stride_un, stride_gn, stride_dn, stride_rm,
    # sizes, scalars
    M, H, counter,
    # flags
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
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
    dout_ptr += base * stride_om
    x_ptr += base * stride_xm
    up_ptr += base * stride_pm
    dup_ptr += base * H
    dx_ptr += base * D
    y_ptr += base * D
    if gate_ptr is not None:
        gate_ptr += base * stride_qm
        dgate_ptr += base * H
    if dbranch_ptr is not None:
        dbranch_ptr += base * D
    if tokens_ptr is not None:
        tokens_ptr += base
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < rows_left(M, base, BLOCK_M)
    mask = row_mask[:, None] & (inside < D)[None, :]
    dense = rows[:, None] * D + inside[None, :]
    dbranch = tl.load(dout_ptr + rows[:, None] * stride_om + inside[None, :], mask=mask, other=0.0)
    if seed_ptr is not None:
        dbranch = dbranch.to(tl.float32) * dropout_scale(
            seed_ptr, tokens_ptr, counter, rows, row_mask, inside, THRESHOLD, SCALE
        )
    dbranch = dbranch.to(up_weight_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    if dbranch_ptr is not None:
        tl.store(dbranch_ptr + dense, dbranch, mask=mask)
    dy = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, H, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        hidden_mask = row_mask[:, None] & (at < H)[None, :]
        w_down = tl.load(
            down_weight_ptr + inside[:, None] * stride_dn + at[None, :],
            mask=(inside < D)[:, None] & (at < H)[None, :], other=0.0,
        )  # [BLOCK_D, BLOCK_H]  # fmt: skip
        da = dot(dbranch, w_down, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
        up = tl.load(
            up_ptr + rows[:, None] * stride_pm + at[None, :], mask=hidden_mask, other=0.0
        ).to(tl.float32)
        gate = up
        if gate_ptr is not None:
            gate = tl.load(
                gate_ptr + rows[:, None] * stride_qm + at[None, :], mask=hidden_mask, other=0.0
            ).to(tl.float32)
        dup, dgate = activate_grad(da, up, gate, ACTIVATION)
        dup = dup.to(dbranch.dtype)
        hidden_at = rows[:, None] * H + at[None, :]
        tl.store(dup_ptr + hidden_at, dup, mask=hidden_mask)
        w_up = load_weight(up_weight_ptr, stride_un, at, H, inside, D, False)
        dy = dot(dup, w_up, dy)
        if gate_ptr is not None:
            dgate = dgate.to(dbranch.dtype)
            tl.store(dgate_ptr + hidden_at, dgate, mask=hidden_mask)
            w_gate = load_weight(gate_weight_ptr, stride_gn, at, H, inside, D, False)
            dy = dot(dgate, w_gate, dy)

    # The same mask computed anew: kept across the loop it spills on sm_90.
    mask = (rows < (M - base).to(tl.int32))[:, None] & (inside < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + inside[None, :], mask=mask, other=0.0)
    x_hat, rstd = normalize(x.to(tl.float32), inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), mask=mask)
    store_norm_partials(dy, x_hat, dnorm_weight_ptr, dnorm_bias_ptr, program, inside, D, ADD)
    dx = norm_input_grad(dy, x_hat, rstd, norm_weight_ptr, inside, D, IS_LAYER)
    dx = add_tile(dx, residual_ptr, stride_rm, rows, inside, mask)
    tl.store(dx_ptr + dense, dx, mask=mask)


def mlp_bwd(
    dout: Tensor,  # (rows, d)
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up_weight: Tensor,
    gate_weight: Tensor | None,
    down_weight: Tensor,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
    dropout: Dropout | None = None,
    residual: Tensor | None = None,  # (rows, d)
    *,
    row_count: Tensor | None = None,
    partials: NormPartials | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor]:
    """Returns dx (rows, d) without the residual's own dout unless it is `residual`, dnorm_weight,
    dnorm_bias (None without a bias), and the weight gradients' operands y, dup, dgate, dbranch.

    Args: as `mlp_bwd_ref`; row_count: see `_runtime`; partials: see `norm_grad_buffers`.
    """
    require(norm_reason(x, residual) or shapes_reason(("residual", residual, x.shape)))
    residual = None if residual is None else contiguous_columns(residual)
    check_mlp(
        x, norm_weight, norm_bias, up_weight, gate_weight, down_weight, activation, kind,
        row_count, dout=dout, up=up, gate=gate,
    )  # fmt: skip
    x, dout = contiguous_columns(x), contiguous_columns(dout)
    if not mlp_is_fused(x.shape[1], up_weight.dtype):
        return _mlp_wide_bwd(
            dout, x, up, gate, norm_weight, norm_bias, up_weight, gate_weight, down_weight,
            activation, eps, kind, dropout, residual, row_count, partials,
        )  # fmt: skip
    (rows, d), hidden = x.shape, up_weight.shape[0]
    up, gated = contiguous_columns(up), gate is not None
    gate = contiguous_columns(gate) if gated else None
    y = torch.empty(rows, d, dtype=up_weight.dtype, device=x.device)
    dup = torch.empty(rows, hidden, dtype=up_weight.dtype, device=x.device)
    dgate = torch.empty_like(dup) if gated else None
    same = dropout is None and dout.dtype == up_weight.dtype
    dbranch = dout if same else torch.empty_like(y)
    config = mlp_config(rows, d, up_weight.dtype, x.device, gated)
    programs = cdiv(rows, config.block_m)
    dx, dnw, dnb = norm_grad_buffers(x, programs, norm_bias is not None, partials)
    if rows:
        _mlp_bwd_kernel[(programs,)](
            dout, x, up, gate, norm_weight, norm_bias, up_weight, gate_weight, down_weight,
            dx, dnw, dnb, y, dup, dgate, None if same else dbranch, residual, row_count,
            **dropout_arguments(dropout),
            stride_om=dout.stride(0), stride_xm=x.stride(0), stride_pm=up.stride(0),
            stride_qm=gate.stride(0) if gated else 0, stride_un=up_weight.stride(0),
            stride_gn=gate_weight.stride(0) if gated else 0, stride_dn=down_weight.stride(0),
            stride_rm=0 if residual is None else residual.stride(0), ADD=partials is not None,
            M=rows, H=hidden, D=d, EPS=eps, IS_LAYER=kind == "layer", ACTIVATION=activation,
            BLOCK_M=config.block_m, BLOCK_H=config.block_n, BLOCK_D=block_of(d), **config.launch,
        )  # fmt: skip
    return dx, *sum_norm_partials(dnw, dnb, partials), y, dup, dgate, dbranch


def _mlp_wide_bwd(
    dout, x, up, gate, norm_weight, norm_bias, up_weight, gate_weight, down_weight,
    activation, eps, kind, dropout, residual, row_count, partials,
):  # fmt: skip
    """The backward for wide d, with the hidden layer's gradients in memory."""
    da, dbranch = linear_residual_bwd(dout, down_weight, dropout, row_count=row_count)
    dup, dgate = activation_bwd(activation, da, up.contiguous(), gate)
    norm = (norm_weight, norm_bias)
    if gate is None:
        options = {"eps": eps, "kind": kind, "row_count": row_count, "partials": partials}
        dx, dnw, dnb, _, y = norm_linear_bwd(dup, x, *norm, up_weight, residual=residual, **options)
        return dx, dnw, dnb, y, dup, None, dbranch
    # Two projections share one norm: their input gradients are summed before its backward.
    y = norm_fwd(x, *norm, eps, kind, up_weight.dtype, row_count)
    dy = torch.addmm(dup @ up_weight, dgate, gate_weight)
    dx, dnw, dnb = norm_bwd(
        dy, x, norm_weight, eps, kind, norm_bias is not None, row_count, partials, residual
    )
    return dx, dnw, dnb, y, dup, dgate, dbranch

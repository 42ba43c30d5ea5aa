"""Norm + up + activation in one kernel: the first half of an MLP whose hidden layer is in memory.

    y = norm(x);  u = y · Wuᵀ + bu;  a = act(u)  (SwiGLU: a = silu(y · Wgᵀ + bg) · u)

Shapes: x (rows, d), Wu and Wg (hidden, d), u, gate, a (rows, hidden). For 256 < d ≤ 512 (fp32: 128
< d ≤ 256, without SwiGLU). A program keeps norm(x) of its rows on the SM and iterates over its
share of the hidden layer in tiles; u and gate are written only if the backward needs them.

FLOPs per row: 2 · d · hidden (SwiGLU 4). Bytes per row (16-bit, fp32 state): 4 · d + 2 · hidden, or
with u (and gate) 4 · d + 4 (6) · hidden. At d = 512, hidden = 2,048: 340 FLOP per byte, compute
bound; with u 205, near the ridge.
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
    counted_rows,
    dot,
    jit_kernel,
    rows_left,
    split_columns,
)
from .activation import activate
from .norm import normalize, scale_shift
from .tuning import pick


@triton.jit
def load_weight(
    ptr, stride, first, last, at, D: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Loads rows `first` < last and columns `at` < D of a weight: [rows, columns], or
    transposed."""
    if TRANSPOSED:
        return tl.load(
            ptr + first[None, :] * stride + at[:, None],
            mask=(first < last)[None, :] & (at < D)[:, None], other=0.0,
        )  # fmt: skip
    else:
        return tl.load(
            ptr + first[:, None] * stride + at[None, :],
            mask=(first < last)[:, None] & (at < D)[None, :], other=0.0,
        )  # fmt: skip


@triton.jit
def hidden_tile(
    y, rows, row_mask, at, H, inside, up_weight_ptr, up_bias_ptr, gate_weight_ptr, gate_bias_ptr,
    up_ptr, gate_ptr, hidden_ptr, stride_un, stride_gn,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Returns columns `at` of the hidden layer [BLOCK_M, BLOCK_H] in y's dtype, 0 beyond H; also
    writes them and their pre-activations to the buffers that are given."""
    hidden_at = rows[:, None] * H + at[None, :]
    mask = row_mask[:, None] & (at < H)[None, :]
    w_up = load_weight(up_weight_ptr, stride_un, at, H, inside, D, True)
    up = dot(y, w_up, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + at, mask=at < H, other=0.0).to(tl.float32)[None, :]
    if up_ptr is not None:
        tl.store(up_ptr + hidden_at, up.to(up_ptr.dtype.element_ty), mask=mask)
    gate = up
    if gate_weight_ptr is not None:
        w_gate = load_weight(gate_weight_ptr, stride_gn, at, H, inside, D, True)
        gate = dot(y, w_gate, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
        if gate_bias_ptr is not None:
            gate += tl.load(gate_bias_ptr + at, mask=at < H, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None:
            tl.store(gate_ptr + hidden_at, gate.to(gate_ptr.dtype.element_ty), mask=mask)
    hidden = activate(up, gate, ACTIVATION).to(y.dtype)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + hidden_at, hidden, mask=mask)
    return hidden


@jit_kernel
def _mlp_up_fwd_kernel(
    # pointers
    x_ptr, norm_weight_ptr, norm_bias_ptr, up_weight_ptr, up_bias_ptr, gate_weight_ptr,
    gate_bias_ptr, up_ptr, gate_ptr, hidden_ptr, count_ptr,
    # strides
    stride_xm, stride_un, stride_gn,
    # sizes
    M, H, tiles, tiles_each, column_blocks,
    # flags
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, ACTIVATION: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    program = tl.program_id(0)
    base = (program // column_blocks).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    x_ptr += base * stride_xm
    hidden_ptr += base * H
    if up_ptr is not None:
        up_ptr += base * H
    if gate_ptr is not None:
        gate_ptr += base * H
    rows = tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_D)
    row_mask = rows < rows_left(M, base, BLOCK_M)
    mask = row_mask[:, None] & (inside < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + inside[None, :], mask=mask, other=0.0)
    x_hat, _ = normalize(x.to(tl.float32), inside, D, EPS, IS_LAYER)
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    y = y.to(up_weight_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    start = program % column_blocks * tiles_each
    for tile in range(start, tl.minimum(start + tiles_each, tiles)):
        hidden_tile(
            y, rows, row_mask, tile * BLOCK_H + tl.arange(0, BLOCK_H), H, inside, up_weight_ptr,
            up_bias_ptr, gate_weight_ptr, gate_bias_ptr, up_ptr, gate_ptr, hidden_ptr,
            stride_un, stride_gn, D, ACTIVATION, BLOCK_M, BLOCK_H,
        )  # fmt: skip


def _config(d: int, dtype: torch.dtype, device: torch.device, gated: bool) -> Config:
    return pick("mlp_up_gated" if gated else "mlp_up", dtype, d, 0, device)


def mlp_up_fwd(
    x: Tensor,  # (rows, d), in the state dtype, contiguous columns
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up_weight: Tensor,  # (hidden, d), in the compute dtype
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    eps: float,
    kind: str,
    keep: bool,
    row_count: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Returns u, gate (None unless `keep`) and a (rows, hidden); mlp_fwd has checked the call.

    Args: as `mlp_fwd_ref`; row_count: see `_runtime`.
    """
    (rows, d), hidden_size = x.shape, up_weight.shape[0]
    gated = gate_weight is not None

    def buffer(wanted: bool) -> Tensor | None:
        shape = (rows, hidden_size)
        return torch.empty(shape, dtype=up_weight.dtype, device=x.device) if wanted else None

    up, gate, hidden = buffer(keep), buffer(keep and gated), buffer(True)
    if rows:
        config = _config(d, up_weight.dtype, x.device, gated)
        row_blocks, tiles = cdiv(rows, config.block_m), cdiv(hidden_size, config.block_n)
        tiles_each, column_blocks = split_columns(tiles, row_blocks, x.device)
        _mlp_up_fwd_kernel[(column_blocks * row_blocks,)](
            x, norm_weight, norm_bias, up_weight, up_bias, gate_weight, gate_bias,
            up, gate, hidden, row_count, stride_xm=x.stride(0), stride_un=up_weight.stride(0),
            stride_gn=gate_weight.stride(0) if gated else 0,
            M=rows, H=hidden_size, tiles=tiles, tiles_each=tiles_each, column_blocks=column_blocks,
            D=d, EPS=eps, IS_LAYER=kind == "layer", ACTIVATION=activation,
            BLOCK_M=config.block_m, BLOCK_H=config.block_n, BLOCK_D=block_of(d), **config.launch,
        )  # fmt: skip
    return up, gate, hidden

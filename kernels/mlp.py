"""Norm + up + activation + down + residual in one kernel: forward.

    y = norm(x);  u = y · Wuᵀ + bu;  a = act(u)  (SwiGLU: a = silu(y · Wgᵀ + bg) · u)
    out = x + drop(a · Wdᵀ + bd)

Shapes: x, out (rows, d), Wu and Wg (hidden, d), Wd (d, hidden). For d ≤ 256 (fp32: 128) a program
keeps norm(x) and the output of its rows on the SM and iterates over the hidden layer in tiles,
which are written only if the backward needs them.

| saved by the caller | recomputed in backward |
|---|---|
| x, u, (gate), a, if `keep` | norm(x) |

FLOPs per row: 4 · d · hidden (SwiGLU 6). Bytes per row (fp32 state): 8 · d without `keep`, plus 4 ·
hidden with it. At d = 256, hidden = 1,024: 512 FLOP per byte, compute bound; with `keep` 170, near
the ridge.
Above d = 256 the hidden layer is in memory: `mlp_up` writes it, linear_residual reads it. So it is
for few rows in 16 bits at d > 128, where a program reads all weights tile by tile and most
processors wait: an H200 took 91 µs for 700 rows, and 16 µs for a norm_linear and a linear_residual
of them, whose programs share the columns too. Above d = 512 (fp32: 256, SwiGLU 128) the op is a
norm, GEMMs and an elementwise activation.
"""

from __future__ import annotations

import torch
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
    rows_left,
)
from .activation import activation_fwd
from .dropout import dropout_arguments, dropout_scale
from .dropout_ref import Dropout
from .linear_residual import linear_residual_fwd
from .mlp_up import hidden_tile, mlp_up_fwd
from .norm import normalize, scale_shift
from .norm_linear import norm_linear_fwd
from .supports import (
    activation_reason,
    mlp_is_fused,
    norm_reason,
    require,
    row_count_reason,
    shapes_reason,
    up_is_fused,
    weights_reason,
)
from .tuning import pick


@jit_kernel
def _mlp_fwd_kernel(
    # pointers
    x_ptr, norm_weight_ptr, norm_bias_ptr, up_weight_ptr, up_bias_ptr, gate_weight_ptr,
    gate_bias_ptr, down_weight_ptr, down_bias_ptr, out_ptr, up_ptr, gate_ptr, hidden_ptr,
    count_ptr, seed_ptr, tokens_ptr,
    # strides
    stride_xm, stride_un, stride_gn, stride_dn, stride_om,
    # sizes, scalars
    M, H, counter,
    # flags
    D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_RESIDUAL: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    x_ptr += base * stride_xm
    out_ptr += base * stride_om
    if up_ptr is not None:
        up_ptr += base * H
        hidden_ptr += base * H
    if gate_ptr is not None:
        gate_ptr += base * H
    if tokens_ptr is not None:
        tokens_ptr += base
    rows = tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_D)
    row_mask = rows < rows_left(M, base, BLOCK_M)
    mask = row_mask[:, None] & (inside < D)[None, :]
    x_at = x_ptr + rows[:, None] * stride_xm + inside[None, :]
    x_hat, _ = normalize(
        tl.load(x_at, mask=mask, other=0.0).to(tl.float32), inside, D, EPS, IS_LAYER
    )
    y = scale_shift(x_hat, norm_weight_ptr, norm_bias_ptr, inside, D)
    y = y.to(up_weight_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    branch = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, H, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        hidden = hidden_tile(
            y, rows, row_mask, at, H, inside, up_weight_ptr, up_bias_ptr, gate_weight_ptr,
            gate_bias_ptr, up_ptr, gate_ptr, hidden_ptr, stride_un, stride_gn,
            D, ACTIVATION, BLOCK_M, BLOCK_H,
        )  # fmt: skip
        # Columns beyond H are act(0) = 0.
        w_down = tl.load(
            down_weight_ptr + inside[None, :] * stride_dn + at[:, None],
            mask=(inside < D)[None, :] & (at < H)[:, None], other=0.0,
        )  # [BLOCK_H, BLOCK_D]  # fmt: skip
        branch = dot(hidden, w_down, branch)
    if down_bias_ptr is not None:
        bias = tl.load(down_bias_ptr + inside, mask=inside < D, other=0.0)
        branch += bias.to(tl.float32)[None, :]
    if seed_ptr is not None:
        kept = dropout_scale(
            seed_ptr, tokens_ptr, counter, rows, row_mask, inside, THRESHOLD, SCALE
        )
        branch = tl.where(kept > 0.0, branch * SCALE, 0.0)  # a product with `kept` spills on sm_90
    if ADD_RESIDUAL:
        branch += tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + rows[:, None] * stride_om + inside[None, :],
        branch.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


def mlp_config(rows: int, d: int, dtype: torch.dtype, device: torch.device, gated: bool) -> Config:
    """Returns the configuration of forward and backward; block_n is a tile of the hidden layer.

    Args:
        rows: Number of rows.
        d: Width of the states.
        dtype: Their dtype.
        device: Where they are.
        gated: Whether the MLP has a gate.
    """
    return pick("mlp_gated" if gated else "mlp", dtype, d, rows, device)


def _has_few_rows(rows: int, d: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether blocks of rows alone leave at least half of the processors idle."""
    wide = d > 128 and dtype != torch.float32
    return wide and 2 * cdiv(rows, 64) <= device_props(device).processors


def check_mlp(
    x, norm_weight, norm_bias, up_weight, gate_weight, down_weight, activation, kind, row_count,
    up_bias=None, gate_bias=None, down_bias=None, out=None, dout=None, up=None, gate=None,
) -> None:  # fmt: skip
    """Checks that the kernels support a call.

    Args:
        x: (rows, d); all arguments are as in `mlp_fwd` and `mlp_bwd`, None where there is none.

    Raises:
        Unsupported: They do not.
    """
    require(
        norm_reason(
            x, norm_weight, norm_bias, up_weight, gate_weight, down_weight, up_bias, gate_bias,
            down_bias, out, dout, up, gate, kind=kind,
        )
    )  # fmt: skip
    (rows, d), hidden = x.shape, up_weight.shape[0]
    require(
        shapes_reason(
            ("the norm's weight", norm_weight, (d,)),
            ("its bias", norm_bias, (d,)),
            ("up_weight", up_weight, (hidden, d)),
            ("up_bias", up_bias, (hidden,)),
            ("gate_weight", gate_weight, (hidden, d)),
            ("gate_bias", gate_bias, (hidden,)),
            ("down_weight", down_weight, (d, hidden)),
            ("down_bias", down_bias, (d,)),
            ("out", out, (rows, d)),
            ("dout", dout, (rows, d)),
            ("up", up, (rows, hidden)),
            ("gate", gate, (rows, hidden)),
        )  # fmt: skip
        or weights_reason(up_weight, gate_weight, down_weight)
        or activation_reason(activation, gate_weight is not None)
        or row_count_reason(row_count, x)
    )


def mlp_fwd(
    x: Tensor,  # (rows, d), in the state dtype
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    up_weight: Tensor,  # (hidden, d), in the compute dtype
    up_bias: Tensor | None,
    gate_weight: Tensor | None,  # (hidden, d), SwiGLU only
    gate_bias: Tensor | None,
    down_weight: Tensor,  # (d, hidden)
    down_bias: Tensor | None,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
    dropout: Dropout | None = None,
    out: Tensor | None = None,
    keep: bool = True,
    residual: bool = True,
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns out (rows, d) and, if `keep`, u, gate and a (rows, hidden) for the backward, else
    None.

    Args: as `mlp_fwd_ref`; row_count: see `_runtime`.
    """
    check_mlp(
        x, norm_weight, norm_bias, up_weight, gate_weight, down_weight, activation, kind,
        row_count, up_bias, gate_bias, down_bias, out,
    )  # fmt: skip
    x = contiguous_columns(x)
    (rows, d), hidden_size = x.shape, up_weight.shape[0]
    apart = _has_few_rows(rows, d, up_weight.dtype, x.device)
    if apart or not mlp_is_fused(d, up_weight.dtype):
        return _mlp_wide_fwd(
            x, norm_weight, norm_bias, up_weight, up_bias, gate_weight, gate_bias, down_weight,
            down_bias, activation, eps, kind, dropout, out, keep, residual, row_count,
        )  # fmt: skip
    if out is None:
        out = torch.empty(rows, d, dtype=(x if residual else up_weight).dtype, device=x.device)
    require("out needs contiguous columns" if out.stride(-1) != 1 else None)

    def buffer(wanted: bool) -> Tensor | None:
        shape = (rows, hidden_size)
        return torch.empty(shape, dtype=up_weight.dtype, device=x.device) if wanted else None

    gated = gate_weight is not None
    up, gate, hidden = buffer(keep), buffer(keep and gated), buffer(keep)
    if rows:
        config = mlp_config(rows, d, up_weight.dtype, x.device, gated)
        _mlp_fwd_kernel[(cdiv(rows, config.block_m),)](
            x, norm_weight, norm_bias, up_weight, up_bias, gate_weight, gate_bias,
            down_weight, down_bias, out, up, gate, hidden, row_count,
            **dropout_arguments(dropout),
            stride_xm=x.stride(0), stride_un=up_weight.stride(0),
            stride_gn=gate_weight.stride(0) if gated else 0, stride_dn=down_weight.stride(0),
            stride_om=out.stride(0), M=rows, H=hidden_size,
            D=d, EPS=eps, IS_LAYER=kind == "layer", ACTIVATION=activation, ADD_RESIDUAL=residual,
            BLOCK_M=config.block_m, BLOCK_H=config.block_n, BLOCK_D=block_of(d), **config.launch,
        )  # fmt: skip
    return out, up, gate, hidden


def _mlp_wide_fwd(
    x, norm_weight, norm_bias, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias,
    activation, eps, kind, dropout, out, keep, residual, row_count,
):  # fmt: skip
    """The forward for wide d, with the hidden layer in memory."""
    norm = (norm_weight, norm_bias)
    options = {"eps": eps, "kind": kind, "row_count": row_count}
    if up_is_fused(x.shape[1], up_weight.dtype, gate_weight is not None):
        up, gate, hidden = mlp_up_fwd(
            x, *norm, up_weight, up_bias, gate_weight, gate_bias, activation, keep=keep, **options
        )
    else:
        up = norm_linear_fwd(x, *norm, up_weight, up_bias, **options)
        gate = None
        if gate_weight is not None:
            gate = norm_linear_fwd(x, *norm, gate_weight, gate_bias, **options)
        hidden = activation_fwd(activation, up, gate)
    residue = x if residual else None
    down = (down_weight, down_bias, residue, dropout, out)
    out = linear_residual_fwd(hidden, *down, row_count=row_count)
    return (out, up, gate, hidden) if keep else (out, None, None, None)

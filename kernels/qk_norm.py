"""RMSNorm of each query and key head, then RoPE, forward and backward.

    q̂ = RoPE(z_q · r · w_q), r = (mean(z_q²) + eps)^(−1/2), for each query head; k̂ likewise; v = z_v
    g = RoPE⁻¹(dq̂);  dw_q = Σ g · ẑ over rows and heads, ẑ = z · r
    dz = r · (g · w − ẑ · mean(g · w · ẑ))

Shapes: z, qkv, dz (rows, (heads + 2 · kv_heads) · head_dim), w (head_dim,). A program holds some
rows of one head as two half-tiles, so RoPE is elementwise (as in `norm_linear`). Saved by the
caller: z. Recomputed: the norms. dw is summed from one fp32 partial per program and head, in a
fixed order.

Bytes per row (16-bit, 768 columns): forward 3 kB, backward 4.6 kB, at a few FLOPs a byte: memory
bound. Inside norm_linear it would cost no traffic, but its column tiles are narrower than a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import (
    block_of,
    cdiv,
    contiguous_columns,
    counted_rows,
    jit_kernel,
)
from .supports import (
    heads_reason,
    require,
    rope_reason,
    row_count_reason,
    rows_reason,
    shapes_reason,
)

PROGRAMS = 256  # per head, of the backward


@triton.jit
def _load_halves(ptr, row_mask, column, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Loads both halves [BLOCK_M, BLOCK_P] of a head's rows in fp32, with zeros outside; ptr
    [BLOCK_M, 1]: where they start."""
    first = tl.load(
        ptr + column[None, :], mask=row_mask[:, None] & (column < HALF)[None, :], other=0.0
    )
    second = tl.load(
        ptr + HALF + column[None, :],
        mask=row_mask[:, None] & (column < HEAD_DIM - HALF)[None, :], other=0.0,
    )  # fmt: skip
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(
    ptr, first, second, row_mask, column, HALF: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Stores in the layout of `_load_halves`."""
    kind = ptr.dtype.element_ty
    tl.store(
        ptr + column[None, :], first.to(kind),
        mask=row_mask[:, None] & (column < HALF)[None, :],
    )  # fmt: skip
    tl.store(
        ptr + HALF + column[None, :], second.to(kind),
        mask=row_mask[:, None] & (column < HEAD_DIM - HALF)[None, :],
    )  # fmt: skip


@triton.jit
def _load_weight(
    q_weight_ptr, k_weight_ptr, is_query, column, HALF: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Loads both halves [1, BLOCK_P] of the weight of a query or a key head in fp32."""
    first_mask, second_mask = column < HALF, column < HEAD_DIM - HALF
    first = tl.where(
        is_query,
        tl.load(q_weight_ptr + column, mask=first_mask, other=0.0),
        tl.load(k_weight_ptr + column, mask=first_mask, other=0.0),
    )
    second = tl.where(
        is_query,
        tl.load(q_weight_ptr + HALF + column, mask=second_mask, other=0.0),
        tl.load(k_weight_ptr + HALF + column, mask=second_mask, other=0.0),
    )
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def _normalize_halves(first, second, HEAD_DIM: tl.constexpr, EPS: tl.constexpr):
    """Returns both halves of ẑ [BLOCK_M, BLOCK_P], and r [BLOCK_M, 1]."""
    rstd = tl.rsqrt(tl.sum(first * first + second * second, 1) / HEAD_DIM + EPS)
    if EPS == 0.0:  # rows of zeros, and rows outside
        rstd = tl.where(rstd == float("inf"), 0.0, rstd)
    rstd = rstd[:, None]
    return first * rstd, second * rstd, rstd


@triton.jit
def _load_tables(cos_ptr, sin_ptr, stride_cm, rows, row_mask, column, HALF: tl.constexpr):
    """Loads cos and sin [BLOCK_M, BLOCK_P] in fp32."""
    at = rows[:, None] * stride_cm + column[None, :]
    mask = row_mask[:, None] & (column < HALF)[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=1.0)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0)


@jit_kernel
def _qk_norm_fwd_kernel(
    # pointers
    z_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, out_ptr, count_ptr,
    # strides, sizes
    stride_zm, stride_cm, stride_om, M,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    base = tl.program_id(0).to(tl.int64) * BLOCK_M
    if base >= M:
        return
    head = tl.program_id(1)
    rows = base + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    column = tl.arange(0, BLOCK_P)
    z_at = z_ptr + rows[:, None] * stride_zm + head * HEAD_DIM
    first, second = _load_halves(z_at, row_mask, column, HALF, HEAD_DIM)
    if head < HEADS + KV_HEADS:
        w_first, w_second = _load_weight(
            q_weight_ptr, k_weight_ptr, head < HEADS, column, HALF, HEAD_DIM
        )
        first, second, _ = _normalize_halves(first, second, HEAD_DIM, EPS)
        first *= w_first
        second *= w_second
        if cos_ptr is not None:
            cos, sin = _load_tables(cos_ptr, sin_ptr, stride_cm, rows, row_mask, column, HALF)
            first, second = first * cos - second * sin, second * cos + first * sin
    out_at = out_ptr + rows[:, None] * stride_om + head * HEAD_DIM
    _store_halves(out_at, first, second, row_mask, column, HALF, HEAD_DIM)


@jit_kernel
def _qk_norm_bwd_kernel(
    # pointers
    dqkv_ptr, z_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dz_ptr, dweight_ptr, count_ptr,
    # strides, sizes
    stride_dm, stride_zm, stride_cm, stride_om, M,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    M = counted_rows(M, count_ptr)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_P)
    w_first, w_second = _load_weight(
        q_weight_ptr, k_weight_ptr, head < HEADS, column, HALF, HEAD_DIM
    )
    dw_first = tl.zeros((BLOCK_P,), tl.float32)
    dw_second = tl.zeros((BLOCK_P,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        g_at = dqkv_ptr + rows[:, None] * stride_dm + head * HEAD_DIM
        g_first, g_second = _load_halves(g_at, row_mask, column, HALF, HEAD_DIM)
        if head < HEADS + KV_HEADS:
            z_at = z_ptr + rows[:, None] * stride_zm + head * HEAD_DIM
            first, second = _load_halves(z_at, row_mask, column, HALF, HEAD_DIM)
            first, second, rstd = _normalize_halves(first, second, HEAD_DIM, EPS)
            if cos_ptr is not None:
                cos, sin = _load_tables(cos_ptr, sin_ptr, stride_cm, rows, row_mask, column, HALF)
                g_first, g_second = g_first * cos + g_second * sin, g_second * cos - g_first * sin
            dw_first += tl.sum(g_first * first, 0)
            dw_second += tl.sum(g_second * second, 0)
            g_first *= w_first
            g_second *= w_second
            inner = tl.sum(g_first * first + g_second * second, 1)[:, None] / HEAD_DIM
            g_first = (g_first - first * inner) * rstd
            g_second = (g_second - second * inner) * rstd
        dz_at = dz_ptr + rows[:, None] * stride_om + head * HEAD_DIM
        _store_halves(dz_at, g_first, g_second, row_mask, column, HALF, HEAD_DIM)
    if head < HEADS + KV_HEADS:
        partial = tl.program_id(0) * (HEADS + KV_HEADS) + head
        at = dweight_ptr + partial.to(tl.int64) * HEAD_DIM + column
        tl.store(at, dw_first, mask=column < HALF)
        tl.store(at + HALF, dw_second, mask=column < HEAD_DIM - HALF)


def _block_rows(head_dim: int) -> int:
    return max(1, 2048 // block_of(head_dim))


def _check(z, q_weight, k_weight, heads, kv_heads, cos, sin, row_count, dqkv=None) -> None:
    """Raises Unsupported if the kernels do not support the call."""
    require(
        rows_reason(z, q_weight, k_weight, cos, sin, dqkv)
        or heads_reason(z.shape[1], heads, kv_heads)
    )
    rows, columns = z.shape
    head_dim = columns // (heads + 2 * kv_heads)
    require(
        shapes_reason(
            ("q_weight", q_weight, (head_dim,)), ("k_weight", k_weight, (head_dim,)),
            ("dqkv", dqkv, (rows, columns)),
        )
        or rope_reason(rows, columns, 0 if cos is None else head_dim * (heads + kv_heads), cos, sin)
        or row_count_reason(row_count, z)
    )  # fmt: skip


def _shape(z: Tensor, heads: int, kv_heads: int, cos: Tensor | None, eps: float) -> dict:
    """Returns the arguments that forward and backward share."""
    head_dim = z.shape[1] // (heads + 2 * kv_heads)
    return {
        "stride_zm": z.stride(0), "stride_cm": 0 if cos is None else cos.stride(0),
        "stride_om": z.shape[1], "M": z.shape[0],
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "HALF": cdiv(head_dim, 2),
        "EPS": eps, "BLOCK_M": _block_rows(head_dim), "BLOCK_P": block_of(head_dim) // 2,
        "num_warps": 4,
    }  # fmt: skip


def qk_norm_fwd(
    z: Tensor,  # (rows, (heads + 2 * kv_heads) * head_dim)
    q_weight: Tensor,  # (head_dim,)
    k_weight: Tensor,  # (head_dim,)
    heads: int,
    kv_heads: int,
    cos: Tensor | None = None,  # (rows, head_dim / 2)
    sin: Tensor | None = None,
    eps: float = 1e-6,
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns qkv, of z's shape and dtype.

    Args: as `qk_norm_fwd_ref`; row_count: see `_runtime`.
    """
    _check(z, q_weight, k_weight, heads, kv_heads, cos, sin, row_count)
    z = contiguous_columns(z)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if len(z):
        shape = _shape(z, heads, kv_heads, cos, eps)
        _qk_norm_fwd_kernel[(cdiv(len(z), shape["BLOCK_M"]), heads + 2 * kv_heads)](
            z, q_weight, k_weight, cos, sin, out, row_count, **shape
        )
    return out


def qk_norm_bwd(
    dqkv: Tensor,  # like z
    z: Tensor,  # (rows, (heads + 2 * kv_heads) * head_dim)
    q_weight: Tensor,  # (head_dim,)
    k_weight: Tensor,  # (head_dim,)
    heads: int,
    kv_heads: int,
    cos: Tensor | None = None,  # (rows, head_dim / 2)
    sin: Tensor | None = None,
    eps: float = 1e-6,
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dz, of z's shape and dtype, and dq_weight, dk_weight (head_dim,) in fp32.

    Args: as `qk_norm_bwd_ref`; row_count: see `_runtime`.
    """
    _check(z, q_weight, k_weight, heads, kv_heads, cos, sin, row_count, dqkv)
    z, dqkv = contiguous_columns(z), contiguous_columns(dqkv)
    shape = _shape(z, heads, kv_heads, cos, eps)
    programs = min(cdiv(len(z), shape["BLOCK_M"]), PROGRAMS)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    partials = (programs, heads + kv_heads, shape["HEAD_DIM"])
    dweight = torch.empty(partials, dtype=torch.float32, device=z.device)
    if len(z):
        _qk_norm_bwd_kernel[(programs, heads + 2 * kv_heads)](
            dqkv, z, q_weight, k_weight, cos, sin, dz, dweight, row_count,
            stride_dm=dqkv.stride(0), **shape,
        )  # fmt: skip
    dq_weight, dk_weight = dweight[:, :heads].sum((0, 1)), dweight[:, heads:].sum((0, 1))
    return dz, dq_weight, dk_weight

"""Attention over packed sequences, bidirectional and causal, grouped-query heads: forward.

    s = q · kᵀ · scale (+ mask);  p = exp(s − lse);  o = p · v

Shapes: qkv (rows, (heads + 2 · kv_heads) · head_dim), rows of sequence i from cu_seqlens[i] to
cu_seqlens[i + 1], o (rows, heads · head_dim), lse (rows, heads) fp32. Saved: qkv, o, lse.

*Short* (no sequence over 128 rows, fp32: 32, and a tile that fits the device): one program per
(sequence, head) holds all keys, so softmax takes a single pass. *Long*: one program per (sequence,
head, block of queries), with online softmax over blocks of keys. Nothing is padded in memory;
programs without rows return at once.

FLOPs: 4 · n² · head_dim per head. Bytes: every row of q, k, v is read and of o written once (8 ·
head_dim in 16 bits per row and head; later reads of key blocks hit L2). For n ≤ 128 this is at most
64 FLOP per byte, so it is memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import Config, block_of, cdiv, contiguous_columns, dot, jit_kernel
from .attention_ref import PaddedLayout
from .supports import (
    SHORT,
    heads_reason,
    layout_reason,
    require,
    row_count_reason,
    rows_reason,
)
from .tuning import pick, pick_or_none

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_head(ptr, stride, rows, row_mask, column, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr):
    """Loads columns column .. column + HEAD_DIM of some rows, [BLOCK, BLOCK_H], with zeros
    outside."""
    inside = tl.arange(0, BLOCK_H)
    return tl.load(
        ptr + rows[:, None] * stride + column + inside[None, :],
        mask=row_mask[:, None] & (inside < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def store_head(
    ptr, value, stride, rows, row_mask, column, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Stores a tile in the layout of `load_head`."""
    inside = tl.arange(0, BLOCK_H)
    tl.store(
        ptr + rows[:, None] * stride + column + inside[None, :],
        value.to(ptr.dtype.element_ty),
        mask=row_mask[:, None] & (inside < HEAD_DIM)[None, :],
    )


@triton.jit
def masked_scores(
    q, k, q_at, k_at, n, SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns scores [BLOCK_M, BLOCK_N] in units of log 2, −inf for masked keys."""
    s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * (SCALE * LOG2_E)
    visible = (k_at < n)[None, :]
    if CAUSAL:
        visible = visible & (q_at[:, None] >= k_at[None, :])
    return tl.where(visible, s, float("-inf"))


@triton.jit
def sequence_rows(cu_ptr, count_ptr, sequence):
    """Returns the first row (int64) of a sequence and its number of rows, 0 beyond the row
    count."""
    start = tl.load(cu_ptr + sequence)
    n = tl.load(cu_ptr + sequence + 1) - start
    if count_ptr is not None:
        n = tl.where(start < tl.load(count_ptr), n, 0)
    return start.to(tl.int64), n


@jit_kernel
def _attention_short_fwd_kernel(
    # pointers
    qkv_ptr, cu_ptr, o_ptr, lse_ptr, count_ptr,
    # strides
    stride_qm,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    # blocks
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    first_row, n = sequence_rows(cu_ptr, count_ptr, sequence)
    if n == 0:
        return
    at = tl.arange(0, BLOCK_N)
    qkv_ptr += first_row * stride_qm
    o_ptr += first_row * (HEADS * HEAD_DIM)
    lse_ptr += first_row * HEADS
    mask = at < n
    q = load_head(qkv_ptr, stride_qm, at, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    k = load_head(qkv_ptr, stride_qm, at, mask, (HEADS + kv_head) * HEAD_DIM, HEAD_DIM, BLOCK_H)
    s = masked_scores(q, k, at, at, n, SCALE, CAUSAL, BLOCK_N, BLOCK_N)
    top = tl.max(s, 1)
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, 1)
    v = load_head(
        qkv_ptr, stride_qm, at, mask, (HEADS + KV_HEADS + kv_head) * HEAD_DIM, HEAD_DIM, BLOCK_H
    )
    o = dot(p.to(v.dtype), v, tl.zeros((BLOCK_N, BLOCK_H), tl.float32)) / total[:, None]
    store_head(o_ptr, o, HEADS * HEAD_DIM, at, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    tl.store(lse_ptr + at * HEADS + head, (top + tl.log2(total)) / LOG2_E, mask=mask)


@jit_kernel
def _attention_long_fwd_kernel(
    # pointers
    qkv_ptr, cu_ptr, o_ptr, lse_ptr, count_ptr,
    # strides
    stride_qm,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    first = tl.program_id(1) * BLOCK_M
    first_row, n = sequence_rows(cu_ptr, count_ptr, sequence)
    if first >= n:
        return
    q_at = first + tl.arange(0, BLOCK_M)
    qkv_ptr += first_row * stride_qm
    o_ptr += first_row * (HEADS * HEAD_DIM)
    lse_ptr += first_row * HEADS
    q_mask = q_at < n
    q = load_head(qkv_ptr, stride_qm, q_at, q_mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    stop = n
    if CAUSAL:
        stop = tl.minimum(n, first + BLOCK_M)
    # Every query attends to key 0, so `top` is finite after the first block.
    for block in range(0, stop, BLOCK_N):
        k_at = block + tl.arange(0, BLOCK_N)
        k_mask = k_at < n
        k = load_head(
            qkv_ptr, stride_qm, k_at, k_mask, (HEADS + kv_head) * HEAD_DIM, HEAD_DIM, BLOCK_H
        )
        v = load_head(
            qkv_ptr, stride_qm, k_at, k_mask, (HEADS + KV_HEADS + kv_head) * HEAD_DIM,
            HEAD_DIM, BLOCK_H,
        )  # fmt: skip
        s = masked_scores(q, k, q_at, k_at, n, SCALE, CAUSAL, BLOCK_M, BLOCK_N)
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        o = dot(p.to(v.dtype), v, o * shrink[:, None])
        top = new_top
    o = o / total[:, None]
    store_head(o_ptr, o, HEADS * HEAD_DIM, q_at, q_mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    tl.store(lse_ptr + q_at * HEADS + head, (top + tl.log2(total)) / LOG2_E, mask=q_mask)


def short_config(layout: PaddedLayout, qkv: Tensor, head_dim: int, way: str) -> Config | None:
    """Returns the configuration of the short kernel, or None for the long ones.

    The long ones serve where a sequence is too long for one tile, or the tile too large for the
    device.

    Args:
        layout: The sequences.
        qkv: (rows, columns).
        head_dim: Columns of a head.
        way: "fwd" or "bwd".
    """
    if layout.max_length > (32 if qkv.dtype == torch.float32 else SHORT):
        return None
    kind = "short" if head_dim <= 64 else "wide"
    if way == "bwd" and head_dim <= 32:
        kind = "narrow"
    op = f"attention_{kind}_{way}"
    block = block_of(layout.max_length)
    return pick_or_none(op, qkv.dtype, block, 0, qkv.device)


def check(
    qkv: Tensor,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    row_count: Tensor | None,
    *others: Tensor,
) -> None:
    """Checks that the kernels support a call.

    Args:
        qkv: (rows, columns).
        layout: The sequences.
        heads: Query heads.
        kv_heads: Key and value heads.
        row_count: Number of live rows on the device, or None.
        others: Further tensors with the rows of qkv.

    Raises:
        Unsupported: They do not.
    """
    require(
        rows_reason(qkv, *others)
        or heads_reason(qkv.shape[1], heads, kv_heads)
        or row_count_reason(row_count, qkv)
        or layout_reason(layout, qkv, row_count, *others)
    )


def attention_fwd(
    qkv: Tensor,  # (rows, (heads + 2 * kv_heads) * head_dim)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
    *,
    row_count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns o (rows, heads · head_dim) in qkv's dtype and lse (rows, heads) in fp32.

    Args: as `attention_fwd_ref`; row_count: see `_runtime`.
    """
    check(qkv, layout, heads, kv_heads, row_count)
    qkv = contiguous_columns(qkv)
    rows, head_dim = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads)
    o = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=qkv.device)
    if rows == 0:
        return o, lse
    tensors = (qkv, layout.cu_seqlens, o, lse, row_count)
    programs = (layout.cu_seqlens.shape[0] - 1) * heads
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "SCALE": head_dim**-0.5,
        "CAUSAL": causal, "BLOCK_H": block_of(head_dim),
    }  # fmt: skip
    config = short_config(layout, qkv, head_dim, "fwd")
    if config is not None:
        _attention_short_fwd_kernel[(programs,)](
            *tensors, stride_qm=qkv.stride(0), BLOCK_N=block_of(layout.max_length), **shape,
            **config.launch,
        )  # fmt: skip
    else:
        config = pick("attention_long_fwd", qkv.dtype, head_dim, 0, qkv.device)
        _attention_long_fwd_kernel[(programs, cdiv(layout.max_length, config.block_m))](
            *tensors, stride_qm=qkv.stride(0), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            **shape, **config.launch,
        )  # fmt: skip
    return o, lse

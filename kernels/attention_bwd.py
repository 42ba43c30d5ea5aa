"""Attention over packed sequences: backward of `attention.py`.

    p = exp(s − lse);  dv = pᵀ · do;  ds = p · (do · vᵀ − rowsum(do · o)) · scale;  dq = ds · k
    dk = dsᵀ · q   (both sums over the query heads that share a key/value head)

dq, dk, dv are parts of one buffer of qkv's shape; exactly one program writes each element, without
atomics. Saved: qkv, o, lse. Recomputed: p, rowsum(do · o).

*Short*: one program per (sequence, key/value head) holds all keys and values and iterates over its
query heads and blocks of queries; dk and dv stay in registers. *Long*: one kernel for dq (a program
per block of queries), one for dk and dv (a program per block of keys); 7 GEMMs instead of 5.

FLOPs: 10 · n² · head_dim per head (long: 14). Bytes: qkv, o, do are read and dqkv is written once:
16 · head_dim in 16 bits per row and head; for n ≤ 128 it is memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import block_of, cdiv, contiguous_columns, dot, jit_kernel
from .attention import (
    LOG2_E,
    check,
    load_head,
    masked_scores,
    sequence_rows,
    short_config,
    store_head,
)
from .attention_ref import PaddedLayout
from .supports import require, shapes_reason
from .tuning import pick


@triton.jit
def _from_row(
    row, qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, stride_qm, stride_om, stride_dm,
    HEADS: tl.constexpr, width,
):  # fmt: skip
    """Moves the pointers to a sequence's first row (int64), so that offsets stay 32-bit."""
    qkv_ptr += row * stride_qm
    o_ptr += row * stride_om
    do_ptr += row * stride_dm
    return qkv_ptr, o_ptr, do_ptr, lse_ptr + row * HEADS, dqkv_ptr + row * width


@triton.jit
def _load_queries(
    qkv_ptr, o_ptr, do_ptr, lse_ptr, stride_qm, stride_om, stride_dm, rows, mask, head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Loads q, do [BLOCK_M, BLOCK_H], lse in units of log 2 and delta = rowsum(do · o)
    [BLOCK_M]."""
    q = load_head(qkv_ptr, stride_qm, rows, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    o = load_head(o_ptr, stride_om, rows, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    do = load_head(do_ptr, stride_dm, rows, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    lse = tl.load(lse_ptr + rows * HEADS + head, mask=mask, other=0.0) * LOG2_E
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    return q, do.to(q.dtype), lse, delta


@triton.jit
def _score_grads(
    q, do, lse, delta, k, v, q_at, k_at, n, SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Returns p and ds [BLOCK_M, BLOCK_N] in the storage dtype."""
    s = masked_scores(q, k, q_at, k_at, n, SCALE, CAUSAL, BLOCK_M, BLOCK_N)
    p = tl.exp2(s - lse[:, None])
    dp = dot(do, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    ds = p * (dp - delta[:, None]) * SCALE
    return p.to(q.dtype), ds.to(q.dtype)


@jit_kernel
def _attention_short_bwd_kernel(
    # pointers
    qkv_ptr, cu_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, count_ptr,
    # strides
    stride_qm, stride_om, stride_dm,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    group = HEADS // KV_HEADS
    k_column = (HEADS + kv_head) * HEAD_DIM
    v_column = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first_row, n = sequence_rows(cu_ptr, count_ptr, sequence)
    if n == 0:
        return
    qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr = _from_row(
        first_row, qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, stride_qm, stride_om, stride_dm,
        HEADS, width,
    )  # fmt: skip
    k_at = tl.arange(0, BLOCK_N)
    k_mask = k_at < n
    k = load_head(qkv_ptr, stride_qm, k_at, k_mask, k_column, HEAD_DIM, BLOCK_H)
    v = load_head(qkv_ptr, stride_qm, k_at, k_mask, v_column, HEAD_DIM, BLOCK_H)
    dk = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        for block in range(0, n, BLOCK_M):
            q_at = block + tl.arange(0, BLOCK_M)
            mask = q_at < n
            q, do, lse, delta = _load_queries(
                qkv_ptr, o_ptr, do_ptr, lse_ptr, stride_qm, stride_om, stride_dm, q_at, mask,
                head, HEADS, HEAD_DIM, BLOCK_H,
            )  # fmt: skip
            p, ds = _score_grads(
                q, do, lse, delta, k, v, q_at, k_at, n, SCALE, CAUSAL, BLOCK_M, BLOCK_N
            )
            dv = dot(tl.trans(p), do, dv)
            dk = dot(tl.trans(ds), q, dk)
            dq = dot(ds, k, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
            # The masks of the stores are computed anew: kept in registers they spill on sm_90.
            mask = q_at < tl.minimum(n, BLOCK_N)
            store_head(dqkv_ptr, dq, width, q_at, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)
    k_mask = k_at < tl.minimum(n, BLOCK_N)
    store_head(dqkv_ptr, dk, width, k_at, k_mask, k_column, HEAD_DIM, BLOCK_H)
    store_head(dqkv_ptr, dv, width, k_at, k_mask, v_column, HEAD_DIM, BLOCK_H)


@jit_kernel
def _attention_long_bwd_dq_kernel(
    # pointers
    qkv_ptr, cu_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, count_ptr,
    # strides
    stride_qm, stride_om, stride_dm,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first = tl.program_id(1) * BLOCK_M
    first_row, n = sequence_rows(cu_ptr, count_ptr, sequence)
    if first >= n:
        return
    qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr = _from_row(
        first_row, qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, stride_qm, stride_om, stride_dm,
        HEADS, width,
    )  # fmt: skip
    q_at = first + tl.arange(0, BLOCK_M)
    mask = q_at < n
    q, do, lse, delta = _load_queries(
        qkv_ptr, o_ptr, do_ptr, lse_ptr, stride_qm, stride_om, stride_dm, q_at, mask, head,
        HEADS, HEAD_DIM, BLOCK_H,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    stop = n
    if CAUSAL:
        stop = tl.minimum(n, first + BLOCK_M)
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
        _, ds = _score_grads(
            q, do, lse, delta, k, v, q_at, k_at, n, SCALE, CAUSAL, BLOCK_M, BLOCK_N
        )
        dq = dot(ds, k, dq)
    store_head(dqkv_ptr, dq, width, q_at, mask, head * HEAD_DIM, HEAD_DIM, BLOCK_H)


@jit_kernel
def _attention_long_bwd_dkdv_kernel(
    # pointers
    qkv_ptr, cu_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, count_ptr,
    # strides
    stride_qm, stride_om, stride_dm,
    # flags
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    group = HEADS // KV_HEADS
    k_column = (HEADS + kv_head) * HEAD_DIM
    v_column = (HEADS + KV_HEADS + kv_head) * HEAD_DIM
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    first = tl.program_id(1) * BLOCK_N
    first_row, n = sequence_rows(cu_ptr, count_ptr, sequence)
    if first >= n:
        return
    qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr = _from_row(
        first_row, qkv_ptr, o_ptr, do_ptr, lse_ptr, dqkv_ptr, stride_qm, stride_om, stride_dm,
        HEADS, width,
    )  # fmt: skip
    k_at = first + tl.arange(0, BLOCK_N)
    k_mask = k_at < n
    k = load_head(qkv_ptr, stride_qm, k_at, k_mask, k_column, HEAD_DIM, BLOCK_H)
    v = load_head(qkv_ptr, stride_qm, k_at, k_mask, v_column, HEAD_DIM, BLOCK_H)
    dk = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    begin = 0
    if CAUSAL:
        begin = first // BLOCK_M * BLOCK_M
    for member in range(0, group):
        head = kv_head * group + member
        for block in range(begin, n, BLOCK_M):
            q_at = block + tl.arange(0, BLOCK_M)
            mask = q_at < n
            q, do, lse, delta = _load_queries(
                qkv_ptr, o_ptr, do_ptr, lse_ptr, stride_qm, stride_om, stride_dm, q_at, mask,
                head, HEADS, HEAD_DIM, BLOCK_H,
            )  # fmt: skip
            p, ds = _score_grads(
                q, do, lse, delta, k, v, q_at, k_at, n, SCALE, CAUSAL, BLOCK_M, BLOCK_N
            )
            dv = dot(tl.trans(p), do, dv)
            dk = dot(tl.trans(ds), q, dk)
    store_head(dqkv_ptr, dk, width, k_at, k_mask, k_column, HEAD_DIM, BLOCK_H)
    store_head(dqkv_ptr, dv, width, k_at, k_mask, v_column, HEAD_DIM, BLOCK_H)


def attention_bwd(
    do: Tensor,  # (rows, heads * head_dim)
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,  # (rows, heads)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
    *,
    row_count: Tensor | None = None,
) -> Tensor:
    """Returns dqkv, of qkv's shape and dtype.

    Args: as `attention_bwd_ref`; o and lse of the forward are used; row_count: see `_runtime`.
    """
    check(qkv, layout, heads, kv_heads, row_count, do, o, lse)
    width = (qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads) * heads)
    rows = (qkv.shape[0], heads)
    require(shapes_reason(("do", do, width), ("o", o, width), ("lse", lse, rows)))
    qkv, o, do, lse = (
        contiguous_columns(qkv),
        contiguous_columns(o),
        contiguous_columns(do),
        lse.contiguous(),
    )
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.shape[0] == 0:
        return dqkv
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    sequences = layout.cu_seqlens.shape[0] - 1
    tensors = (qkv, layout.cu_seqlens, o, do, lse, dqkv, row_count)
    shape = {
        "stride_qm": qkv.stride(0), "stride_om": o.stride(0), "stride_dm": do.stride(0),
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "SCALE": head_dim**-0.5,
        "CAUSAL": causal, "BLOCK_H": block_of(head_dim),
    }  # fmt: skip
    config = short_config(layout, qkv, head_dim, "bwd")
    if config is not None:
        block = block_of(layout.max_length)
        _attention_short_bwd_kernel[(sequences * kv_heads,)](
            *tensors, **shape, BLOCK_M=min(block, config.block_m), BLOCK_N=block, **config.launch,
        )  # fmt: skip
        return dqkv
    config = pick("attention_long_bwd", qkv.dtype, head_dim, 0, qkv.device)
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **config.launch}
    row_blocks = cdiv(layout.max_length, config.block_m)
    key_blocks = cdiv(layout.max_length, config.block_n)
    _attention_long_bwd_dq_kernel[(sequences * heads, row_blocks)](*tensors, **shape, **blocks)
    _attention_long_bwd_dkdv_kernel[(sequences * kv_heads, key_blocks)](*tensors, **shape, **blocks)
    return dqkv

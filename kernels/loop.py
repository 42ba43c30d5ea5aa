"""The whole loop in one launch, for inference: d ≤ 128, sequences of at most 128 rows (fp32: d ≤
64, 32 rows); head_dim ≤ 32 where both are over 64.

A program holds consecutive whole sequences, at most `BLOCK_M` packed rows, and runs all layers of
all iterations on them. The residual stream stays in registers, where the output projections
accumulate into it. The weights are read from L2, where they stay (1.2 MB at d = 128, 3 layers).
Attention is one tile with a mask of equal sequence numbers. Rows whose loops are over are left
unchanged; a program ends with the last of its rows. After every iteration the readout's argmax is
written; only token ids leave the SM.

    RoPE: z · cos + z' · sin, where z' = y · W'ᵀ and W' holds W's rows with the halves of a head
    swapped; so no column moves between threads.

FLOPs per row and iteration: a layer 2 · d · (5 · heads + …) as in its parts, with q and k computed
twice. Bytes: 8 · d per row for the whole loop, 8 per row and iteration for the ids; weights from
L2: bytes(weights) / BLOCK_M per row and iteration, 9.4 kB at d = 128. It is bound by L2 bandwidth
(about 5.5 TB/s on an H200), at a quarter of the tensor cores' peak.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._runtime import INTERPRETED, block_of, contiguous_columns, device_props, dot, jit_kernel
from .activation import activate
from .attention import LOG2_E
from .loop_ref import LoopLayout, LoopWeights
from .norm import normalize, scale_shift
from .supports import loop_reason, require
from .tuning import pick


@triton.jit
def _apply_norm(
    x, weight_ptr, inside, like, D: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr
):
    """Returns norm(x) [BLOCK_M, BLOCK_D] in the dtype of the weights at `like`."""
    x_hat, _ = normalize(x, inside, D, EPS, IS_LAYER)
    return scale_shift(x_hat, weight_ptr, None, inside, D).to(like.dtype.element_ty)


@triton.jit
def _load_weight_rows(weight_ptr, rows, row_mask, inside, D: tl.constexpr):
    """Loads rows of a (·, D) weight, transposed: [BLOCK_D, rows]."""
    return tl.load(
        weight_ptr + rows[None, :] * D + inside[:, None],
        mask=row_mask[None, :] & (inside < D)[:, None], other=0.0,
    )  # fmt: skip


@triton.jit
def _project_head(
    y, weight_ptr, column, cos, sin, inside,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Returns one head's columns of y · Wᵀ [BLOCK_M, BLOCK_K], rotated by RoPE if `ROPE`."""
    at = tl.arange(0, BLOCK_K)
    w = _load_weight_rows(weight_ptr, column + at, at < HEAD_DIM, inside, D)
    z = dot(y, w, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
    if ROPE:
        swapped = column + (at + HEAD_DIM // 2) % HEAD_DIM
        w = _load_weight_rows(weight_ptr, swapped, at < HEAD_DIM, inside, D)
        partner = dot(y, w, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
        z = z * cos.to(tl.float32) + partner * sin.to(tl.float32)
    return z.to(y.dtype)


@jit_kernel
def _loop_fwd_kernel(
    # pointers
    x_ptr, final_ptr, ids_ptr, bin_ptr, sequence_ptr, loops_ptr, offset_ptr, cos_ptr, sin_ptr,
    norm1_ptr, qkv_ptr, out_ptr, norm2_ptr, up_ptr, gate_ptr, down_ptr, loop_norm_ptr, norm_ptr,
    head_ptr,
    # strides, sizes
    stride_xm, H, V, layers,
    # flags
    D: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, IS_LAYER: tl.constexpr, ACTIVATION: tl.constexpr,
    CAUSAL: tl.constexpr,
    # blocks
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    first = tl.load(bin_ptr + tl.program_id(0)).to(tl.int64)
    count = (tl.load(bin_ptr + tl.program_id(0) + 1) - first).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    inside = tl.arange(0, BLOCK_D)
    mask = rows < count
    tile = mask[:, None] & (inside < D)[None, :]
    sequence = tl.load(sequence_ptr + first + rows, mask=mask, other=-1)
    loops = tl.load(loops_ptr + first + rows, mask=mask, other=0)
    x = tl.load(
        x_ptr + first * stride_xm + (rows[:, None] * stride_xm + inside[None, :]),
        mask=tile, other=0.0,
    ).to(tl.float32)  # fmt: skip
    columns: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    width: tl.constexpr = HEADS * HEAD_DIM
    head_at = tl.arange(0, BLOCK_K)
    # Kept in the compute dtype, sin with the sign of the half: reloading them for every head would
    # need four times the registers, for the addresses.
    cos = x
    sin = x
    if cos_ptr is not None:
        half: tl.constexpr = HEAD_DIM // 2
        table = first * half + (rows[:, None] * half + (head_at % half)[None, :])
        table_mask = mask[:, None] & (head_at < HEAD_DIM)[None, :]
        cos = tl.load(cos_ptr + table, mask=table_mask, other=0.0)
        cos = cos.to(qkv_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_K]
        sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0)
        sin = tl.where((head_at < half)[None, :], -sin, sin).to(qkv_ptr.dtype.element_ty)

    for t in range(0, tl.max(loops, 0)):
        active = (loops > t)[:, None]
        for layer in range(0, layers):
            qkv = qkv_ptr + layer * (columns * D)
            y = _apply_norm(x, norm1_ptr + layer * D, inside, qkv_ptr, D, EPS, IS_LAYER)
            for head in range(0, HEADS):
                kv = head // (HEADS // KV_HEADS)
                q = _project_head(
                    y, qkv, head * HEAD_DIM, cos, sin, inside,
                    D, HEAD_DIM, cos_ptr is not None, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                k = _project_head(
                    y, qkv, (HEADS + kv) * HEAD_DIM, cos, sin, inside,
                    D, HEAD_DIM, cos_ptr is not None, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_M), tl.float32))
                visible = sequence[:, None] == sequence[None, :]
                if CAUSAL:
                    visible = visible & (rows[:, None] >= rows[None, :])
                s = tl.where(visible, s * (SCALE * LOG2_E), float("-inf"))
                p = tl.exp2(s - tl.max(s, 1)[:, None])
                total = tl.sum(p, 1)
                v = _project_head(
                    y, qkv, (HEADS + KV_HEADS + kv) * HEAD_DIM, cos, sin, inside,
                    D, HEAD_DIM, False, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                o = dot(p.to(v.dtype), v, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
                o = tl.where(active, o / total[:, None], 0.0).to(y.dtype)
                w_out = tl.load(
                    out_ptr + layer * (D * width) + head * HEAD_DIM
                    + (inside[None, :] * width + head_at[:, None]),
                    mask=(inside < D)[None, :] & (head_at < HEAD_DIM)[:, None], other=0.0,
                )  # [BLOCK_K, BLOCK_D]  # fmt: skip
                x = dot(o, w_out, x)

            y = _apply_norm(x, norm2_ptr + layer * D, inside, qkv_ptr, D, EPS, IS_LAYER)
            for start in range(0, H, BLOCK_H):
                at = start + tl.arange(0, BLOCK_H)
                w = _load_weight_rows(up_ptr + layer * H * D, at, at < H, inside, D)
                up = dot(y, w, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
                gate = up
                if gate_ptr is not None:
                    w = _load_weight_rows(gate_ptr + layer * H * D, at, at < H, inside, D)
                    gate = dot(y, w, tl.zeros((BLOCK_M, BLOCK_H), tl.float32))
                hidden = tl.where(active, activate(up, gate, ACTIVATION), 0.0).to(y.dtype)
                w_down = tl.load(
                    down_ptr + layer * H * D + (inside[None, :] * H + at[:, None]),
                    mask=(inside < D)[None, :] & (at < H)[:, None], other=0.0,
                )  # [BLOCK_H, BLOCK_D]  # fmt: skip
                x = dot(hidden, w_down, x)
        if loop_norm_ptr is not None:
            x_hat, _ = normalize(x, inside, D, EPS, IS_LAYER)
            x = tl.where(active, scale_shift(x_hat, loop_norm_ptr, None, inside, D), x)

        y = _apply_norm(x, norm_ptr, inside, qkv_ptr, D, EPS, IS_LAYER)
        best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        ids = tl.zeros((BLOCK_M,), tl.int32)
        for start in range(0, V, BLOCK_V):
            tokens = start + tl.arange(0, BLOCK_V)
            w = _load_weight_rows(head_ptr, tokens, tokens < V, inside, D)
            logits = dot(y, w, tl.zeros((BLOCK_M, BLOCK_V), tl.float32))
            logits = tl.where((tokens < V)[None, :], logits, float("-inf"))
            top, top_at = tl.max(logits, 1, return_indices=True)
            ids = tl.where(top > best, top_at + start, ids)
            best = tl.maximum(best, top)
        at = tl.load(offset_ptr + t) + first + rows
        tl.store(ids_ptr + at, ids.to(tl.int64), mask=loops > t)
    tl.store(final_ptr + first * D + (rows[:, None] * D + inside[None, :]), x, mask=tile)


def _code_generation(device: torch.device) -> dict[str, str]:
    """Returns the launch option by which sm_90 runs this kernel with sm_80's matrix instructions.

    Warp-group instructions read their operands through descriptors. ptxas 12.8, which Triton 3.6
    and 3.7 bring along, computes some of this kernel's from uniform registers that nothing has
    written: an address anywhere in shared memory. mma.sync reads registers, so it has none.
    """
    hopper = not INTERPRETED.value and device_props(device).arch == 90
    return {"arch": "sm80"} if hopper else {}


def loop_fwd(
    x: Tensor,  # (rows, d), the state before the first iteration
    layout: LoopLayout,
    weights: LoopWeights,
    cos: Tensor | None,  # (rows, head_dim / 2)
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    causal: bool = False,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """Returns final (rows, d) in fp32, and the token ids int64 of all iterations end to end.

    Args: as `loop_fwd_ref`; at most 128 rows per sequence (fp32: 32).
    """
    require(loop_reason(x, layout, weights, cos, sin, heads, kv_heads, activation, kind))
    w, x = weights, contiguous_columns(x)
    d, head_dim = x.shape[1], w.qkv.shape[1] // (heads + 2 * kv_heads)
    final = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    ids = torch.empty(int(layout.state_offsets[-1]), dtype=torch.int64, device=x.device)
    longest = int(layout.lengths.max(initial=1))
    op = "loop" if w.gate is None else "loop_gated"
    config = pick(op, w.qkv.dtype, longest, 0, x.device)
    block = max(config.block_m, block_of(longest))
    bins = layout.bins(block)
    if x.shape[0] == 0:
        return final, ids
    _loop_fwd_kernel[(bins.shape[0] - 1,)](
        x, final, ids, bins, layout.per_row(np.arange(len(layout.lengths))),
        layout.per_row(layout.loops), layout.tensor(layout.state_offsets, torch.int64), cos, sin,
        w.norm1, w.qkv, w.out, w.norm2, w.up, w.gate, w.down, w.loop_norm, w.norm, w.head,
        stride_xm=x.stride(0), H=w.up.shape[1], V=w.head.shape[0], layers=w.qkv.shape[0],
        D=d, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, SCALE=head_dim**-0.5, EPS=eps,
        IS_LAYER=kind == "layer", ACTIVATION=activation, CAUSAL=causal,
        BLOCK_M=block, BLOCK_D=block_of(d), BLOCK_K=block_of(head_dim),
        BLOCK_H=config.block_n, BLOCK_V=16 if w.qkv.dtype == torch.float32 else 64,
        **config.launch, **_code_generation(x.device),
    )  # fmt: skip
    return final, ids

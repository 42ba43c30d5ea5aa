"""RMSNorm of each query and key head, then RoPE, plain torch, forward and hand-written backward.

    q̂ = RoPE(z_q · (mean(z_q²) + eps)^(−1/2) · w_q) for each query head; k̂ likewise; v = z_v

Saved: z, the projection's output. Recomputed in backward: the norms. Sums and rotations are
computed in fp32 (fp64 for fp64 inputs), and rounded once, to z's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm_linear_ref import rotate_ref
from .norm_ref import norm_bwd_ref, norm_fwd_ref, upcast, upcast_dtype


def qk_norm_fwd_ref(
    z: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Normalises the query and key heads, and rotates them.

    Args:
        z: (rows, (heads + 2 · kv_heads) · head_dim).
        q_weight: (head_dim,), of all query heads.
        k_weight: (head_dim,), of all key heads.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        cos: (rows, head_dim / 2), or None: no RoPE.
        sin: like cos.
        eps: epsilon of the norm.

    Returns:
        qkv, of z's shape and dtype.
    """
    wide = upcast_dtype(z, q_weight)
    q, k, v = _split(z, heads, kv_heads, len(q_weight))
    q = norm_fwd_ref(q, q_weight, None, eps, "rms", wide)
    k = norm_fwd_ref(k, k_weight, None, eps, "rms", wide)
    turned = _join(q, k, len(z), heads, kv_heads)
    if cos is not None:
        turned = rotate_ref(turned, cos, sin, turned.shape[1])
    return torch.cat((turned.to(z.dtype), v), dim=1)


def qk_norm_bwd_ref(
    dqkv: Tensor,
    z: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the backward of `qk_norm_fwd_ref`.

    Args:
        dqkv: like z.
        z, q_weight, k_weight, heads, kv_heads, cos, sin, eps: as in the forward.

    Returns:
        dz, of z's shape and dtype; dq_weight and dk_weight (head_dim,) in fp32 or fp64.
    """
    head_dim = len(q_weight)
    rotary = (heads + kv_heads) * head_dim
    turned = upcast(dqkv[:, :rotary]).clone()
    if cos is not None:
        turned = rotate_ref(turned, cos, sin, rotary, -1.0)
    dq, dk, _ = _split(turned, heads, kv_heads, head_dim)
    q, k, _ = _split(z, heads, kv_heads, head_dim)
    dq, dq_weight, _, _ = norm_bwd_ref(dq, q, q_weight, None, eps)
    dk, dk_weight, _, _ = norm_bwd_ref(dk, k, k_weight, None, eps)
    normed = _join(dq, dk, len(z), heads, kv_heads).to(z.dtype)
    return torch.cat((normed, dqkv[:, rotary:].to(z.dtype)), dim=1), dq_weight, dk_weight


def _split(z: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q (rows · heads, head_dim), k (rows · kv_heads, head_dim), and the other columns."""
    q, k = heads * head_dim, kv_heads * head_dim
    parts = z.split((q, k, z.shape[1] - q - k), dim=1)
    return parts[0].reshape(-1, head_dim), parts[1].reshape(-1, head_dim), parts[2]


def _join(q: Tensor, k: Tensor, rows: int, heads: int, kv_heads: int) -> Tensor:
    """Returns the columns of q and k (rows, (heads + kv_heads) · head_dim), given one head a
    row."""
    width = q.shape[1]
    return torch.cat((q.view(rows, heads * width), k.view(rows, kv_heads * width)), dim=1)

"""Attention over packed sequences, plain torch, forward and hand-written backward.

    s = q · kᵀ · scale (+ mask);  p = exp(s − lse);  o = p · v
    dv = pᵀ · do;  ds = p · (do · vᵀ − rowsum(do · o)) · scale;  dq = ds · k;  dk = dsᵀ · q

Saved: qkv, o, lse. Recomputed: p. Rows are packed; only here are they padded, sequence group by
sequence
group, through the index that a `PaddedLayout` holds (never a Python loop over sequences).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .norm_ref import wide


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, padded together to `length` slots each."""

    first_slot: int
    sequences: int
    length: int
    pad_mask: Tensor | None  # (sequences, 1, 1, 1, length) bool, True where no token is


@dataclass(frozen=True)
class PaddedLayout:
    """Where each packed row goes in the padded buffer of `slots` rows.

    `slot` (rows,) int64, or None when the rows already lie in order without any padding.
    """

    slots: int
    slot: Tensor | None
    groups: tuple[Group, ...]

    def pad(self, rows: Tensor) -> Tensor:
        """(rows, columns) → (slots, columns), zeros where no token is."""
        if self.slot is None:
            return rows
        return rows.new_zeros(self.slots, rows.shape[1]).index_copy_(0, self.slot, rows)

    def unpad(self, padded: Tensor) -> Tensor:
        """(slots, columns) → (rows, columns)."""
        return padded if self.slot is None else padded.index_select(0, self.slot)


def _split(
    padded: Tensor, group: Group, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (S, kv_heads, heads / kv_heads, L, head_dim) and k, v (S, kv_heads, 1, L, head_dim) of
    a group."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    rows = rows.view(group.sequences, group.length, heads + 2 * kv_heads, -1).transpose(1, 2)
    q, k, v = rows.split((heads, kv_heads, kv_heads), dim=1)
    return q.unflatten(1, (kv_heads, -1)), k.unsqueeze(2), v.unsqueeze(2)


def _scores(q: Tensor, k: Tensor, group: Group, causal: bool) -> Tensor:
    """Masked, scaled scores (S, kv_heads, heads / kv_heads, L, L) in the wide dtype."""
    scores = wide(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)))
    if group.pad_mask is not None:
        scores = scores.masked_fill_(group.pad_mask, float("-inf"))
    if causal:
        length = group.length
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill_(future, float("-inf"))
    return scores


def attention_fwd_ref(
    qkv: Tensor,  # (rows, (heads + 2 * kv_heads) * head_dim)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """o (rows, heads * head_dim) in qkv's dtype and lse (rows, heads) in the wide dtype."""
    padded = layout.pad(qkv)
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    o = qkv.new_empty(layout.slots, heads * head_dim)
    lse = torch.empty(layout.slots, heads, dtype=wide(qkv[:0]).dtype, device=qkv.device)
    for group in layout.groups:
        q, k, v = _split(padded, group, heads, kv_heads)
        scores = _scores(q, k, group, causal)
        group_lse = scores.logsumexp(-1, keepdim=True)
        p = scores.sub_(group_lse).exp_().to(qkv.dtype)
        span = slice(group.first_slot, group.first_slot + group.sequences * group.length)
        shape = (group.sequences, group.length, heads, -1)
        o[span].view(shape).copy_(torch.matmul(p, v).flatten(1, 2).transpose(1, 2))
        lse[span].view(shape[:3]).copy_(group_lse.squeeze(-1).flatten(1, 2).transpose(1, 2))
    return layout.unpad(o), layout.unpad(lse)


def attention_bwd_ref(
    do: Tensor,  # (rows, heads * head_dim)
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,  # (rows, heads)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """dqkv, of qkv's shape and dtype, in one buffer."""
    delta = (wide(do) * wide(o)).unflatten(1, (heads, -1)).sum(-1)  # (rows, heads)
    padded, do, lse, delta = (layout.pad(t) for t in (qkv, do, lse, delta))
    dqkv = torch.empty_like(padded)
    for group in layout.groups:
        q, k, v = _split(padded, group, heads, kv_heads)
        dq, dk, dv = _split(dqkv, group, heads, kv_heads)
        span = slice(group.first_slot, group.first_slot + group.sequences * group.length)

        def per_head(t: Tensor, group: Group = group, span: slice = span) -> Tensor:
            t = t[span].view(group.sequences, group.length, heads, -1).transpose(1, 2)
            return t.unflatten(1, (kv_heads, -1))  # (S, kv_heads, heads / kv_heads, L, ·)

        p = _scores(q, k, group, causal).sub_(per_head(lse)).exp_()
        do_group = per_head(do)
        dp = wide(torch.matmul(do_group, v.transpose(-1, -2)))
        ds = dp.sub_(per_head(delta)).mul_(p).mul_(q.shape[-1] ** -0.5).to(q.dtype)
        p = p.to(q.dtype)
        dq.copy_(torch.matmul(ds, k))
        dk.copy_(torch.matmul(ds.transpose(-1, -2), q).sum(2, keepdim=True))
        dv.copy_(torch.matmul(p.transpose(-1, -2), do_group).sum(2, keepdim=True))
    return layout.unpad(dqkv)

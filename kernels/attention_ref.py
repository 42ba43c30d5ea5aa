"""Attention over packed sequences, plain torch, forward and hand-written backward.

    s = q · kᵀ · scale (+ mask);  p = softmax(s);  o = p · v
    dv = pᵀ · do;  ds = p · (do · vᵀ − rowsum(do · o)) · scale;  dq = ds · k;  dk = dsᵀ · q

Saved: qkv. Recomputed: p. Rows are packed; only here are they padded, sequence group by
sequence
group, through the index that a `PaddedLayout` holds (never a Python loop over sequences).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .norm_ref import upcast


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, padded together to `length` slots each."""

    first_slot: int
    sequences: int
    length: int
    pad_mask: Tensor | None  # (sequences, 1, length) bool, True where no token is


class PaddedLayout:
    """Where the packed rows of some sequences lie, and where each goes in a padded buffer.

    cu_seqlens (sequences + 1,) int32 row offsets on the device; max_length: rows of the longest;
    rows: where the offsets end, given by those who made them on the host, from lengths. Without it
    the Triton kernels read the offsets back once, to check them.
    The padding is made by `make_padding` when it is first asked for (the Triton kernels need none):
    `slots` rows of the padded buffer; `slot` (rows,) int64, or None when the rows already lie in
    order without any padding; `groups`.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        max_length: int,
        make_padding: Callable[[], tuple[int, Tensor | None, tuple[Group, ...]]],
        rows: int | None = None,
    ):
        self.cu_seqlens, self.max_length, self.rows = cu_seqlens, max_length, rows
        self._make_padding = make_padding

    @cached_property
    def _padding(self) -> tuple[int, Tensor | None, tuple[Group, ...]]:
        return self._make_padding()

    @property
    def slots(self) -> int:
        return self._padding[0]

    @property
    def slot(self) -> Tensor | None:
        return self._padding[1]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self._padding[2]

    def pad(self, rows: Tensor) -> Tensor:
        """(rows, columns) → (slots, columns), zeros where no token is."""
        if self.slot is None:
            return rows
        return rows.new_zeros(self.slots, rows.shape[1]).index_copy_(0, self.slot, rows)

    def unpad(self, padded: Tensor) -> Tensor:
        """(slots, columns) → (rows, columns)."""
        return padded if self.slot is None else padded.index_select(0, self.slot)


def _heads_first(padded: Tensor, group: Group, heads: int) -> Tensor:
    """A group's slots (slots, heads · width) as (heads, S, L, width), contiguous."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    return rows.view(group.sequences, group.length, heads, -1).permute(2, 0, 1, 3).contiguous()


def _put(padded: Tensor, group: Group, heads_first: Tensor) -> None:
    """The inverse of `_heads_first`, into the group's slots."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    shape = (group.sequences, group.length, heads_first.shape[0], -1)
    rows.view(shape).copy_(heads_first.permute(1, 2, 0, 3))


def _queries_and_keys(
    qkv: Tensor,  # (heads + 2 · kv_heads, S, L, head_dim)
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (kv_heads · S, heads / kv_heads · L, head_dim) and k, v (kv_heads · S, L, head_dim).

    The queries that share a key/value head lie one after the other, so that each product is one
    batched GEMM. Views where every head has its own keys.
    """
    q, k, v = qkv.split((heads, kv_heads, kv_heads))
    q = q.unflatten(0, (kv_heads, -1)).transpose(1, 2)  # (kv_heads, S, heads / kv_heads, L, ·)
    return q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def _per_head(shared: Tensor, group: Group, kv_heads: int) -> Tensor:
    """(heads, S, L, ·) of the queries' order, (kv_heads · S, heads / kv_heads · L, ·)."""
    shape = (kv_heads, group.sequences, -1, group.length, shared.shape[-1])
    return shared.view(shape).transpose(1, 2).flatten(0, 1)


def _probabilities(
    q: Tensor, k: Tensor, group: Group, kv_heads: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Masked, scaled scores and their softmax, (kv_heads · S, heads / kv_heads · L, L), wide."""
    scores = upcast(torch.bmm(q, k.mT)).mul_(q.shape[-1] ** -0.5)
    if group.pad_mask is not None:
        by_sequence = scores.view(kv_heads, group.sequences, *scores.shape[1:])
        by_sequence.masked_fill_(group.pad_mask, float("-inf"))
    if causal:
        length = group.length
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores.view(len(q), -1, length, length).masked_fill_(future, float("-inf"))
    return scores, scores.softmax(-1)


def attention_fwd_ref(
    qkv: Tensor,  # (rows, (heads + 2 * kv_heads) * head_dim)
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """o (rows, heads * head_dim) in qkv's dtype and, if asked for, lse (rows, heads), wide.

    The reference's own backward recomputes p by softmax and needs no lse.
    """
    padded = layout.pad(qkv)
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    o = qkv.new_empty(layout.slots, heads * head_dim)
    lse = upcast(qkv[:0]).new_empty(layout.slots, heads) if with_lse else None
    for group in layout.groups:
        packed = _heads_first(padded, group, heads + 2 * kv_heads)
        q, k, v = _queries_and_keys(packed, heads, kv_heads)
        scores, p = _probabilities(q, k, group, kv_heads, causal)
        _put(o, group, _per_head(torch.bmm(p.to(v.dtype), v), group, kv_heads))
        if lse is not None:
            _put(lse, group, _per_head(scores.logsumexp(-1, keepdim=True), group, kv_heads))
    return layout.unpad(o), None if lse is None else layout.unpad(lse)


def attention_bwd_ref(
    do: Tensor,  # (rows, heads * head_dim)
    qkv: Tensor,
    o: Tensor,
    lse: Tensor | None,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """dqkv, of qkv's shape and dtype, in one buffer. o and lse are not used: see the forward."""
    padded, do = layout.pad(qkv), layout.pad(do)
    dqkv = padded.new_empty(padded.shape)
    for group in layout.groups:
        packed = _heads_first(padded, group, heads + 2 * kv_heads)
        q, k, v = _queries_and_keys(packed, heads, kv_heads)
        per_query = _heads_first(do, group, heads).unflatten(0, (kv_heads, -1)).transpose(1, 2)
        do_q = per_query.flatten(2, 3).flatten(0, 1)
        _, p = _probabilities(q, k, group, kv_heads, causal)
        dp = upcast(torch.bmm(do_q, v.mT))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        ds, p = ds.to(q.dtype), p.to(q.dtype)
        shape = (-1, group.sequences, group.length, q.shape[-1])
        dq = _per_head(torch.bmm(ds, k), group, kv_heads)
        dk, dv = torch.bmm(ds.mT, q).view(shape), torch.bmm(p.mT, do_q).view(shape)
        _put(dqkv, group, torch.cat((dq, dk, dv)))
    return layout.unpad(dqkv)

"""Attention over packed sequences, plain torch, forward and hand-written backward.

    s = q · kᵀ · scale (+ mask);  p = softmax(s);  o = p · v
    dv = pᵀ · do;  ds = p · (do · vᵀ − rowsum(do · o)) · scale;  dq = ds · k;  dk = dsᵀ · q

Saved: qkv. Recomputed: p. Only this op pads the packed rows, one group of sequences at a time, with
the indices of a `PaddedLayout`; there is no Python loop over sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from .norm_ref import upcast


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, padded together to `length` slots each."""

    first_slot: int
    sequences: int
    length: int
    pad_mask: Tensor | None  # (sequences, 1, length) bool, True in empty slots


class PaddedLayout:
    """The offsets of packed sequences, and the place of each row in a padded buffer.

    `slots` is the number of rows of the padded buffer; `slot` (rows,) int64 is each row's place in
    it, or None if the rows are already in order without padding; `groups` are the groups of
    sequences.

    Args:
        cu_seqlens: (sequences + 1,) int32 row offsets on the device.
        max_length: rows of the longest sequence.
        make_padding: returns slots, slot and groups; called on first use, never by the Triton
            kernels.
        rows: the last offset, if the host knows it; else the Triton kernels copy the offsets to the
            host once to check them.
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
        """(rows, columns) → (slots, columns), with zeros in empty slots."""
        if self.slot is None:
            return rows
        return rows.new_zeros(self.slots, rows.shape[1]).index_copy_(0, self.slot, rows)

    def unpad(self, padded: Tensor) -> Tensor:
        """(slots, columns) → (rows, columns)."""
        return padded if self.slot is None else padded.index_select(0, self.slot)


def _heads_first(padded: Tensor, group: Group, heads: int) -> Tensor:
    """(slots, heads · width) → (heads, S, L, width) of a group, contiguous."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    return rows.view(group.sequences, group.length, heads, -1).permute(2, 0, 1, 3).contiguous()


def _put(padded: Tensor, group: Group, heads_first: Tensor) -> None:
    """Copies (heads, S, L, width) into the group's slots, the inverse of `_heads_first`."""
    rows = padded[group.first_slot : group.first_slot + group.sequences * group.length]
    shape = (group.sequences, group.length, heads_first.shape[0], -1)
    rows.view(shape).copy_(heads_first.permute(1, 2, 0, 3))


def _queries_and_keys(
    qkv: Tensor,  # (heads + 2 · kv_heads, S, L, head_dim)
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits qkv into q (kv_heads · S, heads / kv_heads · L, head_dim), see `_join_queries`, and
    k, v (kv_heads · S, L, head_dim). They are views if heads = kv_heads."""
    q, k, v = qkv.split((heads, kv_heads, kv_heads))
    return _join_queries(q, kv_heads), k.flatten(0, 1), v.flatten(0, 1)


def _join_queries(q: Tensor, kv_heads: int) -> Tensor:
    """(heads, S, L, ·) → (kv_heads · S, heads / kv_heads · L, ·): puts the query heads that share a
    key/value head end to end, so that each product is one batched GEMM."""
    return rearrange(q, "(k g) s l w -> (k s) (g l) w", k=kv_heads)


def _split_queries(joined: Tensor, group: Group, kv_heads: int) -> Tensor:
    """The inverse of `_join_queries`."""
    return rearrange(joined, "(k s) (g l) w -> (k g) s l w", k=kv_heads, l=group.length)


def _probabilities(
    q: Tensor, k: Tensor, group: Group, kv_heads: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Masked, scaled scores and their softmax, (kv_heads · S, heads / kv_heads · L, L), in fp32 or
    fp64."""
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
    qkv: Tensor,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention.

    Args:
        qkv: (rows, (heads + 2 · kv_heads) · head_dim).
        layout: the sequences.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        causal: whether a token attends to itself and earlier tokens only.
        with_lse: whether to compute lse; the reference's backward recomputes p without it.

    Returns:
        o (rows, heads · head_dim) in qkv's dtype; lse (rows, heads) in fp32 or fp64, or None.
    """
    padded = layout.pad(qkv)
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    o = qkv.new_empty(layout.slots, heads * head_dim)
    lse = upcast(qkv[:0]).new_empty(layout.slots, heads) if with_lse else None
    for group in layout.groups:
        packed = _heads_first(padded, group, heads + 2 * kv_heads)
        q, k, v = _queries_and_keys(packed, heads, kv_heads)
        scores, p = _probabilities(q, k, group, kv_heads, causal)
        _put(o, group, _split_queries(torch.bmm(p.to(v.dtype), v), group, kv_heads))
        if lse is not None:
            _put(lse, group, _split_queries(scores.logsumexp(-1, keepdim=True), group, kv_heads))
    return layout.unpad(o), None if lse is None else layout.unpad(lse)


def attention_bwd_ref(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor | None,
    layout: PaddedLayout,
    heads: int,
    kv_heads: int,
    causal: bool,
) -> Tensor:
    """Computes the backward of `attention_fwd_ref`.

    Args:
        do: (rows, heads · head_dim).
        qkv: (rows, (heads + 2 · kv_heads) · head_dim).
        o: not used.
        lse: not used.
        layout: the sequences.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        causal: as in the forward.

    Returns:
        dqkv, of qkv's shape and dtype.
    """
    padded, do = layout.pad(qkv), layout.pad(do)
    dqkv = padded.new_empty(padded.shape)
    for group in layout.groups:
        packed = _heads_first(padded, group, heads + 2 * kv_heads)
        q, k, v = _queries_and_keys(packed, heads, kv_heads)
        do_q = _join_queries(_heads_first(do, group, heads), kv_heads)
        _, p = _probabilities(q, k, group, kv_heads, causal)
        dp = upcast(torch.bmm(do_q, v.mT))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        ds, p = ds.to(q.dtype), p.to(q.dtype)
        shape = (-1, group.sequences, group.length, q.shape[-1])
        dq = _split_queries(torch.bmm(ds, k), group, kv_heads)
        dk, dv = torch.bmm(ds.mT, q).view(shape), torch.bmm(p.mT, do_q).view(shape)
        _put(dqkv, group, torch.cat((dq, dk, dv)))
    return layout.unpad(dqkv)

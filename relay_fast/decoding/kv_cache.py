"""Keys and values of sequences that are being written, and attention over them.

`KVCache` stands in for the attention op of the model's own block
(`relay_fast.engine.block_iteration.BlockIteration`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import Ops


class CacheSlice(NamedTuple):
    """Cache rows first..last − 1, whose new tokens all lie at positions below `length`."""

    first: int
    last: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def gather_rows(tensor: Tensor, groups: Sequence[CacheSlice]) -> Tensor:
    """The groups' rows of a tensor, one group after the other."""
    parts = [tensor[group.rows] for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KVCache:
    """One slot for each (iteration, layer), one row for each sequence.

    shape: (slots, batch, kv_heads, length, head_dim). The calls of a pass are counted to know which
    slot is meant.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        slots, batch, kv_heads, self.length, head_dim = shape
        # Keys, then values. Zeros, not empty: what is masked gets weight 0, and 0 · NaN would be
        # NaN.
        self._both = torch.zeros(slots, 2, *shape[1:], dtype=dtype, device=device)
        self._vectors = self._both.view(slots, -1, head_dim)
        # (batch, 2 · kv_heads): where the first head vectors of a row lie in a slot of them.
        first = torch.arange(2 * batch * kv_heads, device=device) * self.length
        self._first = first.view(2, batch, kv_heads).transpose(0, 1).flatten(1).contiguous()
        self._columns = torch.arange(self.length, device=device)
        self._slot = 0

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first `length` positions of cache rows."""
        self._both[:, :, targets, :, :length] = self._both[:, :, sources, :, :length]

    def repeat(self, rows: Tensor, positions: Tensor, first: int, last: int) -> None:
        """Copies what slots first..last − 1 hold at these places (A,) to all later slots, in turn:
        an iteration's keys and values stand for those of iterations that do not run."""
        iterations = self._both.view(-1, last - first, *self._both.shape[1:])
        t = last // (last - first)
        own = iterations[t - 1][:, :, rows, :, positions]
        iterations[t:, :, :, rows, :, positions] = own.unsqueeze(1)

    def prefill(self, ops: Ops, rows: Tensor, positions: Tensor) -> Ops:
        """`ops`, whose attention also stores keys and values of the packed tokens.

        rows, positions (N,): where each token goes.
        """
        self._slot = 0
        targets = self._targets(self._first[rows], positions)

        def attention(qkv, layout, heads, kv_heads, causal):
            self._store(_split_qkv(qkv, heads, kv_heads)[1], targets)
            self._slot += 1
            return ops.attention_fwd(qkv, layout, heads, kv_heads, causal)

        return ops._replace(attention_fwd=attention)

    def step(
        self, ops: Ops, groups: Sequence[CacheSlice], positions: Tensor, first_slot: int = 0
    ) -> Ops:
        """`ops`, whose attention is that of one new token a sequence over the cache.

        positions (A,): where the new tokens of the groups' rows go. first_slot: that of the first
        call.
        """
        return next(self.steps(ops, groups, positions.unsqueeze(0), first_slot))

    def steps(
        self, ops: Ops, groups: Sequence[CacheSlice], positions: Tensor, first_slot: int = 0
    ) -> Iterator[Ops]:
        """What `step` gives for each row of positions (steps, A), in turn."""
        sizes = [group.last - group.first for group in groups]
        targets = self._targets(gather_rows(self._first, groups), positions)
        pasts = [self._past(group) for group in groups]
        futures = [
            self._causal_bias(own, group.length)
            for group, own in zip(groups, positions.split(sizes, 1), strict=True)
        ]
        for targets_k, *futures_k in zip(targets, *futures, strict=True):
            self._slot = first_slot
            attention = self._attention(targets_k, sizes, pasts, futures_k)
            yield ops._replace(attention_fwd=attention)

    def _attention(
        self,
        targets: Tensor,
        sizes: Sequence[int],
        pasts: Sequence[Tensor],
        futures: Sequence[Tensor],
    ) -> Callable[..., tuple[Tensor, None]]:
        """The attention of new tokens that go to `targets`, groups of `sizes` apart."""

        def attention(qkv, layout, heads, kv_heads, causal):
            q, new = _split_qkv(qkv, heads, kv_heads)
            self._store(new, targets)
            q = (q * q.shape[-1] ** -0.5).view(-1, heads // kv_heads, q.shape[-1])
            parts = [q] if len(sizes) == 1 else q.split([n * kv_heads for n in sizes])
            out = [
                _attend(own, past[self._slot], future)
                for own, past, future in zip(parts, pasts, futures, strict=True)
            ]
            self._slot += 1
            return (out[0] if len(out) == 1 else torch.cat(out)).view(len(qkv), -1), None

        return attention

    def _past(self, group: CacheSlice) -> Tensor:
        """(slots, 2, A · kv_heads, group.length, head_dim): a view of the group's rows."""
        return self._both[:, :, group.rows, :, : group.length].flatten(2, 3)

    def _causal_bias(self, positions: Tensor, length: int) -> Tensor:
        """(steps, A · kv_heads, 1, length): −∞ behind each row's new token, else 0."""
        steps, kv_heads = len(positions), self._both.shape[3]
        mask = self._both.new_zeros(steps, positions.shape[1], kv_heads, length)
        future = self._columns[:length] > positions.unsqueeze(2)
        return mask.masked_fill_(future.unsqueeze(2), float("-inf")).view(steps, -1, 1, length)

    def _targets(self, first: Tensor, positions: Tensor) -> Tensor:
        """(…, N · 2 · kv_heads): where the head vectors of tokens at positions (…, N) go."""
        return (first + positions.unsqueeze(-1)).flatten(-2)

    def _store(self, new: Tensor, targets: Tensor) -> None:
        """Puts keys and values of tokens (N, 2 · kv_heads, head_dim) where they go."""
        self._vectors[self._slot].index_copy_(0, targets, new.reshape(-1, new.shape[-1]))


def _split_qkv(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """q (rows, heads, head_dim), and k and v in one (rows, 2 · kv_heads, head_dim)."""
    return qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, 2 * kv_heads), 1)


def _attend(q: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """(A · kv_heads, heads / kv_heads, head_dim), given q of this shape, scaled."""
    keys, values = past
    scores = upcast(torch.baddbmm(future, q, keys.mT))
    return torch.bmm(scores.softmax(-1).to(q.dtype), values)

"""The key/value cache of decoding, and attention over it.

`KVCache` replaces the attention op of a model's block
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
    """Cache rows first..last − 1, whose new tokens lie at positions below `length`."""

    first: int
    last: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def gather_rows(tensor: Tensor, slices: Sequence[CacheSlice]) -> Tensor:
    """Concatenates the slices' rows of a tensor."""
    parts = [tensor[s.rows] for s in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KVCache:
    """Keys and values with one slot per (iteration, layer) and one row per sequence.

    The attention calls of a pass are counted to find the slot of each.

    Args:
        shape: (slots, batch, kv_heads, length, head_dim).
        dtype: of the keys and values.
        device: where they are.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        slots, batch, kv_heads, self.length, head_dim = shape
        # Keys, then values. Zeros, not empty: masked positions get weight 0, and 0 · NaN is NaN.
        self._both = torch.zeros(slots, 2, *shape[1:], dtype=dtype, device=device)
        self._vectors = self._both.view(slots, -1, head_dim)
        # (batch, 2 · kv_heads): index of each head's first vector in a slot.
        first = torch.arange(2 * batch * kv_heads, device=device) * self.length
        self._first = first.view(2, batch, kv_heads).transpose(0, 1).flatten(1).contiguous()
        self._columns = torch.arange(self.length, device=device)
        self._slot = 0

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies cache rows.

        Args:
            sources: (n,) the rows to copy.
            targets: (n,) the rows to overwrite.
            length: positions to copy.
        """
        self._both[:, :, targets, :, :length] = self._both[:, :, sources, :, :length]

    def repeat(self, rows: Tensor, positions: Tensor, first: int, last: int) -> None:
        """Copies one iteration's keys and values to all later iterations, which will not run.

        Args:
            rows: (A,) cache rows.
            positions: (A,) the position in each row.
            first: the iteration's first slot.
            last: the slot after its last.
        """
        iterations = self._both.view(-1, last - first, *self._both.shape[1:])
        t = last // (last - first)
        own = iterations[t - 1][:, :, rows, :, positions]
        iterations[t:, :, :, rows, :, positions] = own.unsqueeze(1)

    def prefill(self, ops: Ops, rows: Tensor, positions: Tensor) -> Ops:
        """Returns `ops` with an attention that also stores the packed tokens' keys and values.

        Args:
            ops: the ops of the block.
            rows: (N,) the cache row of each token.
            positions: (N,) its position in the row.
        """
        self._slot = 0
        targets = self._targets(self._first[rows], positions)

        def attention(qkv, layout, heads, kv_heads, causal):
            self._store(_split_qkv(qkv, heads, kv_heads)[1], targets)
            self._slot += 1
            return ops.attention_fwd(qkv, layout, heads, kv_heads, causal)

        return ops._replace(attention_fwd=attention)

    def step(
        self, ops: Ops, slices: Sequence[CacheSlice], positions: Tensor, first_slot: int = 0
    ) -> Ops:
        """Returns `ops` with the attention of one new token per sequence over the cache.

        Args:
            ops: the ops of the block.
            slices: the cache rows of the sequences, A in all.
            positions: (A,) where the new tokens go.
            first_slot: the slot of the first attention call.
        """
        return next(self.steps(ops, slices, positions.unsqueeze(0), first_slot))

    def steps(
        self, ops: Ops, slices: Sequence[CacheSlice], positions: Tensor, first_slot: int = 0
    ) -> Iterator[Ops]:
        """Yields what `step` returns for each of several steps.

        Args:
            ops, slices, first_slot: as in `step`.
            positions: (steps, A) where the new tokens of each step go.
        """
        sizes = [s.last - s.first for s in slices]
        targets = self._targets(gather_rows(self._first, slices), positions)
        pasts = [self._past(s) for s in slices]
        futures = [
            self._causal_bias(own, s.length)
            for s, own in zip(slices, positions.split(sizes, 1), strict=True)
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
        """Returns the attention of new tokens, split into slices of `sizes` rows."""

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

    def _past(self, cache_slice: CacheSlice) -> Tensor:
        """Returns a view of the slice's rows, (slots, 2, A · kv_heads, length, head_dim)."""
        return self._both[:, :, cache_slice.rows, :, : cache_slice.length].flatten(2, 3)

    def _causal_bias(self, positions: Tensor, length: int) -> Tensor:
        """Returns −∞ after each row's new token, else 0: (steps, A · kv_heads, 1, length)."""
        steps, kv_heads = len(positions), self._both.shape[3]
        mask = self._both.new_zeros(steps, positions.shape[1], kv_heads, length)
        future = self._columns[:length] > positions.unsqueeze(2)
        return mask.masked_fill_(future.unsqueeze(2), float("-inf")).view(steps, -1, 1, length)

    def _targets(self, first: Tensor, positions: Tensor) -> Tensor:
        """Returns the indices (…, N · 2 · kv_heads) of the head vectors of tokens (…, N)."""
        return (first + positions.unsqueeze(-1)).flatten(-2)

    def _store(self, new: Tensor, targets: Tensor) -> None:
        """Stores the keys and values (N, 2 · kv_heads, head_dim) of new tokens."""
        self._vectors[self._slot].index_copy_(0, targets, new.reshape(-1, new.shape[-1]))


def _split_qkv(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Returns q (rows, heads, head_dim), and k and v as one (rows, 2 · kv_heads, head_dim)."""
    return qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, 2 * kv_heads), 1)


def _attend(q: Tensor, past: Tensor, future: Tensor) -> Tensor:
    """Returns the attention output in the shape of q, (A · kv_heads, heads / kv_heads, head_dim).

    q is scaled; `future` is added to the scores.
    """
    keys, values = past
    scores = upcast(torch.baddbmm(future, q, keys.mT))
    return torch.bmm(scores.softmax(-1).to(q.dtype), values)

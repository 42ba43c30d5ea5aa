"""Keys and values of sequences that are being written, and attention over them.

`KVCache` stands in for the attention op of the model's own block (`relay_fast.block.BlockBody`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.functional import Ops
from relay_fast.kernels.norm_ref import wide


class Group(NamedTuple):
    """Cache rows first..last − 1, whose new tokens all lie at positions below `length`."""

    first: int
    last: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def join(tensor: Tensor, groups: Sequence[Group]) -> Tensor:
    """The groups' rows of a tensor, one group after the other."""
    parts = [tensor[group.rows] for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KVCache:
    """One slot for each (iteration, layer), one row for each sequence.

    keys, values: (slots, batch, kv_heads, length, head_dim). The calls of a pass are counted to
    know which slot is meant.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        # Zeros, not empty: what is masked gets weight 0, and 0 · NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = torch.arange(shape[1], device=device)
        self._heads = torch.arange(shape[2], device=device)
        self._columns = torch.arange(shape[3], device=device)
        self._slot = 0

    @property
    def length(self) -> int:
        return len(self._columns)

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first `length` positions of cache rows."""
        for part in (self.keys, self.values):
            part[:, targets, :, :length] = part[:, sources, :, :length]

    def repeat(self, rows: Tensor, positions: Tensor, first: int, last: int) -> None:
        """Copies what slots first..last − 1 hold at these places (A,) to all later slots, in turn:
        an iteration's keys and values stand for those of iterations that do not run."""
        for part in (self.keys, self.values):
            iterations = part.view(-1, last - first, *part.shape[1:])
            t = last // (last - first)
            own = iterations[t - 1][:, rows, :, positions]
            iterations[t:, :, rows, :, positions] = own.unsqueeze(1)

    def prefill(self, ops: Ops, rows: Tensor, positions: Tensor) -> Ops:
        """`ops`, whose attention also stores keys and values of the packed tokens.

        rows, positions (N,): where each token goes.
        """
        self._slot = 0
        targets = self._targets(rows, positions)

        def attention(qkv, layout, heads, kv_heads, causal):
            _, k, v = _split(qkv, heads, kv_heads)
            self._store(k, v, targets)
            self._slot += 1
            return ops.attention_fwd(qkv, layout, heads, kv_heads, causal)

        return ops._replace(attention_fwd=attention)

    def step(
        self, ops: Ops, groups: Sequence[Group], positions: Tensor, first_slot: int = 0
    ) -> Ops:
        """`ops`, whose attention is that of one new token a sequence over the cache.

        positions (A,): where the new tokens of the groups' rows go. first_slot: that of the first
        call.
        """
        self._slot = first_slot
        sizes = [group.last - group.first for group in groups]
        targets = self._targets(join(self._rows, groups), positions)
        masks = [
            self._future(own, group.length)
            for group, own in zip(groups, positions.split(sizes), strict=True)
        ]

        def attention(qkv, layout, heads, kv_heads, causal):
            q, k, v = _split(qkv, heads, kv_heads)
            self._store(k, v, targets)
            q = (q * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1))
            parts = [
                self._attend(own, group, mask)
                for own, group, mask in zip(q.split(sizes), groups, masks, strict=True)
            ]
            self._slot += 1
            return (parts[0] if len(parts) == 1 else torch.cat(parts)), None

        return ops._replace(attention_fwd=attention)

    def _future(self, positions: Tensor, length: int) -> Tensor:
        """(A, 1, 1, length): −∞ behind each row's new token."""
        mask = torch.zeros(len(positions), 1, 1, length, device=positions.device)
        future = self._columns[:length] > positions.unsqueeze(1)
        return mask.masked_fill_(future[:, None, None], float("-inf"))

    def _attend(self, q: Tensor, group: Group, mask: Tensor) -> Tensor:
        """(A, heads · head_dim), given q (A, kv_heads, heads / kv_heads, head_dim), scaled."""
        keys = self.keys[self._slot, group.rows, :, : group.length]
        values = self.values[self._slot, group.rows, :, : group.length]
        scores = wide(torch.matmul(q, keys.transpose(-1, -2))).add_(mask)
        return torch.matmul(scores.softmax(-1).to(q.dtype), values).flatten(1)

    def _targets(self, rows: Tensor, positions: Tensor) -> Tensor:
        """(N · kv_heads,): where the head vectors of the tokens go in a slot of head vectors."""
        first = (rows.unsqueeze(1) * len(self._heads) + self._heads) * self.length
        return (first + positions.unsqueeze(1)).view(-1)

    def _store(self, k: Tensor, v: Tensor, targets: Tensor) -> None:
        for part, new in ((self.keys, k), (self.values, v)):
            vectors = part[self._slot].view(-1, part.shape[-1])
            vectors.index_copy_(0, targets, new.reshape(-1, part.shape[-1]))


def _split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows, heads, head_dim), k and v (rows, kv_heads, head_dim)."""
    return qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=1)

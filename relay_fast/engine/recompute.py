"""Recompute policies: which states are kept between forward and backward.

| policy | kept | recomputed in backward | extra forward FLOPs |
|---|---|---|---|
| `none` | everything inside every iteration | nothing | 0 |
| `state` | every state h_t | the inside of each iteration | 1 × forward |
| `every:k` | every k-th state | k − 1 states of k, then each inside | < 2 × forward |
| `sqrt` | `every:k` with k = ⌈√T⌉ | as `every:k` | < 2 × forward |
| `last:m` | the m states before the last | the earlier ones, then each inside | < 2 × forward |
| `budget:BYTES` | `every:k` with the smallest k that fits | as `every:k` | 1–2 × forward |

h_0 is the caller's own input and h_T the output; neither is copied, neither counts.

A block that runs once (T = 1) keeps nothing under `state`, and recomputes its inside: right where
others follow before the backward comes (prelude, loop, coda). Where it comes at once, as for a
model of one block, `none` is faster and its peak no higher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RecomputePolicy:
    """A parsed recompute policy."""

    kind: str  # none | state | every | last | budget | sqrt
    number: int = 0

    @staticmethod
    def parse(text: str | RecomputePolicy) -> RecomputePolicy:
        """RecomputePolicy of its text; ValueError names what does not parse."""
        if isinstance(text, RecomputePolicy):
            return text
        kind, colon, number = str(text).partition(":")
        if kind in ("none", "state", "sqrt") and not colon:
            return RecomputePolicy(kind)
        if kind in ("every", "last", "budget") and number.isdecimal() and int(number) > 0:
            return RecomputePolicy(kind, int(number))
        raise ValueError(
            f"recompute policy {text!r} is unknown: use 'none', 'state', 'sqrt', 'every:k', "
            f"'last:m' "
            "or 'budget:BYTES' with a positive whole number"
        )

    def kept(self, loops: int, state_bytes: list[int]) -> frozenset[int]:
        """Which t of 1..T−1 keep their state; state_bytes[t − 1] is the size of h_t.

        Raises ValueError where a budget is smaller than the least that works.
        """
        between = range(1, loops)
        if self.kind in ("none", "state"):
            return frozenset(between)
        if self.kind == "last":
            return frozenset(t for t in between if t >= loops - self.number)
        if self.kind == "every":
            return _every(loops, self.number)
        if self.kind == "sqrt":
            return _every(loops, max(1, math.ceil(math.sqrt(loops))))
        least = None
        for k in range(1, max(2, loops)):
            kept = _every(loops, k)
            size = sum(state_bytes[t - 1] for t in kept)
            if size <= self.number:
                return kept
            least = size if least is None else min(least, size)
        raise ValueError(
            f"a budget of {self.number} bytes holds no state of this batch: the least that works "
            f"is "
            f"budget:{least}"
        )


def _every(loops: int, k: int) -> frozenset[int]:
    return frozenset(range(k, loops, k))

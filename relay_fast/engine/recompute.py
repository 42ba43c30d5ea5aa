"""Recompute policies: which states are kept between forward and backward.

| policy | kept | recomputed in backward | extra forward FLOPs |
|---|---|---|---|
| `none` | everything inside every iteration | nothing | 0 |
| `state` | every state h_t | the inside of each iteration | 1 × forward |
| `every:k` | every k-th state | k − 1 states of k, then each inside | < 2 × forward |
| `sqrt` | `every:k` with k = ⌈√T⌉ | as `every:k` | < 2 × forward |
| `last:m` | the m states before the last | the earlier ones, then each inside | < 2 × forward |
| `auto` | the first that fits: `none`, `state`, `every:2`, `every:3`, `sqrt` | | as the chosen |
| `budget:BYTES` | `every:k` with the smallest k that fits | as `every:k` | 1–2 × forward |

h_0 is the caller's own input and h_T the output: neither is copied, and neither counts.

`auto` looks at the free memory of the device at each pass (`relay_fast.engine.auto_policy`). The
compiled op, `relay_fast.loop` around any module, and blocks with parts that are called do not know
what `none` would keep: for them it begins at `state`, where the compiled op stays.

With T = 1, `state` keeps nothing and recomputes the inside of the block. This saves memory if other
blocks run before the backward (prelude, loop, coda). For a model of one block, `none` is faster and
has the same peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RecomputePolicy:
    """A parsed recompute policy."""

    kind: str  # none | state | every | last | budget | sqrt | auto
    number: int = 0

    @staticmethod
    def parse(text: str | RecomputePolicy) -> RecomputePolicy:
        """Parses a policy. Raises ValueError for an unknown one."""
        if isinstance(text, RecomputePolicy):
            return text
        kind, colon, number = str(text).partition(":")
        if kind in ("none", "state", "sqrt", "auto") and not colon:
            return RecomputePolicy(kind)
        if kind in ("every", "last", "budget") and number.isdecimal() and int(number) > 0:
            return RecomputePolicy(kind, int(number))
        raise ValueError(
            f"recompute policy {text!r} is unknown: use 'none', 'state', 'sqrt', 'auto', "
            "'every:k', 'last:m' or 'budget:BYTES' with a positive whole number"
        )

    def kept(self, loops: int, state_bytes: list[int]) -> frozenset[int]:
        """Returns the iterations in 1..T−1 whose states are kept.

        Args:
            loops: the number of iterations T.
            state_bytes: state_bytes[t − 1] is the size of h_t in bytes.

        Raises:
            ValueError: for a budget that is smaller than the smallest possible one.
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
            f"recompute='budget:{self.number}' is too small for this batch: use at least "
            f"'budget:{least}'"
        )


def _every(loops: int, k: int) -> frozenset[int]:
    return frozenset(range(k, loops, k))

"""Counter-based dropout inside kernels: the same integers as `dropout_ref`, in uint32 arithmetic.

The mask is a hash of (seed, site, iteration, token, column): it is not stored, but recomputed in
the backward. Without dropout the seed pointer is None, and no dropout code is compiled.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .dropout_ref import Dropout


@triton.jit
def _mix(x):
    """Murmur3's 32-bit finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_scale(
    seed_ptr, tokens_ptr, counter, rows, row_mask, columns,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] fp32: SCALE where kept, else 0."""
    key = _mix((tl.load(seed_ptr) + counter).to(tl.uint32))
    tokens = tl.load(tokens_ptr + rows, mask=row_mask, other=0).to(tl.uint32)
    row = _mix(tokens * 0x9E3779B1 + key)
    column = columns.to(tl.uint32) * 0x27D4EB2F
    drawn = _mix(row[:, None] + column[None, :])
    return tl.where(drawn >= THRESHOLD, SCALE, 0.0)


def dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    """Returns the kernel arguments that define a mask; the pointers are None without dropout."""
    if dropout is None:
        return {
            "seed_ptr": None, "tokens_ptr": None, "counter": 0, "THRESHOLD": 0, "SCALE": 1.0
        }  # fmt: skip
    return {
        "seed_ptr": dropout.seed,
        "tokens_ptr": dropout.tokens,
        "counter": (dropout.site << 16) + dropout.iteration,
        "THRESHOLD": int(dropout.p * 2**32),
        "SCALE": 1 / (1 - dropout.p),
    }

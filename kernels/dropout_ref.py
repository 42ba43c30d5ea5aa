"""Counter-based dropout: the mask is a hash of (seed, site, iteration, token, column), and not
stored.

The Triton version computes the same integers, so forward, recomputation and both implementations
use the same mask. p = 0 is handled by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Defines a mask: its probability, and the counters that are hashed."""

    p: float
    seed: Tensor  # () int64, on the device
    site: int  # 0 embedding, 1 + 2·layer attention output, 2 + 2·layer MLP output
    iteration: int
    tokens: Tensor  # (rows,) int64, the caller's token index


def _mix(x: Tensor) -> Tensor:
    """Murmur3's 32-bit finaliser on int64 tensors that hold 32-bit values."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW
    return x ^ (x >> 16)


def _row_key(dropout: Dropout) -> Tensor:
    """(rows,) int64, uniform in 0..2³² − 1."""
    key = _mix((dropout.seed + (dropout.site << 16) + dropout.iteration) & _LOW)
    return _mix((dropout.tokens * 0x9E3779B1 + key) & _LOW)


def dropout_mask_ref(dropout: Dropout, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns 1 / (1 − p) where an element is kept, else 0.

    Args:
        dropout: Defines the mask.
        columns: Number of columns.
        dtype: The dtype of the result.

    Returns:
        (rows, columns).
    """
    column = torch.arange(columns, device=dropout.tokens.device) * 0x27D4EB2F & _LOW
    drawn = _mix((_row_key(dropout).unsqueeze(1) + column) & _LOW)
    keep = drawn >= int(dropout.p * 2**32)
    return keep.to(dtype).div_(1 - dropout.p)


def row_uniform(seed: Tensor, tokens: Tensor) -> Tensor:
    """(rows,) fp64 in [0, 1): a random number for each token's number, from a seed () int64."""
    return _mix((tokens * 0x9E3779B1 + _mix(seed & _LOW)) & _LOW).double() / 2**32


NOISE_ROWS = 8192


def noise_table(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a fixed table of standard normal numbers.

    Args:
        columns: Number of columns.
        dtype: The dtype of the table.
        device: Where it is made.

    Returns:
        (NOISE_ROWS, columns).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(NOISE_ROWS, columns, generator=generator, device="cpu").to(device, dtype)


def state_noise_ref(dropout: Dropout, h: Tensor, table: Tensor) -> Tensor:
    """Adds to each row of h a hashed row of the table times p · RMS(row).

    Args:
        dropout: Defines p and the rows of the table.
        h: (rows, d).
        table: The result of `noise_table`.
    """
    rms = torch.linalg.vector_norm(h, dim=-1, keepdim=True).mul_(dropout.p * h.shape[1] ** -0.5)
    return torch.addcmul(h, table.index_select(0, _row_key(dropout) % NOISE_ROWS), rms)

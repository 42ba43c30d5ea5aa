"""Counter-based dropout: the mask is a hash of (seed, site, iteration, token, column), never
stored.

The same integers come out of the Triton version, so that forward, recomputation and both
implementations draw the same mask. p = 0 never gets here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


class Dropout(NamedTuple):
    """What names a mask: its probability and the counters that are hashed."""

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


def _draw(dropout: Dropout, columns: int) -> Tensor:
    """(rows, columns) int64, uniform in 0..2³² − 1."""
    device = dropout.tokens.device
    key = _mix((dropout.seed + (dropout.site << 16) + dropout.iteration) & _LOW)
    row = _mix((dropout.tokens * 0x9E3779B1 + key) & _LOW)
    column = torch.arange(columns, device=device) * 0x27D4EB2F & _LOW
    return _mix((row.unsqueeze(1) + column) & _LOW)


def dropout_mask_ref(dropout: Dropout, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns): 1 / (1 − p) where kept, else 0."""
    keep = _draw(dropout, columns) >= int(dropout.p * 2**32)
    return keep.to(dtype).div_(1 - dropout.p)


def state_noise_ref(dropout: Dropout, h: Tensor) -> Tensor:
    """Uniform noise of h's shape (rows, d) with standard deviation p times each row's RMS."""
    scale = 2 * 3**0.5 * dropout.p
    unit = _draw(dropout, h.shape[1]).to(h.dtype).mul_(2.0**-32).sub_(0.5).mul_(scale)
    return unit * h.square().mean(-1, keepdim=True).sqrt()

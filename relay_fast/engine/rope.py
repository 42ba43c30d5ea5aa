"""Tables of cosines and sines of rotary position embeddings (RoPE)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from relay_fast.config import BlockConfig


def rope_table(
    positions: Tensor,
    head_dim: int,
    base: float,
    dtype: torch.dtype = torch.float32,
    *,
    rotary_dim: int | None = None,
    frequencies: tuple[float, ...] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes the RoPE tables.

    Args:
        positions: (rows,) integers.
        head_dim: columns of a head.
        base: base of the frequencies.
        dtype: dtype of the result.
        rotary_dim: columns of a head that are rotated, the first rotary_dim / 2 pairs; default:
            all. The others get the angle 0, so that the ops need not know of them.
        frequencies: (rotary_dim / 2,) in place of the base's.
        scale: factor of cos and sin of the rotated pairs.

    Returns:
        cos and sin, each (rows, head_dim / 2). The angles are computed in fp64: in fp32 the one of
        position 1,000,000 is off by 0.03.
    """
    pairs = (head_dim if rotary_dim is None else rotary_dim) // 2
    if frequencies is None:
        half = torch.arange(pairs, device=positions.device, dtype=torch.float64)
        frequency = base ** (-half / pairs)
    else:
        frequency = _on_device(frequencies, positions.device)
    angle = positions.double().unsqueeze(1) * frequency
    cos, sin = angle.cos(), angle.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    rest = (0, head_dim // 2 - pairs)
    if rest[1]:
        pad = torch.nn.functional.pad
        cos, sin = pad(cos, rest, value=1.0), pad(sin, rest)
    return cos.to(dtype), sin.to(dtype)


def block_rope_table(
    config: BlockConfig, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Computes the RoPE tables of a block.

    Args:
        config: The config of a block with RoPE.
        positions: (rows,) positions of the rows.
        dtype: The dtype of the tables.

    Returns:
        cos and sin, (rows, head_dim / 2).
    """
    c = config
    return rope_table(
        positions,
        c.head_dim,
        c.rope_base,
        dtype,
        rotary_dim=c.rotary_dim,
        frequencies=c.rope_frequencies,
        scale=c.rope_scale,
    )


@functools.cache
@torch.inference_mode(False)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns frequencies as a tensor; kept for good, because a CUDA graph captures no copy from
    the host, and reads the memory at every replay."""
    return torch.tensor(frequencies, dtype=torch.float64, device=device)

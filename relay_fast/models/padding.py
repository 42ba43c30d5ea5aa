"""Padded batches with an attention mask, packed for the block and padded again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from relay_fast.batch.attention_mask import Padding
from relay_fast.engine.states import States
from relay_fast.models.arguments import flat_positions


def check_masked(x: Tensor, cu_seqlens: object) -> None:
    """Raises ValueError if a call has no place for an attention mask."""
    if cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens are both given: a packed batch has no mask")
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}: an attention_mask needs (B, n, d)")


def forward_padded(
    forward: Callable[..., object],
    x: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    inject: Tensor | None = None,
    **options,
) -> object:
    """Packs a padded batch, calls a block's forward, and pads what it returns.

    Args:
        forward: of the block.
        x: (B, n, d).
        mask: (B, n), see `Padding`.
        positions: (B, n) or (n,); those of padding are ignored.
        inject: (B, n, d).
        **options: further arguments of the forward.
    """
    check_masked(x, options.pop("cu_seqlens", None))
    padding = Padding(mask, x.shape, x.device)
    if inject is not None:
        if inject.shape != x.shape:
            raise ValueError(
                f"inject has shape {tuple(inject.shape)} but x has {tuple(x.shape)}: pass the same"
            )
        inject = padding.pack(inject)
    if positions is not None:
        flat = flat_positions(positions, x.shape).to(x.device)
        positions = padding.pack(flat.view(x.shape[:2]))
    result = forward(
        padding.pack(x),
        cu_seqlens=padding.cu_seqlens,
        positions=positions,
        inject=inject,
        **options,
    )
    padded = lambda value: (
        value.map(padding.pad) if isinstance(value, States) else padding.pad(value)
    )
    if isinstance(result, tuple):  # with the loops
        return padded(result[0]), *result[1:]
    return padded(result)

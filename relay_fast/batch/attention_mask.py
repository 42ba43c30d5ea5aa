"""The attention mask of a padded batch: where its tokens are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.paddings import device_tensor
from relay_fast.utils.arguments import as_tensor, on_host
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class Padding:
    """Locates the tokens of a padded batch. The mask is copied to the host.

    Args:
        mask: (B, n), 1 or True for tokens, 0 or False for padding; each row's tokens are
            consecutive, with padding on the left, on the right or on both sides.
        shape: of the padded batch, (B, n, …).
        device: of the padded batch.

    Attributes:
        lengths: (B,) tokens of each sequence.
        rows: (N,) where each token's row is among the B · n rows.

    Raises:
        ValueError: for any other mask.
    """

    def __init__(self, mask: Tensor, shape: torch.Size, device: torch.device):
        self._width, self._device = shape[1], device
        mask = as_tensor("attention_mask", mask).detach()
        mask = mask.double() if mask.is_floating_point() else mask  # numpy has no bfloat16
        tokens = _check_mask(on_host("attention_mask", mask), shape)
        self._starts, self.lengths = tokens.argmax(1) if tokens.size else 0, tokens.sum(1)
        firsts = np.arange(len(tokens)) * self._width + self._starts
        self.rows = device_tensor(concat_ranges(firsts, self.lengths), torch.int64, device)

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) row offsets on the host."""
        return torch.from_numpy(lengths_to_offsets(self.lengths))

    def pack(self, x: Tensor) -> Tensor:
        """Returns the rows (N, …) of the tokens of x (B, n, …)."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def pad(self, packed: Tensor, sequences: np.ndarray | None = None) -> Tensor:
        """Returns packed rows (N, …) as (B, n, …), with zeros for padding.

        Args:
            packed: rows of the tokens.
            sequences: indices of the sequences that they belong to; None: all.
        """
        rows, count = self.rows, len(self.lengths)
        if sequences is not None and len(sequences) < count:
            count = len(sequences)
            firsts = np.arange(count) * self._width + self._starts[sequences]
            index = concat_ranges(firsts, self.lengths[sequences])
            rows = device_tensor(index, torch.int64, self._device)
        padded = packed.new_zeros(count * self._width, *packed.shape[1:])
        return padded.index_copy(0, rows, packed).unflatten(0, (count, self._width))


def _check_mask(mask: np.ndarray, shape: torch.Size) -> np.ndarray:
    """Returns the mask as bool."""
    if mask.shape != tuple(shape[:2]):
        raise ValueError(
            f"attention_mask has shape {mask.shape} but x has {tuple(shape)}: pass "
            f"{tuple(shape[:2])}, 1 for tokens and 0 for padding"
        )
    wrong = np.argwhere((mask != 0) & (mask != 1))
    if len(wrong):
        i, j = wrong[0].tolist()
        raise ValueError(
            f"attention_mask[{i}, {j}] = {mask[i, j]}: give 1 for tokens and 0 for padding"
        )
    tokens = mask.astype(bool)
    counts = tokens.sum(1)
    if len(counts) and not counts.min():
        i = int(counts.argmin())
        raise ValueError(
            f"attention_mask[{i}] leaves no token of sequence {i}: leave the sequence out of the "
            "batch"
        )
    pieces = tokens[:, :1].sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    if len(pieces) and pieces.max() > 1:
        i = int(pieces.argmax())
        raise ValueError(
            f"attention_mask[{i}] has padding between tokens of sequence {i}: put it before or "
            "after them"
        )
    return tokens

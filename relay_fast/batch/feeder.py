"""The last round as tokens, on the device, for a model that carries its state too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relay_fast.batch.transfer import picklable


@dataclass(frozen=True, eq=False)
class Feeder:
    """Maps the tokens that a model predicts to those that its next iteration gets: the last round,
    right-aligned as it was written.

    Args:
        last: (N,) int64, the last row of each row's sequence.
        pad: the token in front of a round, which begins after the last `pad` of its sequence.
    """

    last: Tensor
    pad: int

    def __getstate__(self) -> dict[str, Any]:
        return picklable(vars(self))

    def start(self) -> Tensor:
        """Returns the tokens (N,) int64 that the first iteration gets."""
        return torch.full_like(self.last, self.pad)

    def after(self, ids: Tensor, rows: int) -> Tensor:
        """Returns the tokens (rows,) int64 that the next iteration gets.

        Args:
            ids: (N_t,) tokens that this one predicted.
            rows: number of rows of the sequences that continue.
        """
        ids = ids[:rows]
        index = torch.arange(rows, device=ids.device)
        last_pad = torch.where(ids == self.pad, index, -1).cummax(0).values[self.last[:rows]]
        return torch.where(index > last_pad, ids, self.pad)

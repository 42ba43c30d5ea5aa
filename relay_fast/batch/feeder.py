"""The last round as tokens for a model that carries its state too, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Feeder:
    """Turns the tokens that a model writes into what it is fed, for the N rows of a batch: the
    last round, right-aligned as it was written.

    last (N,) int64: the last row of the row's sequence.
    pad: what is fed in place of tokens in front of a round, which begins after the last `pad` of
        its sequence.
    """

    last: Tensor
    pad: int

    def to(self, device: torch.device | str) -> Feeder:
        return Feeder(self.last.to(device, non_blocking=True), self.pad)

    def start(self) -> Tensor:
        """(N,) int64: what the first iteration is fed."""
        return torch.full_like(self.last, self.pad)

    def after(self, ids: Tensor, rows: int) -> Tensor:
        """(rows,) int64: what the next iteration is fed.

        Args:
            ids: (N_t,) the tokens that this one wrote.
            rows: of the batch's sequences that go on.
        """
        ids = ids[:rows]
        index = torch.arange(rows, device=ids.device)
        last_pad = torch.where(ids == self.pad, index, -1).cummax(0).values[self.last[:rows]]
        return torch.where(index > last_pad, ids, self.pad)

"""What a model that is fed its own rounds as tokens is fed next, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Feeder:
    """Turns the tokens that a model writes into what it is fed, for the N rows of a batch.

    source (N,) int64: the row whose token is fed here, in the same sequence.
    since (N,) int64: the iteration after which that is, and stays; 0: after each one anew.
    token (N,) int64: what is fed in place of a token that was written; -1: nothing is.
    last (N,) int64: the last row of the row's sequence.
    pad: what is fed before, and in place of tokens in front of a round, which begins after the last
        `pad` of its sequence.
    """

    source: Tensor
    since: Tensor
    token: Tensor
    last: Tensor
    pad: int

    def to(self, device: torch.device | str) -> Feeder:
        columns = (self.source, self.since, self.token, self.last)
        return Feeder(*(column.to(device, non_blocking=True) for column in columns), self.pad)

    def start(self) -> Tensor:
        """(N,) int64: what the first iteration is fed."""
        return torch.full_like(self.token, self.pad)

    def after(self, iteration: int, ids: Tensor, fed: Tensor, rows: int) -> Tensor:
        """(rows,) int64: what the next iteration is fed.

        Args:
            iteration: the number of the one that is done, from 1.
            ids: (N_t,) the tokens that it wrote.
            fed: (N_t,) what it was fed.
            rows: of the batch's sequences that go on.
        """
        source, since, token = self.source[:rows], self.since[:rows], self.token[:rows]
        index = torch.arange(rows, device=ids.device)
        pads = torch.where(ids[:rows] == self.pad, index, -1)
        last_pad = pads.cummax(0).values[self.last[:rows]]
        written = torch.where(source > last_pad, ids[source], self.pad)
        shown = torch.where(token < 0, written, token)
        return torch.where((since == 0) | (since == iteration), shown, fed[:rows])

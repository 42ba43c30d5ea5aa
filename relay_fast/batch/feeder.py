"""Computes on the device the next input of a model that gets its own rounds as tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Feeder:
    """Maps the tokens that a model predicts to the tokens that its next iteration gets, for the N
    rows of a batch.

    A predicted round follows the last `pad` of its sequence; tokens before it are replaced by
    `pad`.

    Args:
        source: (N,) int64, the row of the same sequence whose prediction this row gets.
        since: (N,) int64, the iteration after which the row is filled, once; 0: after every
            iteration.
        token: (N,) int64, a token that the row gets instead of a prediction; −1: none.
        last: (N,) int64, the last row of the row's sequence.
        pad: the token of rows that are not filled yet.
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
        """Returns the tokens (N,) int64 that the first iteration gets."""
        return torch.full_like(self.token, self.pad)

    def after(self, iteration: int, ids: Tensor, fed: Tensor, rows: int) -> Tensor:
        """Returns the tokens (rows,) int64 that the next iteration gets.

        Args:
            iteration: number of the finished iteration, from 1.
            ids: (N_t,) tokens that it predicted.
            fed: (N_t,) tokens that it got.
            rows: number of rows of the sequences that continue.
        """
        source, since, token = self.source[:rows], self.since[:rows], self.token[:rows]
        index = torch.arange(rows, device=ids.device)
        pads = torch.where(ids[:rows] == self.pad, index, -1)
        last_pad = pads.cummax(0).values[self.last[:rows]]
        written = torch.where(source > last_pad, ids[source], self.pad)
        shown = torch.where(token < 0, written, token)
        return torch.where((since == 0) | (since == iteration), shown, fed[:rows])

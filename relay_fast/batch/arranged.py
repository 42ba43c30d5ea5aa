"""Inputs of iterations that are laid on the device, for a model that is fed its own rounds.

The host brings a batch of first inputs and how the later ones follow from the rounds written
(`relay_fast.tasks.feedback.Arrangement`); everything else is a function of the tokens that come out
of each iteration, in shapes that do not depend on them.

Shapes: S sequences, R rows, both of the capacity. Rows beyond the live ones hold anything valid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.batch.capacity import Capacity, CapacityBatch, CapacityPlan
from relay_fast.batch.packed import PackedBatch


class _Layout(NamedTuple):
    """Where the sequences of an iteration are.

    offsets: (S + 1,) int64.
    owner: (R,) the sequence of each row, S behind the last one.
    """

    offsets: Tensor
    owner: Tensor

    def of_row(self, values: Tensor) -> Tensor:
        """(S,) → (R,)."""
        return values[self.owner.clamp(max=len(values) - 1)]


class _Rounds(NamedTuple):
    """The tokens (R,) that an iteration wrote; ends and sizes of the rounds among them (S,)."""

    tokens: Tensor
    ends: Tensor
    sizes: Tensor

    def at(self, layout: _Layout, from_end: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens (R,) that stand so far from the end of their sequence's round, 1 the
        last, and whether there are such."""
        place = layout.of_row(self.ends) - from_end
        there = (from_end > 0) & (from_end <= layout.of_row(self.sizes))
        return self.tokens[place.clamp(0, len(self.tokens) - 1)], there


class ArrangedInputs:
    """Lays the input of one iteration after the other.

    Args:
        static: holds the first inputs and, beside them, what `beside_sizes` lists.
        moves: whether a sequence of any batch `follows`; without, all rows keep their places.
        pad: the token in front of a round.
    """

    def __init__(self, static: CapacityBatch, moves: bool, pad: int):
        self._static, self._moves, self._pad = static, moves, pad
        c = static.capacity
        self._once = replace(c, rows=c.rows[:1], active=c.active[:1], targets=c.targets[:1])

    @staticmethod
    def beside_sizes(capacity: Capacity) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of the fields of an `Arrangement`."""
        rows, sequences = capacity.rows[:1], (capacity.sequences,)
        whole, flag = torch.int32, torch.bool
        kinds = [(sequences, flag), (sequences, whole), (rows, whole), ((3, *rows), whole)]
        return [*kinds, (rows, whole), (rows, whole), (rows, flag)]

    def start(self) -> PackedBatch:
        """Returns the batch of the first iteration."""
        static, plan = self._static, self._static.plan
        offsets = plan.cu_seqlens.long()
        self._rows = torch.arange(plan.rows, device=offsets.device)
        self._home = self._layout = _Layout(offsets, self._owners(offsets))
        self.outgrown = torch.zeros((), dtype=torch.bool, device=offsets.device)
        self._shown = static.beside[3][2].long()
        return self._batch(static.batch.tokens, self._fed(0), plan.positions, 0)

    @property
    def offsets(self) -> Tensor:
        """(S + 1,) int64 offsets of the sequences in the batch that was made last."""
        return self._layout.offsets

    def after(self, ids: Tensor, before: int) -> PackedBatch:
        """Returns the batch of the next iteration.

        `outgrown` becomes true if an input does not fit into the capacity; what follows is wrong.

        Args:
            ids: (R,) the tokens that the last batch gave.
            before: number of iterations that are done.
        """
        _, _, turns, fed, _, from_end, stays = self._static.beside
        rounds, home = self._rounds(ids), self._home
        tokens, there = rounds.at(home, from_end)
        fresh = torch.where(stays, turns == before - 1, turns < before)
        self._shown = torch.where(fresh, torch.where(there, tokens, fed[2]), self._shown)
        static, plan = self._static, self._static.plan
        if not self._moves:
            return self._batch(static.batch.tokens, self._fed(before), plan.positions, before)
        self._move(rounds.sizes, before)
        layout = self._layout
        place = self._rows - layout.of_row(layout.offsets[:-1])
        at_home = (layout.of_row(home.offsets[:-1]) + place).clamp(0, plan.rows - 1)
        tokens, there = rounds.at(layout, layout.of_row(layout.offsets[1:]) - self._rows)
        own, follows = static.batch.tokens[at_home], layout.of_row(static.beside[0])
        moved = torch.where(place == 0, own, torch.where(there, tokens, self._pad))
        return self._batch(
            torch.where(follows, moved, own),
            torch.where(follows, self._pad, self._fed(before)[at_home]),
            torch.where(follows, place, plan.positions[at_home]).int(),
            before,
        )

    def _owners(self, offsets: Tensor) -> Tensor:
        return torch.searchsorted(offsets[1:], self._rows, right=True)

    def _fed(self, before: int) -> Tensor:
        """Returns the tokens (R,) fed in the layout of the first inputs."""
        _, _, turns, fed, growth, _, _ = self._static.beside
        more = self._shown + growth * before
        return torch.where(turns > before, fed[0], torch.where(turns == before, fed[1], more))

    def _rounds(self, ids: Tensor) -> _Rounds:
        offsets, owner = self._layout
        pads = torch.where(ids == self._pad, self._rows, -1)
        last = pads.new_full((len(offsets),), -1).scatter_reduce(0, owner, pads, "amax")[:-1]
        begins = torch.maximum(last + 1, offsets[:-1])
        return _Rounds(ids, offsets[1:], offsets[1:] - begins)

    def _move(self, sizes: Tensor, before: int) -> None:
        """Lays out the next iteration: an input that follows has the last round's size."""
        follows, least = self._static.beside[:2]
        capacity = self._static.capacity
        width = torch.where(follows, torch.maximum(sizes + 1, least), self._home.offsets.diff())
        going = torch.arange(len(width), device=width.device) < self._active(before)
        width = width * going
        too_long, too_many = width.max() > capacity.longest, width.sum() > capacity.rows[0]
        self.outgrown = self.outgrown | too_long | too_many
        ends = width.clamp(max=capacity.longest).cumsum(0).clamp(max=capacity.rows[0])
        offsets = torch.cat((ends.new_zeros(1), ends))
        self._layout = _Layout(offsets, self._owners(offsets))

    def _active(self, before: int) -> Tensor:
        return self._static.plan.active_counts[before, 0]

    def _batch(self, tokens: Tensor, fed: Tensor, positions: Tensor, before: int) -> PackedBatch:
        """Returns the batch of a single iteration."""
        home = self._static.plan
        counts = home.active_counts[before : before + 1]
        offsets = home.cu_seqlens
        if self._moves:
            offsets = self._layout.offsets.int()
            counts = torch.stack((counts[0, 0], offsets[-1])).unsqueeze(0)
        indices = [positions, home.tokens, offsets, counts, home.last_rows, home.final_rows]
        plan = CapacityPlan(self._once, home.device, indices)
        none = self._static.batch.targets[:0]
        return replace(
            self._static.batch, tokens=tokens, fed=fed, plan=plan, row_offsets=(0, 0), rows=none
        )

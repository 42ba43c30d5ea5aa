"""Inputs of iterations that are laid on the device, for a model that is fed its own rounds.

The host brings a batch of first inputs and how the later ones follow from the rounds written
(`relay_fast.tasks.feedback.Arrangement`); everything else is a function of the tokens that come out
of each iteration, in shapes that do not depend on them.

An iteration's inputs are some fifty small ops: what is the same for a sequence is gathered for its
rows at once, and what does not change is made in `start`.

Shapes: S sequences, R rows, both of the capacity. Rows beyond the live ones hold anything valid.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.batch.capacity import Capacity, CapacityBatch, CapacityPlan
from relay_fast.batch.packed import PackedBatch

NEVER = 1 << 30  # a place that no row reaches


class _Layout(NamedTuple):
    """Where the sequences of an iteration are; the last of the S + 1 is empty, and owns the rows
    behind all others.

    starts, ends: (S + 1,) int64.
    owner: (R,) the sequence of each row.
    """

    starts: Tensor
    ends: Tensor
    owner: Tensor


class ArrangedInputs:
    """Lays the input of one iteration after the other.

    Args:
        static: holds the first inputs and, beside them, what `beside_sizes` lists.
        moves: whether a sequence of any batch `follows`; without, all rows keep their places.
        pad: the token in front of a round.
        largest: the largest token; what grows in iterations that no sequence has stays below.

    Attributes:
        widths: (S,) int64, tokens that each input of the batch that was made last needs. If one
            exceeds the capacity's longest sequence, or all together its rows, they are cut: what
            comes then is wrong.
    """

    def __init__(self, static: CapacityBatch, moves: bool, pad: int, largest: int):
        self._static, self._moves, self._pad_token, self._largest = static, moves, pad, largest
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
        follows, least, turns, fed, _, from_end, stays = static.beside
        offsets = plan.cu_seqlens.long()
        self._rows = torch.arange(plan.rows, device=offsets.device)
        self._next_rows = self._rows + 1
        self._zero, self._pad = offsets.new_zeros(1), offsets.new_full((), self._pad_token)
        self._home = self._layout = self._layout_of(torch.cat((offsets[1:], offsets[-1:])))
        sequences = torch.arange(plan.sequences, device=offsets.device)
        self._going = sequences < plan.active_counts[:, :1]
        self.widths = self._home_widths = offsets.diff()
        self._from_end = from_end.long().masked_fill(from_end == 0, NEVER)
        self._until = turns.masked_fill(~stays, NEVER) + 1
        self._shown = fed[2].long()
        self._of_home = torch.stack((static.batch.tokens, plan.positions.long()), 1)
        self._least = least.long()
        self._not_following = torch.cat((~follows, ~follows[:0].new_zeros(1))) * NEVER
        return self._batch(static.batch.tokens, self._fed(0), plan.positions, 0)

    def after(self, ids: Tensor, before: int) -> PackedBatch:
        """Returns the batch of the next iteration.

        Args:
            ids: (R,) the tokens that the last batch gave.
            before: number of iterations that are done.
        """
        sizes, ends = self._round_sizes(ids), self._layout.ends
        self._show(ids, sizes, before)
        static, fed = self._static, self._fed(before)
        if not self._moves:
            return self._batch(static.batch.tokens, fed, static.plan.positions, before)
        self._move(sizes[:-1], before)
        new, rows = self._layout, self._rows
        of_sequences = (
            ends - new.ends,  # from a row to that of the round which it shows
            new.ends - sizes,  # the first row that shows one
            self._home.starts - new.starts,  # from a row to that of the first input
            new.starts + self._not_following,
            new.starts,
        )
        shift, first, homewards, following, starts = torch.stack(of_sequences, 1)[new.owner].unbind(
            1
        )
        written = ids[self._inside(rows + shift)]
        at_home = self._inside(rows + homewards)
        own, positions = self._of_home[at_home].unbind(1)
        shown, follows = torch.where(rows >= first, written, self._pad), rows >= following
        return self._batch(
            torch.where(rows > following, shown, own),
            torch.where(follows, self._pad, fed[at_home]),
            torch.where(follows, rows - starts, positions),
            before,
        )

    def _inside(self, places: Tensor) -> Tensor:
        return places.clamp(0, len(self._rows) - 1)

    def _layout_of(self, ends: Tensor) -> _Layout:
        """Args: ends: (S + 1,) of the sequences, the last one empty."""
        owner = torch.searchsorted(ends[:-1], self._rows, right=True)
        return _Layout(torch.cat((self._zero, ends[:-1])), ends, owner)

    def _round_sizes(self, ids: Tensor) -> Tensor:
        """Returns the tokens behind the last pad of each sequence, (S + 1,)."""
        starts, ends, owner = self._layout
        behind = (ids == self._pad_token) * self._next_rows
        return ends - starts.scatter_reduce(0, owner, behind, "amax")

    def _show(self, ids: Tensor, sizes: Tensor, before: int) -> None:
        """Puts what the last round wrote where the first inputs' layout shows it."""
        _, _, turns, fed, *_ = self._static.beside
        ends, sizes = torch.stack((self._layout.ends, sizes), 1)[self._home.owner].unbind(1)
        there = self._from_end <= sizes
        tokens = torch.where(there, ids[self._inside(ends - self._from_end)], fed[2])
        fresh = (turns < before) & (self._until >= before)
        self._shown = torch.where(fresh, tokens, self._shown)

    def _fed(self, before: int) -> Tensor:
        """Returns the tokens (R,) fed in the layout of the first inputs."""
        _, _, turns, fed, growth, _, _ = self._static.beside
        more = torch.add(self._shown, growth, alpha=before).clamp(max=self._largest)
        return torch.where(turns > before, fed[0], torch.where(turns == before, fed[1], more))

    def _move(self, sizes: Tensor, before: int) -> None:
        """Lays out the next iteration: an input that follows has the last round's size."""
        follows, capacity = self._static.beside[0], self._static.capacity
        width = torch.where(follows, torch.maximum(sizes + 1, self._least), self._home_widths)
        self.widths = width * self._going[before]
        ends = self.widths.clamp(max=capacity.longest).cumsum(0).clamp(max=capacity.rows[0])
        self._layout = self._layout_of(torch.cat((ends, ends[-1:])))

    def _batch(self, tokens: Tensor, fed: Tensor, positions: Tensor, before: int) -> PackedBatch:
        """Returns the batch of a single iteration."""
        home = self._static.plan
        counts, offsets = home.active_counts[before : before + 1], home.cu_seqlens
        if self._moves:
            offsets = self._layout.starts.int()
            counts = offsets[-1:].expand(1, 2)  # of which the rows are read
        indices = [positions, home.tokens, offsets, counts, home.last_rows, home.final_rows]
        plan = CapacityPlan(self._once, home.device, indices)
        none = self._static.batch.targets[:0]
        return replace(
            self._static.batch, tokens=tokens, fed=fed, plan=plan, row_offsets=(0, 0), rows=none
        )

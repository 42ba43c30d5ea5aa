"""A plan whose loop counts are not known in advance: sequences stop while the loop runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.paddings import device_tensor
from relay_fast.batch.plan import Plan, chosen_states
from relay_fast.batch.row_range import RowRange, scattered
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class StoppingPlan(Plan):
    """A plan that grows by one iteration at a time, of the sequences that did not stop.

    All rows stay in the caller's order. State t holds those of the sequences that reach
    iteration t, in the same order. Serves one pass; `loops` and the counts of rows are final when
    `iterations` is exhausted.

    Args:
        lengths: tokens of each sequence.
        limits: the largest number of iterations of each sequence.
        device: where the index tensors are.
        positions: position of each token; default: 0..n − 1 in each sequence.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        limits: np.ndarray,
        device: torch.device | str = "cpu",
        positions: np.ndarray | None = None,
    ):
        super().__init__(lengths, np.zeros(len(lengths), np.int64), device, positions)
        self.limits = np.asarray(limits, np.int64)
        self._members: list[np.ndarray] = []
        self._ranges: list[RowRange] = []

    @property
    def limit(self) -> int:
        """The largest number of iterations that the loop may take."""
        return int(self.limits.max(initial=0))

    @property
    def most_rows(self) -> tuple[int, ...]:
        return tuple(int(self.lengths[self.limits >= t].sum()) for t in range(1, self.limit + 1))

    def iterations(self) -> Iterator[RowRange]:
        """Yields the row range of each iteration, as long as a sequence with rows goes on; after
        each, `stop` may end sequences."""
        alive, before = np.arange(self.sequences), np.arange(self.sequences)
        for t in range(1, self.limit + 1):
            alive = alive[self.limits[alive] >= t]
            rows = int(self.lengths[alive].sum())
            if rows == 0:
                break
            source = slice(0, rows)
            if len(alive) < len(before):
                starts = lengths_to_offsets(self.lengths[before])[np.searchsorted(before, alive)]
                source = concat_ranges(starts, self.lengths[alive])
            row_range = scattered(
                t, alive, self.offsets, self.device, source=source, target=slice(0, rows)
            )
            self._members.append(alive)
            self._ranges.append(row_range)
            self.max_loops = t
            self.active_sequences += (len(alive),)
            self.active_rows += (rows,)
            self.state_offsets += (self.state_offsets[-1] + rows,)
            self.loops[alive] = t
            self._stopped = np.zeros(len(alive), bool)
            yield row_range
            before, alive = alive, alive[~self._stopped]

    def stop(self, stopped: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """Ends sequences of the present iteration.

        Args:
            stopped: (active sequences,) bool. Sequences at their limit end in any case.

        Returns:
            The ended sequences' rows among all rows, and in the present state; None: none ended.
        """
        alive, t = self._members[-1], self.max_loops
        self._stopped = stopped
        ended = stopped | (self.limits[alive] == t)
        lengths = self.lengths[alive]
        if not lengths[ended].any():
            return None
        pick = lambda starts: device_tensor(
            concat_ranges(starts[ended], lengths[ended]), torch.int64, self.device
        )
        return pick(self.offsets[alive]), pick(lengths_to_offsets(lengths)[:-1])

    def row_ranges(
        self, iteration: int, truncate: int | np.ndarray | None = None
    ) -> tuple[RowRange, ...]:
        """Returns the range of all sequences that reach an iteration, of those that did so far."""
        row_range = self._ranges[iteration - 1]
        if truncate is None or self._learns(iteration, truncate).any():
            return (row_range,)
        return (replace(row_range, grad=False),)

    def _learns(self, iteration: int, truncate: int | np.ndarray) -> np.ndarray:
        alive = self._members[iteration - 1]
        last = truncate[alive] if isinstance(truncate, np.ndarray) else truncate
        return self.loops[alive] - iteration < last

    def rows_without_gradient(
        self, iteration: int, truncate: int | np.ndarray | None
    ) -> Tensor | None:
        if truncate is None:
            return None
        alive = self._members[iteration - 1]
        dead = alive[~self._learns(iteration, truncate)]
        if not len(dead):
            return None
        rows = concat_ranges(self.offsets[dead], self.lengths[dead])
        return device_tensor(rows, torch.int64, self.device)

    def chosen_states(self, return_states: bool | Sequence[int]) -> tuple[int, ...]:
        return chosen_states(return_states, self.limit)

    def prefix(self, iteration: int) -> Tensor:
        return self._ranges[iteration - 1].rows

    def sequences_at(self, iteration: int) -> np.ndarray:
        if iteration > self.max_loops:  # asked for, and never reached
            return np.zeros(0, np.int64)
        return self._members[iteration - 1]

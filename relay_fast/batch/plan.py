"""The plan of a batch: all that the host knows before the first kernel.

Sequences are sorted by loops, largest first, so that the rows of the sequences that still loop at
iteration t are a prefix (the *active prefix*). The plan holds the sizes of that prefix as Python
ints, and the index tensors on the device. Later no tensor is copied back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.arguments import check_cu_seqlens as check_cu_seqlens
from relay_fast.batch.arguments import check_floating as check_floating
from relay_fast.batch.arguments import check_loops as check_loops
from relay_fast.batch.paddings import Paddings, device_tensor
from relay_fast.batch.row_range import RowRange, scattered
from relay_fast.batch.transfer import picklable, upload
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.utils.arguments import as_device, kind_of, on_host
from relay_fast.utils.numbers import as_int, as_ints, is_bool
from relay_fast.utils.ragged import concat_ranges

_INDICES = ("positions", "cu_seqlens", "last_rows")


class Plan:
    """The order, the active prefix and the attention layout of a batch of packed sequences.

    Args:
        lengths: tokens of each sequence, in the caller's order.
        loops: iterations of each sequence (≥ 0), in the caller's order.
        device: where the index tensors are.
        positions: position of each token, in the caller's row order; default: 0..n − 1 in each
            sequence.
        token_numbers: number of each token, in the caller's row order; default: 0..N − 1. Random
            masks are drawn by these numbers, so a part of a batch keeps those of the whole.

    Attributes:
        lengths: int64 array (sequences,), in sorted order like the following ones.
        loops: int64 array (sequences,).
        order: caller's index of each sorted sequence.
        sorted: whether the caller's order is already sorted; `order` is then the identity.
        offsets: first row of each sequence, (sequences + 1,).
        max_loops: the largest loop count T.
        active_sequences: T ints, the sequences that still loop at t = 1..T.
        active_rows: T ints, their rows.
        state_offsets: T + 1 ints; state t starts at state_offsets[t − 1] in an iteration-major
            buffer of all states.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        loops: Sequence[int] | np.ndarray,
        device: torch.device | str = "cpu",
        positions: np.ndarray | None = None,
        token_numbers: np.ndarray | None = None,
    ):
        lengths, loops = _counts("lengths", lengths), _counts("loops", loops)
        if len(lengths) != len(loops):
            raise ValueError(
                f"there are {len(lengths)} lengths and {len(loops)} loops: give one of each for "
                "every sequence"
            )
        self.device = as_device(device)
        self.sorted = bool((loops[:-1] >= loops[1:]).all())
        self.order = np.arange(len(loops)) if self.sorted else np.argsort(-loops, kind="stable")
        self.lengths, self.loops = lengths[self.order], loops[self.order]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.max_loops = int(self.loops.max(initial=0))
        steps = np.arange(1, self.max_loops + 1)
        active = np.searchsorted(-self.loops, -steps, side="right")
        self.active_sequences = tuple(active.tolist())
        self.active_rows = tuple(self.offsets[active].tolist())
        self.state_offsets = (0, *np.cumsum(self.active_rows, dtype=np.int64).tolist())
        self._caller_positions = None
        if positions is not None:
            self._caller_positions = _positions(positions, int(self.offsets[-1]))
        self._caller_tokens = token_numbers
        self._start_caches()

    def _start_caches(self) -> None:
        self._layouts: dict[tuple[int, int], PaddedLayout] = {}
        self._active_to_caller: dict[int, Tensor] = {}
        self._scattered: dict[tuple[int, bytes], tuple[RowRange, ...]] = {}

    @classmethod
    def of_rows(cls, rows: int, loops: int, device: torch.device) -> Plan:
        """Makes the plan of sequences of one row that loop equally often, at a fifth of the
        constructor's cost.

        Args:
            rows: Number of sequences, each of one row.
            loops: Iterations of every sequence.
            device: Where the plan's tensors are.

        Returns:
            The plan that the constructor makes of these sizes.
        """
        plan = cls.__new__(cls)
        plan.device, plan.sorted, plan.max_loops = device, True, loops if rows else 0
        plan.order, plan.offsets = np.arange(rows), np.arange(rows + 1)
        plan.lengths, plan.loops = np.ones(rows, np.int64), np.full(rows, loops)
        plan.active_sequences = plan.active_rows = (rows,) * plan.max_loops
        plan.state_offsets = tuple(range(0, rows * plan.max_loops + 1, max(1, rows)))
        plan._caller_positions = plan._caller_tokens = None
        plan._start_caches()
        return plan

    def to(self, device: torch.device | str) -> Plan:
        """Returns the plan on another device; its sorted order counts as the caller's."""
        return self.with_indices(device, upload(self.indices(), device))

    def indices(self) -> list[Tensor]:
        """Returns the index tensors that every pass reads, for `with_indices`."""
        return [getattr(self, name) for name in _INDICES]

    def with_indices(self, device: torch.device | str, indices: Sequence[Tensor]) -> Plan:
        """Returns the plan on a device; its sorted order counts as the caller's.

        Args:
            device: where the plan is wanted.
            indices: what `indices` returned, on that device.
        """
        positions = None if self._caller_positions is None else self.positions.cpu().numpy()
        tokens = None if self._caller_tokens is None else self.token_numbers
        plan = Plan(self.lengths, self.loops, device, positions, tokens)
        vars(plan).update(zip(_INDICES, indices, strict=True))  # cached properties
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return picklable(vars(self))

    def take(self, sequences: np.ndarray) -> Plan:
        """Returns the plan of some sequences, by ascending index; tokens keep their numbers."""
        rows = concat_ranges(self.offsets[sequences], self.lengths[sequences])
        positions = self._caller_positions
        if positions is not None:
            positions = positions if self.row_order is None else positions[self.row_order]
            positions = positions[rows]
        return Plan(
            self.lengths[sequences],
            self.loops[sequences],
            self.device,
            positions,
            self.token_numbers[rows],
        )

    def part(self, first: int, last: int) -> Plan:
        """Returns the plan of sequences first..last − 1."""
        return self._part(first, last, self.loops[first:last])

    def once(self, iteration: int) -> Plan:
        """Returns the plan of a single iteration: the sequences that reach it, with one loop
        each."""
        active = self.active_sequences[iteration - 1]
        return self._part(0, active, np.ones(active, np.int64))

    def _part(self, first: int, last: int, loops: np.ndarray) -> Plan:
        positions = self._caller_positions
        if positions is not None:
            positions = positions if self.row_order is None else positions[self.row_order]
            positions = positions[self.offsets[first] : self.offsets[last]]
        tokens = self.token_numbers[self.offsets[first] : self.offsets[last]]
        return Plan(self.lengths[first:last], loops, self.device, positions, tokens)

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def limit(self) -> int:
        """The largest number of iterations that the loop may take."""
        return self.max_loops

    @property
    def most_rows(self) -> tuple[int, ...]:
        """The largest number of rows that each of these iterations may have."""
        return self.active_rows

    @property
    def rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def token_iterations(self) -> int:
        """Σ n_i · T_i, the cost of the batch."""
        return self.state_offsets[-1]

    # `CapacityPlan` overrides these: its live rows are known on the device only. Here all are.

    fixed_capacity = False
    final_rows: Tensor | None = None

    def live(self, iteration: int) -> Tensor | None:
        """Returns which rows of an iteration are live, (N_t, 1) bool; None: all."""
        return None

    def row_count(self, iteration: int) -> Tensor | None:
        """Returns the number of live rows of an iteration, (1,) int32 on the device; None: all."""
        return None

    def layout_of(self, row_range: RowRange) -> PaddedLayout:
        """Returns the attention layout of a row range."""
        if row_range.members is not None:
            return row_range.members.layout
        return self.layout(row_range.first_sequence, row_range.last_sequence)

    def prefix(self, iteration: int) -> slice | Tensor:
        """Returns where the rows of state t are among all rows."""
        return slice(0, self.rows_at(iteration))

    def rows_without_gradient(self, iteration: int, truncate: object) -> Tensor | None:
        """Returns the rows inside ranges with a gradient that truncation stops; None: none."""
        return None

    def sequences_at(self, iteration: int) -> np.ndarray:
        """Returns the caller's indices of the sequences that reach an iteration, ascending."""
        return np.sort(self.order[: self.active_sequences[iteration - 1]])

    def rows_at(self, iteration: int) -> int:
        """Returns the number of rows of the active prefix at an iteration; 0 after the last."""
        return self.active_rows[iteration - 1] if 1 <= iteration <= self.max_loops else 0

    def row_ranges(
        self, iteration: int, truncate: int | np.ndarray | None = None
    ) -> tuple[RowRange, ...]:
        """Returns the row ranges of an iteration.

        Args:
            iteration: 1-based.
            truncate: number of last iterations of each sequence that gradients flow through: None
                for all, an int, or (sequences,) in sorted order.

        Returns:
            One range, or two if truncation stops the gradient in a part of the prefix.
        """
        last, cut = self.active_sequences[iteration - 1], 0
        if isinstance(truncate, np.ndarray):
            learns = self.loops[:last] - iteration < truncate[:last]
            cut = last - int(learns.sum())
            if learns[:cut].any():
                return self._two_scattered(iteration, truncate, learns)
        elif truncate is not None:
            later = iteration + truncate
            cut = self.active_sequences[later - 1] if later <= self.max_loops else 0
        bounds = [(0, cut, False), (cut, last, True)]
        return tuple(
            RowRange(
                iteration, a, b, int(self.offsets[a]), int(self.offsets[b]), grad, part=int(grad)
            )
            for a, b, grad in bounds
            if self.offsets[b] > self.offsets[a]
        )

    def _two_scattered(
        self, iteration: int, truncate: np.ndarray, learns: np.ndarray
    ) -> tuple[RowRange, ...]:
        t, key = iteration, (iteration, truncate.tobytes())
        if key not in self._scattered:
            ranges = (
                scattered(t, np.flatnonzero(learns == grad), self.offsets, self.device, grad)
                for grad in (False, True)
            )
            self._scattered[key] = tuple(r for r in ranges if r.last_row)
        return self._scattered[key]

    def chosen_states(self, return_states: bool | Sequence[int]) -> tuple[int, ...]:
        """Calls `chosen_states` for this plan's iterations."""
        return chosen_states(return_states, self.max_loops)

    # Index tensors, each built once on the host and copied to the device. They are never inference
    # tensors: a batch may be evaluated under inference_mode first, and trained on later.

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return device_tensor(array, dtype, self.device)

    @cached_property
    def row_order(self) -> np.ndarray | None:
        """Caller's row index of each sorted row; None if the orders are equal."""
        if self.sorted:
            return None
        caller_lengths = np.empty_like(self.lengths)
        caller_lengths[self.order] = self.lengths
        caller_offsets = np.concatenate([[0], np.cumsum(caller_lengths)])
        shift = caller_offsets[self.order] - self.offsets[:-1]
        return np.arange(self.rows) + np.repeat(shift, self.lengths)

    @cached_property
    def to_sorted(self) -> Tensor | None:
        """(rows,) int64: sorted = caller[to_sorted]."""
        return None if self.row_order is None else self._tensor(self.row_order, torch.int64)

    @cached_property
    def to_caller(self) -> Tensor | None:
        """(rows,) int64: caller = sorted[to_caller]."""
        return (
            None
            if self.row_order is None
            else self._tensor(np.argsort(self.row_order), torch.int64)
        )

    def active_to_caller(self, iteration: int) -> Tensor | None:
        """Returns (N_t,) int64 indices that put the rows of state t into the caller's relative
        order."""
        if self.row_order is None:
            return None
        rows = self.rows_at(iteration)
        if rows not in self._active_to_caller:
            index = np.argsort(self.row_order[:rows])
            self._active_to_caller[rows] = self._tensor(index, torch.int64)
        return self._active_to_caller[rows]

    @cached_property
    def token_numbers(self) -> np.ndarray:
        """(rows,) int64: the number of the token in each row."""
        numbers, order = self._caller_tokens, self.row_order
        if numbers is None:
            return np.arange(self.rows) if order is None else order
        return numbers if order is None else numbers[order]

    @cached_property
    def tokens(self) -> Tensor:
        """(rows,) int64: the number of the token in each row, a counter of the dropout masks."""
        if self._caller_tokens is None and self.row_order is None:
            with torch.inference_mode(False):
                return torch.arange(self.rows, device=self.device)
        return self._tensor(self.token_numbers, torch.int64)

    @cached_property
    def positions(self) -> Tensor:
        """(rows,) int32 position of each row."""
        positions = self._caller_positions
        if positions is None:
            positions = np.arange(self.rows) - np.repeat(self.offsets[:-1], self.lengths)
        elif self.row_order is not None:
            positions = positions[self.row_order]
        return self._tensor(positions, torch.int32)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(sequences + 1,) int32 row offsets."""
        return self._tensor(self.offsets, torch.int32)

    @cached_property
    def last_rows(self) -> Tensor:
        """(sequences,) int64: the last row of each sequence; for an empty one, the row before
        it."""
        return self._tensor(self.offsets[1:] - 1, torch.int64)

    @cached_property
    def _paddings(self) -> Paddings:
        return Paddings(self.lengths, self.device)

    def layout(self, first: int, last: int) -> PaddedLayout:
        """Returns the row offsets of sequences first..last − 1, with their padding for torch's
        attention."""
        key = (first, last)
        if key not in self._layouts:
            lengths = self.lengths[first:last]
            with torch.inference_mode(False):
                cu_seqlens = self.cu_seqlens[first : last + 1]
                cu_seqlens = cu_seqlens - cu_seqlens[:1] if first else cu_seqlens
            self._layouts[key] = PaddedLayout(
                cu_seqlens,
                int(lengths.max(initial=0)),
                partial(self._paddings.make, first, last),
                int(lengths.sum()),
            )
        return self._layouts[key]


def _counts(name: str, counts: Any) -> np.ndarray:
    """Returns counts (sequences,) as int64; raises TypeError and ValueError for anything else."""
    try:
        counts = np.asarray(counts, dtype=np.int64)
    except (TypeError, ValueError, NotImplementedError):  # the last for meta tensors
        raise TypeError(f"{name} is {kind_of(counts)}: give one int per sequence") from None
    if counts.ndim != 1:
        raise ValueError(f"{name} has shape {counts.shape}: give one int per sequence")
    return counts


def _positions(positions: Any, rows: int) -> np.ndarray:
    """Returns positions (rows,); raises ValueError for what is no whole number of 32 bits."""
    positions = as_ints("positions", positions, rows)
    least, most = positions.min(initial=0), positions.max(initial=0)
    if least < -(2**31) or most >= 2**31:
        raise ValueError(
            f"positions from {least} to {most} do not fit into 32 bits: give smaller ones"
        )
    return positions


def chosen_states(return_states: bool | Sequence[int], loops: int) -> tuple[int, ...]:
    """Returns the iterations in 1..loops whose states are requested, ascending.

    Args:
        return_states: True for all, False for none, or a list of iterations.
        loops: the number of iterations of the batch.

    Raises:
        ValueError: for an iteration that the batch does not reach, and for a single int.
    """
    if is_bool(return_states):
        return tuple(range(1, loops + 1)) if return_states else ()
    if isinstance(return_states, Tensor | np.ndarray):
        if isinstance(return_states, Tensor):
            return_states = on_host("return_states", return_states)
        return_states = return_states.tolist()
    if not hasattr(return_states, "__iter__"):
        raise ValueError(
            f"return_states = {return_states}: pass True for all states, or a list of iterations"
        )
    wanted = tuple(sorted({as_int("an iteration in return_states", t) for t in return_states}))
    if wanted and not 1 <= wanted[0] <= wanted[-1] <= loops:
        raise ValueError(
            f"return_states has iterations {list(wanted)}: give iterations in 1..{loops}"
        )
    return wanted

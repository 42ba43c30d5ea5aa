"""Batches of one fixed shape, whatever they hold: what a CUDA graph is captured over.

A `Capacity` says how much of everything fits; `CapacityBatch` has the tensors, and `load` copies a
batch into them. Iteration t always works on the capacity's rows; how many of them are live (the
active prefix of the batch that is loaded) is known on the device alone. Rows beyond are other
sequences' or nobody's: the engine keeps their states and gradients as they were, and their
targets are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan, RowRange
from relay_fast.kernels.attention_ref import Group, PaddedLayout
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

ALIGN = 64  # capacities in rows are whole blocks of the kernels


@dataclass(frozen=True)
class Capacity:
    """How large a batch may be. Per iteration: rows, sequences that still loop, rows with targets.

    longest: tokens of the longest sequence; sequences: in all (loops of 0 included).
    """

    rows: tuple[int, ...]
    active: tuple[int, ...]
    targets: tuple[int, ...]
    sequences: int
    longest: int

    def __post_init__(self) -> None:
        sizes = {len(self.rows), len(self.active), len(self.targets)}
        if len(sizes) != 1 or not self.rows:
            raise ValueError(
                "a capacity needs one number of rows, active sequences and targets for each of at "
                f"least one iteration, got {len(self.rows)}, {len(self.active)} and "
                f"{len(self.targets)}"
            )
        for name in ("rows", "active"):
            values = getattr(self, name)
            if any(a < b for a, b in zip(values, values[1:], strict=False)):
                raise ValueError(f"capacity {name} must not grow with the iteration: {values}")

    @property
    def token_iterations(self) -> int:
        return sum(self.rows)

    @staticmethod
    def of(batches: Iterable[PackedBatch], slack: float = 0.1, spread: float = 0.0) -> Capacity:
        """What these batches need, and `slack` more of everything but the longest sequence and the
        iterations.

        spread: of an iteration that k sequences reach also spread / √k more: where lengths are
        drawn at random, k itself differs from batch to batch by about √k.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("Capacity.of needs at least one batch to measure")
        loops = max(b.plan.max_loops for b in batches)

        def most(of) -> np.ndarray:
            return np.array([max(of(b, t) for b in batches) for t in range(1, loops + 1)], int)

        active = most(lambda b, t: _at(b.plan.active_sequences, t))
        more = 1 + slack + spread / np.sqrt(np.maximum(1, active))
        grow = lambda values: np.ceil(np.round(values * more, 6)).astype(int)
        rows = grow(most(lambda b, t: b.plan.rows_at(t) if t > 1 else b.plan.rows))
        rows = np.maximum.accumulate(rows[::-1])[::-1]  # none may grow with the iteration
        sequences = int(np.ceil(max(len(b) for b in batches) * (1 + slack)))
        return Capacity(
            tuple((-(-rows // ALIGN) * ALIGN).tolist()),
            tuple(np.minimum(grow(active), sequences).tolist()),
            tuple(grow(most(lambda b, t: _at(np.diff(b.row_offsets), t))).tolist()),
            sequences,
            max(int(b.plan.lengths.max(initial=1)) for b in batches),
        )

    def reason(self, batch: PackedBatch) -> str | None:
        """Why a batch does not fit; None if it does."""
        plan = batch.plan
        if plan.max_loops > len(self.rows):
            return f"the batch loops {plan.max_loops} times, the capacity is {len(self.rows)}"
        longest = int(plan.lengths.max(initial=0))
        limits = [
            ("sequences", len(batch), self.sequences), ("rows", plan.rows, self.rows[0]),
            ("tokens in its longest sequence", longest, self.longest),
        ]  # fmt: skip
        counts = np.diff(batch.row_offsets)
        for t in range(1, plan.max_loops + 1):
            limits += [
                (f"rows in iteration {t}", plan.rows_at(t), self.rows[t - 1]),
                (f"active sequences in iteration {t}", plan.active_sequences[t - 1],
                 self.active[t - 1]),
                (f"targets in iteration {t}", int(counts[t - 1]), self.targets[t - 1]),
            ]  # fmt: skip
        for what, have, most in limits:
            if have > most:
                return f"the batch has {have} {what}, the capacity is {most}"
        return None


def _at(values: Sequence[int], iteration: int) -> int:
    return int(values[iteration - 1]) if iteration <= len(values) else 0


class CapacityPlan(Plan):
    """A plan whose sizes are a capacity's, with the loaded batch's own counts on the device."""

    fixed_capacity = True

    def __init__(self, capacity: Capacity, device: torch.device | str):
        c = self.capacity = capacity
        self.device = torch.device(device)
        self.sorted, self.order = True, np.arange(c.sequences)
        self.lengths = np.full(c.sequences, c.longest)
        self.max_loops = len(c.rows)
        self.loops = np.full(c.sequences, self.max_loops)
        # Slices by sequence are taken from the device's offsets; only the ends are known here.
        self.active_sequences, self.active_rows = c.active, c.rows
        self.state_offsets = (0, *np.cumsum(c.rows).tolist())
        new = lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype, device=self.device)
        self.positions = new(c.rows[0], dtype=torch.int32)
        self.tokens = new(c.rows[0])
        self.cu_seqlens = new(c.sequences + 1, dtype=torch.int32)
        self.active_counts = new(self.max_loops, 2, dtype=torch.int32)
        self.last_rows = new(c.sequences)
        self._offsets: dict[int, Tensor] = {}
        self._live: dict[int, Tensor] = {}

    @property
    def sequences(self) -> int:
        return self.capacity.sequences

    @property
    def rows(self) -> int:
        return self.capacity.rows[0]

    def to(self, device: torch.device | str) -> Plan:
        raise RuntimeError("a static plan stays on its device: load batches into another one there")

    def load(self, plan: Plan) -> None:
        """Takes a plan's counts and indices over; what the capacity has beyond them is empty."""
        rows, sequences = plan.rows, plan.sequences
        _fill(self.positions, plan.positions)
        _fill(self.tokens, plan.tokens)
        offsets = np.full(self.sequences + 1, rows)
        offsets[: sequences + 1] = plan.offsets
        self.cu_seqlens.copy_(torch.from_numpy(offsets), non_blocking=True)
        counts = np.zeros((self.max_loops, 2), np.int32)
        counts[: plan.max_loops] = np.array([plan.active_sequences, plan.active_rows]).T
        self.active_counts.copy_(torch.from_numpy(counts), non_blocking=True)
        _fill(self.last_rows, plan.last_rows)
        self._offsets.clear()  # worked out from another batch
        self._live.clear()

    def row_ranges(self, iteration: int, truncate: int | None = None) -> tuple[RowRange, ...]:
        if truncate is not None:
            raise ValueError("a static plan cannot truncate: where to depends on the batch")
        t = iteration - 1
        return (RowRange(iteration, 0, self.active_sequences[t], 0, self.active_rows[t]),)

    def row_count(self, iteration: int) -> Tensor:
        """(1,) int32: live rows of an iteration."""
        return self.active_counts[iteration - 1, 1:]

    # What is remembered below must serve training too, also where it is first asked for in
    # evaluation.

    @torch.inference_mode(False)
    def live(self, iteration: int) -> Tensor:
        """(N_t, 1) bool: which of the capacity's rows are live."""
        if iteration not in self._live:
            rows = torch.arange(self.active_rows[iteration - 1], device=self.device)
            self._live[iteration] = (rows < self.row_count(iteration)).unsqueeze(1)
        return self._live[iteration]

    @torch.inference_mode(False)
    def layout_of(self, row_range: RowRange) -> PaddedLayout:
        """Offsets of the sequences that loop in this iteration, the others being empty."""
        t, last = row_range.iteration, row_range.last_sequence
        if t not in self._offsets:
            self._offsets[t] = torch.minimum(self.cu_seqlens[: last + 1], self.row_count(t))
        offsets, longest = self._offsets[t], self.capacity.longest
        return PaddedLayout(offsets, longest, lambda: self._make_static_padding(t, offsets), 0)

    @torch.inference_mode(False)
    def _make_static_padding(
        self, iteration: int, offsets: Tensor
    ) -> tuple[int, Tensor, tuple[Group, ...]]:
        """One slot for every token of every sequence, and a last sequence for the dead rows.

        Empty sequences attend to their zeros, so that nothing is ever NaN.
        """
        last, longest = len(offsets) - 1, self.capacity.longest
        rows = torch.arange(self.active_rows[iteration - 1], device=self.device, dtype=torch.int32)
        sequence = torch.searchsorted(offsets[1:], rows, right=True)
        place = (rows - offsets[sequence.clamp(max=last - 1)]) * (sequence < last)
        lengths = torch.cat((offsets.diff(), offsets.new_zeros(1)))
        absent = torch.arange(longest, device=self.device) >= lengths[:, None]
        absent &= lengths[:, None] > 0
        group = Group(0, last + 1, longest, absent.unsqueeze(1))
        return (last + 1) * longest, sequence * longest + place, (group,)


def _fill(buffer: Tensor, values: Tensor, beyond: float = 0) -> None:
    """Copies values into the start of a buffer and `beyond` into the rest."""
    buffer[: len(values)].copy_(values, non_blocking=True)
    buffer[len(values) :].fill_(beyond)


class CapacityBatch:
    """The tensors of a batch at a capacity; `batch` is what a model takes."""

    def __init__(self, capacity: Capacity, device: torch.device | str):
        self.capacity = capacity
        self.plan = CapacityPlan(capacity, device)
        offsets = lengths_to_offsets(np.asarray(capacity.targets))
        new = lambda n, dtype=torch.int64: torch.zeros(n, dtype=dtype, device=self.plan.device)
        self.batch = PackedBatch(
            tokens=new(capacity.rows[0]),
            plan=self.plan,
            rows=new(int(offsets[-1])),
            row_offsets=tuple(offsets.tolist()),
            targets=new(int(offsets[-1])),
            weights=new(int(offsets[-1]), torch.float32),
            answers=new(capacity.sequences),
            answer_weights=new(capacity.sequences, torch.float32),
            order=np.arange(capacity.sequences),
            max_token=0,
        )

    def load(self, batch: PackedBatch) -> None:
        """Copies a batch in. Raises ValueError where it does not fit."""
        reason = self.capacity.reason(batch)
        if reason is not None:
            raise ValueError(f"{reason}: make it larger (Capacity.of takes batches and a slack)")
        into = self.batch
        self.plan.load(batch.plan)
        _fill(into.tokens, batch.tokens)
        counts = np.diff(batch.row_offsets)
        starts = np.asarray(into.row_offsets[: len(counts)], np.int64)
        place = torch.from_numpy(concat_ranges(starts, counts)).to(into.rows.device)
        for buffer, values, beyond in (
            (into.rows, batch.rows, 0), (into.targets, batch.targets, -1),
            (into.weights, batch.weights, 0),
        ):  # fmt: skip
            buffer.fill_(beyond)
            buffer[place] = values.to(buffer.device, non_blocking=True)
        _fill(into.answers, batch.answers, -1)
        _fill(into.answer_weights, batch.answer_weights)

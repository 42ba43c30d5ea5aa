"""Batches with fixed shapes, as CUDA graphs need them.

A `Capacity` gives the largest supported sizes. `CapacityBatch` allocates tensors of these sizes,
and `load` copies a batch into them. Iteration t always computes the capacity's number of rows; the
number of live rows (the active prefix of the loaded batch) is known on the device only. The other
rows are dead: they belong to finished sequences or are unused. The engine leaves their states and
gradients unchanged, and their targets are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan, RowRange
from relay_fast.batch.transfer import BufferLayout, send
from relay_fast.kernels.attention_ref import Group, PaddedLayout
from relay_fast.utils.arguments import check_kind
from relay_fast.utils.numbers import as_float, as_int
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

ALIGN = 64  # rows are rounded up to whole blocks of the kernels


@dataclass(frozen=True)
class Capacity:
    """The largest supported sizes of a batch.

    Args:
        rows: rows in each iteration.
        active: sequences that still loop in each iteration.
        targets: rows with targets in each iteration.
        sequences: number of sequences, including those with 0 loops.
        longest: tokens of the longest sequence.

    Raises:
        ValueError: if the lists differ in length, are empty, or rows or active increase.
    """

    rows: tuple[int, ...]
    active: tuple[int, ...]
    targets: tuple[int, ...]
    sequences: int
    longest: int

    def __post_init__(self) -> None:
        for name in ("rows", "active", "targets"):
            check_kind(
                f"capacity {name}", getattr(self, name), tuple | list, "give a tuple of ints"
            )
        sizes = {len(self.rows), len(self.active), len(self.targets)}
        if len(sizes) != 1 or not self.rows:
            raise ValueError(
                f"capacity rows, active and targets have {len(self.rows)}, {len(self.active)} and "
                f"{len(self.targets)} entries: give one entry per iteration, at least one"
            )
        for name in ("rows", "active", "targets"):
            for value in getattr(self, name):
                as_int(f"capacity {name}", value, least=0)
        for name in ("sequences", "longest"):
            as_int(f"capacity {name}", getattr(self, name), least=0)
        for name in ("rows", "active"):
            values = getattr(self, name)
            if any(a < b for a, b in zip(values, values[1:], strict=False)):
                raise ValueError(f"capacity {name} must not increase with the iteration: {values}")

    @property
    def token_iterations(self) -> int:
        return sum(self.rows)

    @staticmethod
    def of(batches: Iterable[PackedBatch], slack: float = 0.1, spread: float = 0.0) -> Capacity:
        """Returns the capacity that the given batches need, plus a margin.

        Args:
            batches: at least one batch.
            slack: relative margin of everything except the longest sequence and the iterations.
            spread: extra relative margin spread / √k of an iteration that k sequences reach: with
                random lengths, k varies between batches by about √k.
        """
        slack, spread = as_float("slack", slack, least=0), as_float("spread", spread, least=0)
        check_kind("batches", batches, Iterable, "give a list of PackedBatch")
        batches = list(batches)
        for batch in batches:
            check_kind("an entry of batches", batch, PackedBatch, "give a list of PackedBatch")
        if not batches:
            raise ValueError("Capacity.of got no batch: give at least one")
        loops = max(b.plan.max_loops for b in batches)

        def most(of) -> np.ndarray:
            return np.array([max(of(b, t) for b in batches) for t in range(1, loops + 1)], int)

        active = most(lambda b, t: _at(b.plan.active_sequences, t))
        more = 1 + slack + spread / np.sqrt(np.maximum(1, active))
        grow = lambda values: np.ceil(np.round(values * more, 6)).astype(int)
        rows = grow(most(lambda b, t: b.plan.rows_at(t) if t > 1 else b.plan.rows))
        rows = np.maximum.accumulate(rows[::-1])[::-1]  # may not increase with the iteration
        sequences = int(np.ceil(max(len(b) for b in batches) * (1 + slack)))
        return Capacity(
            tuple((-(-rows // ALIGN) * ALIGN).tolist()),
            tuple(np.minimum(grow(active), sequences).tolist()),
            tuple(grow(most(lambda b, t: _at(np.diff(b.row_offsets), t))).tolist()),
            sequences,
            max(int(b.plan.lengths.max(initial=1)) for b in batches),
        )

    def depths(self, count: int) -> list[Capacity]:
        """Returns up to `count` capacities of evenly spaced numbers of iterations, the smallest
        first: this one, and its first iterations. Raises ValueError for a count below 1."""
        if count < 1:
            raise ValueError(f"depths = {count}: give 1 or more")
        loops = len(self.rows)
        ends = sorted({-(-loops * k // count) for k in range(1, count + 1)})
        return [
            replace(self, rows=self.rows[:t], active=self.active[:t], targets=self.targets[:t])
            for t in ends
        ]

    def reason(self, batch: PackedBatch) -> str | None:
        """Returns why a batch does not fit, or None if it does."""
        plan = batch.plan
        if plan.max_loops > len(self.rows):
            return f"the batch loops {plan.max_loops} times, the capacity is {len(self.rows)}"
        longest = int(plan.lengths.max(initial=0))
        limits = [
            ("sequences", len(batch), self.sequences),
            ("rows", plan.rows, self.rows[0]),
            ("tokens in its longest sequence", longest, self.longest),
        ]
        counts = np.diff(batch.row_offsets)
        for t in range(1, plan.max_loops + 1):
            limits += [
                (f"rows in iteration {t}", plan.rows_at(t), self.rows[t - 1]),
                (
                    f"active sequences in iteration {t}",
                    plan.active_sequences[t - 1],
                    self.active[t - 1],
                ),
                (f"targets in iteration {t}", int(counts[t - 1]), self.targets[t - 1]),
            ]
        for what, have, most in limits:
            if have > most:
                return f"the batch has {have} {what}, the capacity is {most}"
        return None


def _at(values: Sequence[int], iteration: int) -> int:
    return int(values[iteration - 1]) if iteration <= len(values) else 0


class CapacityPlan(Plan):
    """A plan with the sizes of a capacity; the loaded batch's own counts are on the device.

    Args:
        capacity: the sizes.
        device: where the indices are.
        indices: tensors as `index_sizes` lists them.
    """

    fixed_capacity = True

    def __init__(self, capacity: Capacity, device: torch.device | str, indices: Sequence[Tensor]):
        c = self.capacity = capacity
        self.device = torch.device(device)
        self.sorted, self.order = True, np.arange(c.sequences)
        self.lengths = np.full(c.sequences, c.longest)
        self.max_loops = len(c.rows)
        self.loops = np.full(c.sequences, self.max_loops)
        # The host knows the sizes only; the sequences' offsets are on the device.
        self.active_sequences, self.active_rows = c.active, c.rows
        self.state_offsets = (0, *np.cumsum(c.rows).tolist())
        self.positions, self.tokens, self.cu_seqlens, self.active_counts = indices[:4]
        self.last_rows, self.final_rows = indices[4:]
        self.forget()

    @property
    def sequences(self) -> int:
        return self.capacity.sequences

    @property
    def rows(self) -> int:
        return self.capacity.rows[0]

    @staticmethod
    def index_sizes(capacity: Capacity) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of the index tensors: positions, tokens, cu_seqlens,
        active_counts (sequences and rows of each iteration), last_rows and final_rows (where the
        last state of each row is in the input and all states, end to end)."""
        rows, sequences = capacity.rows[0], capacity.sequences
        return [
            ((rows,), torch.int32),
            ((rows,), torch.int64),
            ((sequences + 1,), torch.int32),
            ((len(capacity.rows), 2), torch.int32),
            ((sequences,), torch.int64),
            ((rows,), torch.int64),
        ]

    def indices(self) -> list[Tensor]:
        raise RuntimeError(
            "a fixed-capacity plan cannot change its device: make a CapacityBatch on the other one"
        )

    def write(self, plan: Plan, indices: Sequence[Tensor]) -> None:
        """Writes a plan's counts and indices into tensors like this plan's; the rest is empty."""
        positions, tokens, cu_seqlens, active_counts, last_rows, final_rows = indices
        _fill(positions, plan.positions)
        _fill(tokens, plan.tokens)
        offsets = np.full(self.sequences + 1, plan.rows)
        offsets[: plan.sequences + 1] = plan.offsets
        cu_seqlens.copy_(torch.from_numpy(offsets), non_blocking=True)
        counts = np.zeros((self.max_loops, 2), np.int32)
        counts[: plan.max_loops] = np.array([plan.active_sequences, plan.active_rows]).T
        active_counts.copy_(torch.from_numpy(counts), non_blocking=True)
        _fill(last_rows, plan.last_rows)
        final = np.arange(self.rows)
        starts = np.concatenate(([0], np.add(self.state_offsets[:-1], self.rows)))
        final[: plan.rows] += np.repeat(starts[plan.loops], plan.lengths)
        final_rows.copy_(torch.from_numpy(final), non_blocking=True)

    def forget(self) -> None:
        """Drops what was computed from the previous batch."""
        self._offsets: Tensor | None = None  # (T, sequences + 1)
        self._live: Tensor | None = None  # (T, rows)

    def row_ranges(self, iteration: int, truncate: int | None = None) -> tuple[RowRange, ...]:
        if truncate is not None:
            raise ValueError("fixed-capacity batches do not support truncate: use truncate=None")
        t = iteration - 1
        return (RowRange(iteration, 0, self.active_sequences[t], 0, self.active_rows[t]),)

    def row_count(self, iteration: int) -> Tensor:
        """Returns the number of live rows of an iteration, (1,) int32."""
        return self.active_counts[iteration - 1, 1:]

    # The cached tensors below, each of all iterations at once, must not be inference tensors:
    # training may use them later.

    @torch.inference_mode(False)
    def live(self, iteration: int) -> Tensor:
        """Returns which rows of an iteration are live, (N_t, 1) bool."""
        if self._live is None:
            rows = torch.arange(self.rows, device=self.device)
            self._live = rows < self.active_counts[:, 1:]
        return self._live[iteration - 1, : self.active_rows[iteration - 1]].unsqueeze(1)

    @torch.inference_mode(False)
    def layout_of(self, row_range: RowRange) -> PaddedLayout:
        """Returns the offsets of the sequences that loop in this iteration; the others are
        empty."""
        t, last = row_range.iteration, row_range.last_sequence
        if self._offsets is None:
            self._offsets = torch.minimum(self.cu_seqlens, self.active_counts[:, 1:])
        offsets, longest = self._offsets[t - 1, : last + 1], self.capacity.longest
        return PaddedLayout(offsets, longest, lambda: self._make_padding(t, offsets), 0)

    @torch.inference_mode(False)
    def _make_padding(
        self, iteration: int, offsets: Tensor
    ) -> tuple[int, Tensor, tuple[Group, ...]]:
        """Pads each sequence to the longest one, and adds a last sequence for the dead rows.

        Empty sequences attend to their zeros, so that nothing becomes NaN.
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
    """Copies values into the start of a buffer, and fills the rest with `beyond`."""
    buffer[: len(values)].copy_(values, non_blocking=True)
    buffer[len(values) :].fill_(beyond)


class CapacityBatch:
    """The tensors of a batch at a fixed capacity; `batch` is the PackedBatch to pass to a model.

    They are parts of one buffer, so that a batch on the host takes one copy to the device.

    Args:
        capacity: the sizes.
        device: where the tensors are allocated.
    """

    def __init__(self, capacity: Capacity, device: torch.device | str):
        self.capacity = capacity
        offsets = lengths_to_offsets(np.asarray(capacity.targets))
        rows, targets, sequences = (capacity.rows[0],), (int(offsets[-1]),), (capacity.sequences,)
        whole, real = torch.int64, torch.float32
        own = [(rows, whole), (targets, whole), (targets, whole), (targets, real)]
        own += [(sequences, whole), (sequences, real)]
        indices = CapacityPlan.index_sizes(capacity)
        self._indices = len(indices)
        self._layout = BufferLayout([*indices, *own])
        self._buffer = self._layout.empty(device).zero_()
        views = self._layout.views(self._buffer)
        self.plan = CapacityPlan(capacity, device, views[: self._indices])
        tokens, target_rows, targets, weights, answers, answer_weights = views[self._indices :]
        self.batch = PackedBatch(
            tokens=tokens,
            plan=self.plan,
            rows=target_rows,
            row_offsets=tuple(offsets.tolist()),
            targets=targets,
            weights=weights,
            answers=answers,
            answer_weights=answer_weights,
            order=np.arange(capacity.sequences),
            max_token=0,
        )

    def __getstate__(self) -> tuple[Capacity, torch.device, Tensor]:
        return self.capacity, self.plan.device, self._buffer

    def __setstate__(self, state: tuple[Capacity, torch.device, Tensor]) -> None:
        capacity, device, buffer = state
        self.__init__(capacity, device)
        self._buffer.copy_(buffer)

    def load(self, batch: PackedBatch) -> None:
        """Copies a batch into the tensors. Raises ValueError if it does not fit.

        A batch on the host is written into pinned memory and copied asynchronously, beside what
        runs on the device.
        """
        reason = self.capacity.reason(batch)
        if reason is not None:
            raise ValueError(f"{reason}: build a larger one with Capacity.of(batches, slack)")
        at, device = batch.tokens.device, self.plan.device
        image = self._layout.empty(at, pinned=at.type == "cpu" and device.type == "cuda")
        views = self._layout.views(image)
        self.plan.write(batch.plan, views[: self._indices])
        self._write(batch, *views[self._indices :])
        self._buffer.copy_(send(image, device), non_blocking=True)
        self.plan.forget()

    def _write(
        self,
        batch: PackedBatch,
        tokens: Tensor,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor,
        answers: Tensor,
        answer_weights: Tensor,
    ) -> None:
        """Writes a batch's tensors into tensors of the capacity's sizes."""
        _fill(tokens, batch.tokens)
        counts = np.diff(batch.row_offsets)
        starts = np.asarray(self.batch.row_offsets[: len(counts)], np.int64)
        place = torch.from_numpy(concat_ranges(starts, counts)).to(rows.device)
        for into, values, beyond in (
            (rows, batch.rows, 0),
            (targets, batch.targets, -1),
            (weights, batch.weights, 0),
        ):
            into.fill_(beyond)
            into[place] = values
        _fill(answers, batch.answers, -1)
        _fill(answer_weights, batch.answer_weights)

"""Batches without padding: sequences laid end to end, sorted by loops, with their plan and
targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.feeder import Feeder
from relay_fast.batch.plan import Plan
from relay_fast.batch.transfer import picklable, upload
from relay_fast.utils.ragged import pieces


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of N tokens in all, largest loop count first.

    Args:
        tokens: (N,) int64.
        plan: order, active prefix and offsets.
        rows: (R,) int64, rows with a target as indices into the active prefix of their iteration,
            iteration-major.
        row_offsets: T + 1 ints; the rows of iteration t start at row_offsets[t − 1].
        targets: (R,) int64.
        weights: (R,) fp32, w_task · λ / (B · T_i · |M_t|).
        answers: (B,) int64.
        answer_weights: (B,) fp32, w_task / B.
        order: (B,), the caller's sample of each sequence.
        max_token: the largest token id.
        fed: (N,) int64, of a `side_by_side` batch: a second token at each place. Its sequences are
            iterations, with the last one of each sample at the end, in `order`.
        target_offsets: (sequences + 1,), of a `side_by_side` batch: where the rows of each sequence
            start.
        feeder: for a model with feedback that carries its state.
        true_feed: (Σ n_i · T_i,) int64, iteration-major: the true rounds for each iteration if the
            state is carried.
        truth: share of the iterations that get true rounds; the others get the model's own.
        next_tokens: whether the targets are the tokens that follow, as an autoregressive model
            learns; None if unknown.
    """

    tokens: Tensor
    plan: Plan
    rows: Tensor
    row_offsets: tuple[int, ...]
    targets: Tensor
    weights: Tensor
    answers: Tensor
    answer_weights: Tensor
    order: np.ndarray
    max_token: int
    fed: Tensor | None = None
    target_offsets: np.ndarray | None = None
    feeder: Feeder | None = None
    true_feed: Tensor | None = None
    truth: float = 1.0
    next_tokens: bool | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def answer_rows(self) -> Tensor:
        """(B,) int64: the rows whose last state the answers are read from."""
        return self.plan.last_rows[self.plan.sequences - len(self) :]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the batch on a device, by one asynchronous copy; itself if it is there."""
        device = torch.device(device)
        if device.type == self.plan.device.type and device.index in (None, self.plan.device.index):
            return self
        own, indices = self._tensors(), self.plan.indices()
        last = [] if self.feeder is None else [self.feeder.last]
        moved = iter(upload([*own.values(), *indices, *last], device))
        changed = {name: next(moved) for name in own}
        changed["plan"] = self.plan.with_indices(device, [next(moved) for _ in indices])
        if last:
            changed["feeder"] = replace(self.feeder, last=next(moved))
        return replace(self, **changed)

    def pin_memory(self) -> PackedBatch:
        """Returns the batch in pinned memory; called by a DataLoader with `pin_memory=True`."""
        return replace(self, **{name: t.pin_memory() for name, t in self._tensors().items()})

    def __getstate__(self) -> dict[str, Any]:
        return picklable(vars(self))

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in values.items() if isinstance(t, Tensor)}

    def parts(self, tokens: int) -> Iterator[PackedBatch]:
        """Splits a `side_by_side` batch into batches of about `tokens` tokens each, whose losses
        sum to its own; yields any other batch unchanged."""
        plan = self.plan
        if self.fed is None or plan.rows <= tokens:
            yield self
            return
        first_answer = plan.sequences - len(self)
        for chosen in pieces(plan.lengths, tokens):
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            rows = slice(int(plan.offsets[first]), int(plan.offsets[last]))
            offsets = self.target_offsets[first : last + 1]
            targets = slice(int(offsets[0]), int(offsets[-1]))
            answers = slice(max(0, first - first_answer), max(0, last - first_answer))
            yield replace(
                self,
                plan=plan.part(first, last),
                tokens=self.tokens[rows],
                fed=self.fed[rows],
                rows=self.rows[targets] - rows.start,
                row_offsets=(0, targets.stop - targets.start),
                target_offsets=offsets - offsets[0],
                targets=self.targets[targets],
                weights=self.weights[targets],
                answers=self.answers[answers],
                answer_weights=self.answer_weights[answers],
                order=self.order[answers],
            )

    @staticmethod
    def looped(*arguments, **options) -> PackedBatch:
        """Calls `relay_fast.data.collate.collate_looped`."""
        from relay_fast.data.collate import collate_looped

        return collate_looped(*arguments, **options)

    @staticmethod
    def side_by_side(*arguments, **options) -> PackedBatch:
        """Calls `relay_fast.data.collate.collate_side_by_side`."""
        from relay_fast.data.collate import collate_side_by_side

        return collate_side_by_side(*arguments, **options)

    @staticmethod
    def carried(*arguments, **options) -> PackedBatch:
        """Calls `relay_fast.data.collate.collate_carried`."""
        from relay_fast.data.collate import collate_carried

        return collate_carried(*arguments, **options)

    @staticmethod
    def autoregressive(*arguments, **options) -> PackedBatch:
        """Calls `relay_fast.data.collate.collate_autoregressive`."""
        from relay_fast.data.collate import collate_autoregressive

        return collate_autoregressive(*arguments, **options)

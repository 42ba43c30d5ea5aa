"""The rows that are computed together in one iteration."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.paddings import Paddings, device_tensor
from relay_fast.kernels.attention_ref import PaddedLayout
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class Members(NamedTuple):
    """The sequences of a row range that are not consecutive, and where their rows are."""

    rows: Tensor  # (n,) int64, among all rows
    source: Tensor | slice  # in state t − 1
    target: Tensor | slice  # in state t
    layout: PaddedLayout


@dataclass(frozen=True)
class RowRange:
    """Sequences that are computed together in one iteration: consecutive ones, or `members`.

    `grad` is False if truncated backpropagation stops the gradient there. Of a range with members,
    the first sequence and row are 0, and the last ones their numbers. `part` tells the ranges of an
    iteration apart, also where truncation is known in the backward only.
    """

    iteration: int  # 1-based
    first_sequence: int
    last_sequence: int  # exclusive
    first_row: int
    last_row: int  # exclusive
    grad: bool = True
    members: Members | None = field(default=None, compare=False)
    part: int = field(default=1, compare=False)

    @property
    def rows(self) -> slice | Tensor:
        """The rows' place among all rows of the batch."""
        return slice(self.first_row, self.last_row) if self.members is None else self.members.rows

    @property
    def source(self) -> slice | Tensor:
        """The rows' place in state t − 1."""
        return self.rows if self.members is None else self.members.source

    @property
    def target(self) -> slice | Tensor:
        """The rows' place in state t."""
        return self.rows if self.members is None else self.members.target


def scattered(
    iteration: int,
    sequences: np.ndarray,
    offsets: np.ndarray,
    device: torch.device,
    grad: bool = True,
    source: np.ndarray | slice | None = None,
    target: slice | None = None,
) -> RowRange:
    """Makes a row range of any sequences.

    Args:
        iteration: 1-based.
        sequences: indices, ascending.
        offsets: first row of each sequence of the batch, (all sequences + 1,).
        device: where the index tensors are.
        grad: whether gradients flow through.
        source: where the rows are in state t − 1; default: as among all rows.
        target: where they are in state t; default: as among all rows.
    """
    lengths = offsets[sequences + 1] - offsets[sequences]
    rows = device_tensor(concat_ranges(offsets[sequences], lengths), torch.int64, device)
    if isinstance(source, np.ndarray):
        source = device_tensor(source, torch.int64, device)
    own = lengths_to_offsets(lengths)
    layout = PaddedLayout(
        device_tensor(own, torch.int32, device),
        int(lengths.max(initial=0)),
        partial(Paddings(lengths, device).make, 0, len(lengths)),
        int(own[-1]),
    )
    members = Members(
        rows, rows if source is None else source, rows if target is None else target, layout
    )
    return RowRange(iteration, 0, len(sequences), 0, int(own[-1]), grad, members, int(grad))

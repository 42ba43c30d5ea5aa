"""Pads packed sequences for torch's attention, in groups of similar length."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.transfer import upload
from relay_fast.kernels.attention_ref import Group

GROUP_COST = 16_000  # cost of another attention group in score elements, measured on a CPU
MAX_GROUPS = 6


class Paddings:
    """Pads sequences for torch's attention, the only op that needs padding; sequences of similar
    length share a group.

    Separate from the plan, which holds the layouts that refer to it: without a reference cycle a
    dropped batch is freed at once, and a used one can be pickled.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device):
        self.lengths, self.device = lengths, device

    @cached_property
    def _group_bounds(self) -> np.ndarray:
        """The largest length of each attention group, ascending, with minimal total cost."""
        lengths, counts = np.unique(self.lengths[self.lengths > 0], return_counts=True)
        if len(lengths) == 0:
            return lengths
        totals = np.concatenate([[0], np.cumsum(counts)])
        best = np.full(len(lengths) + 1, np.inf)
        best[0] = 0
        chosen: list[np.ndarray] = []
        costs = np.full((len(lengths) + 1, len(lengths) + 1), np.inf)
        for end in range(1, len(lengths) + 1):
            width = float(lengths[end - 1]) ** 2
            costs[:end, end] = (totals[end] - totals[:end]) * width + GROUP_COST
        table = best
        finals = []
        for _ in range(min(MAX_GROUPS, len(lengths))):
            candidates = table[:, None] + costs
            chosen.append(candidates.argmin(0))
            table = candidates.min(0)
            finals.append(table[-1])
        end, bounds = len(lengths), []
        for depth in range(int(np.argmin(finals)), -1, -1):
            bounds.append(lengths[end - 1])
            end = int(chosen[depth][end])
        return np.array(bounds[::-1])

    def make(self, first: int, last: int) -> tuple[int, Tensor | None, tuple[Group, ...]]:
        """Returns slots, slot and groups (see `PaddedLayout`) of sequences first..last − 1."""
        lengths = self.lengths[first:last]
        rows = int(lengths.sum())
        member = np.searchsorted(self._group_bounds, lengths)
        base = np.zeros(len(lengths), dtype=np.int64)
        groups, slot = [], 0
        for g in range(len(self._group_bounds)):
            inside = np.flatnonzero((member == g) & (lengths > 0))
            if len(inside) == 0:
                continue
            inner = lengths[inside]
            width = int(inner.max())
            base[inside] = slot + np.arange(len(inside)) * width
            mask = None
            if inner.min() < width:
                mask = np.arange(width)[None, :] >= inner[:, None]
                mask = device_tensor(mask[:, None], torch.bool, self.device)
            groups.append(Group(slot, len(inside), width, mask))
            slot += len(inside) * width
        if len(groups) <= 1 and slot == rows:
            return slot, None, tuple(groups)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        slots = np.arange(rows) + np.repeat(base - starts, lengths)
        return slot, device_tensor(slots, torch.int64, self.device), tuple(groups)


@torch.inference_mode(False)
def device_tensor(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies an array to a device, never as an inference tensor, since a plan outlives the mode.

    Args:
        array: The array.
        dtype: The dtype of the tensor.
        device: Where the tensor is made.

    Returns:
        A tensor of the array's shape.
    """
    return upload([torch.from_numpy(np.ascontiguousarray(array)).to(dtype)], device)[0]

"""Shares of a batch: its sequences dealt out to processes so that each has the same work.

The shares' losses sum to the batch's, because the weights of its rows stay those of the batch; and
random masks are the batch's, because tokens keep their numbers (`Plan.token_numbers`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.feeder import Feeder
from relay_fast.batch.packed import PackedBatch
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


def deal(costs: Sequence[int] | np.ndarray, shares: int) -> list[np.ndarray]:
    """Deals items out so that the shares' costs are as equal as the largest-first rule makes them.

    The largest item left goes to the share with the least cost, then the fewest items, then the
    smallest number; the difference between two shares is at most the cost of one item.

    Args:
        costs: (items,) what each item costs, 0 or more.
        shares: how many there are, at least 1.

    Returns:
        The ascending indices of each share's items.
    """
    costs = np.asarray(costs, np.int64)
    heap = [(0, 0, k) for k in range(shares)]
    owner = np.empty(len(costs), np.int64)
    for item in np.argsort(-costs, kind="stable").tolist():
        cost, items, k = heap[0]
        owner[item] = k
        heapq.heapreplace(heap, (cost + int(costs[item]), items + 1, k))
    return [np.flatnonzero(owner == k) for k in range(shares)]


def share_of(batch: PackedBatch, share: int, shares: int) -> PackedBatch:
    """Returns one of the shares of a batch, which have equal Σ n_i · T_i.

    Args:
        batch: the whole batch, on the CPU.
        share: which one, 0 ≤ share < shares.
        shares: how many there are; where the batch has fewer sequences, some shares are empty.
    """
    if shares == 1:
        return batch
    plan = batch.plan
    return take_sequences(batch, deal(plan.lengths * plan.loops, shares)[share])


def take_sequences(batch: PackedBatch, chosen: np.ndarray) -> PackedBatch:
    """Returns the part of a batch with some of its sequences.

    Args:
        batch: the whole batch.
        chosen: (sequences of the part,) ascending indices into the plan's sorted sequences.
    """
    plan, part = batch.plan, batch.plan.take(chosen)
    tokens = _index(concat_ranges(plan.offsets[chosen], plan.lengths[chosen]), batch)
    place = np.full(plan.sequences, -1)
    place[chosen] = np.arange(len(chosen))

    # Rows with a target, of all iterations: those of the chosen sequences, where they stand now.
    rows = batch.rows.cpu().numpy()
    owner = np.searchsorted(plan.offsets, rows, side="right") - 1
    kept = np.flatnonzero(place[owner] >= 0)
    owner = owner[kept]
    moved = rows[kept] - plan.offsets[owner] + part.offsets[place[owner]]
    iteration = np.searchsorted(batch.row_offsets, kept, side="right") - 1
    counts = np.bincount(iteration, minlength=part.max_loops)[: part.max_loops]
    targets = _index(kept, batch)

    first_answer = plan.sequences - len(batch)
    answers = chosen[chosen >= first_answer] - first_answer
    own = _index(answers, batch)
    more = {}
    if batch.fed is not None:
        sizes = np.diff(batch.target_offsets)[chosen]
        more = {"fed": batch.fed[tokens], "target_offsets": lengths_to_offsets(sizes)}
    if batch.feeder is not None:
        last = torch.from_numpy(np.repeat(part.offsets[1:] - 1, part.lengths))
        more["feeder"] = Feeder(last.to(plan.device), batch.feeder.pad)
    if batch.true_feed is not None:
        more["true_feed"] = batch.true_feed[_index(_states(plan, chosen), batch)]
    return replace(
        batch,
        tokens=batch.tokens[tokens],
        plan=part,
        rows=_index(moved, batch),
        row_offsets=tuple(lengths_to_offsets(counts).tolist()),
        targets=batch.targets[targets],
        weights=batch.weights[targets],
        answers=batch.answers[own],
        answer_weights=batch.answer_weights[own],
        order=batch.order[answers],
        **more,
    )


def _states(plan, chosen: np.ndarray) -> np.ndarray:
    """Returns the iteration-major indices of the chosen sequences' rows in all their iterations."""
    parts = [np.empty(0, np.int64)]
    for t, active in enumerate(plan.active_sequences):
        inside = chosen[chosen < active]
        starts = plan.offsets[inside] + plan.state_offsets[t]
        parts.append(concat_ranges(starts, plan.lengths[inside]))
    return np.concatenate(parts)


def _index(values: np.ndarray, batch: PackedBatch) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.int64)).to(batch.plan.device)

"""Batches without padding: sequences laid end to end, sorted by loops, with their plan and
targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from relay_fast.plan import Plan, check_loops
from relay_fast.ragged import offsets_of, ragged_index
from relay_fast.tasks import TASK_NAMES, Samples, Task
from relay_fast.tasks.vocabulary import PAD

__all__ = ["PackedBatch", "Plan", "check_loops"]
WEIGHTINGS = ("sequence", "row")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of N tokens in all, largest loop count first.

    tokens (N,) int64; plan: order, active prefix, offsets (see `Plan`).
    rows (R,) int64: rows with a target, as index into the active prefix of their iteration,
    iteration-major; row_offsets: T + 1 ints, where the rows of iteration t start (index t − 1);
    targets (R,) int64; weights (R,) fp32: w_task · λ / (B · T_i · |M_t|).
    answers (B,) int64 and answer_weights (B,) fp32: w_task / B.
    order (B,): which sample of the caller each sequence is; max_token: the largest token id.
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

    def __len__(self) -> int:
        return self.plan.sequences

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device; itself if it is there already."""
        device = torch.device(device)
        if device.type == self.plan.device.type and device.index in (None, self.plan.device.index):
            return self
        moved = self._tensors(lambda t: t.to(device, non_blocking=True))
        return replace(self, plan=self.plan.to(device), **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, as a DataLoader with `pin_memory=True` asks for it."""
        return replace(self, **self._tensors(Tensor.pin_memory))

    def _tensors(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: change(t) for name, t in values.items() if isinstance(t, Tensor)}

    @staticmethod
    def looped(
        samples: Samples,
        tasks: Mapping[str, Task],
        *,
        task_weights: Mapping[str, float] | None = None,
        chain_weight: float = 1.0,
        weighting: str = "sequence",
        extra_pad: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """The looped model's batch: problems, and every iteration's round right-aligned.

        An input shorter than its task's longest round plus the boundary `<pad>` is padded on the
        left, between the task token (always leftmost) and the problem, and so is every input by
        `extra_pad` (S,) more tokens. weighting="sequence" lets
        sequences weigh alike whatever their length; "row" lets all supervised rows weigh alike.
        Raises ValueError for unknown weightings and tasks, and for tokens that are negative.
        """
        _check_weighting(weighting, task_weights)
        order = np.argsort(-samples.loops, kind="stable")
        s = samples.take(order)
        sizes = np.diff(s.problem_offsets)
        width = np.maximum(sizes, [tasks[TASK_NAMES[k]].min_input_tokens for k in s.task])
        if extra_pad is not None:
            width = width + extra_pad[order]
        plan = Plan(width, s.loops, device)
        tokens = np.full(plan.rows, PAD, np.int64)
        ends = plan.offsets[1:]
        tokens[ragged_index(ends - sizes + 1, sizes - 1)] = s.problem[
            ragged_index(s.problem_offsets[:-1] + 1, sizes - 1)
        ]
        tokens[plan.offsets[:-1]] = s.problem[s.problem_offsets[:-1]]

        # Rounds, iteration-major: the boundary <pad> and then the round's tokens.
        owner = np.repeat(np.arange(len(s)), s.loops)
        iteration = np.arange(len(owner)) - s.first_round[owner]
        major = np.lexsort((owner, iteration))
        owner, iteration = owner[major], iteration[major]
        lengths = np.diff(s.round_offsets)[major]
        if np.any(lengths >= width[owner]):
            raise ValueError(
                "a round does not fit into its input: raise the task's min_input_tokens"
            )
        counts = lengths + 1
        rows = ragged_index(ends[owner] - counts, counts)
        targets = np.full(len(rows), PAD, np.int64)
        starts = offsets_of(counts)[:-1]
        targets[ragged_index(starts + 1, lengths)] = s.rounds[
            ragged_index(s.round_offsets[:-1][major], lengths)
        ]
        per_iteration = np.bincount(iteration, weights=counts, minlength=plan.max_loops)
        task_weight = _task_weights(s, task_weights)
        if weighting == "sequence":
            share = chain_weight * task_weight[owner] / (len(s) * s.loops[owner] * counts)
        else:
            share = chain_weight * task_weight[owner] / len(rows)
        return PackedBatch(
            torch.from_numpy(tokens).to(device),
            plan,
            torch.from_numpy(rows).to(device),
            tuple(offsets_of(per_iteration.astype(np.int64)).tolist()),
            torch.from_numpy(targets).to(device),
            torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device),
            torch.from_numpy(s.answer.astype(np.int64)).to(device),
            torch.from_numpy((task_weight / max(1, len(s))).astype(np.float32)).to(device),
            order,
            max(_largest(tokens, targets), int(s.answer.max(initial=0))),  # no answer: negative
        )

    @staticmethod
    def autoregressive(
        samples: Samples,
        tasks: Mapping[str, Task],
        *,
        task_weights: Mapping[str, float] | None = None,
        weighting: str = "sequence",
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """The autoregressive model's batch: whole sequences, targets after the problem.

        Options and errors are those of `looped`.
        """
        _check_weighting(weighting, task_weights)
        sequence, offsets, prompts = samples.sequences(tasks)
        sizes = np.diff(offsets)
        inputs = ragged_index(offsets[:-1], sizes - 1)
        plan = Plan(sizes - 1, np.ones(len(samples), np.int64), device)
        counts = sizes - prompts
        rows = ragged_index(plan.offsets[:-1] + prompts - 1, counts)
        targets = sequence[ragged_index(offsets[:-1] + prompts, counts)]
        task_weight = _task_weights(samples, task_weights)
        if weighting == "sequence":
            share = task_weight / (max(1, len(samples)) * counts)
        else:
            share = task_weight / max(1, len(rows))
        return PackedBatch(
            torch.from_numpy(sequence[inputs].astype(np.int64)).to(device),
            plan,
            torch.from_numpy(rows).to(device),
            (0, len(rows)) if len(samples) else (0,),
            torch.from_numpy(targets.astype(np.int64)).to(device),
            torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device),
            torch.from_numpy(samples.answer.astype(np.int64)).to(device),
            torch.zeros(len(samples), device=device),
            np.arange(len(samples)),
            _largest(sequence),
        )


def _check_weighting(weighting: str, task_weights: Mapping[str, float] | None) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r} is unknown: use one of {WEIGHTINGS}")
    for name in set(task_weights or {}).difference(TASK_NAMES):
        raise ValueError(f"task_weights names {name!r}: the tasks are {', '.join(TASK_NAMES)}")


def _largest(*tokens: np.ndarray) -> int:
    """The largest token id."""
    least = min(int(part.min(initial=0)) for part in tokens)
    if least < 0:
        raise ValueError(f"token {least} is negative: token ids are 0 or more")
    return max(int(part.max(initial=0)) for part in tokens)


def _task_weights(samples: Samples, task_weights: Mapping[str, float] | None) -> np.ndarray:
    """w_task of each sample."""
    table = np.array([(task_weights or {}).get(name, 1.0) for name in TASK_NAMES])
    return table[samples.task]

"""Samples of tasks as flat arrays, from which batches are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from relay_fast.tasks.vocabulary import EOS
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

TASK_NAMES = ("arithmetic", "edit_distance", "lis")  # built-in: their places are their indices


class WritesAnswers(Protocol):
    """The part of a task that `Samples.sequences` needs."""

    index: int

    @property
    def answer_suffix(self) -> tuple[int, ...] | None:
        """Tokens between the last round and the answer; None if no answer is written."""


_Task = TypeVar("_Task", bound=WritesAnswers)


def tasks_present(kinds: np.ndarray, tasks: Mapping[str, _Task]) -> dict[int, _Task]:
    """Returns the tasks of samples by their index, ascending.

    Args:
        kinds: (S,) `Samples.task`.
        tasks: At least the tasks that occur, by name.

    Raises:
        ValueError: A task is missing.
    """
    by_index = {task.index: task for task in tasks.values()}
    present = np.unique(kinds).tolist()
    for k in present:
        if k not in by_index:
            name = repr(TASK_NAMES[k]) if 0 <= k < len(TASK_NAMES) else f"a task of index {k}"
            raise ValueError(
                f"the samples hold {name}, which is not among the tasks given; add it to the "
                f"mapping."
            )
    return {k: by_index[k] for k in present}


@dataclass(frozen=True, eq=False)
class Samples:
    """S samples, ragged parts laid end to end; R = sum of `loops` rounds in all.

    task            (S,) int32, the `index` of each sample's task
    length          (S,) int32, the problem's complexity (see the tasks)
    problem         (tokens,) int32, task token first, `=` or `<sep>` last
    problem_offsets (S + 1,) int64
    rounds          (tokens,) int32, all rounds of all samples
    round_offsets   (R + 1,) int64
    loops           (S,) int32, rounds of each sample
    answer          (S,) int32, token id
    """

    task: np.ndarray
    length: np.ndarray
    problem: np.ndarray
    problem_offsets: np.ndarray
    rounds: np.ndarray
    round_offsets: np.ndarray
    loops: np.ndarray
    answer: np.ndarray

    def __len__(self) -> int:
        return len(self.task)

    @cached_property
    def first_round(self) -> np.ndarray:
        """(S + 1,) int64; sample i has the rounds first_round[i] .. first_round[i + 1] - 1."""
        return lengths_to_offsets(self.loops)

    def iterations(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sample of each round, in order, and the number of rounds before it, (I,)."""
        owner = np.repeat(np.arange(len(self)), self.loops)
        return owner, np.arange(len(owner)) - self.first_round[owner]

    def problem_of(self, i: int) -> np.ndarray:
        """Returns the problem tokens of sample i."""
        i = self._position(i)
        return self.problem[self.problem_offsets[i] : self.problem_offsets[i + 1]]

    def rounds_of(self, i: int) -> list[np.ndarray]:
        """Returns the rounds of sample i, one token array each."""
        i = self._position(i)
        bounds = self.round_offsets[self.first_round[i] : self.first_round[i + 1] + 1]
        return [self.rounds[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]

    def take(self, index: Any) -> Samples:
        """Selects samples by numpy indexing with `index` (integers, mask, slice), in order.

        Raises IndexError as numpy does.
        """
        rows = np.atleast_1d(np.arange(len(self))[index])
        loops = self.loops[rows]
        problem_sizes = np.diff(self.problem_offsets)[rows]
        rounds = concat_ranges(self.first_round[rows], loops)
        round_sizes = np.diff(self.round_offsets)[rounds]
        return Samples(
            task=self.task[rows],
            length=self.length[rows],
            problem=self.problem[concat_ranges(self.problem_offsets[rows], problem_sizes)],
            problem_offsets=lengths_to_offsets(problem_sizes),
            rounds=self.rounds[concat_ranges(self.round_offsets[rounds], round_sizes)],
            round_offsets=lengths_to_offsets(round_sizes),
            loops=loops,
            answer=self.answer[rows],
        )

    @staticmethod
    def concat(parts: Sequence[Samples]) -> Samples:
        """Concatenates all samples of `parts`, in order."""
        columns = {}
        for field in fields(Samples):
            arrays = [getattr(part, field.name) for part in parts]
            if field.name.endswith("_offsets"):
                arrays = [np.zeros(1, np.int64), *map(np.diff, arrays)]
                columns[field.name] = np.cumsum(np.concatenate(arrays))
            else:
                columns[field.name] = np.concatenate([np.zeros(0, np.int32), *arrays])
        return Samples(**columns)

    def sequences(
        self, tasks: Mapping[str, WritesAnswers]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Builds autoregressive sequences `[TASK] problem round_1 … round_T (suffix answer) <eos>`.

        The prompt is the problem; the loss covers everything after it. `tasks` has at least the
        tasks that occur, by name. Raises ValueError if one is missing.

        Returns:
            Tokens (flat, int32), offsets (S + 1,) int64 and prompt lengths (S,) int32.
        """
        present = tasks_present(self.task, tasks)
        tails = np.zeros(len(self), np.int64)
        for k, task in present.items():
            suffix = task.answer_suffix
            tails[self.task == k] = 0 if suffix is None else len(suffix) + 1
        prompts = np.diff(self.problem_offsets)
        chains = np.diff(self.round_offsets[self.first_round])
        offsets = lengths_to_offsets(prompts + chains + tails + 1)
        # One byte for the origin of each token is three times faster than 64-bit indices.
        sizes = np.stack([prompts, chains, tails + 1], axis=1).ravel()
        origin = np.repeat(np.tile(np.arange(3, dtype=np.uint8), len(self)), sizes)
        tokens = np.full(offsets[-1], EOS, np.int32)
        tokens[origin == 0] = self.problem
        tokens[origin == 1] = self.rounds
        ends = offsets[1:] - 1
        for k, task in present.items():
            suffix = task.answer_suffix
            if suffix is None:
                continue
            rows = np.flatnonzero(self.task == k)
            for back, token in enumerate(reversed(suffix), start=2):
                tokens[ends[rows] - back] = token
            tokens[ends[rows] - 1] = self.answer[rows]
        return tokens, offsets, prompts.astype(np.int32)

    def _position(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}: the last one is {len(self) - 1}")
        return i % len(self)

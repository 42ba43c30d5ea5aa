"""Checks chains: by the tasks' rules, by the answer alone, or against solved problems."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from relay_fast.tasks import Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.utils.ragged import concat_ranges

CHECKS = ("task", "self", None)


def verify_chains(
    written: Samples, tasks: Mapping[str, Task], verify: str | None = "task"
) -> np.ndarray:
    """Checks chains that a model wrote.

    Args:
        written: S chains.
        tasks: The tasks by name.
        verify: "task": every round is the one that the problem's rules demand, and the answer is
            the one that the rounds imply. This solves each problem; if they are solved already,
            `correct_chains` is many times faster. "self": the answer is the one that the rounds
            imply (needs no solver and no label). None: all chains pass.

    Returns:
        (S,) bool, the chains that pass.

    Raises:
        ValueError: The check is unknown, or a problem is malformed.
    """
    check_verify(verify)
    passed = np.ones(len(written), bool)
    if verify is None:
        return passed
    for k, task in tasks_present(written.task, tasks).items():
        rows = np.flatnonzero(written.task == k)
        own = _select(written, rows)
        implied = task.answers_of(own)
        passed[rows] = (implied >= 0) & (implied == own.answer)
        if verify == "task":
            rows = rows[passed[rows]]
            own = _select(written, rows)
            passed[rows] = correct_chains(own, task.solve_samples(own))
    return passed


def same_answers(written: Samples, truth: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    """Returns (S,) bool: the answer is that of `truth`, the solved problems.

    Args:
        written: S chains that a model wrote.
        truth: The same problems, solved.
        tasks: The tasks by name.
    """
    same = np.zeros(len(written), bool)
    for k, task in tasks_present(written.task, tasks).items():
        rows = np.flatnonzero(written.task == k)
        same[rows] = task.same_answers(_select(written, rows), _select(truth, rows))
    return same


def _select(samples: Samples, rows: np.ndarray) -> Samples:
    """Takes rows without a copy if they are all rows."""
    return samples if len(rows) == len(samples) else samples.take(rows)


def check_verify(verify: str | None) -> None:
    """Raises ValueError for an unknown check."""
    if verify not in CHECKS:
        raise ValueError(f'verify = {verify!r} is unknown: use "task", "self" or None')


def correct_chains(written: Samples, truth: Samples) -> np.ndarray:
    """Returns (S,) bool: every round and the answer equal those of `truth`, the solved problems."""
    both = (written, truth)
    index = np.flatnonzero((written.loops == truth.loops) & (written.answer == truth.answer))
    loops = truth.loops[index]
    a, b = (np.diff(s.round_offsets)[concat_ranges(s.first_round[index], loops)] for s in both)
    index = index[_without(np.repeat(np.arange(len(index)), loops), a != b, len(index))]
    sizes = np.diff(truth.round_offsets[truth.first_round])[index]
    a, b = (s.rounds[concat_ranges(s.round_offsets[s.first_round[index]], sizes)] for s in both)
    correct = np.zeros(len(written), bool)
    correct[index[_without(np.repeat(np.arange(len(index)), sizes), a != b, len(index))]] = True
    return correct


def _without(owner: np.ndarray, wrong: np.ndarray, owners: int) -> np.ndarray:
    """Returns (owners,) bool: no item of the owner is wrong."""
    return np.bincount(owner[wrong], minlength=owners) == 0

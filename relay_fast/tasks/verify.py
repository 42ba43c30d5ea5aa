"""Which chains pass: by the tasks' rules, by the answer alone, or against solved problems."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from relay_fast.tasks import TASK_NAMES, Samples, Task
from relay_fast.utils.ragged import concat_ranges

CHECKS = ("task", "self", None)


def verify_chains(
    written: Samples, tasks: Mapping[str, Task], verify: str | None = "task"
) -> np.ndarray:
    """(S,) bool: which chains pass.

    verify="task": every round is what the problem's rules demand, and the answer is the one that
    the rounds imply. It solves each problem; where they are solved already, `right_chains` says the
    same many times faster. "self": the answer is the one that the rounds imply (needs no solver and
    no label). None: all pass. Raises ValueError for another name, and for what is no problem.
    """
    check_verify(verify)
    passed = np.ones(len(written), bool)
    if verify is None:
        return passed
    for k in np.unique(written.task):
        task, rows = tasks[TASK_NAMES[k]], np.flatnonzero(written.task == k)
        own = _those(written, rows)
        implied = task.answers_of(own)
        passed[rows] = (implied >= 0) & (implied == own.answer)
        if verify == "task":
            rows = rows[passed[rows]]
            own = _those(written, rows)
            passed[rows] = right_chains(own, task.solve_samples(own))
    return passed


def _those(samples: Samples, rows: np.ndarray) -> Samples:
    return samples if len(rows) == len(samples) else samples.take(rows)


def check_verify(verify: str | None) -> None:
    """Raises ValueError for a check that there is not."""
    if verify not in CHECKS:
        raise ValueError(f'verify = {verify!r} is unknown: use "task", "self" or None')


def right_chains(written: Samples, truth: Samples) -> np.ndarray:
    """(S,) bool: every round and the answer are those of `truth`, the same problems solved."""
    both = (written, truth)
    index = np.flatnonzero((written.loops == truth.loops) & (written.answer == truth.answer))
    loops = truth.loops[index]
    a, b = (np.diff(s.round_offsets)[concat_ranges(s.first_round[index], loops)] for s in both)
    index = index[_without(np.repeat(np.arange(len(index)), loops), a != b, len(index))]
    sizes = np.diff(truth.round_offsets[truth.first_round])[index]
    a, b = (s.rounds[concat_ranges(s.round_offsets[s.first_round[index]], sizes)] for s in both)
    right = np.zeros(len(written), bool)
    right[index[_without(np.repeat(np.arange(len(index)), sizes), a != b, len(index))]] = True
    return right


def _without(owner: np.ndarray, wrong: np.ndarray, owners: int) -> np.ndarray:
    """(owners,) bool: owns nothing that is wrong."""
    return np.bincount(owner[wrong], minlength=owners) == 0

"""Inputs of a looped model that is fed its own rounds: the true ones in training, its own after.

The task says what an iteration sees of the problem and of the rounds before it (`Task.inputs`).
Given the rounds, the iterations of a sample do not depend on each other, so that they train side
by side in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan
from relay_fast.tasks import FeedbackDraws, Inputs, Samples, Task, Written
from relay_fast.tasks.feedback import Arrangement
from relay_fast.tasks.samples import tasks_present
from relay_fast.utils.arguments import check_kind, kind_of
from relay_fast.utils.numbers import as_ints
from relay_fast.utils.ragged import concat_ranges


class Iterations(NamedTuple):
    """Inputs of I iterations, laid end to end.

    widths (I,) int64: tokens of each; shifts (I,) int64: what was added to the numbers fed.
    """

    inputs: Inputs
    widths: np.ndarray
    shifts: np.ndarray


def iterations_of(
    written: Written,
    tasks: Mapping[str, Task],
    owner: np.ndarray,
    before: np.ndarray,
    draws: Mapping[str, FeedbackDraws] | None = None,
    rng: np.random.Generator | None = None,
) -> Iterations:
    """Returns the inputs that iterations see, made by each problem's own task.

    Args:
        written: Problems, with the rounds written so far.
        tasks: The tasks by name.
        owner: (I,) the problem of each iteration.
        before: (I,) the rounds that are written before each iteration.
        draws: By task, what `rng` varies in training; without them nothing is drawn.
        rng: The random generator of the draws.

    Raises:
        ValueError: A task does not define its inputs, or does not support its draws.
    """
    kinds = written.problems.task[owner]
    parts = {}
    for k, task in tasks_present(kinds, tasks).items():
        own = np.flatnonzero(kinds == k)
        chosen = (draws or {}).get(task.name, FeedbackDraws())
        parts[k] = own, _of_one_task(task, written, owner[own], before[own], chosen, rng)
    if len(parts) == 1:
        return next(iter(parts.values()))[1]
    widths, shifts = np.zeros(len(owner), np.int64), np.zeros(len(owner), np.int64)
    for own, part in parts.values():
        widths[own], shifts[own] = part.widths, part.shifts
    starts = np.cumsum(widths) - widths
    whole = np.zeros((3, int(widths.sum())), np.int64)
    for own, part in parts.values():
        whole[:, concat_ranges(starts[own], widths[own])] = np.stack(part.inputs[:3])
    return Iterations(Inputs(*whole), widths, shifts)


def _of_one_task(
    task: Task,
    written: Written,
    owner: np.ndarray,
    before: np.ndarray,
    draws: FeedbackDraws,
    rng: np.random.Generator | None,
) -> Iterations:
    check_draws(task, draws)
    sizes = task.input_sizes(written, owner, before)
    widths = as_ints(f"task {task.name!r}: input_sizes", sizes, len(owner), 1)
    shifts = np.zeros(len(owner), np.int64)
    if rng is not None:
        widths, shifts = draws.widths(widths, rng), draws.shifts(len(owner), rng)
    made = task.inputs(written, owner, before, widths)
    tokens, fed, positions, cuts = _checked_inputs(task, made, widths)
    if positions is None:
        positions = concat_ranges(np.zeros_like(widths), widths)
    if rng is not None and draws.cut:
        positions = positions + draws.moves(widths, cuts, rng)
    if shifts.any():
        fed = fed + np.where(task.are_numbers(fed), np.repeat(shifts, widths), 0)
    return Iterations(Inputs(tokens, fed, positions), widths, shifts)


def _checked_inputs(task: Task, made: Inputs, widths: np.ndarray) -> Inputs:
    """Returns what a task's `inputs` made for inputs of these widths; raises ValueError for
    anything but whole numbers, one a token."""
    try:
        tokens, fed, positions, cuts = Inputs(*made)
    except TypeError:
        raise ValueError(
            f"task {task.name!r}: inputs returned {kind_of(made)}: return Inputs(tokens, fed)"
        ) from None
    of, rows = f"task {task.name!r}: the {{}} of inputs".format, int(widths.sum())
    tokens, fed = as_ints(of("tokens"), tokens, rows, 0), as_ints(of("fed tokens"), fed, rows, 0)
    if positions is not None:
        positions = as_ints(of("positions"), positions, rows)
    if cuts is not None:
        cuts = as_ints(of("cuts"), cuts, len(widths))
    return Inputs(tokens, fed, positions, cuts)


def true_rounds(
    samples: Samples,
    tasks: Mapping[str, Task],
    owner: np.ndarray,
    before: np.ndarray,
    shifts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the round that each iteration has to write.

    Args:
        samples: Solved problems.
        tasks: The tasks by name.
        owner: (I,) the problem of each iteration.
        before: (I,) the rounds that come before it.
        shifts: (I,) what is added to every number that it is fed.

    Returns:
        The tokens of the rounds, end to end, int64, and the size of each (I,).
    """
    r = samples.first_round[owner] + before
    sizes = np.diff(samples.round_offsets)[r]
    rounds = samples.rounds[concat_ranges(samples.round_offsets[r], sizes)].astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    moved = shifts > 0
    for k, task in tasks_present(samples.task[owner[moved]], tasks).items():
        own = np.flatnonzero(moved & (samples.task[owner] == k))
        rounds[concat_ranges(starts[own], sizes[own])] = task.shifted_rounds(
            samples, owner[own], before[own], shifts[own]
        )
    return rounds, sizes


def every_iteration(task: Task, samples: Samples) -> tuple[np.ndarray, np.ndarray, Iterations]:
    """Returns owner and number of rounds before (I,) of all iterations of solved problems of a
    task, and what they see, of which nothing is drawn."""
    owner, before = samples.iterations()
    return owner, before, iterations_of(Written.truth(samples), {task.name: task}, owner, before)


def unclear_iterations(task: Task, samples: Samples) -> tuple[int, int, int] | None:
    """Finds a problem in which two iterations see the same and have to write different rounds, so
    that no model can learn both.

    Args:
        task: The task.
        samples: Solved problems of it.

    Returns:
        The problem's place in `samples` and how many rounds are before the two iterations, or None.
    """
    owner, before, (inputs, widths, none) = every_iteration(task, samples)
    rounds, sizes = true_rounds(samples, {task.name: task}, owner, before, none)
    ends, round_ends, seen = np.cumsum(widths), np.cumsum(sizes), {}
    for k, i in enumerate(owner.tolist()):
        own = slice(ends[k] - widths[k], ends[k])
        key = i, *(part[own].tobytes() for part in inputs[:3])
        wanted = rounds[round_ends[k] - sizes[k] : round_ends[k]].tobytes()
        first, before_first = seen.setdefault(key, (wanted, int(before[k])))
        if first != wanted:
            return i, before_first, int(before[k])
    return None


def collate_next(
    written: Written,
    tasks: Mapping[str, Task],
    owner: np.ndarray,
    before: np.ndarray,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Collates the batch off which a model with feedback reads one round of each problem.

    Args:
        written: Problems, with the rounds written so far.
        tasks: The tasks by name.
        owner: (I,) the problems to continue.
        before: (I,) the rounds that each of them has.
        device: Where the batch is made.
    """
    inputs, widths, _ = iterations_of(written, tasks, owner, before)
    plan = Plan(widths, np.ones(len(owner), np.int64), device, inputs.positions)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return PackedBatch(
        torch.from_numpy(inputs.tokens).to(device),
        plan,
        rows=none,
        row_offsets=(0, 0),
        targets=none,
        weights=none.float(),
        answers=none,
        answer_weights=none.float(),
        order=np.arange(0),
        max_token=int(max(inputs.tokens.max(initial=0), inputs.fed.max(initial=0))),
        fed=torch.from_numpy(inputs.fed).to(device),
    )


class FirstInputs(NamedTuple):
    """The inputs before the first round, and how the later ones follow; ends and fields are those
    of the problems in their order."""

    inputs: Inputs
    widths: np.ndarray
    arrangement: Arrangement


def arranged_inputs(problems: Samples, tasks: Mapping[str, Task]) -> FirstInputs | str:
    """Returns the first inputs of problems, from which a device can lay the later ones; or, as a
    string, which task does not let it."""
    for task in tasks_present(problems.task, tasks).values():
        if not _arranges(task):
            return f"task {task.name!r} makes the inputs of an iteration in Python"
    none = np.zeros(int(problems.first_round[-1]), np.int64)
    written = Written(problems, np.zeros(0, np.int32), none, none)
    owner = np.arange(len(problems))
    inputs, widths, _ = iterations_of(written, tasks, owner, np.zeros_like(owner))
    starts = np.cumsum(widths) - widths
    whole = Arrangement.empty(len(problems), len(inputs.tokens))
    for k, task in tasks_present(problems.task, tasks).items():
        own = np.flatnonzero(problems.task == k)
        part = task.arrangement(problems.take(own), widths[own])
        if part is None:
            return f"task {task.name!r} makes the inputs of an iteration in Python"
        remedy = "return an Arrangement, or None"
        check_kind(f"the arrangement of task {task.name!r}", part, Arrangement, remedy)
        rows = concat_ranges(starts[own], widths[own])
        for name, values in part._asdict().items():
            field = getattr(whole, name)
            at = own if name in ("follows", "least") else rows
            if np.shape(values) != (*field.shape[:-1], len(at)):
                raise ValueError(
                    f"task {task.name!r}: {name} of its arrangement has shape {np.shape(values)}: "
                    f"give {(*field.shape[:-1], len(at))}"
                )
            field[..., at] = values
    return FirstInputs(inputs, widths, whole)


def _arranges(task: Task) -> bool:
    """Tells whether a task's arrangement is that of its inputs: defined beside them or later."""
    order = type(task).__mro__
    first = lambda name: next(i for i, cls in enumerate(order) if name in vars(cls))
    return first("arrangement") <= min(first("inputs"), first("input_sizes"))


def mean_iteration_tokens(
    task: Task, length: int, draws: FeedbackDraws, problems: int = 64
) -> float:
    """Returns the tokens of all inputs of a problem, on average over some problems.

    Args:
        task: The task.
        length: Length of the problems.
        draws: What is drawn for each iteration in training.
        problems: How many problems are drawn.
    """
    rng = np.random.default_rng(0)
    samples = task.sample(np.full(problems, length), seed=0)
    owner, before = samples.iterations()
    sizes = task.input_sizes(Written.truth(samples), owner, before)
    return float(draws.widths(sizes, rng).sum()) / problems


def check_draws(task: Task, draws: FeedbackDraws) -> None:
    """Raises ValueError for draws that a task has not."""
    if draws.cut and task.clips_positions:
        raise ValueError(
            f"task {task.name!r} shows no distance that grows with the length, cut = {draws.cut} "
            f"does nothing for it: leave it out"
        )
    if draws.shift and not task.takes_shift:
        raise ValueError(
            f"task {task.name!r} has no rule for shifted numbers, shift = {draws.shift} cannot be "
            f"trained: leave it out"
        )


def check_numbers(task: Task, tokens: np.ndarray) -> None:
    """Raises ValueError for numbers beyond the vocabulary."""
    if not task.takes_shift:
        return
    largest, limit = int(tokens.max(initial=0)), task.vocabulary.end_of_numbers - 1
    if largest > limit:
        last = task.vocabulary.max_number
        raise ValueError(
            f"task {task.name!r} needs numbers up to {last + largest - limit} in its feedback, the "
            f"vocabulary ends at {last}: use a larger max_number, a smaller shift or shorter "
            f"problems"
        )

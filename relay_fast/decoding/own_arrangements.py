"""Compares how a user's task says that inputs follow from rounds with the inputs that it makes.

The tasks of the package are tested for it. Of others, a wrong arrangement would give chains on a
card that are not those of a CPU, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from relay_fast.batch.arranged import ArrangedInputs
from relay_fast.batch.capacity import CapacityBatch
from relay_fast.config import ModelConfig
from relay_fast.data.feedback import iterations_of
from relay_fast.decoding.static_reading import capacity_of, prepare
from relay_fast.tasks import Samples, Task, Written
from relay_fast.tasks.feedback import right_aligned
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.vocabulary import PAD

_PACKAGE = __name__.partition(".")[0]


def check_own_arrangements(
    config: ModelConfig, written: Samples, tasks: Mapping[str, Task], checked: set[str]
) -> None:
    """Checks the tasks whose arrangement is defined outside of the package.

    Args:
        config: of the model.
        written: Problems, sorted by most loops first, with rounds that it wrote.
        tasks: Their tasks by name.
        checked: Names of those to leave out; those that are right are added.

    Raises:
        ValueError: The inputs that the arrangement says are not those that the task makes.
    """
    for k, task in tasks_present(written.task, tasks).items():
        if task.name in checked:
            continue
        defines = next(cls for cls in type(task).__mro__ if "arrangement" in vars(cls))
        before = None
        if defines.__module__.partition(".")[0] != _PACKAGE:
            own = written.take(np.flatnonzero(written.task == k))
            before = _first_difference(config, own, task)
        if before is not None:
            raise ValueError(
                f"task {task.name!r}: after {before} rounds, arrangement says other inputs than "
                f"inputs makes; mend {defines.__name__}.arrangement, or let it return None"
            )
        checked.add(task.name)


def _first_difference(config: ModelConfig, written: Samples, task: Task) -> int | None:
    """Returns after how many rounds the inputs are others, or None."""
    rounds, tasks, made = Written.truth(written), {task.name: task}, []
    for before in range(int(written.loops.max(initial=0))):
        owner = np.flatnonzero(written.loops > before)
        many = np.full(len(owner), before)
        inputs, widths, _ = iterations_of(rounds, tasks, owner, many)
        starts, sizes = rounds.last_round(owner, many + 1)
        over = np.maximum(0, sizes - widths)  # of inputs that were longer, which is found below
        ids = right_aligned(widths, written.rounds, starts + over, sizes - over)
        made.append((widths, inputs[:3], torch.from_numpy(ids)))
    loaded = prepare(config, written, tasks)
    rows = max(len(ids) for *_, ids in made)
    longest = max(int(widths.max()) for widths, *_ in made)
    capacity = capacity_of(loaded, config)
    rows, longest = max(rows, capacity.rows[0]), max(longest, capacity.longest)
    capacity = replace(capacity, rows=(rows,) * len(capacity.rows), longest=longest)
    static = CapacityBatch(capacity, "cpu", ArrangedInputs.beside_sizes(capacity))
    static.load(loaded.batch, loaded.beside)
    laid, last = ArrangedInputs(static, loaded.moves, PAD, config.vocabulary_size - 1), None
    for before, (widths, inputs, ids) in enumerate(made):
        batch = laid.start() if last is None else laid.after(last, before)
        of_device = (batch.tokens, batch.fed, batch.plan.positions)
        same = np.array_equal(laid.widths[: len(widths)].numpy(), widths)
        if not same or any(
            not np.array_equal(own[: len(true)].numpy(), true)
            for own, true in zip(of_device, inputs, strict=True)
        ):
            return before
        last = torch.full((rows,), PAD)
        last[: len(ids)] = ids
    return None

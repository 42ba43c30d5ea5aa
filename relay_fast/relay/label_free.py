"""The label-free filter: which chains of a model to keep where the truth is not known.

A chain is kept if its answer is the one that its rounds imply, which says something where an
answer head writes the answer. A looped model that is fed its own rounds has no such head: there
the chain's confidence (`relay_fast.decoding.confidence`) must reach a bound too. The bound is set
inside the training range, where the truth is known, so that most of the right chains of the longest
trained length reach it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from relay_fast.decoding.confidence import generate_confident, tells_confidence
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.verify import correct_chains, verify_chains
from relay_fast.training.model_files import Model
from relay_fast.utils.seeds import FILTER_SEED_OFFSET

KEPT = 0.99  # share of the right chains inside the training range that reach the bound
PROBLEMS = 256  # of each task, to set it
UNREACHABLE = 1.0  # above every log-probability; a chain may be so sure that its own is 0

Bounds = Mapping[str, float]  # least log-probability of a chain's tokens, by task


def confidence_bounds(
    model: Model,
    tasks: Mapping[str, Task],
    ranges: Mapping[str, Sequence[int]],
    seed: int,
    problems: int = PROBLEMS,
    autocast: str = "fp32",
) -> dict[str, float] | None:
    """Returns the filter's bound for each task, None for a model whose filter has none.

    A task of which no chain is right inside its range gets UNREACHABLE.

    Args:
        model: The model.
        tasks: The tasks by name.
        ranges: (shortest, longest) trained length of each.
        seed: Selects the problems.
        problems: How many of each task.
        autocast: Precision of the GEMMs, that of the chains to be filtered.
    """
    if not tells_confidence(model):
        return None
    bounds = {}
    for name, task in tasks.items():
        inside = _inside_problems(task, *ranges[name], problems, seed)
        written, confidence = generate_confident(model, inside, tasks, autocast=autocast)
        right = confidence[correct_chains(written, inside)]
        bound = float(np.quantile(right, 1 - KEPT, method="lower")) if len(right) else UNREACHABLE
        bounds[name] = math.floor(bound * 1e4) / 1e4  # the same on every machine
    return bounds


def label_free(
    written: Samples,
    tasks: Mapping[str, Task],
    confidence: np.ndarray | None = None,
    bounds: Bounds | None = None,
) -> np.ndarray:
    """Returns (S,) bool: the chains that the filter keeps.

    Args:
        written: S chains that a model wrote.
        tasks: The tasks by name.
        confidence: (S,) of each chain; None for a model that does not tell it.
        bounds: Those of `confidence_bounds`; None for no bound.
    """
    kept = verify_chains(written, tasks, "self")
    if confidence is None or bounds is None:
        return kept
    for k, task in tasks_present(written.task, tasks).items():
        kept &= (written.task != k) | (confidence >= bounds[task.name])
    return kept


def bound_text(task: str, bound: float) -> str:
    """Says what a task's bound means."""
    if bound == UNREACHABLE:
        return f"the filter keeps no chain of {task}: none was right inside the training range"
    return (
        f"the filter keeps chains of {task} whose tokens are each at least {math.exp(bound):.3g} "
        f"likely, as {KEPT:.0%} of the right ones are at the end of the training range"
    )


def _inside_problems(task: Task, shortest: int, longest: int, number: int, seed: int) -> Samples:
    """Returns solved problems of the longest trained length, and of shorter ones where there are
    not enough, preferably such as training does not see."""
    parts, found = [], 0
    lengths = task.lengths_between(shortest, longest)[::-1].tolist()
    for length in lengths:
        parts.append(task.unseen(length, number - found, seed + FILTER_SEED_OFFSET))
        found += len(parts[-1])
        if found >= number:
            break
    if not found:
        parts = [task.sample(np.full(number, lengths[0]), seed + FILTER_SEED_OFFSET)]
    return Samples.concat(parts)

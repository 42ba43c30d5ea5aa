"""The reasoning tasks: problems solved in rounds. Importing them does not import numba."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from relay_fast.tasks.arithmetic import Arithmetic
from relay_fast.tasks.base import NO_ANSWER, Task
from relay_fast.tasks.edit_distance import EditDistance
from relay_fast.tasks.feedback import FeedbackDraws, Inputs, Written
from relay_fast.tasks.lis import LIS
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.vocabulary import Vocabulary

__all__ = [
    "LIS",
    "NO_ANSWER",
    "TASK_NAMES",
    "Arithmetic",
    "EditDistance",
    "FeedbackDraws",
    "Inputs",
    "Samples",
    "Task",
    "Vocabulary",
    "Written",
    "build_tasks",
    "make_task",
]

_CLASSES: dict[str, type[Task]] = {cls.name: cls for cls in (Arithmetic, EditDistance, LIS)}


def make_task(name: str, vocabulary: Vocabulary, **params: Any) -> Task:
    """Builds a task.

    Args:
        name: One of `TASK_NAMES`.
        vocabulary: Its tokens.
        params: Further arguments of its constructor.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is invalid.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown task {name!r}; known are {', '.join(TASK_NAMES)}.")
    known = list(inspect.signature(_CLASSES[name]).parameters)[1:]
    unknown = [key for key in params if key not in known]
    if unknown:
        raise ValueError(
            f"unknown parameter {unknown[0]!r} of task {name}; known are {', '.join(known)}."
        )
    return _CLASSES[name](vocabulary, **_of_their_kinds(name, params))


def _of_their_kinds(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the parameters to the annotated types; raises ValueError for other types."""
    from relay_fast.utils.settings import check_value  # imports pydantic, which blocks do not need

    hints = get_type_hints(_CLASSES[name].__init__)
    return {
        key: check_value(f"tasks.{name}.parameters.{key}", value, hints[key])
        if key in hints
        else value
        for key, value in params.items()
    }


def build_tasks(
    names: Iterable[str], vocabulary: Vocabulary, **params: Mapping[str, Any]
) -> dict[str, Task]:
    """Builds tasks by name, as in `build_tasks(["lis"], vocabulary, lis={"group": 5})`.

    Args:
        names: Some of `TASK_NAMES`.
        vocabulary: Their tokens.
        params: For each task, further arguments of its constructor.

    Raises:
        ValueError: A task is unknown, or there are parameters of a task that is not built.
    """
    names = list(names)
    unused = [name for name in params if name not in names]
    if unused:
        raise ValueError(
            f"parameters for {unused[0]!r}, which is not among the tasks {', '.join(names)}; "
            f"add the task or drop the parameters."
        )
    return {name: make_task(name, vocabulary, **params.get(name, {})) for name in names}

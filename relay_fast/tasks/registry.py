"""Builds tasks by name, from a run's config or from what a file of chains says of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from relay_fast.tasks.arithmetic import Arithmetic
from relay_fast.tasks.base import Task
from relay_fast.tasks.edit_distance import EditDistance
from relay_fast.tasks.lis import LIS
from relay_fast.tasks.references import load_class
from relay_fast.tasks.samples import TASK_NAMES
from relay_fast.tasks.text import TextTask
from relay_fast.tasks.vocabulary import Vocabulary
from relay_fast.utils.errors import RunStopped
from relay_fast.utils.nearest import nearest

_COMPILED: dict[str, type[Task]] = {cls.name: cls for cls in (Arithmetic, EditDistance, LIS)}
TEXT_TASKS = {"addition": "relay_fast.tasks.addition:Addition"}  # of the package, by name
FIRST_INDEX = len(TASK_NAMES)  # of tasks that are not compiled
_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")  # of files, too


def is_compiled(name: str, entry: Mapping[str, Any]) -> bool:
    """Tells whether a task of a config is one of `TASK_NAMES`."""
    return name in _COMPILED and "class" not in entry and "data" not in entry


def make_task(name: str, vocabulary: Vocabulary, **params: Any) -> Task:
    """Builds a task.

    Args:
        name: One of `TASK_NAMES`, or with `class` in the parameters any.
        vocabulary: Its tokens.
        params: Further arguments of its constructor; for a `TextTask` what `Task.to_dict` gives:
            `class`, `parameters` and `index`.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is invalid.
    """
    if "class" in params or name in TEXT_TASKS:
        index = params.pop("index", FIRST_INDEX)
        return open_text_task(name, params).bound(vocabulary, index)
    if name not in _COMPILED:
        known = ", ".join((*TASK_NAMES, *TEXT_TASKS))
        raise ValueError(f"unknown task {name!r}; known are {known}.")
    cls = _COMPILED[name]
    known = list(inspect.signature(cls).parameters)[1:]
    unknown = [key for key in params if key not in known]
    if unknown:
        raise ValueError(
            f"unknown parameter {unknown[0]!r} of task {name}; known are {', '.join(known)}: the "
            f"nearest is {nearest(unknown[0], known)}"
        )
    if not vocabulary.has_numbers:
        raise ValueError(
            f"task {name} needs a vocabulary with numbers; give vocabulary.max_number beside "
            f"tokens."
        )
    return cls(vocabulary, **_of_their_kinds(name, cls, params))


def _of_their_kinds(name: str, cls: type[Task], params: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the parameters to the annotated types; raises ValueError for other types."""
    from relay_fast.utils.settings import check_value  # imports pydantic, which blocks do not need

    hints = get_type_hints(cls.__init__)
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


def tasks_of_config(
    entries: Mapping[str, Mapping[str, Any]], vocabulary: Vocabulary
) -> dict[str, Task]:
    """Builds the tasks of a config's table `tasks`, by name.

    Those of `TASK_NAMES` keep their indices; the others are numbered from FIRST_INDEX on, in the
    alphabetic order of their names.

    Raises:
        ValueError: A task cannot be built; the message names it.
    """
    own = sorted(name for name, entry in entries.items() if not is_compiled(name, entry))
    tasks = {}
    for name, entry in entries.items():
        if name in own:
            index = FIRST_INDEX + own.index(name)
            tasks[name] = open_text_task(name, entry).bound(vocabulary, index)
        else:
            tasks[name] = make_task(name, vocabulary, **entry.get("parameters", {}))
    return tasks


def open_text_task(name: str, entry: Mapping[str, Any]) -> TextTask:
    """Builds a task that is not compiled, from its table of a config.

    Args:
        name: Its name in the config.
        entry: Its table: `class` or `data`, and `parameters`.

    Raises:
        ValueError: There is no such class, it is no task, or it does not take the parameters.
    """
    where, parameters = f"tasks.{name}", dict(entry.get("parameters", {}))
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{where:.60}: use letters, digits, _ and - in the name of a task, at most 100"
        )
    if "class" in entry and "data" in entry:
        raise ValueError(f"{where} has a class and data: give one of them")
    if "data" in entry:
        cls, parameters = _class_of_data(where), {"name": name, "data": entry["data"], **parameters}
    elif reference := entry.get("class", TEXT_TASKS.get(name)):
        cls = load_class(reference, f"{where}.class")
    else:
        known = ", ".join((*TASK_NAMES, *TEXT_TASKS))
        raise ValueError(f"{where}: unknown task {name!r}; known are {known}, others need a class.")
    if not issubclass(cls, TextTask):
        raise ValueError(
            f"{where}.class = {entry['class']!r} is no task; derive it from "
            f"relay_fast.tasks.TextTask."
        )
    _check_parameters(where, cls, parameters)
    try:
        task = cls(**parameters)
    except (ValueError, RunStopped):
        raise
    except Exception as error:
        raise ValueError(
            f"{where}: {cls.__name__} cannot be built ({type(error).__name__}: {error})"
        ) from error
    try:
        name_of(task, name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if task.name != name:
        raise ValueError(
            f"{where}.class = {entry.get('class', cls.__name__)!r} is the task "
            f"{task.name!r}: write it under tasks.{task.name}"
        )
    return task


def _check_parameters(where: str, cls: type, parameters: Mapping[str, Any]) -> None:
    """Raises ValueError for a parameter that a constructor does not have."""
    own = [*inspect.signature(cls.__init__).parameters.values()][1:]
    if cls.__init__ is object.__init__:
        own = []
    known = [p.name for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    unknown = [name for name in parameters if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in own):
        near = nearest(unknown[0], [name for name in known if name not in parameters])
        hint = f": the nearest is {where}.parameters.{near}" if near else ""
        known = f"known are {', '.join(known)}" if known else "it has none"
        raise ValueError(
            f"{where}: {cls.__name__} cannot be built (unknown parameter {unknown[0]!r}; {known})"
            f"{hint}"
        )


def name_of(task: TextTask, wanted: str = "my_task") -> str:
    """Returns the name of a task; raises ValueError, which proposes one, if it has none."""
    if not isinstance(name := getattr(task, "name", None), str):
        cls = type(task).__name__
        raise ValueError(f"{cls} has no name: write name = {wanted!r} in the class")
    return name


def _class_of_data(where: str) -> type:
    """Returns the class of tasks whose chains come from a file: a `TextTask` that is built of
    `name`, `data` and the table's `parameters`."""
    try:
        from relay_fast.tasks.records import RecordsTask
    except ImportError as error:
        raise ValueError(f"{where}.data: files of chains cannot be read here") from error
    return RecordsTask

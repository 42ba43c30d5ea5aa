"""The reasoning tasks: problems solved in rounds. Importing them does not import numba.

Three are built in and compiled; any other is a `TextTask`, a class of plain Python.
"""

from __future__ import annotations

from relay_fast.tasks.arithmetic import Arithmetic
from relay_fast.tasks.base import NO_ANSWER, Task
from relay_fast.tasks.edit_distance import EditDistance
from relay_fast.tasks.feedback import FeedbackDraws, Inputs, Written
from relay_fast.tasks.lis import LIS
from relay_fast.tasks.records import RecordsTask
from relay_fast.tasks.registry import build_tasks, make_task, open_text_task, tasks_of_config
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.text import Sizes, TextTask
from relay_fast.tasks.vocabulary import Vocabulary

__all__ = [
    "LIS",
    "NO_ANSWER",
    "TASK_NAMES",
    "Arithmetic",
    "EditDistance",
    "FeedbackDraws",
    "Inputs",
    "RecordsTask",
    "Samples",
    "Sizes",
    "Task",
    "TextTask",
    "Vocabulary",
    "Written",
    "build_tasks",
    "make_task",
    "open_text_task",
    "tasks_of_config",
]

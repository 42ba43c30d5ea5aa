"""Display names, and the tables of accuracy: a row for each model, a column for each length."""

from __future__ import annotations

import io
import math
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from relay_fast.reporting.palette import accuracy_color
from relay_fast.reporting.text_table import NONE, make_console, make_table

MODEL_NAMES = {
    "looped_aligned": "Looped + alignment",
    "ar_relay": "AR, RELAY-enhanced",
    "ar_baseline": "AR-CoT baseline",
    "looped_vanilla": "Looped, vanilla",
    "ar_self_truth": "AR + self chains (truth)",
    "ar_self_loop": "AR + self chains (loop)",
}
ANSWER_ONLY = frozenset({"looped_vanilla"})  # trained without chains, so it writes none
# Of results without labels, as earlier versions wrote them.
TASK_NAMES = {"arithmetic": "Arithmetic", "edit_distance": "Edit distance", "lis": "LIS"}
LENGTH_NAMES = {
    "arithmetic": "number of operators",
    "edit_distance": "length of the shorter string",
    "lis": "numbers in the sequence",
}
METRIC_NAMES = {
    "answer": "final answer correct",
    "chain": "whole chain correct",
    "bit": "chain tokens correct",
    "bit_forced": "chain tokens correct, teacher-forced",
    "answer_once": "final answer correct after one iteration alone, a control",
}
_RULE = "│"
_CELL = 4  # the width of "99.9"; all of them correct is "100"


def in_order(keys: Iterable[str], order: Mapping[str, Any]) -> list[str]:
    """Sorts `keys` as they stand in `order`; keys that it lacks come last."""
    keys = list(keys)
    return [k for k in order if k in keys] + [k for k in keys if k not in order]


def models_of(results: Mapping[str, Any], task: str) -> list[str]:
    """Returns the models that were evaluated on `task`, in display order."""
    accuracy = results.get("accuracy", {})
    return in_order((m for m in accuracy if accuracy[m].get(task)), MODEL_NAMES)


def tasks_of(results: Mapping[str, Any]) -> list[str]:
    """Returns the tasks that any model was evaluated on, in display order."""
    return in_order(
        {task: None for by_task in results.get("accuracy", {}).values() for task in by_task},
        TASK_NAMES,
    )


def task_title(results: Mapping[str, Any], task: str) -> str:
    """Returns a task's name for tables and plots."""
    return results.get("labels", {}).get(task, {}).get("title") or TASK_NAMES.get(task, task)


def length_name(results: Mapping[str, Any], task: str) -> str:
    """Returns what a task's length counts."""
    own = results.get("labels", {}).get(task, {}).get("unit")
    return own or LENGTH_NAMES.get(task, "length")


def curve(
    results: Mapping[str, Any], model: str, task: str, metric: str
) -> tuple[list[int], list[float]]:
    """Returns the lengths, ascending, at which a metric was measured, and the accuracies there.

    Args:
        results: The content of results.json.
        model: Name of the model.
        task: Name of the task.
        metric: A key of `METRIC_NAMES`.

    Returns:
        (lengths, accuracies in 0..1), both empty for chains of a model that writes none.
    """
    if model in ANSWER_ONLY and metric != "answer":
        return [], []
    by_length = results.get("accuracy", {}).get(model, {}).get(task, {})
    points = sorted(
        (int(length), cell[metric])
        for length, cell in by_length.items()
        if cell.get(metric) is not None
    )
    return [length for length, _ in points], [value for _, value in points]


def print_report(
    results: Mapping[str, Any],
    metrics: Sequence[str] = ("answer", "chain", "answer_once"),
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """Prints one table for each task and metric that was measured.

    Args:
        results: The content of results.json.
        metrics: Keys of `METRIC_NAMES`.
        file: Where to print, by default stdout. Cells are coloured by accuracy on terminals only.
        width: Columns of text, by default the terminal's; lengths that do not fit are left out, and
            the table says so.
    """
    width = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    for task in tasks_of(results):
        for metric in metrics:
            if any(curve(results, model, task, metric)[0] for model in models_of(results, task)):
                _print_table(results, task, metric, width, file)
                print(file=file)


def table_text(
    results: Mapping[str, Any], task: str, metric: str = "answer", width: int = 100
) -> str:
    """Returns the table of one task and metric as plain text.

    Args:
        results: The content of results.json.
        task: Name of the task.
        metric: A key of `METRIC_NAMES`.
        width: The most columns of text, but never fewer than two lengths need.
    """
    file = io.StringIO()
    _print_table(results, task, metric, width, file)
    return file.getvalue().rstrip("\n")


def _print_table(
    results: Mapping[str, Any], task: str, metric: str, width: int, file: TextIO | None
) -> None:
    """Prints models by lengths; a rule parts the training range from the lengths beyond it."""
    from rich.text import Text

    curves = {
        MODEL_NAMES.get(model, model): dict(zip(*curve(results, model, task, metric), strict=True))
        for model in models_of(results, task)
    }
    lengths = sorted({length for values in curves.values() for length in values})
    shortest, longest = results.get("train_lengths", {}).get(task, (None, None))
    name_width = max((len(name) for name in curves), default=0)
    room = max(2, (width - name_width - len(_RULE) - 1) // (_CELL + 1))
    shown = _spread(lengths, longest, room)

    columns: list[int | None] = list(shown)  # None: the rule
    if longest is not None and any(n > longest for n in shown):
        columns.insert(sum(n <= longest for n in shown), None)
    table = make_table([True, *(False for _ in columns)], gap=1)
    for column, n in zip(table.columns[1:], columns, strict=True):
        column.header = _RULE if n is None else str(n).rjust(_CELL)
    for name, values in curves.items():
        cells = [_RULE if n is None else _percent(values.get(n)) for n in columns]
        table.add_row(name, *(Text(cell, style=_color(cell)) for cell in cells))

    notes = [f"columns: {length_name(results, task)}"]
    if longest is not None:
        notes.append(f"trained on {shortest} to {longest}")
    if len(shown) < len(lengths):
        notes.append(f"{len(shown)} of {len(lengths)} lengths fit, all are in results.json")
    title = f"{task_title(results, task)}: {METRIC_NAMES.get(metric, metric)} (%)"
    console = make_console(table, file, width)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    for note in textwrap.wrap("; ".join(notes), max(width, 40)):
        console.print(Text(note, style="dim"), soft_wrap=True)


def _color(cell: str) -> str:
    try:
        return accuracy_color(float(cell))
    except ValueError:  # the rule, or nothing measured
        return "dim"


def _percent(value: float | None) -> str:
    """Formats a share in `_CELL` characters, rounded down: "100" means every one."""
    if value is None:
        return NONE
    return "100" if value >= 1 else f"{math.floor(1000 * value + 1e-9) / 10:.1f}"


def _spread(lengths: list[int], longest: int | None, room: int) -> list[int]:
    """Picks at most `room` lengths: the ends, both sides of the training range, the rest evenly."""
    if len(lengths) <= room:
        return lengths
    inside = [n for n in lengths if longest is None or n <= longest]
    beyond = [n for n in lengths if longest is not None and n > longest]
    # Two thirds for the lengths beyond, where the models differ.
    for_beyond = min(len(beyond), max(room - len(inside), room * 2 // 3))
    return _evenly(inside, room - for_beyond) + _evenly(beyond, for_beyond)


def _evenly(values: list[int], count: int) -> list[int]:
    if count >= len(values):
        return values
    if count <= 1:
        return values[-1:] * count
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]

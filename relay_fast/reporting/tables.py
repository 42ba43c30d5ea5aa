"""Readable names, and the final table: accuracy of each model at each length."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

MODEL_NAMES = {
    "looped_aligned": "Looped + alignment",
    "ar_relay": "AR, RELAY-enhanced",
    "ar_baseline": "AR-CoT baseline",
    "looped_vanilla": "Looped, vanilla",
    "ar_self_truth": "AR + self chains (truth)",
    "ar_self_loop": "AR + self chains (loop)",
}
ANSWER_ONLY = frozenset({"looped_vanilla"})  # trained without chains: what it writes as one is none
TASK_NAMES = {"arithmetic": "Arithmetic", "edit_distance": "Edit distance", "lis": "LIS"}
LENGTH_NAMES = {
    "arithmetic": "number of operators",
    "edit_distance": "length of the shorter string",
    "lis": "numbers in the sequence",
}
METRIC_NAMES = {
    "answer": "final answer right",
    "chain": "whole chain right",
    "bit": "chain tokens right",
    "bit_forced": "chain tokens right, teacher-forced",
}
_NONE = "–"
_RULE = "│"
_CELL = 4  # the width of "99.9"; all of them right is "100"


def in_order(keys: Iterable[str], order: Mapping[str, Any]) -> list[str]:
    """`keys` in the order of `order`; those it does not know come last."""
    keys = list(keys)
    return [k for k in order if k in keys] + [k for k in keys if k not in order]


def models_of(results: Mapping[str, Any], task: str) -> list[str]:
    """The models that were evaluated on `task`, in display order."""
    accuracy = results.get("accuracy", {})
    return in_order((m for m in accuracy if accuracy[m].get(task)), MODEL_NAMES)


def tasks_of(results: Mapping[str, Any]) -> list[str]:
    """The tasks that any model was evaluated on, in display order."""
    return in_order(
        {task: None for by_task in results.get("accuracy", {}).values() for task in by_task},
        TASK_NAMES,
    )


def curve(
    results: Mapping[str, Any], model: str, task: str, metric: str
) -> tuple[list[int], list[float]]:
    """(lengths ascending, accuracies in 0..1) where the metric was measured and means something."""
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
    metrics: Sequence[str] = ("answer", "chain"),
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """Print one table for each task and metric that was measured.

    `width`: columns of text, by default the terminal's; lengths that do not fit are left out, and
    the table says so. With rich if it is installed, else as plain text.
    """
    width = width or shutil.get_terminal_size(fallback=(100, 24)).columns
    for task in tasks_of(results):
        for metric in metrics:
            table = _Table.of(results, task, metric, width)
            if len(table.rows) > 1:
                _show(table, file, width)


def table_text(
    results: Mapping[str, Any], task: str, metric: str = "answer", width: int = 100
) -> str:
    """The table as plain text."""
    return "\n".join(_Table.of(results, task, metric, width).lines())


class _Table:
    """Models by lengths; a rule parts the lengths in the training range from those beyond."""

    def __init__(self, title: str, notes: list[str], rows: list[list[str]]) -> None:
        """rows: the heading, then one a model; cells are padded to equal widths."""
        self.title, self.notes, self.rows = title, notes, rows

    @classmethod
    def of(cls, results: Mapping[str, Any], task: str, metric: str, width: int) -> _Table:
        """At most `width` characters wide, but never fewer than two lengths."""
        curves = {
            MODEL_NAMES.get(model, model): dict(
                zip(*curve(results, model, task, metric), strict=True)
            )
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
        heading = [_RULE if n is None else str(n).rjust(_CELL) for n in columns]
        rows = [[" " * name_width, *heading]]
        for name, values in curves.items() if lengths else ():
            cells = [_RULE if n is None else _percent(values.get(n)).rjust(_CELL) for n in columns]
            rows.append([name.ljust(name_width), *cells])

        notes = [f"columns: {LENGTH_NAMES.get(task, 'length')}"]
        if longest is not None:
            notes.append(f"trained on {shortest} to {longest}")
        if len(shown) < len(lengths):
            notes.append(f"{len(shown)} of {len(lengths)} lengths fit, all are in results.json")
        title = f"{TASK_NAMES.get(task, task)}: {METRIC_NAMES.get(metric, metric)} (%)"
        return cls(title, textwrap.wrap("; ".join(notes), max(width, 40)), rows)

    def lines(self) -> list[str]:
        heading, *rows = (" ".join(row) for row in self.rows)
        return [self.title, heading, "─" * len(heading), *rows, *self.notes]


def _show(table: _Table, file: TextIO | None, width: int) -> None:
    """Coloured by accuracy with rich on a terminal, else the plain text."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print("\n".join(table.lines()) + "\n", file=file)
        return
    title, heading, rule, *_ = table.lines()
    console = Console(file=file, width=max(width, len(heading)), highlight=False)
    console.print(Text(title, style="bold"))
    console.print(Text(heading, style="bold"))
    console.print(Text(rule, style="dim"))
    for row in table.rows[1:]:
        cells = [Text(cell, style=_color(cell)) for cell in row[1:]]
        console.print(Text(" ").join([Text(row[0]), *cells]))
    for note in table.notes:
        console.print(Text(note, style="dim"))
    console.print()


def _color(cell: str) -> str:
    try:
        value = float(cell)
    except ValueError:  # the rule, or nothing measured
        return "dim"
    return "green" if value >= 90 else "yellow" if value >= 50 else "red"


def _percent(value: float | None) -> str:
    """In `_CELL` characters; rounded down, so that "100" means every one."""
    if value is None:
        return _NONE
    return "100" if value >= 1 else f"{math.floor(1000 * value + 1e-9) / 10:.1f}"


def _spread(lengths: list[int], longest: int | None, room: int) -> list[int]:
    """At most `room` of `lengths`: ends, both sides of the training range, the rest evenly."""
    if len(lengths) <= room:
        return lengths
    inside = [n for n in lengths if longest is None or n <= longest]
    beyond = [n for n in lengths if longest is not None and n > longest]
    # Two thirds for the lengths beyond: that is where the models differ.
    for_beyond = min(len(beyond), max(room - len(inside), room * 2 // 3))
    return _evenly(inside, room - for_beyond) + _evenly(beyond, for_beyond)


def _evenly(values: list[int], count: int) -> list[int]:
    if count >= len(values):
        return values
    if count <= 1:
        return values[-1:] * count
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]

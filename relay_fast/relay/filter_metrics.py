"""Measures how many chains of a model are correct, and how well the label-free filter finds them.

The precision, recall and keep rate of the label-free filter (`relay_fast.relay.label_free`) are
measured against truth: a chain is correct if every round and the answer are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from relay_fast.reporting.text_table import text_table
from relay_fast.tasks import NO_ANSWER, TASK_NAMES, Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.verify import correct_chains, verify_chains

Table = dict[str, dict[str, "Counts"]]  # by task and length (a string, as in JSON)
_KEYS = ("written", "passed", "agreeing", "right", "both", "unended", "unjudged")  # in files


@dataclass(frozen=True)
class Counts:
    """Chains of one task and length.

    written: all chains; passed: those that passed the dataset's check; kept: those that the
    label-free filter keeps; correct: those whose rounds and answer are all correct;
    kept_and_correct: both; unended: without `<eos>` within the limit; unjudged: those of problems
    whose truth is not known, which are not among the kept and the correct.
    """

    written: int = 0
    passed: int = 0
    kept: int = 0
    correct: int = 0
    kept_and_correct: int = 0
    unended: int = 0
    unjudged: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def precision(self) -> float | None:
        """Share of the kept chains that are correct."""
        return self.kept_and_correct / self.kept if self.kept else None

    @property
    def recall(self) -> float | None:
        """Share of the correct chains that are kept."""
        return self.kept_and_correct / self.correct if self.correct else None

    @property
    def keep_rate(self) -> float | None:
        """Share of the chains that are kept, where the truth is known."""
        judged = self.written - self.unjudged
        return self.kept / judged if judged else None


def count(
    written: Samples,
    truth: Samples,
    tasks: Mapping[str, Task],
    passed: np.ndarray | None = None,
    ended: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> Table:
    """Counts chains by task and length.

    Args:
        written: S chains that a model wrote.
        truth: The same problems, solved as far as they can be.
        tasks: The tasks by name.
        passed: (S,) bool, the chains that passed the dataset's check, by default all.
        ended: (S,) bool, the chains that ended within the limit, by default all.
        kept: (S,) bool, the chains that the label-free filter keeps, by default those whose answer
            is the one that their rounds imply.
    """
    correct = correct_chains(written, truth)
    kept = verify_chains(written, tasks, "self") if kept is None else kept
    every = np.ones(len(written), bool)
    passed = every if passed is None else passed
    ended = every if ended is None else ended
    judged = truth.answer != NO_ANSWER
    kept, correct = kept & judged, correct & judged
    columns = (every, passed, kept, correct, kept & correct, ~ended, ~judged)
    table: Table = {}
    for k, task in tasks_present(truth.task, tasks).items():
        own = table.setdefault(task.name, {})
        for length in np.unique(truth.length[truth.task == k]):
            here = (truth.task == k) & (truth.length == length)
            own[str(length)] = Counts(*(int(column[here].sum()) for column in columns))
    return table


def add(tables: list[Table]) -> Table:
    """Adds several tables; tasks and lengths come in ascending order."""
    total: Table = {}
    for table in tables:
        for task, by_length in table.items():
            own = total.setdefault(task, {})
            for length, counts in by_length.items():
                own[length] = own.get(length, Counts()) + counts
    order = [*(n for n in TASK_NAMES if n in total), *sorted(set(total).difference(TASK_NAMES))]
    return {
        name: dict(sorted(total[name].items(), key=lambda item: int(item[0]))) for name in order
    }


def to_json(table: Table) -> dict[str, dict[str, dict[str, int]]]:
    """Converts a table for a JSON file; `unjudged` is there where it is not 0."""
    return {
        task: {
            n: {k: v for k, v in zip(_KEYS, _values(c), strict=True) if v or k != "unjudged"}
            for n, c in own.items()
        }
        for task, own in table.items()
    }


def from_json(values: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    """Reads what `to_json` gave."""
    read = lambda c: Counts(*[c[key] for key in _KEYS[:-1]], c.get(_KEYS[-1], 0))
    return {task: {n: read(c) for n, c in own.items()} for task, own in values.items()}


def table_text(table: Table) -> str:
    """Formats the counts as text: a row for each length, and the sum of each task below."""
    header = "task length written passed correct kept precision recall unended".split()
    cells = []
    for task, by_length in table.items():
        rows = [*by_length.items()]
        if len(rows) > 1:
            rows.append(("all", sum(by_length.values(), Counts())))
        for length, c in rows:
            shares = map(_percent, (c.keep_rate, c.precision, c.recall))
            cells.append([task, length, c.written, c.passed, c.correct, *shares, c.unended])
    title = "label-free filter against truth"
    return f"{title}\n{text_table(header, cells, left=1)}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _values(counts: Counts) -> tuple[int, ...]:
    return tuple(asdict(counts).values())

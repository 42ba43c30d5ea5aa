"""How far chains that a model wrote can be trusted, and how well that can be told without labels.

The label-free filter keeps a chain whose answer, from the answer head, is the one that its rounds
imply. Against truth (every round and the answer are right) it has a precision (how many of the kept
are right), a recall (how many of the right are kept) and a share that it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from relay_fast.tasks import TASK_NAMES, Samples, Task
from relay_fast.tasks.verify import right_chains, verify_chains

Table = dict[str, dict[str, "Counts"]]  # by task and length (a string, as in JSON)


@dataclass(frozen=True)
class Counts:
    """Chains of one task and length.

    written: all; passed: of those, by the check that the dataset asked for; agreeing: kept by the
    label-free filter; right: in every round and the answer; both: agreeing and right; unended:
    without `<eos>` within the limit.
    """

    written: int = 0
    passed: int = 0
    agreeing: int = 0
    right: int = 0
    both: int = 0
    unended: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    @property
    def precision(self) -> float | None:
        return self.both / self.agreeing if self.agreeing else None

    @property
    def recall(self) -> float | None:
        return self.both / self.right if self.right else None

    @property
    def share(self) -> float | None:
        return self.agreeing / self.written if self.written else None


def count(
    written: Samples,
    truth: Samples,
    tasks: Mapping[str, Task],
    passed: np.ndarray | None = None,
    ended: np.ndarray | None = None,
) -> Table:
    """Counts by task and length. truth: the same problems solved; passed, ended (S,) bool: default
    all."""
    right = right_chains(written, truth)
    agreeing = verify_chains(written, tasks, "self")
    every = np.ones(len(written), bool)
    passed = every if passed is None else passed
    ended = every if ended is None else ended
    columns = (every, passed, agreeing, right, agreeing & right, ~ended)
    table: Table = {}
    for k in np.unique(truth.task):
        own = table.setdefault(TASK_NAMES[k], {})
        for length in np.unique(truth.length[truth.task == k]):
            here = (truth.task == k) & (truth.length == length)
            own[str(length)] = Counts(*(int(column[here].sum()) for column in columns))
    return table


def add(tables: list[Table]) -> Table:
    """The sum of several tables, tasks and lengths in ascending order."""
    total: Table = {}
    for table in tables:
        for task, by_length in table.items():
            own = total.setdefault(task, {})
            for length, counts in by_length.items():
                own[length] = own.get(length, Counts()) + counts
    return {
        task: dict(sorted(own.items(), key=lambda item: int(item[0])))
        for task, own in sorted(total.items(), key=lambda item: TASK_NAMES.index(item[0]))
    }


def to_json(table: Table) -> dict[str, dict[str, dict[str, int]]]:
    return {t: {n: asdict(counts) for n, counts in own.items()} for t, own in table.items()}


def from_json(values: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    return {t: {n: Counts(**counts) for n, counts in own.items()} for t, own in values.items()}


def report(table: Table) -> str:
    """The table as text: a line for each length, the sum of each task below."""
    lines = [
        "label-free filter (the answer agrees with the rounds) against truth",
        f"{'task':14s}{'length':>7s}{'written':>9s}{'passed':>9s}{'right':>9s}"
        f"{'kept':>8s}{'precision':>11s}{'recall':>8s}{'unended':>9s}",
    ]
    for task, by_length in table.items():
        rows = [*by_length.items()]
        if len(rows) > 1:
            rows.append(("all", sum(by_length.values(), Counts())))
        for length, c in rows:
            lines.append(
                f"{task:14s}{length:>7s}{c.written:9d}{c.passed:9d}{c.right:9d}"
                f"{_percent(c.share):>8s}{_percent(c.precision):>11s}{_percent(c.recall):>8s}"
                f"{c.unended:9d}"
            )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _values(counts: Counts) -> tuple[int, ...]:
    return tuple(asdict(counts).values())

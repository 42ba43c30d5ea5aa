"""What a task's table of a config may leave out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

PHASES = 3  # of the self-chain controls, where no task says
SELF_COUNT, INSIDE, BEYOND = 64, 4000, 1000  # chains of a length, true problems, looped chains


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a config with the settings that its tasks leave out.

    The looped model writes chains of every length beyond `train` up to `test`, the self-chain
    controls grow by one length a phase, and tokens are marked at the longest length of both ranges.
    """
    config = dict(config)
    tasks = config.get("tasks")
    if not isinstance(tasks, Mapping) or not all(isinstance(t, Mapping) for t in tasks.values()):
        return config  # the schema says what is wrong
    phases = _phases(list(tasks.values()))
    config["tasks"] = {name: _completed(table, phases) for name, table in tasks.items()}
    return config


def with_drawable(table: Mapping[str, Any], drawable: Callable[[int], bool]) -> Mapping[str, Any]:
    """Returns a task's completed table with self-chains of lengths that there are problems of: in
    place of each that was left to this module, the next shorter one.

    Args:
        table: The table.
        drawable: Tells whether problems of a length can be drawn.
    """
    lengths = table.get("self_lengths", [])
    ranges = {key: table[key] for key in ("train", "test") if key in table}
    if not _has_ranges(table) or lengths != _completed(ranges, len(lengths))["self_lengths"]:
        return table
    shortest, fitting = table["train"][0], []
    for wanted in lengths:
        there = (n for n in range(wanted, shortest - 1, -1) if drawable(n))
        fitting.append(next(there, wanted))
    return {**table, "self_lengths": fitting}


def _phases(tables: Sequence[Mapping[str, Any]]) -> int:
    """Returns the number of self-chain phases: the first that a task gives, or up to PHASES."""
    keys = ("self_lengths", "self_counts")
    given = [len(t[key]) for t in tables for key in keys if _is_list(t.get(key))]
    beyond = [_last(t) - t["train"][1] for t in tables if _has_ranges(t)]
    return given[0] if given else min(PHASES, max(beyond, default=1))


def used_lengths(entry: Mapping[str, Any]) -> list[int]:
    """Returns all lengths of problems of a task that a run draws, ascending."""
    if not {"train", "test"} <= set(entry):  # the schema says so
        return []
    (shortest, longest), last = entry["train"], entry["test"][1]
    last = max(last, longest + len(entry["merge_beyond"]))
    return sorted({*range(shortest, last + 1), *entry["self_lengths"], *entry["hit_matrix"]})


def _completed(table: Mapping[str, Any], phases: int) -> dict[str, Any]:
    if not _has_ranges(table):
        return {"parameters": {}, **table}
    longest, last = table["train"][1], _last(table)
    return {
        "parameters": {},
        "self_lengths": [min(longest + 1 + k, last) for k in range(phases)],
        "self_counts": [SELF_COUNT] * phases,
        "merge_inside": INSIDE,
        "merge_beyond": [BEYOND] * (last - longest),
        "hit_matrix": sorted({longest, last}),
        **table,
    }


def _last(table: Mapping[str, Any]) -> int:
    """Returns the longest length, at least one beyond training."""
    return max(table["test"][1], table["train"][1] + 1)


def _has_ranges(table: Mapping[str, Any]) -> bool:
    return _is_range(table.get("train")) and _is_range(table.get("test"))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_range(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(isinstance(n, int) for n in value)

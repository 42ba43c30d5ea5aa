"""Parses ranges of lengths from the command line."""

from __future__ import annotations


def parse_lengths(text: str | None) -> range | None:
    """Parses `10-13` or `10`. Raises ValueError for anything else."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise ValueError(f"--lengths {text!r} is not understood; give a range like 10-13.")
    return range(int(first), int(last or first) + 1)

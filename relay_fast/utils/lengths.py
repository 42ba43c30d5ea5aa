"""Ranges of lengths as a person types them."""

from __future__ import annotations


def parse_lengths(text: str | None) -> range | None:
    """The range that `10-13` or `10` means. Raises ValueError for anything else."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise ValueError(f"--lengths {text!r} is not understood; give a range like 10-13.")
    return range(int(first), int(last or first) + 1)

"""Ranges of lengths as text: parsed from the command line, and written in messages."""

from __future__ import annotations

from collections.abc import Iterable


def parse_lengths(text: str | None) -> range | None:
    """Parses `10-13` or `10`. Raises ValueError for anything else."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
        raise ValueError(f"--lengths {text!r} is not understood; give a range like 10-13.")
    return range(int(first), int(last) + 1)


def ranges_text(lengths: Iterable[int], most: int = 5) -> str:
    """Describes ascending numbers, as in `1..10, 12`."""
    parts: list[list[int]] = []
    for n in lengths:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    texts = ["..".join(map(str, part)) for part in parts]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")

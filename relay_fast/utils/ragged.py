"""Index arithmetic for ragged arrays: pieces of unequal length laid end to end."""

from __future__ import annotations

import numpy as np


def lengths_to_offsets(sizes: np.ndarray) -> np.ndarray:
    """Returns the (N + 1,) int64 offsets of N pieces of these sizes, laid end to end."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def concat_ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the flat indices starts[0], …, starts[0] + sizes[0] − 1, starts[1], …."""
    offsets = lengths_to_offsets(sizes)
    flat = np.repeat(starts - offsets[:-1], sizes)
    flat += np.arange(offsets[-1])
    return flat


def pieces(sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Splits items, in order, into groups of about `most` in total size; returns their indices."""
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // most)) + 1
    return np.split(np.arange(len(sizes)), cuts)

"""Checks of what callers say about their sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from relay_fast.utils.arguments import check_tensors, on_host
from relay_fast.utils.numbers import check_int64


def check_floating(x: Tensor, name: str = "x") -> None:
    """Raises TypeError unless x is a tensor in floating point."""
    check_tensors(**{name: x})
    if not x.is_floating_point():
        raise TypeError(
            f"{name} is {x.dtype}, but a state is in floating point: embed the tokens first"
        )


def check_cu_seqlens(
    cu_seqlens: Sequence[int] | np.ndarray | Tensor, rows: int, of: str = "x"
) -> np.ndarray:
    """Returns row offsets (sequences + 1,) as int64 on the host; copying a CUDA tensor
    synchronises.

    Args:
        cu_seqlens: the offsets.
        rows: the number of rows at which they must end.
        of: name of the tensor that has the rows, for messages.

    Raises:
        ValueError: if they do not start at 0, decrease, or do not end at `rows`.
        TypeError: if they are not integers.
    """
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = on_host("cu_seqlens", cu_seqlens)
    offsets = np.asarray(cu_seqlens)
    if offsets.ndim != 1 or not offsets.size or offsets[0] != 0:
        start = offsets.reshape(-1)[:1].tolist()
        raise ValueError(
            f"cu_seqlens must have shape (sequences + 1,) and start at 0, not at {start}"
        )
    if not np.issubdtype(offsets.dtype, np.integer):
        raise TypeError(f"cu_seqlens must be integers, got {offsets.dtype}: give row offsets")
    lengths = np.diff(offsets)
    if lengths.min(initial=0) < 0:
        i = int(np.argmax(lengths < 0))
        raise ValueError(
            f"cu_seqlens decreases from {offsets[i]} to {offsets[i + 1]} at sequence {i}: give the "
            "row offsets of the sequences in order"
        )
    if offsets[-1] != rows:
        raise ValueError(
            f"cu_seqlens ends at {offsets[-1]} but {of} has {rows} rows: give offsets up to {rows}"
        )
    return offsets.astype(np.int64)


def check_loops(loops: int | Sequence[int] | np.ndarray | Tensor, sequences: int) -> np.ndarray:
    """Returns loop counts (sequences,) as int64 on the host; copying a CUDA tensor synchronises.

    Args:
        loops: an int, or one count per sequence.
        sequences: the number of sequences.

    Raises:
        ValueError: for negative counts, or another number of counts than sequences.
        TypeError: for counts that are not integers.
    """
    if isinstance(loops, Tensor):
        loops = on_host("loops", loops)
    try:
        counts = np.asarray(loops)
    except ValueError:  # a ragged list
        raise TypeError(f"loops = {loops}: pass an int or one int per sequence") from None
    if counts.dtype.kind in "Ouf":  # also what numpy makes of Python's ints beyond int64
        whole = [n for n in np.asarray(loops, object).reshape(-1).tolist() if type(n) is int]
        check_int64("loops", max(whole, key=abs, default=0))
    if counts.dtype == np.bool_ or not np.issubdtype(counts.dtype, np.integer):
        if counts.size or counts.ndim != 1:
            raise TypeError(
                f"loops must be integers, got {counts.dtype}: pass an int or one int per sequence"
            )
    if counts.ndim == 0:
        counts = np.full(sequences, int(counts), dtype=np.int64)
    if counts.ndim > 1:
        raise ValueError(
            f"loops has shape {tuple(counts.shape)}: tokens of a sequence attend to each other in "
            "every iteration, so they loop equally often; give an int or one count per sequence"
        )
    if counts.shape != (sequences,):
        raise ValueError(
            f"loops has shape {tuple(counts.shape)} but the batch holds {sequences} sequences: "
            "pass an int or one count per sequence"
        )
    if counts.size and counts.min() < 0:
        worst = int(counts.argmin())
        raise ValueError(f"loops[{worst}] = {counts[worst]} is negative: give counts of 0 or more")
    return counts.astype(np.int64)

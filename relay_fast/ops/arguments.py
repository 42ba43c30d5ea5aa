"""Arguments of the ops of a layer, checked and brought into one form."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from relay_fast.ops.dispatch import compute_dtype
from relay_fast.utils.numbers import as_float, as_int


def check_shape(name: str, t: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError for a tensor of another shape.

    Args:
        name: of the argument.
        t: the tensor.
        shape: its sizes, texts for those that may be any.
    """
    fits = t.ndim == len(shape) and all(
        isinstance(n, str) or n == m for n, m in zip(shape, t.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(t.shape)}: give ({wanted})")


def cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts the tensors to the dtype of GEMMs."""
    return [None if t is None else t.to(compute_dtype(t)) for t in tensors]


def plain_int(name: str, value: Any) -> int:
    """Converts a number, or an array or tensor with one, to an int of Python."""
    return as_int(name, _plain(value), least=0)


def plain_float(name: str, value: Any) -> float:
    """Converts a number, or an array or tensor with one, to a float of Python."""
    return as_float(name, _plain(value), least=0)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value
    if isinstance(value, (np.generic, np.ndarray)):  # a tuple, which torch.compile can trace
        return value.item() if value.size == 1 else value
    return value

"""Checks numbers that users give: Python's, numpy's and tensors with one element."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """Converts `value` to an int.

    Args:
        name: The name of the argument in messages.
        value: The number; bools are refused.
        least: The smallest allowed value, by default any.

    Raises:
        ValueError: The value is not a whole number, or too small.
    """
    if type(value) is int:
        number = value
    else:
        try:
            # Asked first: torch.compile of PyTorch 2.11 lets the TypeError of a float pass.
            if is_bool(value) or not hasattr(value, "__index__"):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} = {value!r}: it must be a whole number") from None
    _check_least(name, value, number, least)
    return number


def check_int64(name: str, number: int) -> int:
    """Returns the number. Raises ValueError if int64 does not hold it."""
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} = {number}: it must be below 2**63 in size")
    return number


def as_float(name: str, value: Any, least: float | None = None) -> float:
    """Converts `value` to a float.

    Args:
        name: The name of the argument in messages.
        value: The number; texts and bools are refused.
        least: The smallest allowed value, by default any.

    Raises:
        ValueError: The value is not a finite number, or too small.
    """
    try:
        if isinstance(value, str | bytes) or is_bool(value):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: it must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} = {number}: it must be finite")
    _check_least(name, value, number, least)
    return number


def as_bool(name: str, value: Any) -> bool:
    """Converts `value` to a bool; raises ValueError for anything else, 0 and 1 included."""
    if not is_bool(value):
        raise ValueError(f"{name} = {value!r}: it must be True or False")
    return bool(value)


def as_ints(name: str, values: Any, count: int, least: int | None = None) -> np.ndarray:
    """Converts `values` to an int64 array (count,).

    Args:
        name: Their name in messages.
        values: The numbers; bools are refused.
        count: How many there must be.
        least: The smallest allowed value, by default any.

    Raises:
        ValueError: They are others.
    """
    array, has = np.asarray(values), "have" if name.endswith("s") else "has"
    if array.shape != (count,) or (count and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} {has} shape {array.shape} and type {array.dtype}: give {count} whole numbers"
        )
    if least is not None and array.min(initial=least) < least:
        raise ValueError(f"{name} hold {array.min()}: they must be {least} or more")
    return array.astype(np.int64, copy=False)


def plain_numbers(value: Any) -> Any:
    """Converts numpy's numbers and arrays in dicts, lists and tuples to Python's, for JSON."""
    if isinstance(value, Mapping):
        return {name: plain_numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(part) for part in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def is_bool(value: Any) -> bool:
    """Tells whether `value` is a single bool of Python, numpy or torch."""
    if isinstance(value, bool):
        return True
    kind = str(getattr(value, "dtype", ""))
    return kind in ("bool", "torch.bool") and not value.ndim


def _check_least(name: str, given: Any, number: float, least: float | None) -> None:
    if least is not None and number < least:
        bound = "0 or more" if least == 0 else f"at least {least}"
        raise ValueError(f"{name} = {given}: it must be {bound}")

"""Numbers that users give: Python's, numpy's and tensors of one number alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. Raises ValueError, calling it `name`, where it is no whole number (a bool
    is none) or less than `least`."""
    if type(value) is int:
        number = value
    else:
        try:
            if is_bool(value):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} = {value!r}: it must be a whole number") from None
    _check_least(name, value, number, least)
    return number


def as_float(name: str, value: Any, least: float | None = None) -> float:
    """`value` as a float. Raises ValueError, calling it `name`, where it is no finite number or
    less than `least`."""
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
    """`value` as a bool. Raises ValueError, calling it `name`, where it is none (0 and 1 are not
    taken for one)."""
    if not is_bool(value):
        raise ValueError(f"{name} = {value!r}: it must be True or False")
    return bool(value)


def plain_numbers(value: Any) -> Any:
    """A value for JSON, with numpy's numbers in its dicts, lists and tuples made Python's."""
    if isinstance(value, Mapping):
        return {name: plain_numbers(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def is_bool(value: Any) -> bool:
    """Whether `value` is a single bool, be it Python's, numpy's or a tensor."""
    if isinstance(value, bool):
        return True
    kind = str(getattr(value, "dtype", ""))
    return kind in ("bool", "torch.bool") and not value.ndim


def _check_least(name: str, given: Any, number: float, least: float | None) -> None:
    if least is not None and number < least:
        bound = "0 or more" if least == 0 else f"at least {least}"
        raise ValueError(f"{name} = {given}: it must be {bound}")

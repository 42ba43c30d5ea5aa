"""Old keyword names that stay accepted."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def renamed(**new_names: str) -> Callable[[F], F]:
    """Decorates a function so that it takes old keyword names, with a DeprecationWarning.

    Args:
        new_names: The new name of each old one, as in `renamed(report="print_table")`.

    Raises:
        TypeError: At a call, for both names of one argument.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{old} and {new} are the same argument: give {new} only")
                warnings.warn(
                    f"{old} is now called {new}: use that name", DeprecationWarning, stacklevel=2
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate

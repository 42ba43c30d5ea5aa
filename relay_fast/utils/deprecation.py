"""Old names that stay accepted: keywords, methods and values of settings."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# Setting -> its old values and what they are called now.
RENAMED_VALUES = {"decay": {"late": "wsd"}}


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Issues the DeprecationWarning of a renamed thing.

    Args:
        old: the old name, as the user wrote it.
        new: the name to use instead.
        stacklevel: as in `warnings.warn`, counted from the caller of this function.
    """
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=stacklevel + 1)


def renamed_keywords(**new_names: str) -> Callable[[F], F]:
    """Decorates a function to accept old keywords, given as old="new", with one warning each.

    The decorated function raises TypeError where the old and the new keyword are both given.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def accept_old(*args, **options):
            for old in new_names.keys() & options.keys():
                new = new_names[old]
                if new in options:
                    raise TypeError(
                        f"{function.__name__}() got {old} and {new}, which are the same: give {new}"
                    )
                warn_renamed(f"{old} of {function.__name__}()", new)
                options[new] = options.pop(old)
            return function(*args, **options)

        return accept_old

    return decorate


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """Makes a method that warns under its `old` name and calls the method `new`."""

    def method(self, *args, **options):
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **options)

    method.__name__, method.__doc__ = old, f"Deprecated alias of `{new}`."
    return method


def current_value(setting: str, value: Any, *, warn: bool = True, stacklevel: int = 2) -> Any:
    """Returns the value of a setting under its current name.

    Args:
        setting: the name of the setting, such as "decay".
        value: its value; what is not an old name is returned as it is.
        warn: whether an old name warns.
        stacklevel: as in `warnings.warn`.
    """
    new = RENAMED_VALUES.get(setting, {}).get(value) if isinstance(value, str) else None
    if new is None:
        return value
    if warn:
        warn_renamed(f"{setting} = {value!r}", repr(new), stacklevel + 1)
    return new


def current_config(config: Any, *, warn: bool = False) -> Any:
    """Returns a copy of a JSON-able config whose values have their current names."""
    if isinstance(config, Mapping):
        return {
            key: current_value(key, current_config(value, warn=warn), warn=warn)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [current_config(value, warn=warn) for value in config]
    return config

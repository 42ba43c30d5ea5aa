"""Where a call came from, for warnings that are raised deep inside."""

from __future__ import annotations

import sys

_PACKAGE = __name__.partition(".")[0]


def outside_level() -> int:
    """Returns the `stacklevel` with which its caller warns at the line outside of the package that
    called it."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level

"""What somebody may have meant by a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the most similar of the known names; None if there are none."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff=0.0)), None)

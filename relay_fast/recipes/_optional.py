"""Packages that only some recipes need."""

from __future__ import annotations

from importlib.util import find_spec


def need(recipe: str, *packages: str) -> None:
    """Raises ValueError, which says how to install them, unless all packages are there."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise ValueError(f"recipe {recipe} needs {names}: pip install {' '.join(missing)}")

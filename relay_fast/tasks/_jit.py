"""Compiles the samplers with numba.

numba's disk cache checks only the compiled function's own file. A digest of this folder's files,
whose functions and constants are inlined, is therefore a part of the name that a function is cached
under.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba


def compiled(function: Callable) -> Callable:
    """Compiles `function` without the GIL; caches it on disk if a folder is writable."""
    function.__qualname__ += f"_{sources_digest(Path(__file__).parent)}"  # names the cache's file
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no writable folder
        return numba.njit(nogil=True)(function)


@cache
def sources_digest(folder: Path) -> str:
    """Returns 16 hexadecimal digits of the Python files in `folder`, from which compiled code takes
    all its functions and constants."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

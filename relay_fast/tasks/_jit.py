"""How the samplers are compiled.

numba's disk cache watches the file of the compiled function alone, by its time and size. What is
inlined from this folder's other files (`_random.py`, the ids in `vocabulary.py`) is a part of the
name that the function is cached under, so that an edit or an update compiles it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba


def compiled(function: Callable) -> Callable:
    """`function` compiled without the GIL, kept on disk where a folder is writable."""
    function.__qualname__ += f"_{sources_digest(Path(__file__).parent)}"  # names the cache's file
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no writable folder
        return numba.njit(nogil=True)(function)


@cache
def sources_digest(folder: Path) -> str:
    """16 hexadecimal digits that stand for the Python files in `folder`, which is all that compiled
    code takes constants and functions from."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

"""How the samplers are compiled.

numba's disk cache watches the file of the compiled function alone. What is inlined from elsewhere
(`_random.py`, the ids in `vocabulary.py`) is not seen: after editing those, delete
`relay_fast/tasks/__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """`function` compiled without the GIL, kept on disk where a folder is writable."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no writable folder
        return numba.njit(nogil=True)(function)

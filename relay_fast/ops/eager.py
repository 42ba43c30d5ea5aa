"""Calls that torch.compile does not trace.

Import this only while compiling: it imports torch's compiler, which is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def eager(function: Callable, *arguments: Any) -> Any:
    """Returns function(*arguments), with a graph break under torch.compile."""
    return function(*arguments)

"""Calls that torch.compile does not look into.

Imported where something is being compiled: it takes torch's compiler along, slow to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def eager(function: Callable, *arguments: Any) -> Any:
    """function(*arguments), a graph break."""
    return function(*arguments)

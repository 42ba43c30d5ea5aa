"""How much memory a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most memory that tensors take at any moment of the call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([size for _, size in sizes]).max(initial=0))

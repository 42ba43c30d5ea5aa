"""The progress of a training stage at each step, and its learning-rate factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relay_fast.utils.deprecation import current_value

DECAYS = ("linear", "cosine", "wsd", "constant")


@dataclass(frozen=True)
class Schedule:
    """progress (steps,) in [0, 1): the share of the stage that is behind at the start of each
    step. Raises ValueError for a `decay` that is none of DECAYS."""

    progress: np.ndarray
    warmup: float = 0.01
    decay: str = "linear"

    def __post_init__(self) -> None:
        decay = current_value("decay", self.decay, stacklevel=3)  # the caller of __init__
        object.__setattr__(self, "decay", decay)
        if self.decay not in DECAYS:
            raise ValueError(f"decay = {self.decay!r} is unknown: use one of {', '.join(DECAYS)}")

    @staticmethod
    def by_steps(steps: int, **options) -> Schedule:
        """Every step counts alike."""
        return Schedule(np.arange(steps) / max(1, steps), **options)

    @staticmethod
    def by_work(work: float, cost: Callable[[float], float], **options) -> Schedule:
        """Steps count by their cost: `cost(progress)` is what a step at that progress takes, in the
        unit of `work`, so that a curriculum's short problems get more steps for the same time."""
        done, progress = 0.0, []
        while done < work:
            progress.append(done / work)
            done += cost(progress[-1])
        return Schedule(np.array(progress), **options)

    @property
    def steps(self) -> int:
        return len(self.progress)

    def lr_scale(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, then `decay`: "linear" or "cosine" to 0, "late"
        (linear to 0 over the last 40 % only) or "constant"."""
        p = float(self.progress[step])
        warm = min(1.0, (p + 1 / self.steps) / self.warmup) if self.warmup else 1.0
        if self.decay == "linear":
            return warm * (1 - p)
        if self.decay == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * p))
        if self.decay == "wsd":
            return warm * min(1.0, (1 - p) / 0.4)
        return warm

"""The progress of a training stage at each step, and its learning-rate scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from relay_fast.utils.deprecation import current_value

DECAYS = ("linear", "cosine", "wsd", "constant")


@dataclass(frozen=True)
class Schedule:
    """The steps of a training stage, and the learning rate's warm-up and decay.

    Args:
        progress: (steps,) in [0, 1), the share of the stage that is done before each step.
        warmup: share of the stage over which the learning rate rises.
        decay: one of DECAYS; see `lr_scale`.

    Raises:
        ValueError: for an unknown `decay`.
    """

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
        """Makes a schedule in which all steps count alike."""
        return Schedule(np.arange(steps) / max(1, steps), **options)

    @staticmethod
    def by_work(work: float, cost: Callable[[float], float], **options) -> Schedule:
        """Makes a schedule in which steps count by cost, so that cheap steps are more frequent.

        Args:
            work: the cost of the whole stage.
            cost: the cost of a step at a progress, in the unit of `work`.
            **options: `warmup` and `decay`.
        """
        done, progress = 0.0, []
        while done < work:
            progress.append(done / work)
            done += cost(progress[-1])
        return Schedule(np.array(progress), **options)

    @property
    def steps(self) -> int:
        return len(self.progress)

    def lr_scale(self, step: int) -> float:
        """Computes the factor of the learning rate at a step.

        After a linear warm-up: "linear" or "cosine" decay to 0; "wsd" (warm-up, stable, decay),
        linear to 0 over the last 40 % of the stage; or "constant".
        """
        p = float(self.progress[step])
        warm = min(1.0, (p + 1 / self.steps) / self.warmup) if self.warmup else 1.0
        if self.decay == "linear":
            return warm * (1 - p)
        if self.decay == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * p))
        if self.decay == "wsd":
            return warm * min(1.0, (1 - p) / 0.4)
        return warm

"""What a pass of the loop is: the body of an iteration, the readout, and the run with both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.ops.dispatch import Ops
from relay_fast.ops.gradients import GATHER_ROWS, GradientBuffers
from relay_fast.utils.numbers import whole

READOUT_ROWS = 1024  # fewer rows than this make a cross-entropy call mostly overhead


class Iteration(Protocol):
    """One iteration of one row range, forward and backward."""

    dx: (
        Tensor | None
    )  # gradient of the input as far as injection carried it, None without injection
    saved_width: int  # how many tensors `forward` returns
    skips_dead_rows: bool  # under a static plan: leaves dead rows out by itself

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]: ...

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Readout:
    """Which rows of which state carry a target, iteration-major, and how their loss is taken.

    rows (R,) int64 index into the active prefix of state t; targets (R,) int64; offsets: T + 1
    ints, where the rows of state t start (index t − 1). Parameters are handed over with the
    body's: final norm weight, final norm bias (or None), head.
    """

    rows: Tensor
    targets: Tensor
    offsets: tuple[int, ...]
    eps: float = 1e-6
    norm: str = "rms"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def rows_of(self, iteration: int) -> slice:
        """The rows of an iteration in the flat lists."""
        return slice(self.offsets[iteration - 1], self.offsets[iteration])

    def chunk_of(self, iteration: int) -> range:
        """The iterations whose rows are read out together with this one's: neighbours with fewer
        than READOUT_ROWS rows between them, the same under every recompute policy."""
        return self._groups[iteration - 1]

    def chunk_rows(self, group: range) -> slice:
        """The rows of a group of iterations in the flat lists."""
        return slice(self.offsets[group[0] - 1], self.offsets[group[-1]])

    @cached_property
    def _groups(self) -> list[range]:
        groups, first = [], 1
        for t in range(1, len(self.offsets)):
            full = self.offsets[t] - self.offsets[first - 1] >= READOUT_ROWS
            if full or t == len(self.offsets) - 1:
                groups += [range(first, t + 1)] * (t + 1 - first)
                first = t + 1
        return groups

    @property
    def options(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "kind": self.norm,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


@dataclass(frozen=True)
class LoopSpec:
    """Everything about one pass through the loop that is not a tensor with a gradient.

    make_iteration(x, parameters) binds the body; the last three parameters are the readout's if
    there is one. `states`: which iterations' states are returned, ascending.
    """

    plan: Plan
    make_iteration: Callable[[Tensor, Sequence[Tensor | None]], Iteration]
    ops: Ops
    policy: RecomputePolicy = RecomputePolicy("state")
    states: tuple[int, ...] = ()
    truncate: int | None = None
    readout: Readout | None = None
    gather_rows: int = GATHER_ROWS
    compute_dtype: torch.dtype | None = None  # of the readout's head; None: the parameter's own

    def __post_init__(self) -> None:
        object.__setattr__(self, "truncate", check_truncate(self.truncate))

    def collect(self, wanted: Sequence[int], final: Tensor, states: Tensor) -> list[Tensor]:
        """The wanted states of a pass, in the caller's order; the last one lies in `final`."""
        spans, result = self.state_spans(), []
        for t in wanted:
            state = states[spans[t]] if t in spans else final[: self.plan.rows_at(t)]
            index = self.plan.active_to_caller(t)
            result.append(state if index is None else state[index])
        return result

    def state_spans(self) -> dict[int, slice]:
        """Where each returned state lies in the flat buffer of returned states."""
        spans, start = {}, 0
        for t in self.states:
            stop = start + self.plan.rows_at(t)
            spans[t] = slice(start, stop)
            start = stop
        return spans


def check_truncate(truncate: int | None) -> int | None:
    """truncate as an int. Raises ValueError for what is no number of iterations."""
    try:
        return None if truncate is None else whole("truncate", truncate, least=1)
    except ValueError:
        raise ValueError(
            f"truncate = {truncate}: gradients flow through a whole number of iterations, at least "
            "1; use None for all, or torch.no_grad() for none"
        ) from None

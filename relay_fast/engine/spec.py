"""Describes one pass through the loop: the loop body, the readout, and the options of the pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, RowRange
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.states import States
from relay_fast.ops.dispatch import Ops
from relay_fast.ops.gradients import GATHER_ROWS, GradientBuffers
from relay_fast.utils.arguments import on_host
from relay_fast.utils.numbers import as_int

READOUT_ROWS = 1024  # with fewer rows a cross-entropy call is mostly overhead


class Iteration(Protocol):
    """The loop body: one iteration over one row range, forward and backward.

    Attributes:
        dx: gradient of the loop's input that came in through injection, (rows, …); None without
            injection.
        saved_width: number of tensors that `forward` returns.
        skips_dead_rows: True if the body leaves the dead rows of a fixed-capacity plan out by
            itself.
        keeps_operands: True if what `backward` hands to `GradientBuffers.weight` is not changed
            later, so that the weight gradients of several iterations may be taken together.
        may_leave_unused: True if a parameter that no iteration used gets no gradient, as in
            autograd, instead of zeros.
        aux: sum of the auxiliary values of the iterations so far, (A,); None: the body has none.
    """

    dx: Tensor | None
    aux: Tensor | None
    saved_width: int
    skips_dead_rows: bool
    keeps_operands: bool
    may_leave_unused: bool

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]:
        """Computes state t.

        Args:
            h: State t − 1.
            row_range: The rows of iteration t.
            out: Receives state t of these rows.
            keep: Whether a backward follows.

        Returns:
            With `keep` the tensors that `backward` needs.
        """
        ...

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor:
        """Computes the gradient of state t − 1.

        Args:
            g: Gradient of state t; may be overwritten by the result. Dead rows keep what they have.
            h: State t − 1.
            saved: What `forward` returned.
            row_range: The rows of iteration t.
            grads: Receives the gradients of the parameters, added to what it holds.

        Returns:
            The gradient of state t − 1, possibly `g` itself.
        """
        ...


@dataclass(frozen=True)
class Readout:
    """Selects the rows of each state that carry a target, and the options of their loss.

    The readout's parameters (final norm weight, final norm bias or None, head) follow the loop
    body's in the engine's list of parameters.

    Args:
        rows: (R,) int64, indices into the active prefix of state t, iteration-major.
        targets: (R,) int64.
        offsets: T + 1 ints; the rows of state t start at offsets[t − 1].
        eps: epsilon of the final norm.
        norm: "rms" or "layer".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: weight of lse².
    """

    rows: Tensor
    targets: Tensor
    offsets: tuple[int, ...]
    eps: float = 1e-6
    norm: str = "rms"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def rows_of(self, iteration: int) -> slice:
        """Returns the slice of an iteration's rows in the flat lists."""
        return slice(self.offsets[iteration - 1], self.offsets[iteration])

    def chunk_of(self, iteration: int) -> range:
        """Returns the iterations whose rows are read out in one call with this one's. Neighbouring
        iterations are joined until they have READOUT_ROWS rows; the chunks do not depend on the
        recompute policy."""
        return self._chunks[iteration - 1]

    def chunk_rows(self, chunk: range) -> slice:
        """Returns the slice of a chunk's rows in the flat lists."""
        return slice(self.offsets[chunk[0] - 1], self.offsets[chunk[-1]])

    @property
    def most_rows(self) -> int:
        """The rows of the largest chunk."""
        sizes = (self.chunk_rows(chunk) for chunk in self._chunks)
        return max((part.stop - part.start for part in sizes), default=0)

    @cached_property
    def _chunks(self) -> list[range]:
        chunks, first = [], 1
        for t in range(1, len(self.offsets)):
            full = self.offsets[t] - self.offsets[first - 1] >= READOUT_ROWS
            if full or t == len(self.offsets) - 1:
                chunks += [range(first, t + 1)] * (t + 1 - first)
                first = t + 1
        return chunks

    @property
    def options(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "kind": self.norm,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }


class _Sorted(np.ndarray):
    """One count per sequence in the plan's order, of a spec that may be copied by `replace`."""


@dataclass(frozen=True)
class LoopSpec:
    """Everything about one pass through the loop except the tensors that get a gradient.

    Args:
        plan: order and active prefix of the batch.
        make_iteration: (x, parameters) → the loop body bound to them. With a readout, the last
            three parameters are the readout's.
        ops: the implementation of the ops.
        policy: the recompute policy.
        states: iterations whose states are returned, ascending.
        truncate: number of last iterations of each sequence that gradients flow through: None for
            all, an int, or one for each sequence in the caller's order.
        until: (row range, state t, state t − 1 of the same rows) → which of its sequences stop, a
            bool array; needs a `StoppingPlan`.
        readout: rows and options of the loss; None: no loss.
        gather_rows: see `GradientBuffers`.
        compute_dtype: dtype of the readout's head; None: the parameter's own.
        inside_bytes: (x) → bytes of a row that the backward of one iteration needs beside the
            state, for "auto"; None: unknown.
    """

    plan: Plan
    make_iteration: Callable[[Tensor, Sequence[Tensor | None]], Iteration]
    ops: Ops
    policy: RecomputePolicy = RecomputePolicy("state")
    states: tuple[int, ...] = ()
    truncate: int | np.ndarray | None = None
    until: Callable[[RowRange, Tensor, Tensor], np.ndarray] | None = None
    readout: Readout | None = None
    gather_rows: int = GATHER_ROWS
    compute_dtype: torch.dtype | None = None
    inside_bytes: Callable[[Tensor], int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.truncate, _Sorted):
            truncate = check_truncate(self.truncate, self.plan.sequences)
            if isinstance(truncate, np.ndarray):
                truncate = truncate[self.plan.order].view(_Sorted)
            object.__setattr__(self, "truncate", truncate)

    def with_iterations(
        self, make_iteration: Callable[[Tensor, Sequence[Tensor | None]], Iteration]
    ) -> LoopSpec:
        """Returns the same pass with another loop body."""
        return replace(self, make_iteration=make_iteration)

    def collect(self, wanted: Sequence[int], final: Tensor, states: Tensor) -> States:
        """Selects states of a finished pass.

        Args:
            wanted: iterations, in the caller's order.
            final: (rows, …), contains the state of the last iteration.
            states: the flat buffer of returned states.

        Returns:
            The wanted states, with rows in the caller's order.
        """
        spans, result = self.state_spans(), []
        for t in wanted:
            state = states[spans[t]] if t in spans else final[: self.plan.rows_at(t)]
            index = self.plan.active_to_caller(t)
            result.append(state if index is None else state[index])
        return States.of(result, [self.plan.sequences_at(t) for t in wanted], self.plan.device)

    def state_spans(self) -> dict[int, slice]:
        """Returns the slice of each returned state in the flat buffer of returned states."""
        spans, start = {}, 0
        for t in self.states:
            stop = start + self.plan.rows_at(t)
            spans[t] = slice(start, stop)
            start = stop
        return spans


def check_truncate(
    truncate: int | Sequence[int] | Tensor | None, sequences: int | None = None
) -> int | np.ndarray | None:
    """Checks the number of iterations that gradients flow through.

    Args:
        truncate: None for all, an int of 0 or more, or one for each sequence.
        sequences: the number of sequences; None: only an int or None is allowed.

    Returns:
        None, an int, or int64 (sequences,) if the counts differ.

    Raises:
        ValueError: if it is none of them.
    """
    if truncate is None:
        return None
    if isinstance(truncate, list | tuple | Tensor | np.ndarray) and np.ndim(truncate):
        counts = truncate
        counts = on_host("truncate", counts) if isinstance(counts, Tensor) else np.asarray(counts)
        if sequences is None:
            raise ValueError(
                "truncate has one count for each sequence, which torch.compile does not support: "
                "give one int"
            )
        if counts.shape != (sequences,) or not (
            counts.size == 0 or np.issubdtype(counts.dtype, np.integer) and counts.min() >= 0
        ):
            raise ValueError(
                f"truncate = {truncate}: give an int, or one of 0 or more for each of the "
                f"{sequences} sequences"
            )
        counts = counts.astype(np.int64)
        if not counts.size or (counts == counts[0]).all():
            return int(counts[0]) if counts.size else None
        return counts
    try:
        return as_int("truncate", truncate, least=0)
    except ValueError:
        raise ValueError(
            f"truncate = {truncate}: gradients flow through a whole number of iterations, 0 or "
            "more; use None for all"
        ) from None


class Pass(NamedTuple):
    """The result of one forward pass: its outputs, and the tensors that the backward needs."""

    outputs: tuple[Tensor, Tensor, Tensor, Tensor]  # final, states, loss, correct
    lse: Tensor
    kept: dict[int, Tensor]
    saved: list[Tensor | None]
    aux: Tensor  # (A,), empty without auxiliary values

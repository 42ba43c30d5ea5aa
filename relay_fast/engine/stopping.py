"""The forward pass of a loop whose sequences stop when a function of their states says so.

After each iteration the sequences that stopped are compacted out, so that the next one computes the
others only. The decisions are read by the host, once an iteration. The backward then runs over the
same sequences (`relay_fast.batch.stopping.StoppingPlan`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.paddings import device_tensor
from relay_fast.batch.plan import Plan
from relay_fast.batch.row_range import RowRange
from relay_fast.batch.stopping import StoppingPlan
from relay_fast.engine.module_checks import version
from relay_fast.engine.spec import LoopSpec, Pass


def forward_until(
    spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None], keep: bool
) -> Pass:
    """Runs the iterations until all sequences have stopped.

    Args:
        spec: the pass; its plan is a new `StoppingPlan`, which this completes.
        x: (rows, …) in the caller's order.
        parameters: the loop body's parameters.
        keep: whether to keep the tensors that the backward needs.
    """
    plan: StoppingPlan = spec.plan
    body = spec.make_iteration(x, parameters)
    # The number of iterations is not known yet: a policy that counts from the end counts from the
    # largest possible number.
    sizes = [rows * x[:1].nbytes for rows in plan.most_rows]
    between = spec.policy.kept(plan.limit, sizes) if keep else ()
    final, h = x.clone(), x
    chosen: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    insides: list[list[Tensor | None]] = []
    for row_range in plan.iterations():
        t = row_range.iteration
        entering, out = h[row_range.source], x.new_empty(row_range.last_row, *x.shape[1:])
        inside = body.forward(entering, row_range, out, keep and spec.policy.kind == "none")
        insides.append(inside if keep and spec.policy.kind == "none" else [])
        del inside
        ended = plan.stop(spec.until(row_range, out, entering))
        if ended is not None:
            final[ended[0]] = out[ended[1]]
        if t in spec.states:
            chosen[t] = out
        elif t in between:
            kept[t] = out
        h = out
    # Which iterations truncation stops is known only now.
    learning = [plan.row_ranges(t, spec.truncate)[0].grad for t in range(1, plan.max_loops + 1)]
    saved = [
        value for some, learns in zip(insides, learning, strict=True) if learns for value in some
    ]
    kept = {t: state for t, state in kept.items() if any(learning[t:])}
    empty = torch.empty(0, device=x.device)
    output = torch.cat([x[:0], *chosen.values()])
    aux = empty if body.aux is None else body.aux
    return Pass((final, output, empty, empty), empty, kept, saved, aux)


class Until:
    """Calls the user's function and checks what it returns.

    Args:
        function: (t, state t, state t − 1) → bool for each sequence. If it has an argument
            `cu_seqlens` or `sequences`, it also gets the row offsets of the sequences that it sees,
            or their indices in the batch.
        plan: of the pass.
        view: turns rows into the states that the caller knows, given the number of sequences.
        packed: whether states are packed rows, and the function may get `cu_seqlens`.
        start: number of iterations that were done before this pass.

    Raises:
        TypeError, ValueError: from the call, if it returns anything else.
        RuntimeError: from the call, if it changes a state in place.
    """

    def __init__(
        self,
        function: Callable,
        plan: StoppingPlan,
        view: Callable[[Tensor, int], object],
        packed: bool,
        start: int = 0,
    ):
        if not callable(function):
            raise TypeError(
                f"until is of type {type(function).__name__}: give a function (t, new, old) that "
                "returns a bool for each sequence"
            )
        self._function, self._plan, self._view, self._start = function, plan, view, start
        try:
            names = inspect.signature(function).parameters
        except ValueError:  # a built-in function
            names = ()
        self._takes = [name for name in ("cu_seqlens", "sequences") if name in names]
        if not packed and "cu_seqlens" in self._takes:
            self._takes.remove("cu_seqlens")

    def __call__(self, row_range: RowRange, new: Tensor, old: Tensor) -> np.ndarray:
        plan, count = self._plan, row_range.last_sequence
        t = self._start + row_range.iteration
        given = {
            "cu_seqlens": lambda: row_range.members.layout.cu_seqlens,
            "sequences": lambda: torch.from_numpy(plan.sequences_at(row_range.iteration)).to(
                plan.device
            ),
        }
        before = version(new), version(old)
        with torch.no_grad():
            stopped = self._function(
                t, self._view(new, count), self._view(old, count),
                **{name: given[name]() for name in self._takes},
            )  # fmt: skip
        if (version(new), version(old)) != before:
            raise RuntimeError(
                f"until changed a state in place at iteration {t}, but the loop goes on with it: "
                "change a copy"
            )
        if not isinstance(stopped, Tensor) or stopped.dtype != torch.bool:
            kind = stopped.dtype if isinstance(stopped, Tensor) else type(stopped).__name__
            raise TypeError(
                f"until returned {kind} at iteration {t}: return a bool tensor with one entry for "
                f"each of the {count} sequences that it got"
            )
        if stopped.shape != (count,):
            raise ValueError(
                f"until returned shape {tuple(stopped.shape)} at iteration {t}: return one bool "
                f"for each of the {count} sequences that it got, shape ({count},)"
            )
        return stopped.cpu().numpy()


def pass_options(
    until: Callable | None,
    plan: Plan,
    wanted: Sequence[int],
    view: Callable[[Tensor, int], object],
    packed: bool,
    start: int = 0,
) -> dict[str, object]:
    """Returns the fields `states` and `until` of the pass's `LoopSpec`.

    Args:
        until, plan, view, packed, start: as in `Until`; without a function nothing stops.
        wanted: iterations whose states are returned. The last one's is the final state, where it is
            known which that is.
    """
    if until is None:
        return {"states": tuple(t for t in wanted if t < plan.max_loops)}
    return {"states": tuple(wanted), "until": Until(until, plan, view, packed, start)}


def loops_run(plan: Plan) -> Tensor:
    """Returns how many iterations each sequence ran, (sequences,) int64 in the caller's order."""
    loops = np.empty_like(plan.loops)
    loops[plan.order] = plan.loops
    return device_tensor(loops, torch.int64, plan.device)

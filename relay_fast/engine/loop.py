"""The loop engine: one autograd Function over all iterations.

Iteration t computes the active prefix only. The recompute policy decides which states are kept for
the backward (`relay_fast.engine.recompute`). Each weight gradient is accumulated over all
iterations in one fp32 buffer (`relay_fast.ops.gradients`).

The engine is independent of layers and losses: a *body* runs one iteration of one row range,
forward and backward (`relay_fast.engine.block_iteration.BlockIteration`, or a user's module), and a
*readout* turns states into row losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from relay_fast.batch.plan import RowRange
from relay_fast.engine.auto_policy import choose_policy
from relay_fast.engine.row_losses import RowLosses, StateGradients
from relay_fast.engine.spec import Iteration, LoopSpec, Pass
from relay_fast.engine.stopping import forward_until
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import differentiable_once, launch_context, refuse_transforms
from relay_fast.ops.gradients import GROUP_ROWS, GradientBuffers


def run_loop(
    spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the loop on x; differentiable.

    Args:
        spec: the pass.
        x: (rows, …) in sorted order.
        parameters: the loop body's parameters, then the readout's if there is one.

    Returns:
        final (rows, …), each sequence's state after its own last iteration; the states chosen by
        `spec.states`, end to end; loss (R,) and correct (R,) of the readout's rows, empty
        without a readout.

    Raises:
        RuntimeError: under forward-mode AD or a torch.func transform.
    """
    return run_with_aux(spec, x, parameters)[:4]


def run_with_aux(
    spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Does what `run_loop` does, and sums the body's auxiliary values.

    Args:
        spec: The pass.
        x: The input, (rows, d) in sorted order.
        parameters: The parameters of the body, then those of the readout.

    Returns:
        What `run_loop` returns, and the sum of the auxiliary values, (A,).
    """
    refuse_transforms(x, *parameters)
    if torch.is_grad_enabled():
        return _Loop.apply(choose_policy(spec, x, parameters), x, *parameters)
    with launch_context(x):
        done = forward_pass(spec, x, parameters, keep=False)
    return *done.outputs, done.aux


def iterate(
    spec: LoopSpec,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    prepare: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (t, state t of the active prefix) for t = 1..T, without gradients.

    Two buffers hold the states: a yielded state is overwritten two iterations later. Of a
    fixed-capacity plan, the rows that are dead hold anything.

    Args:
        spec: the pass; its readout is not used.
        x: (rows, …) in sorted order.
        parameters: the loop body's parameters.
        prepare: (state t − 1, t) → the input of iteration t; by default state t − 1 itself.
    """
    with torch.no_grad(), launch_context(x):
        body = spec.make_iteration(x, parameters)
        buffers = [x.new_empty(x.shape), x.new_empty(x.shape)]
        h = x
        for t in range(1, spec.plan.max_loops + 1):
            out = buffers[t % 2][: spec.plan.rows_at(t)]
            if prepare is not None:
                h = prepare(h, t)
            for row_range in spec.plan.row_ranges(t):
                body.forward(h[row_range.rows], row_range, out[row_range.rows], keep=False)
            yield t, out
            h = out


class _States:
    """Allocates the states of one pass: in the returned buffer, among the kept states, or in one of
    two alternating buffers. Where the host does not know which sequences end and all states are
    kept, they lie behind the input in one buffer, from which the final state is gathered."""

    def __init__(self, spec: LoopSpec, x: Tensor, kept: Sequence[int]):
        self._plan, self._x = spec.plan, x
        self._spans = spec.state_spans()
        self.output = x.new_empty(sum(spec.plan.rows_at(t) for t in spec.states), *x.shape[1:])
        self._passing: dict[int, Tensor] = {}
        self._all: Tensor | None = None
        every = not spec.states and len(kept) == spec.plan.max_loops - 1
        if spec.plan.fixed_capacity and every:
            self._all = self._new(spec.plan.rows + spec.plan.token_iterations)
            self._all[: spec.plan.rows] = x
            self.kept = {t: self.slot(t) for t in sorted(kept)}
            return
        self.final = x.new_empty(x.shape)
        self.kept = {t: self._new(spec.plan.rows_at(t)) for t in sorted(kept)}
        idle = slice(0 if spec.plan.fixed_capacity else spec.plan.rows_at(1), None)
        self.final[idle] = x[idle]

    def _new(self, rows: int) -> Tensor:
        return self._x.new_empty(rows, *self._x.shape[1:])

    def slot(self, t: int) -> Tensor:
        """Returns the buffer (N_t, …) of state t."""
        if self._all is not None:
            start = self._plan.rows + self._plan.state_offsets[t - 1]
            return self._all[start : start + self._plan.rows_at(t)]
        if t in self._spans:
            return self.output[self._spans[t]]
        if t in self.kept:
            return self.kept[t]
        if t == self._plan.max_loops and not self._plan.fixed_capacity:
            return self.final[: self._plan.rows_at(t)]
        if t % 2 not in self._passing:
            self._passing[t % 2] = self._new(self._plan.rows_at(t))
        return self._passing[t % 2][: self._plan.rows_at(t)]

    def store_finished(self, t: int, state: Tensor) -> None:
        """Copies the rows of sequences that end at iteration t into the final state."""
        if self._all is not None:
            return
        live = self._plan.live(t)
        if live is not None:  # the host does not know which end: later iterations overwrite
            rows = slice(0, self._plan.rows_at(t))
            torch.where(live, state, self.final[rows], out=self.final[rows])
        elif state.data_ptr() != self.final.data_ptr():
            rows = slice(self._plan.rows_at(t + 1), self._plan.rows_at(t))
            self.final[rows] = state[rows]

    def finish(self) -> Tensor:
        """Returns the final state."""
        if self._all is None:
            return self.final
        return self._all.index_select(0, self._plan.final_rows)


def kept_states(spec: LoopSpec, row_bytes: int) -> set[int]:
    """Returns the iterations whose states are kept in addition to the returned ones."""
    plan = spec.plan
    kept = spec.policy.kept(plan.max_loops, [rows * row_bytes for rows in plan.active_rows])
    if spec.readout is None:  # truncated iterations do not read their states in the backward
        kept = {t for t in kept if any(s.grad for s in plan.row_ranges(t + 1, spec.truncate))}
    return set(kept).difference(spec.states)


def forward_pass(
    spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None], keep: bool
) -> Pass:
    """Runs all iterations.

    Args:
        spec: the pass.
        x: (rows, …) in sorted order.
        parameters: the loop body's parameters, then the readout's if there is one.
        keep: whether to keep the tensors that the backward needs.
    """
    if spec.until is not None:
        return forward_until(spec, x, parameters, keep)
    plan = spec.plan
    body = spec.make_iteration(x, parameters)
    states = _States(spec, x, kept_states(spec, x[:1].nbytes) if keep else ())
    losses = RowLosses(spec, x, parameters) if spec.readout is not None else None
    saved: list[Tensor | None] = []
    h = x
    for t in range(1, plan.max_loops + 1):
        out = states.slot(t)
        for row_range in plan.row_ranges(t, spec.truncate):
            wanted = keep and row_range.grad and spec.policy.kind == "none"
            inside = _run_range(body, h, row_range, out, wanted)
            if wanted:
                saved.extend(inside)
            del inside
        states.store_finished(t, out)
        if losses is not None:
            losses.forward(t, out)
        h = out
    empty = torch.empty(0, device=x.device)
    loss, lse, correct = losses.outputs() if losses else (empty, empty, empty)
    # Aliases: autograd marks the returned tensors, and `saved` holds views of the same buffers.
    final, output = states.finish().detach(), states.output.detach()
    aux = empty if body.aux is None else body.aux
    return Pass((final, output, loss, correct), lse, states.kept, saved, aux)


def _run_range(
    body: Iteration, h: Tensor, row_range: RowRange, out: Tensor, keep: bool
) -> list[Tensor | None]:
    """Runs one iteration of a row range, from state t − 1 in `h` to state t in `out`."""
    source, target = row_range.source, row_range.target
    if isinstance(target, slice):
        return body.forward(h[source], row_range, out[target], keep)
    part = out.new_empty(row_range.last_row, *out.shape[1:])
    inside = body.forward(h[source], row_range, part, keep)
    out[target] = part
    return inside


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec: LoopSpec, x: Tensor, *parameters: Tensor | None):
        with launch_context(x):
            done = forward_pass(spec, x, parameters, keep=any(ctx.needs_input_grad))
        correct = done.outputs[-1]
        ctx.spec, ctx.kept, ctx.parameters = spec, tuple(done.kept), len(parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(
            x,
            *_outputs_for_backward(spec, done),
            done.lse,
            *parameters,
            *done.kept.values(),
            *done.saved,
        )
        return *done.outputs, done.aux

    @staticmethod
    @differentiable_once
    def backward(ctx, g_final, g_states, g_loss, _, g_aux):
        return backward_pass(ctx, g_final, g_states, g_loss, g_aux)


def _outputs_for_backward(spec: LoopSpec, done: Pass) -> tuple[Tensor | None, Tensor | None]:
    """Returns final and states if the backward reads them, else None: the caller may then change or
    free them. The last state is read only by the readout."""
    final, states, _, _ = done.outputs
    last = spec.plan.max_loops
    inner = any(t < last for t in spec.states) or (spec.readout is not None and last in spec.states)
    return final if spec.readout is not None else None, states if inner else None


def backward_pass(
    ctx,
    g_final: Tensor | None,
    g_states: Tensor | None,
    g_loss: Tensor | None,
    g_aux: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of `_Loop.apply`'s arguments.

    Args:
        ctx: the context of its forward.
        g_final: gradient of the final state, or None.
        g_states: gradient of the flat buffer of returned states, or None.
        g_loss: gradient of the row losses, or None.
        g_aux: gradient of the sum of auxiliary values, or None.
    """
    saved = ctx.saved_tensors  # read once: hooks may allow unpacking only once
    with launch_context(saved[0]):
        return _Backward(ctx, saved, g_aux).run_all(g_final, g_states, g_loss)


def _add_rows(g: Tensor, rows: slice | Tensor, value: Tensor) -> None:
    if isinstance(rows, slice):
        g[rows].add_(value)
    else:
        g.index_add_(0, rows, value.to(g.dtype))


class _Backward:
    """One backward pass over the iterations, from the last to the first."""

    def __init__(self, ctx, saved: Sequence[Tensor | None], g_aux: Tensor | None):
        self.spec: LoopSpec = ctx.spec
        self.plan = self.spec.plan
        x, final, output, lse, *rest = saved
        parameters, rest = rest[: ctx.parameters], rest[ctx.parameters :]
        kept, self.saved = rest[: len(ctx.kept)], rest[len(ctx.kept) :]
        self.x, self.lse, self.parameters = x, lse, parameters
        self.needed = ctx.needs_input_grad[2:]
        self.body = self.spec.make_iteration(x, parameters)
        if g_aux is not None and g_aux.numel():
            self.body.g_aux = g_aux
        self.grads = GradientBuffers(
            parameters,
            self.needed,
            self.spec.ops.weight_grad,
            self.spec.gather_rows,
            self._group_rows(),
        )
        body_needed = self.needed[:-3] if self.spec.readout is not None else self.needed
        self.x_needed = ctx.needs_input_grad[1]
        self.body_needed = self.x_needed or any(body_needed)
        self.states = {0: x, **dict(zip(ctx.kept, kept, strict=True))}
        if output is not None:
            self.states |= {t: output[span] for t, span in self.spec.state_spans().items()}
        if final is not None and self.plan.max_loops:
            last = self.plan.max_loops
            self.states[last] = final[: self.plan.rows_at(last)]

    def _group_rows(self) -> int:
        """Returns how many rows of operands are kept for one launch: no more than those of the
        largest iteration, which fit anyway."""
        return max(GROUP_ROWS, self.plan.rows_at(1)) if self.body.keeps_operands else 0

    def run_all(self, g_final: Tensor | None, g_states: Tensor | None, g_loss: Tensor | None):
        plan, spec = self.plan, self.spec
        g = upcast(self.x).new_zeros(self.x.shape) if g_final is None else upcast(g_final).clone()
        spans = spec.state_spans()
        readout = None
        if g_loss is not None:
            readout = StateGradients(
                spec, self.parameters, self.grads, self._state, self.lse, g_loss
            )
        for t in range(plan.max_loops, 0, -1):
            prefix = plan.prefix(t)
            if g_states is not None and t in spans:
                _add_rows(g, prefix, g_states[spans[t]])
            if readout is not None:
                readout.add(t, g[prefix])
            stopped = plan.rows_without_gradient(t, spec.truncate)
            if stopped is not None:
                g[stopped] = 0
            row_ranges = plan.row_ranges(t, spec.truncate)
            for row_range in row_ranges if self.body_needed else ():
                if row_range.grad:
                    self._iteration(t, row_range, g)
                else:
                    g[row_range.rows] = 0
            self.states.pop(t, None)
        if self.body.dx is not None:
            g += self.body.dx
        results = self.grads.results(zeros=not self.body.may_leave_unused)
        return None, g.to(self.x.dtype) if self.x_needed else None, *results

    def _iteration(self, t: int, row_range: RowRange, g: Tensor) -> None:
        """Turns the gradient of state t in the range's rows of g into that of state t − 1."""
        h, rows = self._state(t - 1)[row_range.source], g[row_range.rows]
        if self.spec.policy.kind == "none":
            inside = self._pop_saved()
        else:
            inside = self.body.forward(h, row_range, h.new_empty(h.shape))
        self.grads.make_room(len(rows))
        entering, fixed = rows, self.plan.fixed_capacity
        if fixed and not self.body.skips_dead_rows:
            entering = rows.masked_fill(~self.plan.live(t), 0)
        new = self.body.backward(entering, h, inside, row_range, self.grads)
        if new is rows and isinstance(row_range.rows, slice):
            return
        if fixed:  # the gradient of a finished sequence is kept until its own last iteration
            torch.where(self.plan.live(t), new, rows, out=rows)
        else:
            g[row_range.rows] = new

    def _pop_saved(self) -> list[Tensor | None]:
        width = self.body.saved_width
        inside, self.saved = self.saved[-width:], self.saved[:-width]
        return inside

    def _state(self, t: int) -> Tensor:
        """Returns state t; recomputes it, and all states after the nearest kept one before it, if
        needed."""
        if t not in self.states:
            start = max(s for s in self.states if s < t)
            h = self.states[start]
            for s in range(start + 1, t + 1):
                out = self.x.new_empty(self.plan.rows_at(s), *self.x.shape[1:])
                for row_range in self.plan.row_ranges(s, self.spec.truncate):
                    _run_range(self.body, h, row_range, out, keep=False)
                self.states[s] = h = out
        return self.states[t]

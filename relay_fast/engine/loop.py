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
from relay_fast.engine.spec import Iteration, LoopSpec, Pass
from relay_fast.engine.stopping import forward_until
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import differentiable_once, launch_context, refuse_transforms
from relay_fast.ops.gradients import GradientBuffers


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
    """As `run_loop`; also returns the sum of the body's auxiliary values, (A,)."""
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

    Two buffers hold the states: a yielded state is overwritten two iterations later.

    Args:
        spec: the pass; its readout is not used.
        x: (rows, …) in sorted order.
        parameters: the loop body's parameters.
        prepare: (state t − 1, t) → the input of iteration t; by default state t − 1 itself.

    Raises:
        ValueError: for a fixed-capacity plan, whose number of live rows is known on the device
            only.
    """
    if spec.plan.fixed_capacity:
        raise ValueError(
            "fixed-capacity batches are for training: generate from the PackedBatch that was loaded"
        )
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
    two alternating buffers."""

    def __init__(self, spec: LoopSpec, x: Tensor, kept: Sequence[int]):
        self._plan, self._x = spec.plan, x
        self._spans = spec.state_spans()
        self.output = x.new_empty(sum(spec.plan.rows_at(t) for t in spec.states), *x.shape[1:])
        self.final = x.new_empty(x.shape)
        self.kept = {t: self._new(spec.plan.rows_at(t)) for t in sorted(kept)}
        self._passing: dict[int, Tensor] = {}

    def _new(self, rows: int) -> Tensor:
        return self._x.new_empty(rows, *self._x.shape[1:])

    def slot(self, t: int) -> Tensor:
        """Returns the buffer (N_t, …) of state t."""
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
        live = self._plan.live(t)
        if live is not None:  # the host does not know which end: later iterations overwrite
            rows = slice(0, self._plan.rows_at(t))
            self.final[rows] = torch.where(live, state, self.final[rows])
        elif state.data_ptr() != self.final.data_ptr():
            rows = slice(self._plan.rows_at(t + 1), self._plan.rows_at(t))
            self.final[rows] = state[rows]


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
    losses = _RowLosses(spec, x, parameters) if spec.readout is not None else None
    saved: list[Tensor | None] = []
    idle = slice(0 if plan.fixed_capacity else plan.rows_at(1), None)
    states.final[idle] = x[idle]
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
    final, output = states.final.detach(), states.output.detach()
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


class _RowLosses:
    """Computes the readout of each iteration from its state; keeps only the log-sum-exp."""

    def __init__(self, spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]):
        self._spec, self._readout = spec, spec.readout
        self._parameters = _readout_parameters(spec, parameters)
        rows = spec.readout.offsets[-1]
        self._loss = torch.empty(rows, dtype=upcast(x[:0]).dtype, device=x.device)
        self._lse = torch.empty_like(self._loss)
        self._correct = torch.empty(rows, dtype=torch.bool, device=x.device)
        self._held: list[Tensor] = []

    def forward(self, t: int, state: Tensor) -> None:
        """Collects the rows of state t, and computes their losses once their chunk is complete."""
        readout = self._readout
        chunk = readout.chunk_of(t)
        if len(chunk) > 1:
            self._held.append(state.index_select(0, readout.rows[readout.rows_of(t)]))
            if t != chunk[-1]:
                return
            h, index, self._held = torch.cat(self._held), None, []
        else:
            h, index = state, readout.rows[readout.rows_of(t)]
        part = readout.chunk_rows(chunk)
        if part.stop > part.start:
            self._loss[part], self._lse[part], self._correct[part] = (
                self._spec.ops.cross_entropy_fwd(
                    h, readout.targets[part], *self._parameters, index, **readout.options
                )
            )

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._loss, self._lse, self._correct


def _readout_parameters(spec: LoopSpec, parameters: Sequence[Tensor | None]):
    """Returns the final norm's weight and bias, and the head in the compute dtype."""
    norm_weight, norm_bias, head = parameters[-3:]
    return norm_weight, norm_bias, head.to(spec.compute_dtype or head.dtype)


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
            parameters, self.needed, self.spec.ops.weight_grad, self.spec.gather_rows
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

    def run_all(self, g_final: Tensor | None, g_states: Tensor | None, g_loss: Tensor | None):
        plan, spec = self.plan, self.spec
        g = upcast(self.x).new_zeros(self.x.shape) if g_final is None else upcast(g_final).clone()
        spans = spec.state_spans()
        for t in range(plan.max_loops, 0, -1):
            prefix = plan.prefix(t)
            if g_states is not None and t in spans:
                _add_rows(g, prefix, g_states[spans[t]])
            if g_loss is not None:
                self._readout(t, g[prefix], g_loss)
            stopped = plan.rows_without_gradient(t, spec.truncate)
            if stopped is not None:
                g[stopped] = 0
            row_ranges = plan.row_ranges(t, spec.truncate)
            for row_range in row_ranges if self.body_needed else ():
                if row_range.grad:
                    g[row_range.rows] = self._iteration(t, row_range, g[row_range.rows])
                else:
                    g[row_range.rows] = 0
            self.states.pop(t, None)
        if self.body.dx is not None:
            g += self.body.dx
        results = self.grads.results()
        return None, g.to(self.x.dtype) if self.x_needed else None, *results

    def _iteration(self, t: int, row_range: RowRange, g: Tensor) -> Tensor:
        h = self._state(t - 1)[row_range.source]
        if self.spec.policy.kind == "none":
            inside = self._pop_saved()
        else:
            inside = self.body.forward(h, row_range, h.new_empty(h.shape))
        live = self.plan.live(t)
        if live is None:
            return self.body.backward(g, h, inside, row_range, self.grads)
        # The gradient of a finished sequence is kept until its own last iteration.
        entering = g if self.body.skips_dead_rows else g.masked_fill(~live, 0)
        return torch.where(live, self.body.backward(entering, h, inside, row_range, self.grads), g)

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

    def _readout(self, t: int, g_t: Tensor, g_loss: Tensor) -> None:
        """Adds the loss gradient of iteration t's rows to g_t (N_t, d)."""
        readout = self.spec.readout
        chunk = readout.chunk_of(t)
        if t == chunk[-1]:
            self._dh = self._chunk_gradient(chunk, g_loss)
        part, start = readout.rows_of(t), readout.chunk_rows(chunk).start
        if part.stop > part.start:
            dh = self._dh[part.start - start : part.stop - start]
            g_t.index_add_(0, readout.rows[part], dh.to(g_t.dtype))

    def _chunk_gradient(self, chunk: range, g_loss: Tensor) -> Tensor | None:
        """Returns the gradient of the chunk's state rows, end to end."""
        readout, part = self.spec.readout, self.spec.readout.chunk_rows(chunk)
        if part.stop == part.start:
            return None
        if len(chunk) > 1:
            rows = [self._state(u).index_select(0, readout.rows[readout.rows_of(u)]) for u in chunk]
            h, index = torch.cat(rows), None
        else:
            h, index = self._state(chunk[0]), readout.rows[part]
        norm, norm_bias, head = (len(self.parameters) - i for i in (3, 2, 1))
        return self.spec.ops.cross_entropy_bwd(
            g_loss[part],
            h,
            readout.targets[part],
            self.lse[part],
            *_readout_parameters(self.spec, self.parameters),
            *(self.grads.buffer(i) for i in (head, norm, norm_bias)),
            index,
            **readout.options,
        )

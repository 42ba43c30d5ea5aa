"""The loop engine: one autograd Function over all iterations.

Nothing is computed that is not needed (iteration t works on the active prefix only), nothing is
kept that the recompute policy says can be recomputed (`relay_fast.engine.recompute`), and every
weight gradient is accumulated over the iterations in one wide buffer (`relay_fast.ops.gradients`).

The engine knows neither layers nor losses: a *body* runs one iteration of one row range forward and
backward (`relay_fast.engine.block_iteration.BlockIteration`, or a user's module), a *readout* turns
states into row losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relay_fast.batch.plan import RowRange
from relay_fast.engine.spec import LoopSpec
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import differentiable_once, refuse_transforms, undisturbed
from relay_fast.ops.gradients import GradientBuffers


def run_loop(
    run: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the loop on x (rows, …) in sorted order.

    Returns final (rows, …): each sequence's state after its own last iteration; states: the chosen
    states end to end; loss (R,) and correct (R,) of the readout's rows (empty without a readout).
    """
    refuse_transforms(x, *parameters)
    if torch.is_grad_enabled():
        return _Loop.apply(run, x, *parameters)
    with undisturbed(x):
        return forward_pass(run, x, parameters, keep=False).outputs


def iterate(
    run: LoopSpec,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    enter: Callable[[Tensor, int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (t, state t of the active prefix) without gradients; two buffers in all, so a state is
    valid until the next but one is asked for.

    enter(state t − 1, t): what iteration t starts from, default: state t − 1. Raises ValueError for
    a static plan: which of its rows are live is known on the device alone.
    """
    if run.plan.fixed_capacity:
        raise ValueError("a static batch is for training: read chains off the batch it was given")
    with torch.no_grad(), undisturbed(x):
        body = run.make_iteration(x, parameters)
        buffers = [x.new_empty(x.shape), x.new_empty(x.shape)]
        h = x
        for t in range(1, run.plan.max_loops + 1):
            out = buffers[t % 2][: run.plan.rows_at(t)]
            if enter is not None:
                h = enter(h, t)
            for row_range in run.plan.row_ranges(t):
                body.forward(h[row_range.rows], row_range, out[row_range.rows], keep=False)
            yield t, out
            h = out


class _States:
    """Where the states of one pass lie: in the output, in the kept set, or in two passing
    buffers."""

    def __init__(self, run: LoopSpec, x: Tensor, kept: Sequence[int]):
        self._plan, self._x = run.plan, x
        self._spans = run.state_spans()
        self.output = x.new_empty(sum(run.plan.rows_at(t) for t in run.states), *x.shape[1:])
        self.final = x.new_empty(x.shape)
        self.kept = {t: self._new(run.plan.rows_at(t)) for t in sorted(kept)}
        self._passing: dict[int, Tensor] = {}

    def _new(self, rows: int) -> Tensor:
        return self._x.new_empty(rows, *self._x.shape[1:])

    def slot(self, t: int) -> Tensor:
        """The buffer (N_t, …) of state t."""
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
        """Copies the rows whose sequences end at iteration t into the final state."""
        live = self._plan.live(t)
        if live is not None:  # which of them end is not known: a later iteration overwrites
            rows = slice(0, self._plan.rows_at(t))
            self.final[rows] = torch.where(live, state, self.final[rows])
        elif state.data_ptr() != self.final.data_ptr():
            rows = slice(self._plan.rows_at(t + 1), self._plan.rows_at(t))
            self.final[rows] = state[rows]


class _Pass(NamedTuple):
    """What one forward pass leaves: its outputs, and what the backward needs."""

    outputs: tuple[Tensor, Tensor, Tensor, Tensor]  # final, states, loss, correct
    lse: Tensor
    kept: dict[int, Tensor]
    saved: list[Tensor | None]


def kept_states(run: LoopSpec, row_bytes: int) -> set[int]:
    """Which states are kept beside those that are returned anyway."""
    plan = run.plan
    kept = run.policy.kept(plan.max_loops, [rows * row_bytes for rows in plan.active_rows])
    if run.readout is None:  # under truncation some states are never asked for again
        kept = {t for t in kept if any(s.grad for s in plan.row_ranges(t + 1, run.truncate))}
    return set(kept).difference(run.states)


def forward_pass(
    run: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None], keep: bool
) -> _Pass:
    """All iterations; with `keep`, what the backward needs is kept."""
    plan = run.plan
    body = run.make_iteration(x, parameters)
    states = _States(run, x, kept_states(run, x[:1].nbytes) if keep else ())
    losses = _RowLosses(run, x, parameters) if run.readout is not None else None
    saved: list[Tensor | None] = []
    idle = slice(0 if plan.fixed_capacity else plan.rows_at(1), None)
    states.final[idle] = x[idle]
    h = x
    for t in range(1, plan.max_loops + 1):
        out = states.slot(t)
        for row_range in plan.row_ranges(t, run.truncate):
            wanted = keep and row_range.grad and run.policy.kind == "none"
            inside = body.forward(h[row_range.rows], row_range, out[row_range.rows], wanted)
            if wanted:
                saved.extend(inside)
            del inside
        states.store_finished(t, out)
        if losses is not None:
            losses.forward(t, out)
        h = out
    empty = torch.empty(0, device=x.device)
    loss, lse, correct = losses.outputs() if losses else (empty, empty, empty)
    # Aliases: autograd marks what is returned, and `saved` holds views of the same buffers.
    final, output = states.final.detach(), states.output.detach()
    return _Pass((final, output, loss, correct), lse, states.kept, saved)


class _RowLosses:
    """The readout of every iteration, as its state is made; only the log-sum-exp is saved."""

    def __init__(self, run: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]):
        self._run, self._readout = run, run.readout
        self._parameters = _readout_parameters(run, parameters)
        rows = run.readout.offsets[-1]
        self._loss = torch.empty(rows, dtype=upcast(x[:0]).dtype, device=x.device)
        self._lse = torch.empty_like(self._loss)
        self._correct = torch.empty(rows, dtype=torch.bool, device=x.device)
        self._held: list[Tensor] = []

    def forward(self, t: int, state: Tensor) -> None:
        """Takes the rows of state t along, and their loss where its group is complete."""
        readout = self._readout
        group = readout.chunk_of(t)
        if len(group) > 1:
            self._held.append(state.index_select(0, readout.rows[readout.rows_of(t)]))
            if t != group[-1]:
                return
            h, index, self._held = torch.cat(self._held), None, []
        else:
            h, index = state, readout.rows[readout.rows_of(t)]
        part = readout.chunk_rows(group)
        if part.stop > part.start:
            self._loss[part], self._lse[part], self._correct[part] = (
                self._run.ops.cross_entropy_fwd(
                    h, readout.targets[part], *self._parameters, index, **readout.options
                )
            )

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._loss, self._lse, self._correct


def _readout_parameters(run: LoopSpec, parameters: Sequence[Tensor | None]):
    """Final norm weight, its bias, and the head in the compute dtype."""
    norm_weight, norm_bias, head = parameters[-3:]
    return norm_weight, norm_bias, head.to(run.compute_dtype or head.dtype)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: LoopSpec, x: Tensor, *parameters: Tensor | None):
        with undisturbed(x):
            done = forward_pass(run, x, parameters, keep=any(ctx.needs_input_grad))
        correct = done.outputs[-1]
        ctx.run, ctx.kept, ctx.parameters = run, tuple(done.kept), len(parameters)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(
            x, *_read_again(run, done), done.lse, *parameters, *done.kept.values(), *done.saved
        )
        return done.outputs

    @staticmethod
    @differentiable_once
    def backward(ctx, g_final, g_states, g_loss, _):
        return backward_pass(ctx, g_final, g_states, g_loss)


def _read_again(run: LoopSpec, done: _Pass) -> tuple[Tensor | None, Tensor | None]:
    """final and states, where the backward reads them: what it does not read the caller may change
    in place or drop. The last state is read by the readout alone."""
    final, states, _, _ = done.outputs
    last = run.plan.max_loops
    inner = any(t < last for t in run.states) or (run.readout is not None and last in run.states)
    return final if run.readout is not None else None, states if inner else None


def backward_pass(
    ctx, g_final: Tensor | None, g_states: Tensor | None, g_loss: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of `_Loop.apply`'s arguments, given what its forward left in `ctx`."""
    saved = ctx.saved_tensors  # once: hooks may let it be unpacked only once
    with undisturbed(saved[0]):
        return _Backward(ctx, saved).run_all(g_final, g_states, g_loss)


class _Backward:
    """One backward sweep over the iterations, last to first."""

    def __init__(self, ctx, saved: Sequence[Tensor | None]):
        self.run: LoopSpec = ctx.run
        self.plan = self.run.plan
        x, final, output, lse, *rest = saved
        parameters, rest = rest[: ctx.parameters], rest[ctx.parameters :]
        kept, self.saved = rest[: len(ctx.kept)], rest[len(ctx.kept) :]
        self.x, self.lse, self.parameters = x, lse, parameters
        self.needed = ctx.needs_input_grad[2:]
        self.body = self.run.make_iteration(x, parameters)
        self.grads = GradientBuffers(
            parameters, self.needed, self.run.ops.weight_grad, self.run.gather_rows
        )
        body_needed = self.needed[:-3] if self.run.readout is not None else self.needed
        self.x_needed = ctx.needs_input_grad[1]
        self.body_needed = self.x_needed or any(body_needed)
        self.states = {0: x, **dict(zip(ctx.kept, kept, strict=True))}
        if output is not None:
            self.states |= {t: output[span] for t, span in self.run.state_spans().items()}
        if final is not None and self.plan.max_loops:
            last = self.plan.max_loops
            self.states[last] = final[: self.plan.rows_at(last)]

    def run_all(self, g_final: Tensor | None, g_states: Tensor | None, g_loss: Tensor | None):
        plan, run = self.plan, self.run
        g = upcast(self.x).new_zeros(self.x.shape) if g_final is None else upcast(g_final).clone()
        spans = run.state_spans()
        for t in range(plan.max_loops, 0, -1):
            g_t = g[: plan.rows_at(t)]
            if g_states is not None and t in spans:
                g_t += g_states[spans[t]]
            if g_loss is not None:
                self._readout(t, g_t, g_loss)
            row_ranges = plan.row_ranges(t, run.truncate)
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
        h = self._state(t - 1)[row_range.rows]
        if self.run.policy.kind == "none":
            inside = self._pop_saved()
        else:
            inside = self.body.forward(h, row_range, h.new_empty(h.shape))
        live = self.plan.live(t)
        if live is None:
            return self.body.backward(g, h, inside, row_range, self.grads)
        # The gradient of a sequence that is over waits for its own last iteration.
        entering = g if self.body.skips_dead_rows else g.masked_fill(~live, 0)
        return torch.where(live, self.body.backward(entering, h, inside, row_range, self.grads), g)

    def _pop_saved(self) -> list[Tensor | None]:
        width = self.body.saved_width
        inside, self.saved = self.saved[-width:], self.saved[:-width]
        return inside

    def _state(self, t: int) -> Tensor:
        """State t, recomputed from the nearest kept one before it (with all in between) if need
        be."""
        if t not in self.states:
            start = max(s for s in self.states if s < t)
            h = self.states[start]
            for s in range(start + 1, t + 1):
                out = self.x.new_empty(self.plan.rows_at(s), *self.x.shape[1:])
                for row_range in self.plan.row_ranges(s, self.run.truncate):
                    self.body.forward(h[row_range.rows], row_range, out[row_range.rows], keep=False)
                self.states[s] = h = out
        return self.states[t]

    def _readout(self, t: int, g_t: Tensor, g_loss: Tensor) -> None:
        """Adds the loss gradient of iteration t's rows to g_t (N_t, d)."""
        readout = self.run.readout
        group = readout.chunk_of(t)
        if t == group[-1]:
            self._dh = self._group_gradient(group, g_loss)
        part, start = readout.rows_of(t), readout.chunk_rows(group).start
        if part.stop > part.start:
            dh = self._dh[part.start - start : part.stop - start]
            g_t.index_add_(0, readout.rows[part], dh.to(g_t.dtype))

    def _group_gradient(self, group: range, g_loss: Tensor) -> Tensor | None:
        """Gradient of the group's state rows, one after the other."""
        readout, part = self.run.readout, self.run.readout.chunk_rows(group)
        if part.stop == part.start:
            return None
        if len(group) > 1:
            rows = [self._state(u).index_select(0, readout.rows[readout.rows_of(u)]) for u in group]
            h, index = torch.cat(rows), None
        else:
            h, index = self._state(group[0]), readout.rows[part]
        norm, norm_bias, head = (len(self.parameters) - i for i in (3, 2, 1))
        return self.run.ops.cross_entropy_bwd(
            g_loss[part],
            h,
            readout.targets[part],
            self.lse[part],
            *_readout_parameters(self.run, self.parameters),
            *(self.grads.buffer(i) for i in (head, norm, norm_bias)),
            index,
            **readout.options,
        )

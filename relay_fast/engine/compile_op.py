"""The looped block as a pair of custom ops: torch.compile(fullgraph=True) sees one node.

The forward op returns the kept states as one flat tensor in addition to its outputs; the backward
is an op of its own. Every option is a typed argument: the block's are the fields of BlockConfig, in
their order. The plan is built inside the ops from host tensors, and cached; a batch with an
attention mask is packed inside them. Recompute policies "none" and "auto" are "state": the inside
of an iteration cannot leave an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from relay_fast.batch.attention_mask import Padding
from relay_fast.batch.plan import check_cu_seqlens, check_loops
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.config import BIASES, BlockConfig
from relay_fast.engine.block_iteration import BlockIteration
from relay_fast.engine.loop import backward_pass, forward_pass, kept_states
from relay_fast.engine.loop_flops import LoopFlops
from relay_fast.engine.parameter_names import parameter_names
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.resumption import Entry, check_max_loops
from relay_fast.engine.spec import LoopSpec
from relay_fast.ops.dispatch import chosen_ops, launch_context
from relay_fast.ops.flops import count_flops, is_fake


def skip_frame(function: Callable) -> Callable:
    """Makes torch.compile start in the functions that `function` calls instead of in it.

    Equivalent to `torch._dynamo.eval_frame.skip_code`, without the slow import of torch's compiler.
    """
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


# Types of the fields of BlockConfig, and of the ops' arguments for them.
_TYPES = {
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
    "bool | tuple[str, ...]": "str[]",  # the parts with a bias
    "tuple[float, ...] | Mapping[str, Any] | None": "float[]?",
}
_FIELDS = [(field.name, _TYPES[field.type]) for field in fields(BlockConfig)]
_BLOCK = ", ".join(f"{kind} {name}" for name, kind in _FIELDS)
# Of both ops, behind the tensors that they compute with.
_OPTIONS = (
    f"{_BLOCK}, str recompute, str impl, int gather_rows, "
    "ScalarType dtype, "  # of the GEMMs
    "SymInt batch, "  # number of sequences of a padded batch
    "Tensor? cu_seqlens, "  # of a packed batch
    "SymInt count, "  # loops of every sequence if `loops` is None
    "Tensor? loops, "  # (sequences,)
    "Tensor? positions, "  # (rows,)
    "Tensor? mask, "  # (batch, n) of a padded batch: where its tokens are
    "SymInt start, "  # iterations that the state has been through
    "bool injected, "  # whether the last parameter is what injection adds, (rows, d)
    "Tensor? seed, "  # () of the dropout masks and the state noise
    "SymInt[] states, SymInt truncate"  # 0: no truncation; -1: to no iteration
)


class _Call(NamedTuple):
    """The arguments behind the block's."""

    recompute: str
    impl: str
    gather_rows: int
    dtype: torch.dtype
    batch: int
    cu_seqlens: Tensor | None
    count: int
    loops: Tensor | None
    positions: Tensor | None
    mask: Tensor | None
    start: int
    injected: bool
    seed: Tensor | None
    states: list[int]
    truncate: int


def describe(config: BlockConfig) -> tuple:
    """Returns a block's configuration as arguments of the ops."""
    parts = [part for part in BIASES if config.bias is True or part in (config.bias or ())]
    values = {name: getattr(config, name) for name, _ in _FIELDS} | {"bias": parts}
    return tuple(values.values())


@lru_cache
def _block(values: tuple) -> tuple[BlockConfig, list[str]]:
    """Returns the configuration and its parameter names, from the result of `describe`."""
    config = BlockConfig(**dict(zip((name for name, _ in _FIELDS), values, strict=True)))
    return config, parameter_names(config)


def _parse(options: Sequence) -> tuple[BlockConfig, list[str], _Call]:
    """Returns the block, its parameter names and the other options of a call."""
    count = len(_FIELDS)
    block = (tuple(v) if isinstance(v, list | tuple) else v for v in options[:count])
    return *_block(tuple(block)), _Call(*options[count:])


def _make_spec(x: Tensor, options: Sequence) -> tuple[LoopSpec, _Rows]:
    config, names, call = _parse(options)
    positions, padding = call.positions, None
    if call.mask is not None:
        padded = (call.batch, len(x) // max(1, call.batch))
        padding = Padding(call.mask, torch.Size(padded), x.device)
        lengths = padding.lengths
        positions = None if positions is None else positions[padding.rows]
    elif call.cu_seqlens is None:
        lengths = np.full(call.batch, len(x) // max(1, call.batch))
    else:
        lengths = np.diff(check_cu_seqlens(call.cu_seqlens, len(x)))
    counts = check_loops(call.count if call.loops is None else call.loops, len(lengths))
    where = None if positions is None else positions.cpu().numpy()
    plan = cached_plan(lengths, counts, x.device, where)
    check_max_loops(config, plan)
    ops = chosen_ops(call.impl, x.device)

    def make_iteration(x: Tensor, parameters) -> BlockIteration:
        named = dict(zip(names, parameters, strict=False))  # behind them: what is injected
        return BlockIteration(config, named, plan, x, ops, call.dtype, call.seed)

    spec = LoopSpec(
        plan,
        make_iteration,
        ops,
        _policy(call.recompute),
        tuple(call.states),
        max(call.truncate, 0) if call.truncate else None,
        gather_rows=call.gather_rows,
        compute_dtype=call.dtype,
    )
    spec = Entry(call.start, x if call.injected else None).enter(spec, config)
    return spec, _Rows(spec, padding, len(x), call.injected)


class _Rows:
    """Takes rows from the caller's order to the engine's, and back.

    Args:
        spec: of the pass.
        padding: of a batch with a mask, whose rows the engine does not have.
        count: the caller's rows.
        injected: whether the last parameter has a row for each of x.
    """

    def __init__(self, spec: LoopSpec, padding: Padding | None, count: int, injected: bool):
        self._spec, self._count, self.injected = spec, count, injected
        self._padded = padding is not None
        self._index = spec.plan.to_sorted
        if padding is not None:
            rows = padding.rows
            self._index = rows if self._index is None else rows[self._index]

    def enter(self, rows: Tensor) -> Tensor:
        return rows if self._index is None else rows[self._index]

    def leave(self, rows: Tensor) -> Tensor:
        if self._padded:
            return rows.new_zeros(self._count, *rows.shape[1:]).index_copy(0, self._index, rows)
        to_caller = self._spec.plan.to_caller
        return rows if to_caller is None else rows[to_caller]

    def with_parameters(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns the parameters with what is injected in the engine's order."""
        if not self.injected:
            return list(parameters)
        return [*parameters[:-1], self.enter(parameters[-1])]

    def states(self, flat: Tensor, leave: bool) -> Tensor:
        """Takes returned states, end to end, to the caller's order, or back.

        With a mask all of them have all rows: several numbers of loops return no states.
        """
        if not self._padded:
            return _reordered(self._spec, flat, leave)
        count = len(self._spec.states)
        parts = flat.chunk(count) if count else []
        move = self.leave if leave else self.enter
        return torch.cat([flat[:0], *map(move, parts)])


def _policy(recompute: str) -> RecomputePolicy:
    policy = RecomputePolicy.parse(recompute)
    return RecomputePolicy("state") if policy.kind in ("none", "auto") else policy


def _reordered(spec: LoopSpec, flat: Tensor, to_caller: bool) -> Tensor:
    """Reorders returned states from the engine's order to the caller's, or back."""
    if spec.plan.to_caller is None:
        return flat
    result = flat.new_empty(flat.shape)
    for t, span in spec.state_spans().items():
        index = spec.plan.active_to_caller(t)
        if to_caller:
            result[span] = flat[span][index]
        else:
            result[span][index] = flat[span]
    return result


@torch.library.custom_op(
    "relay_fast::loop_fwd",
    mutates_args=(),
    schema=f"(Tensor x, Tensor[] parameters, {_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def loop_fwd(x: Tensor, parameters: list[Tensor], *options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns final (rows, d), the chosen states end to end, and the kept states end to end.

    x (rows, d) is in the caller's order, the parameters in that of `parameter_names`.
    """
    *options, keep = options
    spec, rows = _make_spec(x, options)
    with torch.no_grad(), launch_context(x):
        done = forward_pass(spec, rows.enter(x), rows.with_parameters(parameters), keep)
        final, chosen, _, _ = done.outputs
        kept = torch.cat([x[:0], *done.kept.values()])
        return rows.leave(final), rows.states(chosen, leave=True), kept


@loop_fwd.register_fake
def _(x, parameters, *options):
    *options, keep = options
    _, _, call = _parse(options)
    rows, states, count = x.shape[0], call.states, call.count
    if call.loops is not None:  # LoopedBlock then refuses return_states
        size = lambda: torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(x.shape), x.new_empty(0, *x.shape[1:]), x.new_empty(size(), *x.shape[1:])
    policy = _policy(call.recompute)
    kept = 0
    sizes_unknown = policy.kind == "budget" or call.mask is not None
    if keep and (sizes_unknown or isinstance(count, torch.SymInt)):
        kept_rows = torch.library.get_ctx().new_dynamic_size()  # avoids a guard on `count`
    else:
        if keep:
            between, truncate = policy.kept(count, [0] * count), call.truncate
            kept = sum(
                t not in states and (not truncate or t + 1 > count - max(truncate, 0))
                for t in between
            )
        kept_rows = kept * rows
    return (
        x.new_empty(x.shape),
        x.new_empty(len(states) * rows, *x.shape[1:]),
        x.new_empty(kept_rows, *x.shape[1:]),
    )


@torch.library.custom_op(
    "relay_fast::loop_bwd",
    mutates_args=(),
    schema="(Tensor g_final, Tensor g_states, Tensor x, Tensor chosen, Tensor kept, "
    f"Tensor[] parameters, bool[] needed, {_OPTIONS}) -> Tensor[]",
)
def loop_bwd(
    g_final: Tensor,
    g_states: Tensor,
    x: Tensor,
    chosen: Tensor,
    kept: Tensor,
    parameters: list[Tensor],
    needed: list[bool],
    *options,
) -> list[Tensor]:
    """Computes the backward of the loop op.

    Args:
        g_final: Gradient of the final state.
        g_states: Gradients of the states that were returned.
        x: The loop's input.
        chosen: The states that the forward returned.
        kept: The states that it kept for the backward.
        parameters: The block's parameters.
        needed: Which of x and the parameters need a gradient.
        options: The forward's options.

    Returns:
        The gradients that are needed, of x first.
    """
    spec, rows = _make_spec(x, options)
    names = sorted(kept_states(spec, x[:1].nbytes))
    parts = kept.split([spec.plan.rows_at(t) for t in names]) if names else ()
    with torch.no_grad():
        dx, *grads = backward_pass(
            SimpleNamespace(
                spec=spec,
                saved_tensors=(
                    rows.enter(x),
                    None,
                    rows.states(chosen, leave=False),
                    x.new_empty(0),
                    *rows.with_parameters(parameters),
                    *parts,
                ),
                kept=tuple(names),
                parameters=len(parameters),
                needs_input_grad=(False, *needed),
            ),
            rows.enter(g_final),
            rows.states(g_states, leave=False) if spec.states else None,
            None,
        )[1:]
        if dx is not None:
            left = rows.leave(dx)
            dx = dx.clone() if left is dx else left
        if grads and rows.injected and grads[-1] is not None:
            grads[-1] = rows.leave(grads[-1])
    return [g.contiguous() for g in (dx, *grads) if g is not None]


@loop_bwd.register_fake
def _(g_final, g_states, x, chosen, kept, parameters, needed, *_):
    return [t.new_empty(t.shape) for t, need in zip((x, *parameters), needed, strict=True) if need]


def _setup_context(ctx, inputs, output) -> None:
    x, parameters, *rest = inputs
    tensors = [t for t in rest[:-1] if isinstance(t, Tensor)]
    ctx.rest = [None if isinstance(t, Tensor) else t for t in rest[:-1]]
    ctx.where = [i for i, t in enumerate(rest[:-1]) if isinstance(t, Tensor)]
    ctx.needed = [x.requires_grad, *(p.requires_grad for p in parameters)]
    ctx.save_for_backward(x, *output[1:], *parameters, *tensors)  # backward does not read `final`


def _backward(ctx, g_final, g_states, _):
    x, chosen, kept, *others = ctx.saved_tensors
    size = len(ctx.needed) - 1
    parameters, tensors = others[:size], others[size:]
    rest = list(ctx.rest)
    for i, tensor in zip(ctx.where, tensors, strict=True):
        rest[i] = tensor
    grads = iter(
        loop_bwd(
            x.new_zeros(x.shape) if g_final is None else g_final.contiguous(),
            chosen.new_zeros(chosen.shape) if g_states is None else g_states.contiguous(),
            x,
            chosen,
            kept,
            parameters,
            ctx.needed,
            *rest,
        )
    )
    dx, *others = (next(grads) if need else None for need in ctx.needed)
    nothing = [[] if value == [] else None for value in rest]  # torch takes [] for tensors
    return dx, others, *nothing, None


loop_fwd.register_autograd(_backward, setup_context=_setup_context)


# FLOPs


def _flops(x: Tensor, parameters: list[Tensor], options: Sequence) -> LoopFlops:
    config, names, call = _parse(options)
    given = (call.loops, call.cu_seqlens, call.positions, call.mask)
    if any(is_fake(t) for t in given if t is not None):  # no values: every sequence loops once
        sequences = len(call.loops) if call.loops is not None else call.batch
        rest = {"cu_seqlens": None, "loops": None, "positions": None, "mask": None}
        call = call._replace(batch=sequences, count=call.count or 1, **rest)
    spec, _ = _make_spec(x, (*options[: len(_FIELDS)], *call))
    return LoopFlops(config, spec, dict(zip(names, parameters, strict=False)))


def _forward_flops(x, parameters, *options, out_val=None, **_) -> int:
    return _flops(x, parameters, options[:-1]).forward()


def _backward_flops(
    g_final, g_states, x, chosen, kept, parameters, needed, *options, out_val=None, **_
) -> int:
    flops = _flops(x, parameters, options)
    return flops.backward(x[:1].nbytes, any(needed[1:]))


count_flops("loop_fwd", _forward_flops)
count_flops("loop_bwd", _backward_flops)

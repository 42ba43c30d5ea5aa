"""The looped block as a pair of custom ops: torch.compile(fullgraph=True) sees one node.

The forward op returns the kept states as one flat tensor in addition to its outputs; the backward
is an op of its own. The plan is built inside the ops from host tensors, and cached. Recompute
policy "none" keeps the same tensors as "state": the inside of an iteration cannot leave an op.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from relay_fast.batch.plan import check_cu_seqlens, check_loops
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.config import BlockConfig
from relay_fast.engine.block_iteration import BlockIteration, check_max_loops, parameter_names
from relay_fast.engine.loop import backward_pass, forward_pass, kept_states
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.spec import LoopSpec
from relay_fast.ops.dispatch import launch_context, select


def skip_frame(function: Callable) -> Callable:
    """Makes torch.compile start in the functions that `function` calls instead of in it.

    Equivalent to `torch._dynamo.eval_frame.skip_code`, without the slow import of torch's compiler.
    """
    action = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


def describe(config: BlockConfig) -> str:
    """Serialises a block's configuration to the string that the ops take."""
    return json.dumps(config.to_dict())


@lru_cache
def _parse(block: str) -> tuple[BlockConfig, list[str]]:
    """Returns the configuration and its parameter names."""
    config = BlockConfig(**json.loads(block))
    return config, parameter_names(config)


def _make_spec(
    x: Tensor,
    block: str,
    options: str,
    dtype: torch.dtype,
    batch: int,
    cu_seqlens: Tensor | None,
    count: int,
    loops: Tensor | None,
    positions: Tensor | None,
    seed: Tensor | None,
    states: list[int],
    truncate: int,
) -> LoopSpec:
    config, names = _parse(block)
    recompute, impl, gather_rows = json.loads(options)
    if cu_seqlens is None:
        lengths = np.full(batch, len(x) // max(1, batch))
    else:
        lengths = np.diff(check_cu_seqlens(cu_seqlens, len(x)))
    counts = check_loops(count if loops is None else loops, len(lengths))
    where = None if positions is None else positions.cpu().numpy()
    plan = cached_plan(lengths, counts, x.device, where)
    check_max_loops(config, plan)
    ops = select(impl, x.device)

    def make_iteration(x: Tensor, parameters) -> BlockIteration:
        named = dict(zip(names, parameters, strict=True))
        return BlockIteration(config, named, plan, x, ops, dtype, seed)

    return LoopSpec(
        plan, make_iteration, ops, _policy(recompute), tuple(states), truncate or None,
        gather_rows=gather_rows, compute_dtype=dtype,
    )  # fmt: skip


def _policy(recompute: str) -> RecomputePolicy:
    policy = RecomputePolicy.parse(recompute)
    return RecomputePolicy("state") if policy.kind == "none" else policy


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


@torch.library.custom_op("relay_fast::loop_fwd", mutates_args=())
def loop_fwd(
    x: Tensor,  # (rows, d), caller's order
    parameters: list[Tensor],  # ordered as `parameter_names`
    block: str,  # result of `describe`
    options: str,  # JSON: recompute, impl, gather_rows
    dtype: torch.dtype,  # of the GEMMs
    batch: int,  # number of sequences of a padded batch
    cu_seqlens: Tensor | None,  # of a packed batch
    count: int,  # loops of every sequence if `loops` is None
    loops: Tensor | None,  # (sequences,)
    positions: Tensor | None,  # (rows,)
    seed: Tensor | None,  # () of the dropout masks and the state noise
    states: list[int],
    truncate: int,  # 0: no truncation
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns final (rows, d), the chosen states end to end, and the kept states end to end."""
    spec = _make_spec(
        x,
        block,
        options,
        dtype,
        batch,
        cu_seqlens,
        count,
        loops,
        positions,
        seed,
        states,
        truncate,
    )
    plan = spec.plan
    with torch.no_grad(), launch_context(x):
        h = x if plan.to_sorted is None else x[plan.to_sorted]
        done = forward_pass(spec, h, parameters, keep)
        final, chosen, _, _ = done.outputs
        final = final if plan.to_caller is None else final[plan.to_caller]
        kept = torch.cat([x[:0], *done.kept.values()])
        return final, _reordered(spec, chosen, to_caller=True), kept


@loop_fwd.register_fake
def _(
    x, parameters, block, options, dtype, batch, cu_seqlens, count, loops, positions, seed, states,
    truncate, keep,
):  # fmt: skip
    rows = x.shape[0]
    if loops is not None:  # LoopedBlock then refuses return_states
        size = lambda: torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(x.shape), x.new_empty(0, *x.shape[1:]), x.new_empty(size(), *x.shape[1:])
    policy = _policy(json.loads(options)[0])
    kept = 0
    if keep and (policy.kind == "budget" or isinstance(count, torch.SymInt)):
        kept_rows = torch.library.get_ctx().new_dynamic_size()  # avoids a guard on `count`
    else:
        if keep:
            between = policy.kept(count, [0] * count)
            kept = sum(
                t not in states and (not truncate or t + 1 > count - truncate) for t in between
            )
        kept_rows = kept * rows
    return (
        x.new_empty(x.shape),
        x.new_empty(len(states) * rows, *x.shape[1:]),
        x.new_empty(kept_rows, *x.shape[1:]),
    )


@torch.library.custom_op("relay_fast::loop_bwd", mutates_args=())
def loop_bwd(
    g_final: Tensor,
    g_states: Tensor,
    x: Tensor,
    chosen: Tensor,
    kept: Tensor,
    parameters: list[Tensor],
    needed: list[bool],  # of x and each parameter
    block: str,
    options: str,
    dtype: torch.dtype,
    batch: int,
    cu_seqlens: Tensor | None,
    count: int,
    loops: Tensor | None,
    positions: Tensor | None,
    seed: Tensor | None,
    states: list[int],
    truncate: int,
) -> list[Tensor]:
    """Returns the gradients of x and the parameters, for those that need one."""
    spec = _make_spec(
        x,
        block,
        options,
        dtype,
        batch,
        cu_seqlens,
        count,
        loops,
        positions,
        seed,
        states,
        truncate,
    )
    plan = spec.plan
    names = sorted(kept_states(spec, x[:1].nbytes))
    parts = kept.split([plan.rows_at(t) for t in names]) if names else ()
    order = plan.to_sorted
    to_sorted = lambda t: t if order is None else t[order]
    with torch.no_grad():
        dx, *grads = backward_pass(
            SimpleNamespace(
                spec=spec,
                saved_tensors=(
                    to_sorted(x), None, _reordered(spec, chosen, to_caller=False),
                    x.new_empty(0), *parameters, *parts,
                ),
                kept=tuple(names),
                parameters=len(parameters),
                needs_input_grad=(False, *needed),
            ),
            to_sorted(g_final),
            _reordered(spec, g_states, to_caller=False) if states else None,
            None,
        )[1:]  # fmt: skip
        if dx is not None:
            dx = dx.clone() if plan.to_caller is None else dx[plan.to_caller]
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
            x, chosen, kept, parameters, ctx.needed, *rest,
        )
    )  # fmt: skip
    dx, *others = (next(grads) if need else None for need in ctx.needed)
    nothing = [[] if value == [] else None for value in rest]  # torch takes [] for tensors
    return dx, others, *nothing, None


loop_fwd.register_autograd(_backward, setup_context=_setup_context)

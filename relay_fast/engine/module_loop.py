"""The loop engine around any nn.Module: `relay_fast.loop`.

The module's own autograd computes the gradients of one iteration; the engine provides the active
prefix, recompute policies, returned states, truncation, stopping and the sum of the weight
gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from relay_fast.batch.plan import Plan, check_cu_seqlens, check_loops
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.batch.stopping import StoppingPlan
from relay_fast.engine.aux_values import AuxValues
from relay_fast.engine.loop import run_with_aux
from relay_fast.engine.module_checks import check_kinds, check_rows, refuse_batch_norm, tensors_in
from relay_fast.engine.module_iteration import Call, Options, has_saved_tensor_hooks
from relay_fast.engine.plain_loop import plain_loop, runs_plainly
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.spec import LoopSpec, check_truncate
from relay_fast.engine.state_tree import StateTree
from relay_fast.engine.states import States
from relay_fast.engine.stopping import loops_run, pass_options
from relay_fast.engine.wrappers import gathered, refuse_flattened, refuse_replicas, shards
from relay_fast.ops.dispatch import refuse_transforms, select
from relay_fast.utils.numbers import as_int, is_bool


# Long: the signature and its description are most of it.
@torch.compiler.disable
def loop(
    module: nn.Module,
    x: object,
    loops: int | Sequence[int] | Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_row: Mapping[str, object] | None = None,
    shared: Mapping[str, object] | None = None,
    recompute: str = "state",
    return_states: bool | Sequence[int] = False,
    return_loops: bool = False,
    truncate: int | Sequence[int] | Tensor | None = None,
    until: Callable[..., Tensor] | None = None,
    start: int = 0,
    aux: bool = False,
) -> object:
    """Applies `module` to x `loops` times: h ← module(h, **per_row, **shared), h built as x.

    Args:
        module: maps a state to the next one of the same shape. If it has an argument `iteration`,
            it gets the iteration's number (from start + 1; the same when recomputed); if it has a
            `cu_seqlens` argument and the batch is packed, the row offsets of the sequences that it
            sees.
        x: (B, …) padded, or (N, …) packed with `cu_seqlens`; floating point. Or nested tuples,
            lists and dicts of such tensors of one dtype: the module gets and returns the same
            structure (the tensors that it gets are views of one buffer).
        loops: an int, or one count per sequence (≥ 0). A finished sequence is no longer computed.
            With `until`, the largest number of iterations.
        cu_seqlens: (B + 1,) row offsets of a packed batch.
        per_row: arguments of the module with one entry per sequence (padded) or per row (packed):
            tensors, also inside lists, tuples and dicts. They are sliced to the active prefix.
        shared: arguments of the module that are passed unchanged. Containers with tensors are
            copied.
        recompute: see `relay_fast.engine.recompute`. Recomputation draws the same random numbers
            from torch's generators; a module that is non-deterministic for other reasons needs
            "none".
        return_states: True, or a list of iterations: return their states instead of the final one.
        return_loops: also return how many iterations each sequence ran, (B,) int64.
        truncate: number of last iterations of each sequence that gradients flow through: an int or
            one count per sequence (≥ 0); None: all.
        until: (t, state t, state t − 1) → (active sequences,) bool: which of them stop. It sees the
            sequences that still loop, in the caller's order, and no gradients; with arguments
            `cu_seqlens` or `sequences` it also gets their row offsets or their indices. The host
            waits for its answer, once an iteration. See `relay_fast.engine.criteria`.
        start: number of iterations that x has already been through.
        aux: the module returns (state, aux), aux being floating-point tensors of fixed shapes, also
            in containers. Their sums over all calls are returned, and have gradients. Not with both
            `until` and `truncate`.

    Returns:
        The final state, or a list of states as `LoopedBlock.forward` returns it; then the loops if
        `return_loops`, then the sums if `aux`, as a tuple. Gradients flow into x, the module's
        parameters, and the tensors in per_row and shared.

    Raises:
        RuntimeError: if the module changes its buffers (batch norm in training) or its input in
            place, uses a tensor that needs a gradient but is not registered as a parameter, or
            stores a tensor with an autograd graph (such as an auxiliary loss). To detect these, the
            first iteration records its graph under every policy.
        TypeError, ValueError: if arguments have wrong types or do not fit together.

    Note:
        Under torch.compile this call is a graph break; the module itself may be compiled. Under
        hooks on saved tensors (checkpointing around the call, offloading), "none" keeps the
        same tensors as "state". Truncation that splits an iteration calls the module twice there,
        once for the sequences without a gradient.
    """
    check_kinds(module, per_row, shared)
    tree = StateTree(x)
    rows = x if tree.is_tensor else tree_leaves(x)[0]
    start = as_int("start", start, least=0)
    per_row, shared = dict(per_row or {}), dict(shared or {})
    arguments = tensors_in(x, per_row, shared)
    refuse_transforms(*arguments, module=module)
    refuse_replicas(module)
    refuse_flattened(module)
    refuse_batch_norm(module)
    plan = _make_plan(rows, loops, cu_seqlens, stops=until is not None)
    check_rows(per_row, plan.rows, rows.device)
    truncate = check_truncate(truncate, plan.sequences)
    if aux and until is not None and truncate is not None:
        raise ValueError(
            "aux=True with until and truncate: aux is a sum over sequences, and for which of them "
            "truncation leaves it a gradient is only known at the end; leave out truncate"
        )
    policy = RecomputePolicy.parse(recompute)
    if policy.kind == "none" and has_saved_tensor_hooks():  # hooks cannot save graphs
        policy = RecomputePolicy("state")
    return_states = bool(return_states) if is_bool(return_states) else return_states
    wanted = plan.chosen_states(return_states)
    options = Options(
        tree, AuxValues() if aux else None, _takes(module, cu_seqlens, per_row, shared), start
    )
    parameters = list(module.parameters())
    tensors = arguments + parameters
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    uniform = plan.max_loops > 0 and plan.rows > 0 and plan.loops[-1] == plan.max_loops
    if (
        uniform
        and not shards(module.modules())  # gathered once by the engine, and by each plain call
        and (truncate is None or not gradient)
        and runs_plainly(gradient, policy.kind, tensors)
    ):
        given = {**per_row, **shared}
        if "cu_seqlens" in options.takes:
            given["cu_seqlens"] = plan.cu_seqlens
        final, states, sums = plain_loop(
            module, x, plan.max_loops, given, options, parameters if gradient else None, wanted
        )
        states = States.of(states, [plan.sequences_at(t) for t in wanted], plan.device)
    else:
        final, states, sums = _run(
            module,
            x,
            plan,
            (per_row, shared),
            options,
            policy,
            wanted,
            truncate,
            until,
            cu_seqlens is not None,
        )
        if until is not None and return_states is True:
            states = states.first(plan.max_loops)
    result = [final if return_states is False else states]
    result += [loops_run(plan)] if return_loops else []
    result += [options.aux.join(sums)] if aux else []
    return result[0] if len(result) == 1 else tuple(result)


def _run(
    module: nn.Module,
    x: object,
    plan: Plan,
    arguments: tuple[dict, dict],
    options: Options,
    policy: RecomputePolicy,
    wanted: Sequence[int],
    truncate: int | np.ndarray | None,
    until: Callable | None,
    packed: bool,
) -> tuple[object, States, Tensor]:
    """Runs the engine.

    Args:
        module, x, plan, policy, truncate, until: as in `loop`.
        arguments: per_row and shared.
        options: how the module is called.
        wanted: iterations whose states are returned.
        packed: whether the batch has row offsets.

    Returns:
        The final state, the wanted ones, and the sums of the auxiliary values.
    """
    per_row, shared = arguments
    tree = options.tree
    flat = tree.flatten(x)
    if plan.to_sorted is not None:
        flat = flat[plan.to_sorted]
        per_row = tree_map(lambda value: value[plan.to_sorted], per_row)
    view = lambda h, _: tree.unflatten(h)
    passes = pass_options(until, plan, wanted, view, packed, options.start)

    def run(flat: Tensor) -> tuple[LoopSpec, tuple[Tensor, ...]]:
        call = Call(module, plan, per_row, shared, options, flat)
        call.replays_rng = torch.is_grad_enabled() and policy.kind != "none"
        call.checked = not (
            torch.is_grad_enabled() and any(t.requires_grad for t in (flat, *call.tensors))
        )
        spec = LoopSpec(plan, call.body, select("torch"), policy, truncate=truncate, **passes)
        return spec, run_with_aux(spec, flat, call.tensors)

    sharded = shards(module.modules())
    root = [m for m in sharded if m is module]
    spec, (final, states, _, _, sums) = gathered(flat, run, root, sharded[len(root) :])
    collected = spec.collect(wanted, final, states)
    if plan.to_caller is not None:
        final = final[plan.to_caller]
    if not tree.is_tensor:
        final = tree.unflatten(final)
        collected = collected.map(lambda state, _: tree.unflatten(state))
    return final, collected, sums


def _make_plan(x: Tensor, loops, cu_seqlens, stops: bool) -> Plan:
    """Builds the plan; a whole sequence of a padded batch counts as one row."""
    if cu_seqlens is None and not stops and type(loops) is int and 0 <= loops < 2**63:
        return Plan.of_rows(len(x), loops, x.device)
    if cu_seqlens is None:
        lengths = np.ones(len(x), np.int64)
    else:
        lengths = np.diff(check_cu_seqlens(cu_seqlens, len(x)))
    kind = StoppingPlan if stops else cached_plan
    return kind(lengths, check_loops(loops, len(lengths)), x.device)


def _takes(module: nn.Module, cu_seqlens, per_row: Mapping, shared: Mapping) -> frozenset[str]:
    """Returns the arguments that the module has and the caller does not pass."""
    forward = module.forward
    names = {"iteration"} if cu_seqlens is None else {"iteration", "cu_seqlens"}
    known = _parameters_of(getattr(forward, "__func__", forward))
    return frozenset(names.intersection(known).difference(per_row, shared))


@lru_cache(maxsize=256)  # reading a signature takes as long as a small module
def _parameters_of(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)

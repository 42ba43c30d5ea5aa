"""The loop engine around any nn.Module: `relay_fast.loop`.

The module's own autograd computes the gradients of one iteration; the engine provides the active
prefix, recompute policies, returned states, truncation and the sum of the weight gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from relay_fast.batch.plan import Plan, RowRange, check_cu_seqlens, check_floating, check_loops
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.engine.loop import run_loop
from relay_fast.engine.recompute import RecomputePolicy
from relay_fast.engine.retained_graphs import find_retained_graphs
from relay_fast.engine.spec import LoopSpec
from relay_fast.engine.wrappers import (
    gathered,
    kept_gathered,
    refuse_flattened,
    refuse_replicas,
    shards,
)
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.dispatch import refuse_transforms, select
from relay_fast.ops.gradients import GradientBuffers
from relay_fast.utils.numbers import is_bool


# Long: the signature and its description are most of it.
@torch.compiler.disable
def loop(
    module: nn.Module,
    x: Tensor,
    loops: int | Sequence[int] | Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_row: Mapping[str, object] | None = None,
    shared: Mapping[str, object] | None = None,
    recompute: str = "state",
    return_states: bool | Sequence[int] = False,
    truncate: int | None = None,
) -> Tensor | list[Tensor]:
    """Applies `module` to x `loops` times: h ← module(h, **per_row, **shared), h of x's shape.

    Args:
        module: maps a state to the next one of the same shape. If it has a `cu_seqlens` argument
            and the batch is packed, it gets the row offsets of the sequences that it sees.
        x: (B, …) padded, or (N, …) packed with `cu_seqlens`; floating point.
        loops: an int, or one count per sequence (≥ 0). A finished sequence is no longer computed.
        cu_seqlens: (B + 1,) row offsets of a packed batch.
        per_row: arguments of the module with one entry per sequence (padded) or per row (packed):
            tensors, also inside lists, tuples and dicts. They are sliced to the active prefix.
        shared: arguments of the module that are passed unchanged. Containers with tensors are
            copied.
        recompute: see `relay_fast.engine.recompute`. Recomputation draws the same random numbers
            from torch's generators; a module that is non-deterministic for other reasons needs
            "none".
        return_states: True, or a list of iterations: return their states instead of the final one.
        truncate: number of last iterations of each sequence that gradients flow through; None: all.

    Returns:
        The final state, or a list of states, as `LoopedBlock.forward` does. Gradients flow into x,
        the module's parameters, and the tensors in per_row and shared.

    Raises:
        RuntimeError: if the module changes its buffers (batch norm in training) or its input in
            place, uses a tensor that needs a gradient but is not registered as a parameter, or
            stores a tensor with an autograd graph (such as an auxiliary loss). To detect these, the
            first iteration records its graph under every policy.
        TypeError, ValueError: if arguments have wrong types or do not fit together.

    Note:
        Under torch.compile this call is a graph break; the module itself may be compiled. Under
        hooks on saved tensors (checkpointing around the call, offloading), "none" keeps the
        same tensors as "state".
    """
    check_floating(x)
    arguments = (t for t in tree_leaves((per_row, shared)) if isinstance(t, Tensor))
    refuse_transforms(x, *arguments, module=module)
    refuse_replicas(module)
    refuse_flattened(module)
    _refuse_batch_norm(module)
    plan = _make_plan(x, loops, cu_seqlens)
    per_row = dict(per_row or {})
    _check_rows(per_row, plan.rows, x.device)
    if plan.to_sorted is not None:
        x = x[plan.to_sorted]
        per_row = tree_map(lambda value: value[plan.to_sorted], per_row)
    policy = RecomputePolicy.parse(recompute)
    if policy.kind == "none" and _has_saved_tensor_hooks():  # hooks cannot save graphs
        policy = RecomputePolicy("state")
    return_states = bool(return_states) if is_bool(return_states) else return_states
    wanted = plan.chosen_states(return_states)
    inner = tuple(t for t in wanted if t < plan.max_loops)

    def run(x: Tensor) -> tuple[LoopSpec, tuple[Tensor, ...]]:
        call = _Call(module, plan, per_row, dict(shared or {}), cu_seqlens is not None, x)
        call.replays_rng = torch.is_grad_enabled() and policy.kind != "none"
        call.checked = not (
            torch.is_grad_enabled() and any(t.requires_grad for t in (x, *call.tensors))
        )
        spec = LoopSpec(plan, call.body, select("torch"), policy, inner, truncate)
        return spec, run_loop(spec, x, call.tensors)

    sharded = shards(module.modules())
    root = [m for m in sharded if m is module]
    spec, (final, states, _, _) = gathered(x, run, root, sharded[len(root) :])
    if return_states is False:
        return final if plan.to_caller is None else final[plan.to_caller]
    return spec.collect(wanted, final, states)


def _make_plan(x: Tensor, loops, cu_seqlens) -> Plan:
    """Builds the plan; a whole sequence of a padded batch counts as one row."""
    if cu_seqlens is None:
        return cached_plan(np.ones(len(x), np.int64), check_loops(loops, len(x)), x.device)
    lengths = np.diff(check_cu_seqlens(cu_seqlens, len(x)))
    return cached_plan(lengths, check_loops(loops, len(lengths)), x.device)


def _check_rows(per_row: Mapping[str, object], rows: int, device: torch.device) -> None:
    for path, value in tree_flatten_with_path(per_row)[0]:
        name = f"per_row{keystr(path)}"
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is of type {type(value).__name__}, not a tensor: pass it in `shared`"
            )
        if value.device != device:
            raise ValueError(
                f"x is on {device} and {name} on {value.device}: move them to one device"
            )
        if value.shape[:1] != (rows,):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but x has {rows} rows: pass it in `shared` "
                "if it is the same for all of them"
            )


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, part in module.named_modules():
        tracks = isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
        if tracks and part.training:
            raise RuntimeError(
                f"{name or 'the module'} ({type(part).__name__}) updates running statistics in "
                "forward, which recomputation would do twice: use eval(), or a norm without them"
            )


class _Call:
    """One call of `loop`: its tensors as leaves of their own graphs, and its RNG states."""

    def __init__(self, module: nn.Module, plan: Plan, per_row, shared, packed: bool, x: Tensor):
        self.module, self.plan = module, plan
        self.shards = shards(module.modules())
        self.parameters = dict(module.named_parameters())
        self.per_row, self.per_row_tree = tree_flatten(per_row)
        held = [t for t in tree_leaves(shared) if isinstance(t, Tensor)]
        # All tensors that may get a gradient, in the order of the engine's parameters.
        self.tensors = [*self.parameters.values(), *self.per_row, *held]
        # The module gets these leaves instead: its graphs must not reach the caller's graph.
        leaf = lambda t: t.detach().requires_grad_(t.requires_grad)
        self.weights = {name: leaf(p) for name, p in self.parameters.items()}
        self.shared_leaves = [leaf(t) for t in held]
        leaves = iter(self.shared_leaves)
        self.shared = {k: _with_tensors(v, leaves) for k, v in shared.items()}
        self.replays_rng = False
        self.checked = True  # whether the module's graph was checked or needs no check
        self.rng_states: dict[tuple[int, int], _RngState] = {}
        kind = x.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.takes_cu_seqlens = packed and _accepts(module, "cu_seqlens")

    def body(self, x: Tensor, _: Sequence[Tensor | None]) -> _ModuleIteration:
        return _ModuleIteration(self, x.device)


def _with_tensors(value: object, tensors: Iterator[Tensor]) -> object:
    """Returns a copy of a nested value with its tensors replaced by the next `tensors`; without
    tensors, the value itself."""
    if not any(isinstance(t, Tensor) for t in tree_leaves(value)):
        return value
    return tree_map(lambda t: next(tensors) if isinstance(t, Tensor) else t, value)


def _refuse_unregistered_tensors(new: Tensor, known: Iterable[Tensor]) -> None:
    """Raises RuntimeError if the graph of `new` ends in a leaf that is not among `known`."""
    ids, seen, todo = {id(t) for t in known}, set(), [new.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(parent for parent, _ in node.next_functions)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in ids:
            raise RuntimeError(
                f"the module uses a tensor of shape {tuple(node.variable.shape)} that needs a "
                "gradient but is not registered: make it an nn.Parameter, or pass it in `shared`"
            )


def _refuse_retained_graphs(call: _Call, before: Mapping[int, tuple[str, Tensor]]) -> None:
    """Raises RuntimeError if the module or its arguments store a tensor with a graph that is not in
    `before`."""
    for key, (where, _) in find_retained_graphs(call.module, call.shared).items():
        if key not in before:
            raise RuntimeError(
                f"the module stored a tensor that needs a gradient in {where!r} (an auxiliary "
                "loss?), but gradients flow through the state only: detach() it if no gradient is "
                "needed, or compute it outside of the module from return_states=True"
            )


def _has_saved_tensor_hooks() -> bool:
    """Returns whether hooks on saved tensors are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _accepts(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


class _RngState:
    """A snapshot of torch's generators."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self):
        """Restores the snapshot inside the context."""
        devices = [] if self.cuda is None else [self.device]
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


class _ModuleIteration:
    """The loop body of a user's module (see `relay_fast.engine.spec.Iteration`)."""

    dx = None
    skips_dead_rows = False

    def __init__(self, call: _Call, device: torch.device):
        self.call, self.device = call, device
        self.saved_width = 2 + len(call.per_row)

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]:
        """Writes the next state into `out`; with `keep`, returns the iteration's graph: its input,
        its output, and its slices of the per-row tensors."""
        call, key = self.call, (row_range.iteration, row_range.first_sequence)
        if key in call.rng_states:
            with call.rng_states[key].restored():
                saved = self._call_module(h, row_range, keep)
        else:
            if call.replays_rng:
                call.rng_states[key] = _RngState(self.device)
            if call.checked:
                saved = self._call_module(h, row_range, keep)
            else:
                saved = self._first_call(h, row_range)
        new = saved[1]
        if new.shape != h.shape:
            raise ValueError(
                f"the module changed the state's shape from {tuple(h.shape)} to "
                f"{tuple(new.shape)}: a looped module must keep the shape"
            )
        out.copy_(new.detach())
        return saved if keep else []

    def _first_call(self, h: Tensor, row_range: RowRange) -> list[Tensor]:
        """Runs the first iteration with its graph, and checks the graph."""
        call, same = self.call, lambda t: t
        before = find_retained_graphs(call.module, call.shared)
        # Disables the caller's hooks, which would store tensors that are dropped soon.
        with saved_tensors_hooks(same, same) if _has_saved_tensor_hooks() else nullcontext():
            state, new, *sliced = self._call_module(h, row_range, keep=True)
        _refuse_unregistered_tensors(
            new, [state, *sliced, *call.weights.values(), *call.shared_leaves]
        )
        _refuse_retained_graphs(call, before)
        call.checked = True
        return [state, new, *sliced]

    def _call_module(self, h: Tensor, row_range: RowRange, keep: bool) -> list[Tensor]:
        call = self.call
        # Not detach(): it shares the version counter, and later states reuse the buffer.
        state = h.data.requires_grad_(keep)
        sliced = [
            value.detach()[row_range.rows].requires_grad_(keep and value.requires_grad)
            for value in call.per_row
        ]
        arguments = {**tree_unflatten(sliced, call.per_row_tree), **call.shared}
        if call.takes_cu_seqlens:
            cu = call.plan.cu_seqlens[row_range.first_sequence : row_range.last_sequence + 1]
            arguments["cu_seqlens"] = cu - row_range.first_row if row_range.first_row else cu
        buffers = [(name, b, b._version) for name, b in call.module.named_buffers()]
        kind, dtype, enabled = call.autocast
        with (
            torch.set_grad_enabled(keep),
            torch.autocast(kind, dtype, enabled=enabled),
            kept_gathered(call.shards),
        ):
            new = torch.func.functional_call(call.module, call.weights, (state,), arguments)
        if not isinstance(new, Tensor):
            raise TypeError(
                f"the module returned a value of type {type(new).__name__}: a looped module must "
                "return only the next state, so wrap it in one that does"
            )
        buffers_now = dict(call.module.named_buffers())
        for name, buffer, before in buffers:
            if buffers_now.get(name) is not buffer or buffer._version != before:
                raise RuntimeError(
                    f"the module changed its buffer {name!r} in forward, which recomputation would "
                    "do twice: keep the buffer outside of the module"
                )
        if state._version:
            raise RuntimeError(
                "the module changed its input in place, but the loop still needs that state: "
                "change a copy"
            )
        return [state, new, *sliced]

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor:
        call = self.call
        state, new, *sliced = saved
        if not new.requires_grad:
            return g.new_zeros(g.shape)
        leaves = [*call.weights.values(), *sliced, *call.shared_leaves]
        needed = [i for i in range(len(leaves)) if grads.needs(i)]
        # A recomputed graph is used once, a kept one ("none") as often as the caller's graph.
        retain_graph = (
            not call.replays_rng and torch._C._autograd._get_current_graph_task_keep_graph()
        )
        dh, *values = torch.autograd.grad(
            new,
            [state, *(leaves[i] for i in needed)],
            g.to(new.dtype),
            allow_unused=True,
            retain_graph=retain_graph,
        )
        first_sliced = len(call.weights)
        for i, value in zip(needed, values, strict=True):
            if value is None:
                continue
            if first_sliced <= i < first_sliced + len(sliced):
                grads.buffer(i)[row_range.rows] += value
            else:
                grads.vector(i, value)
        return g.new_zeros(g.shape) if dh is None else upcast(dh)

"""One iteration of a user's module, as the engine runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from relay_fast.batch.plan import Plan
from relay_fast.batch.row_range import RowRange
from relay_fast.engine.aux_values import AuxValues
from relay_fast.engine.module_checks import (
    Buffers,
    refuse_changed_input,
    refuse_retained_graphs,
    refuse_unregistered_tensors,
    version,
)
from relay_fast.engine.retained_graphs import find_retained_graphs
from relay_fast.engine.state_tree import StateTree
from relay_fast.engine.wrappers import kept_gathered, shards
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.gradients import GradientBuffers
from relay_fast.utils.arguments import refuse_meta


@dataclass
class Options:
    """Options of a module's calls, apart from its tensors.

    Args:
        tree: the structure of the state.
        aux: collects auxiliary values; None: the module returns none.
        takes: the arguments among `cu_seqlens` and `iteration` that the module gets.
        start: number of iterations that were done before this call.
    """

    tree: StateTree
    aux: AuxValues | None = None
    takes: frozenset[str] = field(default_factory=frozenset)
    start: int = 0


class Call:
    """One call of `loop`: its tensors as leaves of their own graphs, and its RNG states.

    Args:
        module: The module that is looped.
        plan: The plan of the batch.
        per_row: The arguments with one entry for each row.
        shared: The arguments that all iterations share.
        options: How the module is called.
        x: The loop's input.
    """

    def __init__(self, module: nn.Module, plan: Plan, per_row, shared, options: Options, x: Tensor):
        self.module, self.plan, self.options = module, plan, options
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
        self.rng_states: dict[tuple[int, int], RngState] = {}
        refuse_meta("x", x)
        kind = x.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def body(self, x: Tensor, _: Sequence[Tensor | None]) -> ModuleIteration:
        return ModuleIteration(self, x.device)


def _with_tensors(value: object, tensors: Iterator[Tensor]) -> object:
    """Returns a copy of a nested value with its tensors replaced by the next `tensors`; without
    tensors, the value itself."""
    if not any(isinstance(t, Tensor) for t in tree_leaves(value)):
        return value
    return tree_map(lambda t: next(tensors) if isinstance(t, Tensor) else t, value)


def has_saved_tensor_hooks() -> bool:
    """Returns whether hooks on saved tensors are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class RngState:
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


class ModuleIteration:
    """The loop body of a user's module (see `relay_fast.engine.spec.Iteration`).

    What `forward` returns: the state that the module got, the tensors of the one that it returned,
    the auxiliary values if there are any, and its slices of the per-row tensors.
    """

    dx: Tensor | None = None
    skips_dead_rows = False
    keeps_operands = False
    may_leave_unused = True

    def __init__(self, call: Call, device: torch.device):
        self.call, self.device = call, device
        self.states = len(call.options.tree.shapes)
        self.results = self.states + (call.options.aux is not None)
        self.saved_width = 1 + self.results + len(call.per_row)
        self.aux: Tensor | None = None
        self.g_aux: Tensor | None = None

    def forward(
        self, h: Tensor, row_range: RowRange, out: Tensor, keep: bool = True
    ) -> list[Tensor | None]:
        """Writes the next state.

        Args:
            h: State t − 1.
            row_range: The rows of iteration t.
            out: Receives state t.
            keep: Whether a backward follows.

        Returns:
            With `keep` the iteration's graph.
        """
        call, key = self.call, (row_range.iteration, row_range.part)
        if key in call.rng_states:
            with call.rng_states[key].restored():
                saved = self._call_module(h, row_range, keep)
        else:
            if call.replays_rng:
                call.rng_states[key] = RngState(self.device)
            if call.checked:
                saved = self._call_module(h, row_range, keep)
            else:
                saved = self._first_call(h, row_range)
        call.options.tree.write(out, saved[1 : 1 + self.states])
        if call.options.aux is not None:
            aux = upcast(saved[self.results].detach())
            self.aux = aux.clone() if self.aux is None else self.aux + aux
        return saved if keep else []

    def _first_call(self, h: Tensor, row_range: RowRange) -> list[Tensor]:
        """Runs the first iteration with its graph, and checks the graph."""
        call, same = self.call, lambda t: t
        before = find_retained_graphs(call.module, call.shared)
        # Disables the caller's hooks, which would store tensors that are dropped soon.
        with saved_tensors_hooks(same, same) if has_saved_tensor_hooks() else nullcontext():
            saved = self._call_module(h, row_range, keep=True)
        results, sliced = saved[1 : 1 + self.results], saved[1 + self.results :]
        refuse_unregistered_tensors(
            results, [saved[0], *sliced, *call.weights.values(), *call.shared_leaves]
        )
        refuse_retained_graphs(call.module, call.shared, lambda t: id(t) in before)
        call.checked = True
        return saved

    def _call_module(self, h: Tensor, row_range: RowRange, keep: bool) -> list[Tensor]:
        call, options = self.call, self.call.options
        # Not detach(): it shares the version counter, and later states reuse the buffer.
        state = h.data.requires_grad_(keep)
        sliced = [
            value.detach()[row_range.rows].requires_grad_(keep and value.requires_grad)
            for value in call.per_row
        ]
        arguments = {**tree_unflatten(sliced, call.per_row_tree), **call.shared}
        if "cu_seqlens" in options.takes:
            arguments["cu_seqlens"] = call.plan.layout_of(row_range).cu_seqlens
        if "iteration" in options.takes:
            arguments["iteration"] = options.start + row_range.iteration
        buffers, before = Buffers.of(call.module), version(state)
        kind, dtype, enabled = call.autocast
        with (
            torch.set_grad_enabled(keep),
            torch.autocast(kind, dtype, enabled=enabled),
            kept_gathered(call.shards),
        ):
            given = options.tree.unflatten(state)
            new = torch.func.functional_call(call.module, call.weights, (given,), arguments)
            aux = []
            if options.aux is not None:
                new, flat = options.aux.split(new)
                aux = [flat]
        leaves = options.tree.leaves(new, len(state))
        buffers.check(call.module)
        refuse_changed_input(before, version(state))
        return [state, *leaves, *aux, *sliced]

    def backward(
        self,
        g: Tensor,
        h: Tensor,
        saved: Sequence[Tensor | None],
        row_range: RowRange,
        grads: GradientBuffers,
    ) -> Tensor:
        """Computes the gradient of state t − 1 through the iteration's graph.

        Args:
            g: Gradient of state t.
            h: State t − 1.
            saved: What `forward` returned.
            row_range: The rows of iteration t.
            grads: Receives the gradients of the parameters.
        """
        call, tree = self.call, self.call.options.tree
        state, results, sliced = saved[0], saved[1 : 1 + self.results], saved[1 + self.results :]
        gradients = tree.split_gradient(g, results[: self.states])
        if call.options.aux is not None:
            aux = results[-1]
            value = torch.zeros_like(aux) if self.g_aux is None else self.g_aux.to(aux.dtype)
            gradients.append(value)
        pairs = [p for p in zip(results, gradients, strict=True) if p[0].requires_grad]
        if not pairs:
            return g.new_zeros(g.shape)
        leaves = [*call.weights.values(), *sliced, *call.shared_leaves]
        needed = [i for i in range(len(leaves)) if grads.needs(i)]
        # A recomputed graph is used once, a kept one ("none") as often as the caller's graph.
        retain_graph = (
            not call.replays_rng and torch._C._autograd._get_current_graph_task_keep_graph()
        )
        dh, *values = torch.autograd.grad(
            [result for result, _ in pairs],
            [state, *(leaves[i] for i in needed)],
            [gradient for _, gradient in pairs],
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

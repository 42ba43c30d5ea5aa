"""The loop as plain calls of the module, whose autograd graph is the caller's own.

Where no iteration is recomputed and no sequence ends before the others, the engine would do the
same work with an overhead that a small module notices. The module is checked as the engine does it,
in the first iteration; its results are cast to the state's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from relay_fast.engine.module_checks import (
    Buffers,
    refuse_changed_input,
    refuse_retained_graphs,
    refuse_unregistered_tensors,
    tensors_in,
    version,
)
from relay_fast.engine.module_iteration import Options


def runs_plainly(gradient: bool, kind: str, tensors: Sequence[Tensor]) -> bool:
    """Returns whether plain calls give the gradients of the engine, to the precision of fp32.

    Args:
        gradient: whether a gradient may be asked for.
        kind: of the recompute policy.
        tensors: all that may need a gradient. Of 16-bit ones, or under autocast, the engine sums
            gradients in fp32 and plain calls do not.
    """
    if not gradient:
        return True
    if kind != "none" or torch.is_autocast_enabled(tensors[0].device.type):
        return False
    return all(t.dtype.itemsize >= 4 for t in tensors if t.requires_grad)


def plain_loop(
    module: nn.Module,
    x: object,
    loops: int,
    arguments: Mapping[str, object],
    options: Options,
    parameters: Sequence[Tensor] | None,
    wanted: Sequence[int],
) -> tuple[object, list, Tensor | None]:
    """Applies the module `loops` times to all rows.

    Args:
        module: maps a state to the next one.
        x: the state.
        loops: 1 or more.
        arguments: further arguments of the module.
        options: how it is called.
        parameters: the module's, if a graph is recorded, which is then checked; else None.
        wanted: iterations whose states are returned.

    Returns:
        The last state, the wanted ones, and the sums of the auxiliary values.
    """
    arguments, buffers, step = dict(arguments), Buffers.of(module), _nested_step
    if options.tree.is_tensor and options.aux is None:
        step = _step
    h, states, total = x, [], None
    for t in range(1, loops + 1):
        if "iteration" in options.takes:
            arguments["iteration"] = options.start + t
        if t > 1:
            h, aux = step(module, h, arguments, options)
        else:
            before = torch.autograd._get_sequence_nr()
            new, aux = step(module, h, arguments, options)
            if parameters is not None:
                _check_graph(module, h, new, aux, arguments, parameters, before)
            buffers.check(module)
            h = new
        if aux is not None:
            total = aux if total is None else total + aux
        if t in wanted:
            states.append(h)
    buffers.check(module)
    return _apart(h, x), states, total


def _step(module: nn.Module, h: Tensor, arguments: dict, options: Options) -> tuple[Tensor, None]:
    """One iteration of a state that is a tensor: the module's call, checked."""
    before = None if h.is_inference() else h._version
    new = module(h, **arguments)
    if not isinstance(new, Tensor) or new.shape != h.shape:
        options.tree.leaves(new, len(h))  # says what is wrong
    if before is not None and h._version != before:
        refuse_changed_input(before, h._version)
    return (new if new.dtype == h.dtype else new.to(h.dtype)), None


def _nested_step(
    module: nn.Module, h: object, arguments: dict, options: Options
) -> tuple[object, Tensor | None]:
    """One iteration of any state, with auxiliary values or without."""
    inputs, aux = tree_leaves(h), None
    before = [version(t) for t in inputs]
    new = module(h, **arguments)
    if options.aux is not None:
        new, aux = options.aux.split(new)
    options.tree.leaves(new, len(inputs[0]))
    for tensor, was in zip(inputs, before, strict=True):
        refuse_changed_input(was, version(tensor))
    return tree_map(lambda t: t.to(inputs[0].dtype), new), aux


def _check_graph(
    module: nn.Module,
    h: object,
    new: object,
    aux: Tensor | None,
    arguments: dict,
    parameters: Sequence[Tensor],
    before: int,
) -> None:
    """Refuses what carries a graph out of the first iteration, or into it unseen.

    Args:
        module, arguments, parameters: as in `plain_loop`.
        h, new, aux: state 0, state 1 and the auxiliary values.
        before: autograd's sequence number before the iteration; later nodes are of its graph.
    """
    inputs = tensors_in(h, arguments)
    refuse_unregistered_tensors(tensors_in(new, aux), [*inputs, *parameters], inputs)
    refuse_retained_graphs(module, arguments, lambda t: t.grad_fn._sequence_nr() < before)


def _apart(h: object, x: object) -> object:
    """Returns the last state, copied where it is the caller's own tensor."""
    own = {t.data_ptr() for t in tensors_in(x)}
    copied: Callable[[Tensor], Tensor] = lambda t: t.clone() if t.data_ptr() in own else t
    return copied(h) if isinstance(h, Tensor) else tree_map(copied, h)

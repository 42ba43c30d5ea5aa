"""What a looped module may not do, and what is wrong with its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from relay_fast.engine.retained_graphs import find_retained_graphs
from relay_fast.utils.arguments import check_kind


def tensors_in(*values: object) -> list[Tensor]:
    """Returns the tensors in nested values."""
    leaves = (
        [value] if isinstance(value, Tensor) else tree_leaves(value) if value else []
        for value in values
    )
    return [leaf for some in leaves for leaf in some if isinstance(leaf, Tensor)]


def check_kinds(module: object, per_row: object, shared: object) -> None:
    """Checks what `relay_fast.loop` is given.

    Args:
        module: What is looped.
        per_row, shared: Its arguments by name, or None.

    Raises:
        TypeError: They are of other kinds.
    """
    check_kind("module", module, nn.Module, "give the nn.Module that is looped")
    for name, value in (("per_row", per_row), ("shared", shared)):
        if value is not None:
            check_kind(name, value, Mapping, "give a dict of the module's arguments by name")


def check_rows(per_row: Mapping[str, object], rows: int, device: torch.device) -> None:
    """Checks arguments that have one entry for each row.

    Args:
        per_row: The arguments by name.
        rows: Number of rows.
        device: Where they have to be.

    Raises:
        TypeError, ValueError: One is no tensor, or has another length or device.
    """
    for path, value in tree_flatten_with_path(per_row)[0] if per_row else ():
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


def refuse_batch_norm(module: nn.Module) -> None:
    """Raises RuntimeError for a norm that updates running statistics."""
    for name, part in module.named_modules():
        tracks = isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats
        if tracks and part.training:
            raise RuntimeError(
                f"{name or 'the module'} ({type(part).__name__}) updates running statistics in "
                "forward, which recomputation would do twice: use eval(), or a norm without them"
            )


class Buffers(NamedTuple):
    """A module's buffers and their versions, before it is called."""

    known: list[tuple[str, Tensor, int]]

    @staticmethod
    def of(module: nn.Module) -> Buffers:
        return Buffers([(name, b, version(b)) for name, b in module.named_buffers()])

    def check(self, module: nn.Module) -> None:
        """Raises RuntimeError if one of them was changed or replaced."""
        if not self.known:
            return
        now = dict(module.named_buffers())
        for name, buffer, before in self.known:
            if now.get(name) is not buffer or version(buffer) != before:
                raise RuntimeError(
                    f"the module changed its buffer {name!r} in forward, which recomputation would "
                    "do twice: keep the buffer outside of the module"
                )


def version(tensor: Tensor) -> int:
    """Returns the number of in-place changes; inference tensors do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version


def refuse_changed_input(before: int, now: int) -> None:
    """Raises RuntimeError if the versions of a state differ."""
    if before != now:
        raise RuntimeError(
            "the module changed its input in place, but the loop still needs that state: change a "
            "copy"
        )


def refuse_unregistered_tensors(
    results: Iterable[Tensor], known: Iterable[Tensor], inputs: Iterable[Tensor] = ()
) -> None:
    """Raises RuntimeError if the graph of an iteration ends in a leaf that is not known.

    Args:
        results: what the module returned.
        known: the leaves that it may use.
        inputs: tensors whose own graphs are the caller's.
    """
    ids = {id(t) for t in known}
    seen = {t.grad_fn for t in inputs if t.grad_fn is not None}
    todo = [t.grad_fn for t in results]
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


def refuse_retained_graphs(
    module: nn.Module, shared: Mapping[str, object], known: Callable[[Tensor], bool]
) -> None:
    """Refuses modules that leave a graph behind in an iteration.

    Args:
        module: The module.
        shared: The arguments that all iterations share.
        known: Tells whether a tensor had its graph before the iteration.

    Raises:
        RuntimeError: The module or an argument stores a tensor with a new graph.
    """
    for where, tensor in find_retained_graphs(module, shared).values():
        if not known(tensor):
            raise RuntimeError(
                f"the module stored a tensor that needs a gradient in {where!r} (an auxiliary "
                "loss?), but gradients flow through the state only: return it beside the state "
                "with aux=True, detach() it if no gradient is needed, or compute it outside of the "
                "module from return_states=True"
            )

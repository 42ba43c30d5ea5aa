"""A state that is one tensor or a nested container of tensors, as the engine's one buffer.

The tensors of a nested state lie side by side in a buffer (rows, width); a module gets views of it.
A state that is a tensor is its own buffer, and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path

from relay_fast.batch.plan import check_floating


class StateTree:
    """The structure of a state.

    Args:
        state: a tensor, or nested tuples, lists and dicts of them, with the same number of rows.

    Raises:
        TypeError: for anything but floating-point tensors of one dtype.
        ValueError: for tensors on several devices or with different numbers of rows, and for no
            tensor.
    """

    def __init__(self, state: object):
        self._spec: TreeSpec | None = None
        self.names = [""]
        if isinstance(state, Tensor):
            check_floating(state)
            if not state.ndim:
                raise ValueError("x has shape (): a state has one entry for each row, (rows, …)")
            self.shapes = [state.shape[1:]]
            return
        paths, self._spec = tree_flatten_with_path(state)
        self.names = [keystr(path) for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        if not leaves:
            raise ValueError("the state x holds no tensor: pass a tensor, or tensors in containers")
        for name, leaf in zip(self.names, leaves, strict=True):
            _check_leaf(name, leaf, self.names[0], leaves[0])
        self.shapes = [leaf.shape[1:] for leaf in leaves]
        self._widths = [math.prod(shape) for shape in self.shapes]

    @property
    def is_tensor(self) -> bool:
        return self._spec is None

    def flatten(self, state: object) -> Tensor:
        """Returns the buffer of a state: the tensor itself, or a new (rows, width)."""
        if self._spec is None:
            return state
        return torch.cat(
            [
                leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None]
                for leaf in tree_flatten(state)[0]
            ],
            1,
        )

    def unflatten(self, rows: Tensor) -> object:
        """Returns the state in a buffer, as views."""
        if self._spec is None:
            return rows
        return self._spec.unflatten(
            part.view(len(rows), *shape)
            for part, shape in zip(rows.split(self._widths, 1), self.shapes, strict=True)
        )

    def leaves(self, new: object, rows: int) -> list[Tensor]:
        """Returns the tensors of a state that a module made.

        Args:
            new: what it returned.
            rows: the number of rows that it got.

        Raises:
            TypeError: for another structure.
            ValueError: for another shape.
        """
        if self._spec is None:
            values, same = [new], isinstance(new, Tensor)
        else:
            values, spec = tree_flatten(new)
            same = spec == self._spec and all(isinstance(value, Tensor) for value in values)
        if not same:
            raise TypeError(
                f"the module returned a value of type {type(new).__name__}, which is not built as "
                "the state x: a looped module must return only the next state, so wrap it in one "
                "that does, or pass aux=True if it returns (state, aux)"
            )
        for name, value, shape in zip(self.names, values, self.shapes, strict=True):
            if value.shape != (rows, *shape):
                raise ValueError(
                    f"the module changed the shape of the state{name} from {(rows, *shape)} to "
                    f"{tuple(value.shape)}: a looped module must keep the shape"
                )
        return values

    def write(self, out: Tensor, leaves: Sequence[Tensor]) -> None:
        """Copies the tensors of a state into a buffer."""
        if self._spec is None:
            out.copy_(leaves[0].detach())
            return
        for part, leaf in zip(out.split(self._widths, 1), leaves, strict=True):
            part.copy_(leaf.detach().reshape(part.shape))

    def split_gradient(self, g: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Returns the gradient of each tensor, given that of the buffer."""
        if self._spec is None:
            return [g.to(leaves[0].dtype)]
        parts = g.split(self._widths, 1)
        return [p.reshape(t.shape).to(t.dtype) for p, t in zip(parts, leaves, strict=True)]


def _check_leaf(name: str, leaf: object, first_name: str, first: Tensor) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.ndim:
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(
            f"x{name} is {kind}: a state holds floating-point tensors with one entry for each row; "
            "pass other values in `shared` or `per_row`"
        )
    if leaf.dtype != first.dtype or leaf.device != first.device:
        raise TypeError(
            f"x{name} is {leaf.dtype} on {leaf.device} and x{first_name} {first.dtype} on "
            f"{first.device}: a state has one dtype and one device"
        )
    if len(leaf) != len(first):
        raise ValueError(
            f"x{name} has {len(leaf)} rows and x{first_name} {len(first)}: the tensors of a state "
            "need the same number"
        )

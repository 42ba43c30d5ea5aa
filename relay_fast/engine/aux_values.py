"""Auxiliary values that a looped module returns beside its state, summed over the iterations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten


class AuxValues:
    """Splits (state, aux) and keeps the structure of aux, which all iterations share."""

    def __init__(self):
        self._spec: TreeSpec | None = None
        self._shapes: list[torch.Size] = []

    def split(self, returned: object) -> tuple[object, Tensor]:
        """Returns the state, and the auxiliary values as one flat tensor.

        Raises:
            TypeError: for anything else than (state, aux), and for values that are no tensors.
            ValueError: if the values changed their number or shape.
        """
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"aux=True, but the module returned a value of type {type(returned).__name__}: "
                "return the tuple (state, aux)"
            )
        state, aux = returned
        values, spec = tree_flatten(aux)
        if not values:
            raise TypeError("aux holds nothing to sum: return tensors in it, or leave out aux=True")
        for value in values:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"aux holds {kind}: the values that are summed over the iterations have to be "
                    "floating-point tensors"
                )
        shapes = [value.shape for value in values]
        if self._spec is None:
            self._spec, self._shapes = spec, shapes
        elif (spec, shapes) != (self._spec, self._shapes):
            raise ValueError(
                f"aux changed its shapes from {[tuple(s) for s in self._shapes]} to "
                f"{[tuple(s) for s in shapes]} between iterations, so it has no sum: reduce it "
                "over the rows"
            )
        return state, torch.cat([value.reshape(-1) for value in values])

    def join(self, flat: Tensor) -> object:
        """Returns the values in the module's structure, given their sums as one flat tensor; a zero
        if there was no iteration."""
        if self._spec is None:
            return flat.new_zeros(())
        parts = flat.split([shape.numel() for shape in self._shapes])
        return self._spec.unflatten(
            part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)
        )

"""Weight gradients of shared weights: one wide accumulator each, over all iterations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import upcast

GATHER_ROWS = 256  # default workspace: below this many rows a GEMM is mostly overhead


class GradientBuffers:
    """Accumulators (fp32, or fp64 for fp64 parameters) of the parameters that need a gradient.

    Where an iteration has fewer than `gather_rows` rows, its operands are held back until that many
    have come together and reduced by one long GEMM; this bounds the workspace to the operands of
    2 · `gather_rows` rows. The grouping depends on the batch alone, never on the recompute policy.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | None],
        needed: Sequence[bool],
        weight_grad: Callable[..., None],
        gather_rows: int = GATHER_ROWS,
    ):
        self._parameters = parameters
        self._needed = needed
        self._weight_grad = weight_grad
        self._gather_rows = gather_rows
        self._buffers: dict[int, Tensor] = {}
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def needs(self, index: int | None) -> bool:
        return index is not None and self._needed[index]

    def buffer(self, index: int | None) -> Tensor | None:
        """The accumulator of a parameter, None if it needs no gradient."""
        if not self.needs(index):
            return None
        if index not in self._buffers:
            self._buffers[index] = torch.zeros_like(upcast(self._parameters[index]))
        return self._buffers[index]

    def weight(
        self, index: int | None, dy: Tensor, x: Tensor, row_count: Tensor | None = None
    ) -> None:
        """Adds dyᵀ · x: dy (rows, columns), x (rows, d); of the first `row_count` rows, where
        given."""
        if not self.needs(index):
            return
        if row_count is not None:
            self._add(index, dy, x, row_count=row_count)
            return
        held = self._held.get(index, [])
        if len(dy) + sum(len(part) for part, _ in held) < self._gather_rows:
            self._held[index] = [*held, (dy.clone(), x)]  # dy may be a running gradient
            return
        self._held[index] = [*held, (dy, x)]
        self._reduce(index)

    def vector(self, index: int | None, value: Tensor) -> None:
        """Adds a gradient that is already summed over rows."""
        buffer = self.buffer(index)
        if buffer is not None:
            buffer.add_(value)

    def bias(self, index: int | None, dy: Tensor) -> None:
        """Adds the sum of dy over its rows."""
        if self.needs(index):
            self.vector(index, upcast(dy).sum(0))

    def _reduce(self, index: int) -> None:
        held = self._held.pop(index)
        dy, x = (
            held[0] if len(held) == 1 else (torch.cat(parts) for parts in zip(*held, strict=True))
        )
        self._add(index, dy, x)

    def _add(self, index: int, dy: Tensor, x: Tensor, **count: Tensor) -> None:
        fresh = index not in self._buffers  # then written, not added to: no pass over zeros
        if fresh:
            self._buffers[index] = torch.empty_like(upcast(self._parameters[index]))
        self._weight_grad(self._buffers[index], dy, x, fresh=fresh, **count)

    def results(self) -> list[Tensor | None]:
        """The gradients in the parameters' dtypes, zeros where nothing came, None where not
        needed."""
        for index in list(self._held):
            self._reduce(index)
        return [
            self.buffer(i).to(parameter.dtype) if self.needs(i) else None
            for i, parameter in enumerate(self._parameters)
        ]

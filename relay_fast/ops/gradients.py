"""Accumulates the gradients of shared weights over iterations, in one fp32 buffer each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import upcast

GATHER_ROWS = 256  # with fewer rows a GEMM is mostly overhead
PROGRAM_ROWS = 16  # at least so many rows share a program


class GradientBuffers:
    """Accumulates the gradients of parameters in fp32 (fp64 for fp64 parameters).

    Weight gradients of iterations with few rows are deferred: their operands are collected until
    they have `gather_rows` rows, and then reduced by one GEMM. The workspace is at most the
    operands of 2 · `gather_rows` rows. The grouping depends on the batch only, not on the recompute
    policy.

    Args:
        parameters: the parameters, or None.
        needed: whether each parameter needs a gradient.
        weight_grad: the op that computes acc += dyᵀ · x.
        gather_rows: rows from which a weight gradient is reduced.
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
        self._partials: dict[int, Tensor] = {}

    def needs(self, index: int | None) -> bool:
        return index is not None and self._needed[index]

    def buffer(self, index: int | None) -> Tensor | None:
        """Returns the accumulator of a parameter, or None if it needs no gradient."""
        if not self.needs(index):
            return None
        if index not in self._buffers:
            self._buffers[index] = torch.zeros_like(upcast(self._parameters[index]))
        return self._buffers[index]

    def weight(
        self, index: int | None, dy: Tensor, x: Tensor, row_count: Tensor | None = None
    ) -> None:
        """Adds dyᵀ · x to a weight's gradient.

        Args:
            index: index of the parameter; None: nothing is added.
            dy: (rows, columns).
            x: (rows, d).
            row_count: (1,) int32 on the device, the number of leading rows that count; None: all.
        """
        if not self.needs(index):
            return
        if row_count is not None:
            self._add(index, dy, x, row_count=row_count)
            return
        held = self._held.get(index, [])
        if len(dy) + sum(len(part) for part, _ in held) < self._gather_rows:
            self._held[index] = [*held, (dy.clone(), x)]  # the caller may change dy later
            return
        self._held[index] = [*held, (dy, x)]
        self._reduce(index)

    def vector(self, index: int | None, value: Tensor) -> None:
        """Adds a gradient that is already summed over rows."""
        buffer = self.buffer(index)
        if buffer is not None:
            buffer.add_(value)

    def partials(
        self, weight: int | None, bias: int | None, rows: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Returns buffers in which kernels add up the gradients of a norm's weight and bias, a row
        for each of their programs; they are summed once, in `results`.

        Args:
            weight: index of the weight.
            bias: index of the bias, or None.
            rows: the largest number of rows of a launch.

        Returns:
            The buffers, that of the bias None without one; None if no gradient is needed.
        """
        if not (self.needs(weight) or self.needs(bias)):
            return None
        for index in (weight, bias):
            if index is not None and index not in self._partials:
                d = len(self._parameters[weight])
                self._partials[index] = torch.zeros(
                    -(-rows // PROGRAM_ROWS), d, device=self._parameters[weight].device
                )
        return self._partials[weight], None if bias is None else self._partials[bias]

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
        fresh = index not in self._buffers  # written instead of added to: saves zeroing
        if fresh:
            self._buffers[index] = torch.empty_like(upcast(self._parameters[index]))
        self._weight_grad(self._buffers[index], dy, x, fresh=fresh, **count)

    def results(self) -> list[Tensor | None]:
        """Returns the gradients in the parameters' dtypes: zeros if nothing was added, None if not
        needed."""
        for index in list(self._held):
            self._reduce(index)
        for index, partial in self._partials.items():
            self.vector(index, partial.sum(0))
        return [
            self.buffer(i).to(parameter.dtype) if self.needs(i) else None
            for i, parameter in enumerate(self._parameters)
        ]

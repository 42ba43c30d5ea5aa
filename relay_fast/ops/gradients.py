"""Accumulates the gradients of shared weights over iterations, in one fp32 buffer each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_fast.kernels.norm_ref import upcast

GATHER_ROWS = 256  # with fewer rows a GEMM is mostly overhead
GROUP_ROWS = 8192  # with fewer rows the kernel leaves processors idle
SUMS_BYTES = 256 << 20  # of partial sums that stay over the launches, of all weights
GROUP = 8  # iterations whose operands are kept, as many as one launch takes
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
        group_rows: operands of up to `GROUP` iterations with at most so many rows are kept as they
            are, and reduced by one call; whoever adds them tells of each iteration by `make_room`,
            and does not change them. 0: none are kept.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | None],
        needed: Sequence[bool],
        weight_grad: Callable[..., None],
        gather_rows: int = GATHER_ROWS,
        group_rows: int = 0,
    ):
        self._parameters = parameters
        self._needed = needed
        self._weight_grad = weight_grad
        self._gather_rows, self._group_rows = gather_rows, group_rows
        self._buffers: dict[int, Tensor] = {}
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._biases: dict[int, int] = {}  # of weights whose gradients are taken together
        self._group: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        self._group_sizes: list[int] = []  # rows of the iterations in the group
        self._sums: dict[int, dict[str, Tensor]] = {}  # of the weights, kept over the launches
        self._unwritten: set[int] = set()  # buffers that hold nothing yet
        self._partials: dict[int, Tensor] = {}

    @property
    def groups(self) -> bool:
        """Whether operands of several iterations are reduced together."""
        return self._group_rows > 0

    def needs(self, index: int | None) -> bool:
        return index is not None and self._needed[index]

    def buffer(self, index: int | None) -> Tensor | None:
        """Returns the accumulator of a parameter, or None if it needs no gradient."""
        if not self.needs(index):
            return None
        if index not in self._buffers:
            self._buffers[index] = torch.zeros_like(upcast(self._parameters[index]))
        elif index in self._unwritten:
            self._buffers[index].zero_()
            self._unwritten.remove(index)
        return self._buffers[index]

    def make_room(self, rows: int) -> None:
        """Says that an iteration with so many rows follows; reduces the group if it is full."""
        if not self._group_rows:
            return
        full = len(self._group_sizes) == GROUP
        if self._group_sizes and (full or sum(self._group_sizes) + rows > self._group_rows):
            self._reduce_group()
        self._group_sizes.append(rows)

    def weight(
        self,
        index: int | None,
        dy: Tensor,
        x: Tensor,
        row_count: Tensor | None = None,
        bias: int | None = None,
    ) -> None:
        """Adds dyᵀ · x to a weight's gradient.

        Args:
            index: index of the parameter; None: nothing is added.
            dy: (rows, columns).
            x: (rows, d).
            row_count: (1,) int32 on the device, the number of leading rows that count; None: all.
            bias: index of the bias, to whose gradient the sum of dy over its rows is added by the
                same call; None: there is none.
        """
        if not (self.needs(index) or self.needs(bias)):
            return
        if self.needs(bias):
            self._biases[index] = bias
        if self._group_rows:
            self._group.setdefault(index, []).append((dy, x, row_count))
            return
        if row_count is not None:
            self._add(index, [(dy, x, row_count)])
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
        self._add(index, [(dy, x, None)])

    def _reduce_group(self) -> None:
        for index, operands in self._group.items():
            self._add(index, operands)
        self._group.clear()
        self._group_sizes.clear()

    def _add(self, index: int, operands: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        (dy, x, row_count), *more = operands
        given = {"row_count": row_count, "bias": self.buffer(self._biases.get(index))}
        given = {name: value for name, value in given.items() if value is not None}
        if more:
            given["more"] = more
        if self._group_rows and (index in self._sums or self._room_for_sums()):
            given["sums"] = self._sums.setdefault(index, {})
        fresh = index not in self._buffers  # written instead of added to: saves zeroing
        if fresh:
            self._buffers[index] = torch.empty_like(upcast(self._parameters[index]))
        self._weight_grad(self._buffers[index], dy, x, fresh=fresh, **given)
        if fresh and given.get("sums"):
            self._unwritten.add(index)

    def _room_for_sums(self) -> bool:
        held = sum(t.nbytes for kept in self._sums.values() for t in kept.values())
        return held < SUMS_BYTES

    def results(self, zeros: bool = True) -> list[Tensor | None]:
        """Returns the gradients in the parameters' dtypes, None if not needed.

        Args:
            zeros: whether the gradient is zeros if nothing was added, instead of None.
        """
        for index in list(self._held):
            self._reduce(index)
        self._reduce_group()
        for index, kept in self._sums.items():
            for name, owner in (("acc", index), ("bias", self._biases.get(index))):
                if name in kept and owner in self._unwritten:
                    torch.sum(kept[name], 0, out=self._buffers[owner])
                    self._unwritten.remove(owner)
                elif name in kept:
                    self._buffers[owner].add_(kept[name].sum(0))
        for index, partial in self._partials.items():
            self.vector(index, partial.sum(0))
        return [
            self.buffer(i).to(parameter.dtype)
            if self.needs(i) and (zeros or i in self._buffers)
            else None
            for i, parameter in enumerate(self._parameters)
        ]

"""The readout of the states of a pass: row losses in forward, gradients of the states in backward.

The rows of neighbouring iterations are read out in one call (`Readout.chunk_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relay_fast.engine.spec import LoopSpec
from relay_fast.kernels.norm_ref import upcast
from relay_fast.ops.cross_entropy import SMALL_VOCABULARY
from relay_fast.ops.gradients import GradientBuffers


class RowLosses:
    """Computes the readout of each iteration from its state; keeps only the log-sum-exp.

    Args:
        spec: The pass.
        x: Its input.
        parameters: Its parameters, those of the readout last.
    """

    def __init__(self, spec: LoopSpec, x: Tensor, parameters: Sequence[Tensor | None]):
        self._spec, self._readout = spec, spec.readout
        self._parameters = _readout_parameters(spec, parameters)
        # Loss, log-sum-exp and whether the argmax is right, of each chunk.
        loss = torch.empty(0, dtype=upcast(x[:0]).dtype, device=x.device)
        self._parts = [(loss, loss, loss.new_empty(0, dtype=torch.bool))]
        self._held: list[Tensor] = []

    def forward(self, t: int, state: Tensor) -> None:
        """Collects the rows of state t, and computes their losses once their chunk is complete."""
        readout = self._readout
        chunk = readout.chunk_of(t)
        if len(chunk) > 1:
            self._held.append(state.index_select(0, readout.rows[readout.rows_of(t)]))
            if t != chunk[-1]:
                return
            h, index, self._held = torch.cat(self._held), None, []
        else:
            h, index = state, readout.rows[readout.rows_of(t)]
        part = readout.chunk_rows(chunk)
        if part.stop > part.start:
            self._parts.append(
                self._spec.ops.cross_entropy_fwd(
                    h, readout.targets[part], *self._parameters, index, **readout.options
                )
            )

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, log-sum-exp and correct of all rows, (R,) each."""
        loss, lse, correct = map(torch.cat, zip(*self._parts, strict=True))
        return loss, lse, correct


class StateGradients:
    """Adds the gradient of the row losses to those of the states, from the last iteration on.

    Args:
        spec: the pass.
        parameters: the loop body's parameters, then the readout's.
        grads: accumulators of the parameters' gradients.
        state: t → state t.
        lse: (R,), from the forward.
        g_loss: (R,), the gradient of the row losses.
    """

    def __init__(
        self,
        spec: LoopSpec,
        parameters: Sequence[Tensor | None],
        grads: GradientBuffers,
        state: Callable[[int], Tensor],
        lse: Tensor,
        g_loss: Tensor,
    ):
        self._readout, self._cross_entropy_bwd = spec.readout, spec.ops.cross_entropy_bwd
        self._state, self._lse, self._g_loss = state, lse, g_loss
        self._parameters = _readout_parameters(spec, parameters)
        norm, bias, head = (len(parameters) - i for i in (3, 2, 1))
        self._grads, self._head = grads, head
        self._sums = [grads.buffer(i) for i in (head, norm, bias)]
        self._options = dict(self._readout.options)
        self._keeps = False
        if spec.ops.loop_fwd is not None:  # kernels
            has_bias = bias if parameters[bias] is not None else None
            self._options["partials"] = grads.partials(norm, has_bias, self._readout.most_rows)
            # The logits' gradients are kept where they are narrow.
            self._keeps = grads.groups and len(parameters[head]) <= SMALL_VOCABULARY
        self._dh: Tensor | None = None

    def add(self, t: int, g_t: Tensor) -> None:
        """Adds the loss gradient of iteration t's rows to g_t (N_t, d)."""
        readout = self._readout
        chunk = readout.chunk_of(t)
        if t == chunk[-1]:
            self._dh = self._chunk_gradient(chunk)
        part, start = readout.rows_of(t), readout.chunk_rows(chunk).start
        if part.stop > part.start:
            dh = self._dh[part.start - start : part.stop - start]
            g_t.index_add_(0, readout.rows[part], dh.to(g_t.dtype))

    def _chunk_gradient(self, chunk: range) -> Tensor | None:
        """Returns the gradient of the chunk's state rows, end to end."""
        readout, part = self._readout, self._readout.chunk_rows(chunk)
        if part.stop == part.start:
            return None
        if len(chunk) > 1:
            rows = [self._state(u).index_select(0, readout.rows[readout.rows_of(u)]) for u in chunk]
            h, index = torch.cat(rows), None
        else:
            h, index = self._state(chunk[0]), readout.rows[part]
        operands: list[tuple[Tensor, Tensor]] = []
        dh = self._cross_entropy_bwd(
            self._g_loss[part], h, readout.targets[part], self._lse[part], *self._parameters,
            *self._sums, index, **self._options, **({"operands": operands} if self._keeps else {}),
        )  # fmt: skip
        for dlogits, y in operands:
            self._grads.weight(self._head, dlogits, y)
        return dh


def _readout_parameters(spec: LoopSpec, parameters: Sequence[Tensor | None]):
    """Returns the final norm's weight and bias, and the head in the compute dtype."""
    norm_weight, norm_bias, head = parameters[-3:]
    return norm_weight, norm_bias, head.to(spec.compute_dtype or head.dtype)

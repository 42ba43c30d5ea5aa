"""FLOPs of the loop ops, for `torch.utils.flop_counter`: those of the GEMMs that a pass runs, each
sequence counted at its own length and as often as it loops, recomputation included."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from relay_fast.config import BlockConfig
from relay_fast.engine.loop import kept_states
from relay_fast.engine.parameter_names import is_linear
from relay_fast.engine.spec import LoopSpec
from relay_fast.ops.flops import attention_flops, linear_flops


class LoopFlops:
    """Counts one pass.

    Args:
        config: the block.
        spec: the pass.
        parameters: the block's by name.
    """

    def __init__(self, config: BlockConfig, spec: LoopSpec, parameters: Mapping[str, Tensor]):
        self._config, self._spec, self._plan = config, spec, spec.plan
        self._matrices = [p for n, p in parameters.items() if p.ndim == 2 and is_linear(n)]

    def forward(self) -> int:
        return sum(self._iteration(t) for t in range(1, self._plan.max_loops + 1))

    def backward(self, row_bytes: int, weights: bool) -> int:
        """Counts the backward, with what it recomputes.

        Args:
            row_bytes: size of one row of the state.
            weights: whether any weight needs a gradient.
        """
        total, states = 0, {0, *self._spec.states, *kept_states(self._spec, row_bytes)}
        for t in range(self._plan.max_loops, 0, -1):
            ranges = [r for r in self._plan.row_ranges(t, self._spec.truncate) if r.grad]
            if not ranges:
                continue
            start = max(s for s in states if s < t)
            for s in range(start + 1, t):  # recomputed up to state t − 1
                total += self._iteration(s)
                states.add(s)
            for r in ranges:
                total += self._range(r) + self._range(r, backward=1 + weights)
        return total

    def _iteration(self, t: int) -> int:
        return sum(self._range(r) for r in self._plan.row_ranges(t, self._spec.truncate))

    def _range(self, row_range, backward: int = 0) -> int:
        """Counts one range of rows: the forward, or a backward with so many products a matrix."""
        rows = row_range.last_row - row_range.first_row
        lengths = self._plan.lengths[row_range.first_sequence : row_range.last_sequence]
        c = self._config
        attention = attention_flops(lengths, c.n_heads * c.head_dim, bool(backward))
        return (backward or 1) * linear_flops(rows, self._matrices) + c.n_layers * attention

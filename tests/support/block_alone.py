"""Each sequence alone in the eager block: the truth of packed, padded and stopped calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import EagerBlock
from relay_fast.models.looped_block import LoopedBlock


def twins(**options) -> tuple[LoopedBlock, EagerBlock]:
    """The same random weights in both blocks, in fp64."""
    torch.manual_seed(0)
    block = LoopedBlock(16, 2, 2, **options).double()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    eager = EagerBlock(block.config).double()
    eager.load_state_dict(block.state_dict())
    return block, eager


def alone(
    eager: EagerBlock,
    x: Tensor,
    loops: int,
    inject: Tensor | None = None,
    start: int = 0,
    truncate: int | None = None,
    until: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """States 0..T of one sequence.

    Args:
        eager: the block.
        x: (n, d), its first state.
        loops: iterations, at most.
        inject: (n, d); None: x.
        start: iterations before.
        truncate: last iterations with a gradient.
        until: as the block's, for this sequence.
    """
    h = x[None]
    entering = h if inject is None else inject[None]
    rope = eager.rope(len(x), x.device, x.dtype)
    states = [x]
    for t in range(1, loops + 1):
        with torch.set_grad_enabled(truncate is None or t > loops - truncate):
            new = eager.iteration(h, entering, start + t, rope, None)
        with torch.no_grad():
            stop = until is not None and bool(until(start + t, new, h))
        h = new
        states.append(h[0])
        if stop:
            break
    return states

"""Arguments of a block's call, checked and brought into one form."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.engine.compile_op import skip_frame


@skip_frame
def listed(values):
    """Returns a list of ints as a tensor on the CPU; anything else as it is."""
    if isinstance(values, list | tuple) and set(map(type, values)) == {int}:
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return values


def flat_positions(positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Returns the positions (N,) of all rows of an x of `shape`."""
    if positions is None:
        return None
    positions = torch.as_tensor(positions)
    if positions.is_floating_point():
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if positions.shape not in (shape[:-1], shape[-2:-1]):
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} but x has {tuple(shape)}: pass "
            f"{tuple(shape[:-1])} or {tuple(shape[-2:-1])}"
        )
    return positions.expand(shape[:-1]).reshape(-1)


def refuse_compiled(**options: object) -> None:
    """Raises RuntimeError if an option is given that the op of torch.compile does not have."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    given = [name for name in given if name != "start" or options[name] != 0]
    if given:
        raise RuntimeError(
            f"under torch.compile a LoopedBlock does not take {', '.join(given)}: call it outside "
            "of the compiled function"
        )

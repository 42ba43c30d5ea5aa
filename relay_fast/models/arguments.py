"""Arguments of a block's call, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from relay_fast.batch.plan import Plan, check_cu_seqlens, check_floating, check_loops
from relay_fast.batch.plan_cache import cached_plan
from relay_fast.batch.stopping import StoppingPlan
from relay_fast.engine.block_weights import BlockWeights
from relay_fast.engine.compile_op import skip_frame
from relay_fast.utils.arguments import as_tensor, check_tensors, on_host


def packed_rows(x: Tensor, cu_seqlens: object, d: int) -> tuple[Tensor, torch.Size]:
    """Returns x as rows (N, d), and its own shape.

    Args:
        x: (B, n, d), or (N, d) with row offsets.
        cu_seqlens: row offsets, or None.
        d: width of the block.

    Raises:
        ValueError, TypeError: for another shape or dtype.
    """
    check_tensors(x=x)
    if x.ndim < 2 or x.shape[-1] != d or x.ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(
            f"x has shape {tuple(x.shape)}: pass (B, n, {d}), or (tokens, {d}) together with "
            f"cu_seqlens"
        )
    check_floating(x)
    return x.reshape(-1, d), x.shape


def make_plan(
    x: Tensor,
    loops: int | Sequence[int] | Tensor,
    cu_seqlens: Tensor | Sequence[int] | None,
    positions: Tensor | None,
    stops: bool,
) -> Plan:
    """Makes the plan of a call.

    Args:
        x, loops, cu_seqlens, positions: as in `LoopedBlock.forward`.
        stops: whether sequences stop on the way.
    """
    if cu_seqlens is None:
        lengths = np.full(x.shape[0], x.shape[1])
    else:
        lengths = np.diff(check_cu_seqlens(cu_seqlens, x.shape[0]))
    flat = flat_positions(positions, x.shape)
    if flat is not None:
        flat = on_host("positions", flat)
    kind = StoppingPlan if stops else cached_plan
    return kind(lengths, check_loops(loops, len(lengths)), x.device, flat)


def check_devices(device: torch.device, weights: BlockWeights) -> None:
    """Raises ValueError if a parameter is on another device than the rows."""
    for name, p in zip(weights.names, weights.tensors, strict=True):
        if p.device.type != device.type or device.index not in (None, p.device.index):
            raise ValueError(
                f"x is on {device} and the parameter {name} on {p.device}: move them to one device"
            )


@skip_frame
def listed(values):
    """Returns a list of ints as a tensor on the CPU; anything else as it is."""
    if isinstance(values, list | tuple) and set(map(type, values)) == {int}:
        if max(map(abs, values)) >= 2**63:
            return values  # said by the checks of the call
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    return values


def flat_positions(positions: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Returns the positions (N,) of all rows of an x of `shape`."""
    if positions is None:
        return None
    positions = as_tensor("positions", positions)
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
    if given:
        raise RuntimeError(
            f"under torch.compile a LoopedBlock does not take {', '.join(given)}: call it outside "
            "of the compiled function"
        )

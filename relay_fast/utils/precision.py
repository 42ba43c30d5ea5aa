"""Precisions of the GEMMs, by the names that configs and commands give them."""

from __future__ import annotations

import torch

from relay_fast.utils.arguments import check_choice

# What torch.autocast gets; None for the parameters' own dtype, without autocast.
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def autocast_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of a name in DTYPES. Raises ValueError for another."""
    check_choice("autocast", name, tuple(DTYPES))
    return DTYPES[name]


def autocasting(device: torch.device, name: str) -> torch.autocast:
    """Returns the context in which GEMMs on a device have the precision of this name, whatever
    autocast is around it."""
    dtype = autocast_dtype(name)
    # Without its cache, whose casts a CUDA graph could not keep: the engine casts once a pass.
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)

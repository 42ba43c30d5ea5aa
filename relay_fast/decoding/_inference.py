"""What every use of a model outside training begins with, and how much it may take at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from relay_fast.config import BlockConfig
from relay_fast.ops.dispatch import on_device

MEMINFO = Path("/proc/meminfo")
UNKNOWN_BYTES = 4 << 30  # taken as free where the system does not say


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, the model's device as the current one; modules that were in training
    mode are so again at the end."""
    parameter = next(model.parameters(), None)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with (
            torch.inference_mode(),
            nullcontext() if parameter is None else on_device(parameter.device),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on `device` now."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if not MEMINFO.exists():
        return UNKNOWN_BYTES
    lines = MEMINFO.read_text().splitlines()
    return next(1024 * int(s.split()[1]) for s in lines if s.startswith("MemAvailable"))


def bytes_a_token(c: BlockConfig, longest: int, element: int) -> int:
    """Memory of one token in a pass without gradients: states, one layer's inside, scores.

    longest: tokens of the longest sequence in the batch; element: bytes of a number.
    """
    qkv = (c.n_heads + 2 * c.kv_heads) * c.head_dim
    wide = 2 if c.activation == "swiglu" else 1
    numbers = 8 * c.d_model + 3 * qkv + 2 * wide * c.hidden + 3 * c.n_heads * longest
    return numbers * element

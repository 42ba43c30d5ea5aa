"""Inference mode for a model, and batch sizes that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from relay_fast.config import BlockConfig
from relay_fast.ops.dispatch import on_device
from relay_fast.utils import memory
from relay_fast.utils.precision import autocasting

T = TypeVar("T")

UNKNOWN_BYTES = 4 << 30  # assumed free where the system does not report it


@contextmanager
def inference(model: nn.Module, autocast: str | None = None) -> Iterator[None]:
    """Puts the model into eval mode, without gradients and with its device as the current one.

    On exit, the modules that were in training mode return to it.

    Args:
        model: the model.
        autocast: precision of the GEMMs (`relay_fast.utils.precision`), by default that around.
    """
    parameter = next(model.parameters(), None)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with (
            torch.inference_mode(),
            nullcontext() if parameter is None else on_device(parameter.device),
            nullcontext() if autocast is None else autocasting(parameter.device, autocast),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that can be allocated on `device` now, UNKNOWN_BYTES if it does not say."""
    free = memory.free_bytes(device)
    return UNKNOWN_BYTES if free is None else free


def bytes_a_token(c: BlockConfig, longest: int, element: int) -> int:
    """Estimates the bytes per token of a forward pass without gradients.

    Counts the states, the activations of one layer and the attention scores.

    Args:
        c: the block's configuration.
        longest: tokens in the longest sequence of the batch.
        element: bytes of one number.
    """
    qkv = (c.n_heads + 2 * c.kv_heads) * c.head_dim
    wide = 2 if c.activation == "swiglu" else 1
    numbers = (
        (8 + 2 * c.sandwich_norm) * c.d_model
        + (3 + c.qk_norm) * qkv
        + 2 * wide * c.hidden
        + 3 * c.n_heads * longest
    )
    return numbers * element


def halve_on_oom(attempt: Callable[[int], T], size: int, device: torch.device) -> tuple[T, int]:
    """Calls attempt(size), halving `size` each time that memory runs out.

    Args:
        attempt: takes a batch size; it must be safe to call again after an OutOfMemoryError.
        size: the first batch size to try.
        device: the device whose cached memory is released before the next attempt.

    Returns:
        The result, and the size that fitted.

    Raises:
        torch.OutOfMemoryError: if size 1 does not fit.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # After the except clause: its traceback holds the tensors of the failed attempt.
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()

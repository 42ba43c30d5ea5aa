"""First states that do not come from the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from relay_fast.batch.arguments import check_floating
from relay_fast.utils.arguments import check_kind, check_tensors
from relay_fast.utils.numbers import as_float


def noise_state(
    like: Tensor, std: float = math.sqrt(2 / 5), generator: torch.Generator | None = None
) -> Tensor:
    """Draws a first state from a normal distribution, cut at three standard deviations, as Huginn
    does (Geiping et al. 2025, arXiv 2502.05171, with σ² = 2/5).

    The block then gets the embedded input through injection in every iteration:
    `block(noise_state(e), loops, inject=e)`.

    Args:
        like: gives shape, dtype and device.
        std: standard deviation before the cut.
        generator: default: torch's own.

    Raises:
        TypeError: for a `like` that is no floating-point tensor.
        ValueError: for a std that is negative or not finite.
    """
    check_tensors(like=like)
    check_floating(like, "like")
    if generator is not None:
        check_kind("generator", generator, torch.Generator, "give a torch.Generator, or None")
    std = as_float("std", std, least=0)
    state = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if not std:
        return state
    return nn.init.trunc_normal_(state, 0.0, std, -3 * std, 3 * std, generator=generator)

"""The next tokens of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draws one token per row from softmax(logits / temperature); temperature 0 is the argmax.

    Args:
        logits: (rows, vocabulary).
        temperature: 0 or more.
        generator: on the device of `logits`; None will do at temperature 0.

    Returns:
        (rows,) int64 token ids.
    """
    if not temperature:
        return logits.argmax(-1)
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits / temperature).sub_(noise.log_()).argmax(-1)

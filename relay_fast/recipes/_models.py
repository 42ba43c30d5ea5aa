"""Builds models by shape, (k⊗L) with or without independent ends."""

from __future__ import annotations

import torch
from torch import Tensor

from relay_fast.config import BlockConfig
from relay_fast.models.classifier import LoopedClassifier


def parse_shape(name: str) -> tuple[int, int, int, int]:
    """Parses "kxL" or "prelude+kxL+coda" to (prelude, layers, loops, coda); else ValueError."""
    parts = name.split("+")
    prelude, middle, coda = parts if len(parts) == 3 else ("0", name, "0")
    numbers = [prelude, *middle.split("x"), coda]
    if len(numbers) != 4 or not all(x.isdecimal() for x in numbers) or "0" in numbers[1:3]:
        raise ValueError(f"model {name!r} is unknown: write layers x loops like 1x4, or 1+1x2+1")
    prelude, layers, loops, coda = map(int, numbers)
    return prelude, layers, loops, coda


def make_classifier(
    shape: str, vocabulary_size: int, *, d_model: int, n_heads: int, seed: int, **options
) -> LoopedClassifier:
    """Builds a causal model.

    Args:
        shape: See `parse_shape`.
        vocabulary_size: Number of tokens.
        d_model: Width of the states.
        n_heads: Heads of the attention.
        seed: Seed of the weights.
        options: Further fields of `BlockConfig`.
    """
    prelude, layers, loops, coda = parse_shape(shape)
    torch.manual_seed(seed)
    config = BlockConfig(d_model, n_heads, layers, causal=True, **options)
    return LoopedClassifier(config, vocabulary_size, loops=loops, prelude=prelude, coda=coda)


def classifier_loss(
    model: LoopedClassifier,
    tokens: Tensor,
    rows: Tensor,
    targets: Tensor,
    cu_seqlens: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns loss and share correct, for `relay_fast.recipes._common.train`.

    Args:
        model: The model.
        tokens: (N,) packed, or (B, n).
        rows: (R,) flat indices of the tokens with a target.
        targets: (R,).
        cu_seqlens: Offsets of packed sequences.
    """
    return model.loss(tokens, rows, targets, cu_seqlens=cu_seqlens)

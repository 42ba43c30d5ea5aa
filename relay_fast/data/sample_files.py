"""Files of samples: one safetensors file, written atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from relay_fast.tasks import Samples
from relay_fast.utils.tensor_files import CheckpointError, load_checkpoint, save_checkpoint

CONFIDENCE = "confidence"  # a column that files of samples may have


def save_samples(
    path: str | os.PathLike,
    samples: Samples,
    info: Mapping[str, Any],
    confidence: np.ndarray | None = None,
) -> None:
    """Writes samples.

    Args:
        path: the safetensors file.
        samples: the S samples to save.
        info: JSON-able facts about their origin.
        confidence: (S,) how sure the model is of each, if that is known.
    """
    tensors = {f.name: torch.from_numpy(getattr(samples, f.name)) for f in fields(samples)}
    if confidence is not None:
        tensors[CONFIDENCE] = torch.from_numpy(confidence)
    save_checkpoint(path, tensors, {"kind": "samples", "info": dict(info)})


def load_samples(path: str | os.PathLike) -> Samples:
    """Loads samples that `save_samples` wrote; raises CheckpointError for any other file."""
    return load_confident(path)[0]


def load_confident(path: str | os.PathLike) -> tuple[Samples, np.ndarray | None]:
    """Does what `load_samples` does; returns their confidence too, None if the file has none."""
    tensors, metadata = load_checkpoint(path)
    if metadata.get("kind") != "samples":
        raise CheckpointError(
            f"{path} holds no samples: give a file of relay_fast.data.sample_files"
        )
    confidence = tensors.pop(CONFIDENCE, None)
    names = {f.name for f in fields(Samples)}
    if differing := names ^ set(tensors):
        raise CheckpointError(
            f"{path} was written by another version of relay_fast, with other columns "
            f"({min(differing)!r}); use that version, or delete the file to generate it again."
        )
    samples = Samples(**{name: value.numpy() for name, value in tensors.items()})
    return samples, None if confidence is None else confidence.numpy()

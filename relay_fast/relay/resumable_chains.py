"""Generates looped chains and saves them every few seconds, so that a run can continue."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from relay_fast.data.sample_files import load_samples, save_samples
from relay_fast.decoding.chains import Progress, in_callers_order, stream_chains, stream_order
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples, Task
from relay_fast.training.model_files import model_hash

SAVE_EVERY = 20.0  # seconds of generation that an interruption may lose
PART_TOKENS = 2 << 20  # split files at this size


def generate_in_parts(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    stem: Path,
    progress: Progress | None = None,
) -> Samples:
    """Does what `generate_looped_chains` does, and continues an interrupted call.

    Chains are saved in files `stem`.DIGEST-FIRST.safetensors, which the same call reads later.
    DIGEST stands for the model and the problems; files with another one are ignored.

    Args:
        model: Writes the chains.
        problems: The problems.
        tasks: The tasks by name.
        stem: Path of the files without their endings.
        progress: Called with (problems done, problems in all).

    Returns:
        The chains in the order of `problems`, as `generate_looped_chains` gives them.

    Raises:
        CheckpointError: A file cannot be read or written.
        ValueError: As `generate_looped_chains`.
    """
    name = f"{stem.name}.{_digest(model, problems)}"
    path = lambda first: stem.with_name(f"{name}-{first:08d}.safetensors")
    parts: list[Samples] = []
    done = 0
    while path(done).exists():
        parts.append(load_samples(path(done)))
        done += len(parts[-1])
    fresh: list[Samples] = []
    saved = time.monotonic()
    for _, written in stream_chains(model, problems, tasks, first=done, progress=progress):
        fresh.append(written)
        tokens = sum(len(samples.rounds) for samples in fresh)
        if time.monotonic() - saved >= SAVE_EVERY or tokens >= PART_TOKENS:
            parts.append(Samples.concat(fresh))
            save_samples(path(done), parts[-1], {})  # the name identifies it
            done += len(parts[-1])
            fresh, saved = [], time.monotonic()
    return in_callers_order([(stream_order(problems), Samples.concat(parts + fresh))], problems)


def _digest(model: LoopedTransformer, problems: Samples) -> str:
    """Returns 16 hexadecimal digits that identify the model and the problems."""
    digest = hashlib.sha256(model_hash(model).encode())
    for field in fields(problems):
        digest.update(np.ascontiguousarray(getattr(problems, field.name)).tobytes())
    return digest.hexdigest()[:16]

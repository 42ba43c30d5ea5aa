"""Looped chains written into files as they come, so that an interruption loses next to nothing."""

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

SAVE_EVERY = 20.0  # seconds of writing that an interruption may lose
PART_TOKENS = 2 << 20  # of a file: machines that are lent return small ones


def generate_in_parts(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    stem: Path,
    progress: Progress | None = None,
) -> Samples:
    """What `generate_looped_chains` gives, as far as the files `stem`.WHAT-FIRST.safetensors of
    earlier calls go from them, the rest written into further ones.

    An interrupted call is thus continued by the same call, to the same chains. WHAT stands for the
    model and the problems: files of others are not read. Raises CheckpointError for a file that
    cannot be read or written, and what `generate_looped_chains` raises.
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
            save_samples(path(done), parts[-1], {})  # its name says what it is of
            done += len(parts[-1])
            fresh, saved = [], time.monotonic()
    return in_callers_order([(stream_order(problems), Samples.concat(parts + fresh))], problems)


def _digest(model: LoopedTransformer, problems: Samples) -> str:
    """16 hexadecimal digits that stand for the model and the problems."""
    digest = hashlib.sha256(model_hash(model).encode())
    for field in fields(problems):
        digest.update(np.ascontiguousarray(getattr(problems, field.name)).tobytes())
    return digest.hexdigest()[:16]

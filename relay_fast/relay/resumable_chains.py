"""Generates looped chains and saves them every few seconds, so that a run can continue."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from relay_fast.data.sample_files import load_confident, save_samples
from relay_fast.decoding.chains import Progress, stream_order
from relay_fast.decoding.confidence import confident_in_order, stream_confident, tells_confidence
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
    autocast: str = "fp32",
) -> Samples:
    """Does what `generate_looped_chains` does, and continues an interrupted call.

    Chains are saved in files `stem`.DIGEST-FIRST.safetensors, which the same call reads later.
    DIGEST stands for model, precision and problems; files with another one are ignored.

    Args:
        model: Writes the chains.
        problems: The problems.
        tasks: The tasks by name.
        stem: Path of the files without their endings.
        progress: Called with (problems done, problems in all).
        autocast: Precision of the GEMMs.

    Returns:
        The chains in the order of `problems`, as `generate_looped_chains` gives them.

    Raises:
        CheckpointError: A file cannot be read or written.
        ValueError: As `generate_looped_chains`.
    """
    return generate_confident_in_parts(model, problems, tasks, stem, progress, autocast)[0]


def generate_confident_in_parts(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    stem: Path,
    progress: Progress | None = None,
    autocast: str = "fp32",
) -> tuple[Samples, np.ndarray | None]:
    """Does what `generate_in_parts` does, and returns confidences too.

    Args:
        model: The looped model.
        problems: The problems to solve.
        tasks: The tasks by name.
        stem: Path of the files without their endings.
        progress: Called after each batch.
        autocast: Precision of the GEMMs.

    Returns:
        The chains, and the confidence of each, None for a model that does not tell it.
    """
    name = f"{stem.name}.{_digest(model, problems, autocast)}"
    path = lambda first: stem.with_name(f"{name}-{first:08d}.safetensors")
    parts, done = _saved(path, tells_confidence(model))
    fresh: list[tuple[Samples, np.ndarray | None]] = []
    saved = time.monotonic()
    options = {"first": done, "progress": progress, "autocast": autocast}
    for _, *part in stream_confident(model, problems, tasks, **options):
        fresh.append(tuple(part))
        tokens = sum(len(samples.rounds) for samples, _ in fresh)
        if time.monotonic() - saved >= SAVE_EVERY or tokens >= PART_TOKENS:
            parts.append(_joined(fresh))
            samples, confidence = parts[-1]
            save_samples(path(done), samples, {}, confidence)  # the name identifies it
            done += len(samples)
            fresh, saved = [], time.monotonic()
    if not parts + fresh:
        return confident_in_order([], problems)
    whole = (stream_order(problems), *_joined(parts + fresh))
    return confident_in_order([whole], problems)


def _saved(
    path: Callable[[int], Path], confident: bool
) -> tuple[list[tuple[Samples, np.ndarray | None]], int]:
    """Reads the files of an interrupted call up to the first that is missing, or has no confidence
    where it is wanted; returns how many chains they hold too."""
    parts: list[tuple[Samples, np.ndarray | None]] = []
    done = 0
    while path(done).exists():
        part = load_confident(path(done))
        if confident and part[1] is None:
            break
        parts.append(part)
        done += len(part[0])
    return parts, done


def _joined(
    parts: Sequence[tuple[Samples, np.ndarray | None]],
) -> tuple[Samples, np.ndarray | None]:
    confidences = [confidence for _, confidence in parts]
    joined = None if confidences[0] is None else np.concatenate(confidences)
    return Samples.concat([samples for samples, _ in parts]), joined


def _digest(model: LoopedTransformer, problems: Samples, autocast: str) -> str:
    """Returns 16 hexadecimal digits that identify the model, its precision and the problems."""
    digest = hashlib.sha256(model_hash(model).encode())
    if autocast != "fp32":  # what an older version saved is fp32
        digest.update(autocast.encode())
    for field in fields(problems):
        digest.update(np.ascontiguousarray(getattr(problems, field.name)).tobytes())
    return digest.hexdigest()[:16]

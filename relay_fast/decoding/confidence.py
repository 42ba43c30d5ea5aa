"""How sure a looped model that is fed its own rounds is of its chains.

Such a model has no answer head that could agree with the rounds or not. What it does have is the
probability of each token that it writes; the confidence of a chain is the least of them, as a
log-probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from relay_fast.decoding.chains import in_callers_order, stream_scored
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import Samples, Task

# Indices of some problems, their chains and (S,) fp32 confidences, None where there are none.
Confident = tuple[np.ndarray, Samples, np.ndarray | None]


def tells_confidence(model: Any) -> bool:
    """Tells whether chains of this model have a confidence: it has no answer head."""
    return isinstance(model, LoopedTransformer) and not model.has_answer_head


def stream_confident(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Iterator[Confident]:
    """Yields what `relay_fast.decoding.chains.stream_chains` does, with confidences where the model
    tells them.

    Args:
        model: The looped model.
        problems: The problems to solve.
        tasks: The tasks by name.
        options: Further arguments of `stream_chains`.
    """
    scored = tells_confidence(model)
    for chosen, written, scores in stream_scored(model, problems, tasks, scored, **options):
        yield chosen, written, least_log_probs(written, scores.rounds) if scored else None


def generate_confident(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> tuple[Samples, np.ndarray | None]:
    """Generates chains, and the model's confidence in each.

    Args:
        model: The looped model.
        problems: The problems to solve.
        tasks: The tasks by name.
        options: Further arguments of `stream_confident`.

    Returns:
        What `relay_fast.decoding.chains.generate_looped_chains` returns, and the confidences, (S,)
        fp32, or None for a model that does not tell them.
    """
    return confident_in_order(list(stream_confident(model, problems, tasks, **options)), problems)


def confident_in_order(
    parts: Sequence[Confident], problems: Samples
) -> tuple[Samples, np.ndarray | None]:
    """Concatenates parts in the order of `problems`."""
    written = in_callers_order([part[:2] for part in parts], problems)
    if not parts or parts[0][2] is None:
        return written, None
    confidence = np.empty(len(problems), np.float32)
    for chosen, _, own in parts:
        confidence[chosen] = own
    return written, confidence


def least_log_probs(written: Samples, log_probs: np.ndarray) -> np.ndarray:
    """Returns (S,) the least log-probability of each chain's tokens, -inf for a chain without any.

    Args:
        written: S chains.
        log_probs: (tokens,) of the tokens in `written.rounds`.
    """
    starts = written.round_offsets[written.first_round]
    some = np.flatnonzero(np.diff(starts))
    least = np.full(len(written), -np.inf, np.float32)
    if len(some):
        least[some] = np.minimum.reduceat(log_probs, starts[some])
    return least

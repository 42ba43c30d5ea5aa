"""Chains of a looped model that is fed its own rounds, read off iteration by iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from relay_fast.batch.plan import Plan
from relay_fast.data.feedback import collate_next
from relay_fast.decoding.scores import read_scored
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import NO_ANSWER, Samples, Task, Written
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


def read_fed_rounds(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], scored: bool
) -> tuple[Samples, np.ndarray | None]:
    """Solves problems with a model that is fed its own rounds.

    The inputs of an iteration are made on the host, of the tokens that come back from the one
    before: one synchronisation an iteration.

    Args:
        model: A model with feedback.
        problems: The problems.
        tasks: The tasks by name.
        scored: Whether to return log-probabilities.

    Returns:
        The problems with the rounds that the model writes and the answers that these imply
        (NO_ANSWER where they imply none), and the log-probability of each round's token, or None.
    """
    loops, first = problems.loops, problems.first_round
    rounds, total = int(first[-1]), 0
    starts, sizes = np.zeros(rounds, np.int64), np.zeros(rounds, np.int64)
    tokens, scores = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for t in range(int(loops.max(initial=0))):
        owner = np.flatnonzero(loops > t)
        written = Written(problems, np.concatenate(tokens), starts, sizes)
        batch = collate_next(written, tasks, owner, np.full(len(owner), t), model.device)
        if scored:
            (ids,), _, (own,), _ = read_scored(model, batch)
        else:
            (ids,), _ = model.predict_rounds(batch)
        ids = ids.cpu().numpy().astype(np.int32)
        inside, offsets = find_rounds(ids, batch.plan)
        starts[first[owner] + t], sizes[first[owner] + t] = total + offsets[:-1], np.diff(offsets)
        total += len(inside)
        tokens.append(ids[inside])
        if scored:
            scores.append(own.cpu().numpy()[inside])
    at = concat_ranges(starts, sizes)
    result = replace(
        problems, rounds=np.concatenate(tokens)[at], round_offsets=lengths_to_offsets(sizes)
    )
    result = replace(result, answer=_implied_answers(result, tasks))
    return result, np.concatenate(scores)[at] if scored else None


def _implied_answers(chains: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    answers = np.full(len(chains), NO_ANSWER, np.int32)
    for k, task in tasks_present(chains.task, tasks).items():
        own = chains.task == k
        answers[own] = task.answers_of(chains.take(own))
    return answers


def find_rounds(ids: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rounds in the ids of every iteration's active prefix, iteration-major: index
    of each of their tokens, sequence by sequence, and the rounds' offsets."""
    active = np.array(plan.active_sequences, np.int64)
    owner = concat_ranges(np.zeros_like(active), active)
    iteration = np.repeat(np.arange(len(active)), active)
    ends = np.cumsum(plan.lengths[owner])
    starts = ends - plan.lengths[owner]
    pads = np.where(ids == PAD, np.arange(len(ids)), -1)
    last_pad = np.maximum.reduceat(pads, starts) if len(starts) else starts
    begins = np.maximum(last_pad + 1, starts)
    by_sequence = np.lexsort((iteration, owner))
    begins, sizes = begins[by_sequence], (ends - begins)[by_sequence]
    return concat_ranges(begins, sizes), lengths_to_offsets(sizes)

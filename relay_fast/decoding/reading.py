"""Reads the chains of one batch off a looped model, launched op by op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from relay_fast.batch.plan import Plan
from relay_fast.data.collate import collate_looped
from relay_fast.data.feedback import collate_next
from relay_fast.decoding.scores import read_scored
from relay_fast.models.transformers import LoopedTransformer
from relay_fast.tasks import NO_ANSWER, Samples, Task, Written
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class ChainLogProbs(NamedTuple):
    """fp32 log-probabilities of the tokens of samples: rounds (tokens,) and answer (S,).

    The answer's is 0 where the rounds imply the answer.
    """

    rounds: np.ndarray
    answer: np.ndarray


Chains = tuple[Samples, ChainLogProbs | None]


class Prefixes(NamedTuple):
    """The active prefixes of the iterations of a batch.

    active (T,): sequences of each; widths: tokens of their inputs, iteration-major.
    """

    active: np.ndarray
    widths: np.ndarray

    @staticmethod
    def of(plan: Plan) -> Prefixes:
        active = np.array(plan.active_sequences, np.int64)
        return Prefixes(active, plan.lengths[concat_ranges(np.zeros_like(active), active)])


def read_batch(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], scored: bool
) -> Chains:
    """Generates the chains of one batch in one pass.

    Args:
        model: a looped model in inference mode.
        problems: the batch, sorted by most loops first.
        tasks: the problems' tasks by name.
        scored: whether to compute log-probabilities.

    Returns:
        The problems with generated rounds and answers; log-probabilities, None unless `scored`.
    """
    if not model.has_answer_head:
        return _read_fed_rounds(model, problems, tasks, scored)
    carried = model.config.carry_state
    batch = collate_looped(problems, tasks, carry_state=carried, device=model.device)
    scores, prefixes = None, Prefixes.of(batch.plan)
    if scored:
        rounds, answers, scores, answer_scores = read_scored(model, batch)
        scores = torch.cat([*scores, answer_scores]).cpu().numpy()
    else:
        rounds, answers = model.predict_rounds(batch)
    ids = torch.cat([*rounds, answers]).cpu().numpy().astype(np.int32)
    count = len(ids) - len(problems)
    if scored:
        scores = (scores[:count], scores[count:])
    return answered_chains(problems, prefixes, (ids[:count], ids[count:]), scores)


def answered_chains(
    problems: Samples,
    prefixes: Prefixes,
    ids: tuple[np.ndarray, np.ndarray],
    scores: tuple[np.ndarray, np.ndarray] | None,
) -> Chains:
    """Returns the chains of a model with an answer head.

    Args:
        problems: the batch.
        prefixes: of its iterations.
        ids: tokens of the prefixes, end to end, and the answers.
        scores: log-probabilities of both, or None.
    """
    inside, offsets = find_rounds(ids[0], prefixes)
    rounds = ids[0][inside].astype(np.int32)
    written = replace(
        problems, rounds=rounds, round_offsets=offsets, answer=ids[1].astype(np.int32)
    )
    return written, None if scores is None else ChainLogProbs(scores[0][inside], scores[1])


def implied_chains(
    problems: Samples,
    tasks: Mapping[str, Task],
    prefixes: Prefixes,
    ids: np.ndarray,
    scores: np.ndarray | None,
) -> Chains:
    """Returns the chains of a model without an answer head, with the answers that the rounds imply
    (NO_ANSWER where they imply none).

    Args:
        problems: the batch.
        tasks: the problems' tasks by name.
        prefixes: of its iterations.
        ids: tokens of the prefixes, end to end.
        scores: their log-probabilities, or None.
    """
    inside, offsets = find_rounds(ids, prefixes)
    written = replace(problems, rounds=ids[inside].astype(np.int32), round_offsets=offsets)
    answers = np.full(len(written), NO_ANSWER, np.int32)
    for k, task in tasks_present(written.task, tasks).items():
        own = written.task == k
        answers[own] = task.answers_of(written.take(own))
    none = np.zeros(len(problems), np.float32)
    own = None if scores is None else ChainLogProbs(scores[inside], none)
    return replace(written, answer=answers), own


def _read_fed_rounds(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], scored: bool
) -> Chains:
    """Does what `read_batch` does with a model that is fed its own rounds and carries no state.

    The inputs of an iteration are made on the host, of the tokens that come back from the one
    before: one synchronisation an iteration.
    """
    loops, first = problems.loops, problems.first_round
    rounds, total = int(first[-1]), 0
    starts, sizes = np.zeros(rounds, np.int64), np.zeros(rounds, np.int64)
    tokens, scores, widths = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], []
    for t in range(int(loops.max(initial=0))):
        owner = np.flatnonzero(loops > t)
        written = Written(problems, np.concatenate(tokens), starts, sizes)
        batch = collate_next(written, tasks, owner, np.full(len(owner), t), model.device)
        over = batch.plan.lengths - model.config.max_tokens
        if t and over.max(initial=0) > 0:
            _shorten(written, owner, t, over)
            batch = collate_next(written, tasks, owner, np.full(len(owner), t), model.device)
        if scored:
            (ids,), _, (own,), _ = read_scored(model, batch)
            scores.append(own.cpu().numpy())
        else:
            (ids,), _ = model.predict_rounds(batch)
        tokens.append(ids.cpu().numpy().astype(np.int32))
        inside, offsets = find_rounds(tokens[-1], Prefixes.of(batch.plan))
        r = first[owner] + t
        sizes[r] = np.diff(offsets)
        ends = total + np.cumsum(batch.plan.lengths)  # a round ends where its input does
        starts[r], total = ends - sizes[r], total + len(tokens[-1])
        widths.append(batch.plan.lengths)
    prefixes = Prefixes(
        np.array([len(w) for w in widths], np.int64), np.concatenate([sizes[:0], *widths])
    )
    all_scores = np.concatenate(scores) if scored else None
    return implied_chains(problems, tasks, prefixes, np.concatenate(tokens), all_scores)


def _shorten(written: Written, owner: np.ndarray, before: int, over: np.ndarray) -> None:
    """Leaves out the first tokens of last rounds that make an input longer than a model takes.

    No true round does: the chain is wrong already, and the others of its batch go on.

    Args:
        written: Problems, with the rounds written so far, which are changed.
        owner: (I,) the problem of each iteration.
        before: Rounds before the iterations, at least 1.
        over: (I,) by how many tokens each input is too long.
    """
    r = written.problems.first_round[owner] + before - 1
    left_out = np.clip(over, 0, written.sizes[r])
    written.starts[r] += left_out
    written.sizes[r] -= left_out


def find_rounds(ids: np.ndarray, prefixes: Prefixes) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rounds in the tokens of every iteration's active prefix, which are
    iteration-major: index of each of their tokens, sequence by sequence, and the rounds' offsets.
    """
    active, widths = prefixes
    owner = concat_ranges(np.zeros_like(active), active)
    iteration = np.repeat(np.arange(len(active)), active)
    ends = np.cumsum(widths)
    starts = ends - widths
    pads = np.where(ids == PAD, np.arange(len(ids)), -1)
    last_pad = np.maximum.reduceat(pads, starts) if len(starts) else starts
    begins = np.maximum(last_pad + 1, starts)
    by_sequence = np.lexsort((iteration, owner))
    begins, sizes = begins[by_sequence], (ends - begins)[by_sequence]
    return concat_ranges(begins, sizes), lengths_to_offsets(sizes)

"""Accuracy by length, for every model on the same problems.

`answer`: the final answer is right. `chain`: every token of every round is right. `bit`: share of
the true chain's tokens that are right. All of them free-running; `bit_forced` (autoregressive
models only) is `bit` with the true tokens before each one given.

A looped model's round is compared right-aligned, as it is supervised; an autoregressive model's
text is compared token by token from the end of the prompt on. A missing token is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from relay_fast.data.collate import collate_autoregressive
from relay_fast.decoding._inference import inference
from relay_fast.decoding.chains import (
    decode_chains,
    fitting_problems,
    generate_looped_chains,
    read_answers,
    unseen_problems,
)
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.vocabulary import EOS
from relay_fast.training.model_files import (
    Model,
)
from relay_fast.utils.ragged import concat_ranges

FORCED_TOKENS = 16384  # tokens in a teacher-forced batch
Metrics = dict[str, float | int]


class Grades(NamedTuple):
    """What is right in the answers to S problems with C chain tokens in all."""

    answer: np.ndarray  # (S,) bool
    chain: np.ndarray  # (S,) bool
    hits: np.ndarray  # (C,) bool, of the tokens in Samples.rounds
    forced: np.ndarray | None = None  # (C,) bool


def grade_looped(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Grades:
    """Compares what the looped model writes with the truth in `problems`.

    options: those of `relay_fast.decoding.chains.generate_looped_chains`.
    """
    written = generate_looped_chains(model, problems, tasks, **options)
    true_sizes, sizes = np.diff(problems.round_offsets), np.diff(written.round_offsets)
    owner = np.repeat(np.arange(len(true_sizes)), true_sizes)
    from_right = problems.round_offsets[owner + 1] - np.arange(len(owner))  # 1 for the last token
    there = from_right <= sizes[owner]
    place = written.round_offsets[owner + 1] - from_right
    hits = np.zeros(len(owner), bool)
    hits[there] = written.rounds[place[there]] == problems.rounds[there]
    wrong = (sizes != true_sizes) | (np.bincount(owner[~hits], minlength=len(sizes)) > 0)
    sample = np.repeat(np.arange(len(problems)), problems.loops)
    chain = np.bincount(sample[wrong], minlength=len(problems)) == 0
    return Grades(written.answer == problems.answer, chain, hits)


def grade_autoregressive(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Grades:
    """Compares what the autoregressive model writes with the truth in `problems`.

    options: those of `relay_fast.decoding.autoregressive.decode`. Raises ValueError where a true
    sequence is longer than the model takes.
    """
    forced = _forced(model, problems, tasks)
    decoded = decode_chains(model, problems, tasks, **options)
    sequence, offsets, prompts = problems.sequences(tasks)
    sizes = np.diff(offsets) - prompts
    truth = sequence[concat_ranges(offsets[:-1] + prompts, sizes)]
    owner = np.repeat(np.arange(len(problems)), sizes)
    place = concat_ranges(np.zeros_like(sizes), sizes)
    there = place < np.diff(decoded.offsets)[owner]
    hits = np.zeros(len(truth), bool)
    hits[there] = decoded.tokens[(decoded.offsets[owner] + place)[there]] == truth[there]
    chain_sizes = np.diff(problems.round_offsets[problems.first_round])[owner]
    in_chain = place < chain_sizes
    # A last round without a delimiter of its own ends with <eos>: more after it would be wrong.
    decides = in_chain | ((place == chain_sizes) & (truth == EOS))
    chain = np.bincount(owner[decides & ~hits], minlength=len(problems)) == 0
    answer = read_answers(decoded, problems, tasks) == problems.answer
    return Grades(answer, chain, hits[in_chain], forced[in_chain])


def _forced(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task]
) -> np.ndarray:
    """Whether each token after the prompts is the argmax, given the true tokens before it."""
    sizes = np.diff(problems.sequences(tasks)[1])
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // FORCED_TOKENS)) + 1
    parts = [np.zeros(0, bool)]
    with inference(model):
        for chosen in np.split(np.arange(len(problems)), cuts):
            batch = collate_autoregressive(problems.take(chosen), tasks, device=model.device)
            parts.append(model.teacher_forced_correct(batch).cpu().numpy())
    return np.concatenate(parts)


def evaluate_looped(
    model: LoopedTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """{length: {answer, bit, chain, n}} of task `name`, on `unseen_problems`.

    options: `progress`, called with (problems done, all of them), and the others of the model's
    kind. Raises ValueError for lengths that the task or the model cannot take.
    """
    return _evaluate(grade_looped, model, tasks, name, lengths, problems_per_length, seed, options)


def evaluate_autoregressive(
    model: AutoregressiveTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """{length: {answer, bit, bit_forced, chain, n}} of task `name`, on `unseen_problems`.

    options: `progress`, called with (problems done, all of them), and the others of the model's
    kind. Raises ValueError for lengths that the task or the model cannot take.
    """
    mark = grade_autoregressive
    return _evaluate(mark, model, tasks, name, lengths, problems_per_length, seed, options)


def _evaluate(mark, model, tasks, name, lengths, number, seed, options) -> dict[int, Metrics]:
    # All lengths at once: short sequences take the places of finished ones.
    drawn = [fitting_problems(model, tasks[name], length, number, seed) for length in lengths]
    problems = Samples.concat(drawn)
    marks = mark(model, problems, tasks, **options)
    token_length = np.repeat(problems.length, np.diff(problems.round_offsets[problems.first_round]))
    result = {}
    for length in np.unique(problems.length).tolist():
        samples, tokens = problems.length == length, token_length == length
        result[length] = {
            "answer": float(marks.answer[samples].mean()),
            "bit": float(marks.hits[tokens].mean()),
            "chain": float(marks.chain[samples].mean()),
            "n": int(samples.sum()),
        }
        if marks.forced is not None:
            result[length]["bit_forced"] = float(marks.forced[tokens].mean())
    return result


def hit_matrix(model: Model, task: Task, length: int, n: int, seed: int = 0) -> np.ndarray:
    """(rounds, positions) share of n problems whose token there is right, NaN where none has one.

    Positions count from the beginning of the true round.
    """
    problems = unseen_problems(task, length, n, seed)
    mark = grade_looped if isinstance(model, LoopedTransformer) else grade_autoregressive
    hits = mark(model, problems, {task.name: task}).hits
    sizes = np.diff(problems.round_offsets)
    position = concat_ranges(np.zeros_like(sizes), sizes)
    round_index = np.repeat(concat_ranges(np.zeros_like(problems.loops), problems.loops), sizes)
    shape = (int(problems.loops.max(initial=0)), int(sizes.max(initial=0)))
    cell = round_index * shape[1] + position
    cells = shape[0] * shape[1]
    right = np.bincount(cell, weights=hits, minlength=cells)
    count = np.bincount(cell, minlength=cells)
    return np.where(count > 0, right / np.maximum(count, 1), np.nan).reshape(shape)

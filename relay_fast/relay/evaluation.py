"""Accuracy by length, for every model on the same problems.

| metric | meaning |
|---|---|
| `answer` | share of problems whose final answer is correct |
| `chain` | share of problems with every token of every round correct |
| `bit` | token accuracy: share of the true chain's tokens that are correct |
| `bit_forced` | token accuracy given the true tokens before (autoregressive models only) |
| `answer_once` | `answer` of one iteration alone (looped models only) |

`answer_once` is a control: what one pass from the problem can tell. It has to fail where the
rounds are needed. All but `bit_forced` are free-running. A looped model's round is compared
right-aligned, as it is supervised; an autoregressive model's text is compared token by token from
the end of the prompt on. A missing token is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from relay_fast.data.collate import collate_autoregressive
from relay_fast.decoding._inference import inference
from relay_fast.decoding.chains import (
    decode_chains,
    fitting_problems,
    generate_looped_chains,
    parse_chains,
    unseen_problems,
)
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.verify import same_answers
from relay_fast.tasks.vocabulary import EOS
from relay_fast.training.model_files import Model
from relay_fast.utils.ragged import concat_ranges

FORCED_TOKENS = 16384  # tokens in a teacher-forced batch
Metrics = dict[str, float | int | None]  # metric -> value, and n, the number of problems


class Grades(NamedTuple):
    """Correctness of a model's output for S problems with C chain tokens in all."""

    answer: np.ndarray  # (S,) bool
    chain: np.ndarray  # (S,) bool
    tokens: np.ndarray  # (C,) bool, of the tokens in Samples.rounds
    forced_tokens: np.ndarray | None = None  # (C,) bool, teacher-forced


def grade_looped(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Grades:
    """Compares the chains of a looped model with the truth in `problems`.

    Args:
        model: The looped model.
        problems: S solved problems.
        tasks: The tasks by name.
        options: Passed to `relay_fast.decoding.chains.generate_looped_chains`.
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
    return Grades(_right_answers(model, written, problems, tasks), chain, hits)


def _right_answers(
    model: LoopedTransformer, written: Samples, problems: Samples, tasks: Mapping[str, Task]
) -> np.ndarray:
    if model.supervise == "answer":  # what it has for rounds means nothing
        return written.answer == problems.answer
    return same_answers(written, problems, tasks)


def grade_autoregressive(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Grades:
    """Compares the text of an autoregressive model with the truth in `problems`.

    Args:
        model: The autoregressive model.
        problems: S solved problems.
        tasks: The tasks by name.
        options: Passed to `relay_fast.decoding.autoregressive.decode`.

    Raises:
        ValueError: A true sequence is longer than the model's limit.
    """
    forced = _forced(model, problems, tasks, options.get("autocast", "fp32"))
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
    # A last round without a delimiter ends with <eos>: further tokens would change the round.
    decides = in_chain | ((place == chain_sizes) & (truth == EOS))
    chain = np.bincount(owner[decides & ~hits], minlength=len(problems)) == 0
    answer = same_answers(parse_chains(decoded, problems, tasks), problems, tasks)
    return Grades(answer, chain, hits[in_chain], forced[in_chain])


def _forced(
    model: AutoregressiveTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    autocast: str = "fp32",
) -> np.ndarray:
    """Compares each token after the prompts with the argmax, given the true tokens before it."""
    sizes = np.diff(problems.sequences(tasks)[1])
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // FORCED_TOKENS)) + 1
    parts = [np.zeros(0, bool)]
    with inference(model, autocast):
        for chosen in np.split(np.arange(len(problems)), cuts):
            batch = collate_autoregressive(problems.take(chosen), tasks, device=model.device)
            parts.append(model.teacher_forced_correct(batch).cpu().numpy())
    return np.concatenate(parts)


def answers_once(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> np.ndarray:
    """Returns (S,) bool: whether a looped model that is allowed one iteration has the answer.

    Args:
        model: The looped model.
        problems: S solved problems.
        tasks: The tasks by name.
        options: Passed to `relay_fast.decoding.chains.generate_looped_chains`.
    """
    loops = np.minimum(problems.loops, 1)
    none = np.zeros(int(loops.sum()) + 1, np.int64)
    cut = replace(problems, loops=loops, rounds=problems.rounds[:0], round_offsets=none)
    written = generate_looped_chains(model, cut, tasks, **options)
    return _right_answers(model, written, problems, tasks)


def evaluate_looped(
    model: LoopedTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """Measures a looped model's accuracy by length on `unseen_problems`.

    Args:
        model: The looped model.
        tasks: The tasks by name.
        name: The task to evaluate on.
        lengths: Lengths of the problems.
        problems_per_length: Number of problems of each length.
        seed: Selects the problems.
        options: `progress`, called with (problems done, problems in all), and further options of
            `grade_looped`.

    Returns:
        {length: {"answer", "answer_once", "bit", "chain", "n"}}.

    Raises:
        ValueError: The task or the model does not support a length.
    """
    problems = evaluation_problems([model], tasks[name], lengths, problems_per_length, seed)
    return evaluate_problems(model, tasks, problems, **options)


def evaluate_autoregressive(
    model: AutoregressiveTransformer,
    tasks: Mapping[str, Task],
    name: str,
    lengths: Iterable[int],
    problems_per_length: int,
    seed: int = 0,
    **options,
) -> dict[int, Metrics]:
    """Measures an autoregressive model's accuracy by length on `unseen_problems`.

    Args:
        model: The autoregressive model.
        tasks: The tasks by name.
        name: The task to evaluate on.
        lengths: Lengths of the problems.
        problems_per_length: Number of problems of each length.
        seed: Selects the problems.
        options: `progress`, called with (problems done, problems in all), and further options of
            `grade_autoregressive`.

    Returns:
        {length: {"answer", "bit", "bit_forced", "chain", "n"}}.

    Raises:
        ValueError: The task or the model does not support a length.
    """
    problems = evaluation_problems([model], tasks[name], lengths, problems_per_length, seed)
    return evaluate_problems(model, tasks, problems, **options)


def evaluation_problems(
    models: Sequence[Model], task: Task, lengths: Iterable[int], number: int, seed: int = 0
) -> Samples:
    """Draws the problems that all of `models` are measured on.

    Args:
        models: The models.
        task: Draws the problems.
        lengths: Lengths of the problems.
        number: Number of problems of each length.
        seed: Selects the problems.

    Raises:
        ValueError: The task or a model does not support a length.
    """
    return Samples.concat(
        [fitting_problems(models, task, length, number, seed) for length in lengths]
    )


def evaluate_problems(
    model: Model, tasks: Mapping[str, Task], problems: Samples, **options
) -> dict[int, Metrics]:
    """Measures a model's accuracy by length on `evaluation_problems` of one task.

    Args:
        model: A looped or autoregressive model.
        tasks: The tasks by name.
        problems: Solved problems.
        options: As in `evaluate_looped` or `evaluate_autoregressive`.

    Returns:
        {length: metrics}, as these functions do; the answer is None for a model that writes an
        answer of one token where it has several.
    """
    # All lengths at once, so that new sequences take the places of finished ones.
    looped = isinstance(model, LoopedTransformer)
    grade = grade_looped if looped else grade_autoregressive
    grades = grade(model, problems, tasks, **options)
    readable = getattr(model, "supervise", "chain") == "chain" or all(
        task.one_token_answers for task in tasks_present(problems.task, tasks).values()
    )
    unseen = {k: v for k, v in options.items() if k != "progress"}  # a small part of the time
    once = answers_once(model, problems, tasks, **unseen) if looped else None
    token_length = np.repeat(problems.length, np.diff(problems.round_offsets[problems.first_round]))
    result = {}
    for length in np.unique(problems.length).tolist():
        samples, tokens = problems.length == length, token_length == length
        result[length] = {
            "answer": float(grades.answer[samples].mean()) if readable else None,
            "bit": float(grades.tokens[tokens].mean()),
            "chain": float(grades.chain[samples].mean()),
            "n": int(samples.sum()),
        }
        if grades.forced_tokens is not None:
            result[length]["bit_forced"] = float(grades.forced_tokens[tokens].mean())
        if once is not None:
            result[length]["answer_once"] = float(once[samples].mean()) if readable else None
    return result


def hit_matrix(
    model: Model, task: Task, length: int, n: int, seed: int = 0, **options
) -> np.ndarray:
    """Measures token accuracy by round and position on problems of one length.

    Args:
        model: A looped or autoregressive model.
        task: Draws the problems.
        length: Length of the problems.
        n: Number of problems.
        seed: Selects the problems.
        options: As in `evaluate_problems`.

    Returns:
        (rounds, positions) share of the problems whose token is correct, NaN where none has a
        token. Positions count from the beginning of the true round.
    """
    problems = unseen_problems(task, length, n, seed)
    grade = grade_looped if isinstance(model, LoopedTransformer) else grade_autoregressive
    hits = grade(model, problems, {task.name: task}, **options).tokens
    sizes = np.diff(problems.round_offsets)
    position = concat_ranges(np.zeros_like(sizes), sizes)
    round_index = np.repeat(concat_ranges(np.zeros_like(problems.loops), problems.loops), sizes)
    shape = (int(problems.loops.max(initial=0)), int(sizes.max(initial=0)))
    cell = round_index * shape[1] + position
    cells = shape[0] * shape[1]
    correct = np.bincount(cell, weights=hits, minlength=cells)
    count = np.bincount(cell, minlength=cells)
    return np.where(count > 0, correct / np.maximum(count, 1), np.nan).reshape(shape)

"""Chains that a model writes: looped (all positions of a round at once) or token by token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from relay_fast.data.collate import collate_looped
from relay_fast.decoding._inference import bytes_a_token, free_bytes, inference
from relay_fast.decoding.autoregressive import Decoded, check_prompts, decode
from relay_fast.decoding.fed_rounds import find_rounds, read_fed_rounds
from relay_fast.decoding.scores import read_scored
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import NO_ANSWER, TASK_NAMES, Samples, Task
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.numbers import whole
from relay_fast.utils.ragged import lengths_to_offsets

# Problem tokens in a batch, by device: what a CPU's caches hold (measured), what fills a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 1 << 17}
UNSEEN = 1 << 40  # added to a seed: training streams use small ones, so they never meet
NO_TOKENS = np.zeros(0, np.int32)

Model = LoopedTransformer | AutoregressiveTransformer
Progress = Callable[[int, int], Any]


class Scores(NamedTuple):
    """Log-probabilities in fp32 of the tokens of samples: rounds (tokens,) and answer (S,), which
    is 0 where the answer is what the rounds say."""

    rounds: np.ndarray
    answer: np.ndarray


def unseen_problems(task: Task, length: int, number: int, seed: int) -> Samples:
    """The first `number` problems of a length, of a stream that no training draws from.

    They depend on the task's parameters, length and seed alone: every model gets the same. (Short
    problems are few, those are met in training all the same.)
    """
    return task.sample(np.full(number, length), whole("seed", seed) + UNSEEN)


def fitting_problems(model: Model, task: Task, length: int, number: int, seed: int) -> Samples:
    """`unseen_problems` that the model can take, and whose true chains it can hold.

    Raises ValueError, naming task and length, where it cannot.
    """
    task.check_length(length)
    needed, limit = length, model.config.max_tokens
    if needed <= limit:  # a problem has more tokens than its length: far too long ones are not made
        problems = unseen_problems(task, length, number, seed)
        sizes = np.diff(problems.problem_offsets)
        if isinstance(model, AutoregressiveTransformer):
            sizes = np.diff(problems.sequences({task.name: task})[1]) - 1
        needed = int(sizes.max(initial=0))
        if needed <= limit:
            return problems
    raise ValueError(
        f"{task.name} length {length} needs {needed} tokens or more, beyond the model's limit of "
        f"{limit}: use a smaller length, or train a model with a larger test length."
    )


def generate_looped_chains(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """The same problems, in the same order, with the rounds and answers that the model writes.

    A problem gets `problems.loops` rounds; its true rounds and answer are not read. A round begins
    after the last `<pad>` read from the right, and may be empty. The answer of a model that is fed
    its rounds is what they say, NO_ANSWER where that cannot be read. batch_tokens: problem tokens
    in a batch, by default what free memory holds, at most BATCH_TOKENS; a batch for which memory
    runs out is halved. progress is called with (problems done, S). Raises ValueError for problems
    that the model cannot take, torch.OutOfMemoryError where not even one problem fits.
    """
    options = {"batch_tokens": batch_tokens, "progress": progress}
    return in_callers_order(list(stream_chains(model, problems, tasks, **options)), problems)


def generate_scored(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> tuple[Samples, Scores]:
    """What `generate_looped_chains` gives, and the log-probability of every token of it."""
    parts = list(_stream(model, problems, tasks, True, **options))
    written = in_callers_order([(chosen, samples) for chosen, samples, _ in parts], problems)
    # As samples whose tokens are log-probabilities, so that they are reordered alike.
    scores = [
        (chosen, replace(samples, rounds=own.rounds, answer=own.answer))
        for chosen, samples, own in parts
    ]
    ordered = in_callers_order(scores, problems)
    return written, Scores(ordered.rounds.astype(np.float32), ordered.answer.astype(np.float32))


def stream_chains(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Iterator[tuple[np.ndarray, Samples]]:
    """Batches as they are done, as (which of the problems, their chains).

    Only one batch is in memory: they come in `stream_order`. first: how many of the problems in
    that order to leave out, for a call that continues another. Other options, errors: those of
    `generate_looped_chains`; errors that the problems cause are raised at the first batch.
    """
    for chosen, samples, _ in _stream(model, problems, tasks, **options):
        yield chosen, samples


def stream_order(problems: Samples) -> np.ndarray:
    """(S,) which problem is written when: the most loops, then the longest, come first."""
    return np.lexsort((-np.diff(problems.problem_offsets), -problems.loops))


def _stream(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    scored: bool = False,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, Samples, Scores | None]]:
    if isinstance(model, AutoregressiveTransformer):
        raise TypeError(
            "an autoregressive model writes chains with "
            "relay_fast.decoding.chains.generate_ar_chains, and generate_looped_chains takes a "
            "looped one"
        )
    if batch_tokens is not None:
        batch_tokens = whole("batch_tokens", batch_tokens)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens = {batch_tokens}: it must be 1 or more")
    sizes, widths = np.diff(problems.problem_offsets), np.diff(problems.problem_offsets)
    placed = np.ones(len(problems), bool)
    for name, task in _present(problems, tasks).items():
        of_task = problems.task == TASK_NAMES.index(name)
        widths[of_task] = np.maximum(sizes[of_task], task.min_input_tokens)
        placed[of_task] = model.config.carry_state or not task.clips_positions
    check_prompts(model, problems.problem, problems.problem_offsets, widths - sizes)
    _warn_beyond(model, int(widths[placed].max(initial=0)))
    batch_tokens = batch_tokens or _tokens_that_fit(model, int(widths.max(initial=0)))
    order = stream_order(problems)
    ends = np.cumsum(sizes[order])
    questions = _without_truth(problems)
    start = first
    while start < len(order):
        before = ends[start] - sizes[order[start]]
        stop = max(start + 1, int(np.searchsorted(ends, before + batch_tokens, side="right")))
        try:
            with inference(model):
                result = read_batch(model, questions.take(order[start:stop]), tasks, scored)
        except torch.OutOfMemoryError:
            if stop == start + 1:
                raise
            # The rest of the problems, too, come in half as large batches.
            batch_tokens = int(ends[stop - 1] - before) // 2
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if progress is not None:
            progress(stop, len(order))
        yield order[start:stop], *result
        start = stop


def read_batch(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], scored: bool
) -> tuple[Samples, Scores | None]:
    """The problems, most loops first, with what the model writes in one pass over all of them;
    and its log-probabilities if `scored`."""
    if not model.has_answer_head:
        written, own = read_fed_rounds(model, problems, tasks, scored)
        none = np.zeros(len(problems), np.float32)
        return written, Scores(own, none) if scored else None
    carried = model.config.carry_state
    batch = collate_looped(problems, tasks, carry_state=carried, device=model.device)
    if scored:
        rounds, answers, scores, answer_scores = read_scored(model, batch)
    else:
        rounds, answers = model.read(batch)
    ids = torch.cat([*rounds, answers]).cpu().numpy().astype(np.int32)
    ids, answer = ids[: len(ids) - len(problems)], ids[len(ids) - len(problems) :]
    inside, round_offsets = find_rounds(ids, batch.plan)
    written = replace(problems, rounds=ids[inside], round_offsets=round_offsets, answer=answer)
    if not scored:
        return written, None
    own = torch.cat([*scores, answer_scores]).cpu().numpy()
    return written, Scores(own[: len(ids)][inside], own[len(ids) :])


def in_callers_order(parts: list[tuple[np.ndarray, Samples]], problems: Samples) -> Samples:
    """The samples of parts, each (which of the problems, samples), in the problems' order."""
    if not parts:
        return _without_truth(problems)
    order = np.concatenate([chosen for chosen, _ in parts])
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return Samples.concat([samples for _, samples in parts]).take(back)


def _tokens_that_fit(model: LoopedTransformer, longest: int) -> int:
    """Problem tokens in a batch that half of the free memory holds, at most BATCH_TOKENS."""
    element = model.embedding.weight.element_size()
    a_token = bytes_a_token(model.config.block, longest, element)
    fit = free_bytes(model.device) // (2 * a_token)
    return max(1, min(BATCH_TOKENS[model.device.type], fit))


def _warn_beyond(model: LoopedTransformer, longest: int) -> None:
    """Warns where a model with feedback reads inputs longer than any that it was trained on."""
    trained = model.config.trained_tokens
    if trained and longest > trained:
        warnings.warn(
            f"the longest input has {longest} tokens, the model was trained on up to {trained} "
            "(padding and cuts included): what it writes beyond is a guess; train with a larger "
            "pad_to",
            stacklevel=4,
        )


def _without_truth(problems: Samples) -> Samples:
    """The problems with empty rounds and no answers."""
    return replace(
        problems,
        rounds=NO_TOKENS,
        round_offsets=np.zeros(len(problems.round_offsets), np.int64),
        answer=np.full(len(problems), PAD, np.int32),
    )


def decode_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Decoded:
    """What the autoregressive model writes after each problem: up to the longest chain that a
    problem of that length can have. options: those of
    `relay_fast.decoding.autoregressive.decode`."""
    limits = np.zeros(len(problems), np.int64)
    for name, task in _present(problems, tasks).items():
        of_task = problems.task == TASK_NAMES.index(name)
        for length in np.unique(problems.length[of_task]).tolist():
            limit = task.max_sequence_tokens(length) - task.max_problem_tokens(length)
            limits[of_task & (problems.length == length)] = limit
    return decode(model, problems.problem, problems.problem_offsets, max_new=limits, **options)


def generate_ar_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Samples:
    """The same problems with the rounds and answers that the autoregressive model writes.

    The number of rounds is what the model wrote; an answer that cannot be read is NO_ANSWER.
    options: those of `relay_fast.decoding.autoregressive.decode`.
    """
    return parse_chains(decode_chains(model, problems, tasks, **options), problems, tasks)


def parse_chains(decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]) -> Samples:
    """The problems with the rounds and answers of what was decoded."""
    tokens, sizes, loops, answers = [NO_TOKENS], [], [], []
    for rounds, answer in _read_texts(decoded, problems, tasks):
        tokens.append(np.array([token for r in rounds for token in r], np.int32))
        sizes += map(len, rounds)
        loops.append(len(rounds))
        answers.append(answer)
    return replace(
        problems,
        rounds=np.concatenate(tokens),
        round_offsets=lengths_to_offsets(np.array(sizes, np.int64)),
        loops=np.array(loops, np.int32),
        answer=np.array(answers, np.int32),
    )


def _read_texts(
    decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]
) -> Iterator[tuple[list[list[int]], int]]:
    """Rounds and answer of every decoded sequence."""
    bounds = decoded.offsets.tolist()
    for k, begin, end in zip(problems.task.tolist(), bounds[:-1], bounds[1:], strict=True):
        rounds, answer = tasks[TASK_NAMES[k]].split(decoded.tokens[begin:end].tolist())
        yield rounds, NO_ANSWER if answer is None else answer


def read_answers(decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    """(S,) int32 answers of what was decoded, NO_ANSWER where there is none to read."""
    texts = _read_texts(decoded, problems, tasks)
    return np.fromiter((answer for _, answer in texts), np.int32, len(problems))


def _present(problems: Samples, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that occur. Raises ValueError where one is not among those given."""
    names = [TASK_NAMES[k] for k in np.unique(problems.task)]
    if missing := [name for name in names if name not in tasks]:
        raise ValueError(
            f"the problems hold {missing[0]!r}, which is not among the tasks given; add it to the "
            f"mapping."
        )
    return {name: tasks[name] for name in names}

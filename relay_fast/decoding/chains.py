"""Generation of chains: looped (all positions of a round at once) or token by token."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from relay_fast.data.collate import input_widths
from relay_fast.decoding._inference import bytes_a_token, free_bytes
from relay_fast.decoding.autoregressive import Decoded, check_prompts, decode
from relay_fast.decoding.chain_batches import ChainBatch, one_ahead
from relay_fast.decoding.chain_reader import ChainReader
from relay_fast.decoding.reading import ChainLogProbs
from relay_fast.decoding.reading import read_batch as read_batch
from relay_fast.models.transformers import AutoregressiveTransformer, LoopedTransformer
from relay_fast.tasks import NO_ANSWER, Samples, Task
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.arguments import check_kind
from relay_fast.utils.callers import outside_level
from relay_fast.utils.numbers import as_int
from relay_fast.utils.ragged import lengths_to_offsets

# Problem tokens per batch: what fits into a CPU's caches (measured), what fills a GPU.
BATCH_TOKENS = {"cpu": 2048, "cuda": 1 << 17}
NO_TOKENS = np.zeros(0, np.int32)

Model = LoopedTransformer | AutoregressiveTransformer
Progress = Callable[[int, int], Any]


def unseen_problems(task: Task, length: int, number: int, seed: int) -> Samples:
    """Draws problems of one length from a stream that training does not use.

    They depend on the task's parameters, the length and the seed only, so every model gets the
    same. There are few short problems, so these do occur in training.

    Args:
        task: draws the problems.
        length: their length.
        number: how many; a larger number extends a smaller one. A file may hold fewer.
        seed: of the stream.
    """
    return task.unseen(length, number, seed)


def fitting_problems(
    models: Sequence[Model], task: Task, length: int, number: int, seed: int
) -> Samples:
    """Returns `unseen_problems` whose true chains each of the models can hold.

    Args:
        models: the models whose limits count.
        task, length, number, seed: as in `unseen_problems`.

    Raises:
        ValueError: names the task and length whose chains exceed a model's limit.
    """
    task.check_length(length)
    for model in models:  # a problem has more tokens than its length: do not make far too long ones
        _refuse_beyond_limit(model, task, length, length)
    problems = unseen_problems(task, length, number, seed)
    if number and not len(problems):
        raise ValueError(
            f"{task.name} has no solved problems of length {length} for evaluation: add some to "
            f"its test_data, raise its held_out, or leave this length out"
        )
    for model in models:
        sizes = np.diff(problems.problem_offsets)
        if isinstance(model, AutoregressiveTransformer):
            sizes = np.diff(problems.sequences({task.name: task})[1]) - 1
        _refuse_beyond_limit(model, task, length, int(sizes.max(initial=0)))
    return problems


def _refuse_beyond_limit(model: Model, task: Task, length: int, needed: int) -> None:
    limit = model.config.max_tokens
    if needed > limit:
        raise ValueError(
            f"{task.name} length {length} needs {needed} tokens or more, beyond the model's limit "
            f"of {limit}: use a smaller length, or train a model with a larger test length."
        )


def generate_looped_chains(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    *,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    autocast: str = "fp32",
) -> Samples:
    """Returns the problems, in their order, with the rounds and answers that the model generates.

    A problem gets `problems.loops` rounds; its true rounds and answer are not read. A round begins
    after the last `<pad>` of its iteration, and may be empty. The answer of a model
    without an answer head is the one that its rounds imply, or NO_ANSWER. If a round that it is fed
    makes an input longer than the model's `max_tokens`, the round's first tokens are left out.

    On a CUDA device, a call of several batches reads most of them as replays of CUDA graphs
    (`relay_fast.decoding.chain_reader`), where that saves time.

    Args:
        model: a looped model.
        problems: S samples.
        tasks: the problems' tasks by name.
        batch_tokens: problem tokens per batch, by default what fits into free memory, at most
            BATCH_TOKENS. A batch for which memory runs out is halved.
        progress: called with (problems done, S).
        autocast: precision of the GEMMs, "fp32" (the parameters' own dtype) or "bf16".

    Raises:
        ValueError: if the model cannot take the problems.
        torch.OutOfMemoryError: if a single problem does not fit.
    """
    options = {"batch_tokens": batch_tokens, "progress": progress, "autocast": autocast}
    return in_callers_order(list(stream_chains(model, problems, tasks, **options)), problems)


def generate_scored(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> tuple[Samples, ChainLogProbs]:
    """Generates chains together with the log-probability of every token.

    Args:
        model, problems, tasks, options: as in `generate_looped_chains`.

    Returns:
        What `generate_looped_chains` returns, and the log-probabilities.
    """
    parts = list(stream_scored(model, problems, tasks, **options))
    written = in_callers_order([(chosen, samples) for chosen, samples, _ in parts], problems)
    # Log-probabilities take the tokens' places in samples, so that both are reordered alike.
    scores = [
        (chosen, replace(samples, rounds=own.rounds, answer=own.answer))
        for chosen, samples, own in parts
    ]
    ordered = in_callers_order(scores, problems)
    return written, ChainLogProbs(
        ordered.rounds.astype(np.float32), ordered.answer.astype(np.float32)
    )


def stream_chains(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Iterator[tuple[np.ndarray, Samples]]:
    """Yields each batch when it is done, as (indices of its problems, their chains).

    Batches come in `stream_order`. Where they are read as CUDA graphs, the next one is started
    before one is yielded: changed weights count from the one after it.

    Args:
        model: a looped model.
        problems: S samples.
        tasks: the problems' tasks by name.
        **options: `first`, how many problems of that order to skip, for a call that continues
            another; `shard`, (i, n) for every nth batch from the ith on; others as in
            `generate_looped_chains`.

    Raises:
        ValueError: as `generate_looped_chains`, at the first batch.
    """
    for chosen, samples, _ in stream_scored(model, problems, tasks, False, **options):
        yield chosen, samples


def stream_order(problems: Samples) -> np.ndarray:
    """Returns the order (S,) of generation: by most loops, then by longest problem."""
    return np.lexsort((-np.diff(problems.problem_offsets), -problems.loops))


def stream_scored(
    model: LoopedTransformer,
    problems: Samples,
    tasks: Mapping[str, Task],
    scored: bool = True,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    first: int = 0,
    shard: tuple[int, int] = (0, 1),
    autocast: str = "fp32",
) -> Iterator[tuple[np.ndarray, Samples, ChainLogProbs | None]]:
    """Does what `stream_chains` does, and yields log-probabilities too.

    Args:
        model, problems, tasks, first, shard: As in `stream_chains`.
        scored: Whether to compute the log-probabilities; if not, None is yielded for them.
        batch_tokens, progress, autocast: As in `generate_looped_chains`.
    """
    if isinstance(model, AutoregressiveTransformer):
        raise TypeError(
            "generate_looped_chains needs a looped model: use "
            "relay_fast.decoding.chains.generate_ar_chains for an autoregressive one"
        )
    check_kind("problems", problems, Samples, "give the Samples that a task's sample() returns")
    check_kind("tasks", tasks, Mapping, "give the problems' tasks by name")
    if batch_tokens is not None:
        batch_tokens = as_int("batch_tokens", batch_tokens)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens = {batch_tokens}: it must be 1 or more")
    sizes, widths = np.diff(problems.problem_offsets), input_widths(problems, tasks)
    check_prompts(model, problems.problem, problems.problem_offsets, widths - sizes)
    _warn_beyond(model, problems, tasks, widths)
    batch_tokens = batch_tokens or _tokens_that_fit(model, int(widths.max(initial=0)))
    order = stream_order(problems)
    reader, questions = ChainReader(model, tasks, scored), _without_truth(problems)
    ends = np.concatenate([[0], np.cumsum(sizes[order])])

    def started() -> Iterator[tuple[ChainBatch, int]]:
        start, batches, most = first, 0, batch_tokens
        while start < len(order):
            stop = int(np.searchsorted(ends, ends[start] + most, side="right")) - 1
            stop, batches = max(start + 1, stop), batches + 1
            if (batches - 1) % shard[1] == shard[0]:
                batch = ChainBatch(reader, questions, order[start:stop], autocast)
                if len(batch.chosen) < stop - start:  # the later batches, too, are as small
                    stop = start + len(batch.chosen)
                    most = int(ends[stop] - ends[start])
                yield batch, stop
            start = stop

    for batch, stop in one_ahead(started()):
        chains = batch.chains()
        if progress is not None:
            progress(stop, len(order))
        yield batch.chosen, *chains


def in_callers_order(parts: list[tuple[np.ndarray, Samples]], problems: Samples) -> Samples:
    """Concatenates parts, each (indices of its problems, samples), in the problems' order."""
    if not parts:
        return _without_truth(problems)
    order = np.concatenate([chosen for chosen, _ in parts])
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return Samples.concat([samples for _, samples in parts]).take(back)


def _tokens_that_fit(model: LoopedTransformer, longest: int) -> int:
    """Returns how many problem tokens fit into half of the free memory, at most BATCH_TOKENS."""
    element = model.embedding.weight.element_size()
    a_token = bytes_a_token(model.config.block, longest, element)
    fit = free_bytes(model.device) // (2 * a_token)
    return max(1, min(BATCH_TOKENS[model.device.type], fit))


def _warn_beyond(
    model: LoopedTransformer, problems: Samples, tasks: Mapping[str, Task], widths: np.ndarray
) -> None:
    """Warns if a model with feedback reads inputs longer than those that it was trained on.

    Args:
        model: A looped model.
        problems: S samples.
        tasks: Their tasks by name.
        widths: (S,) the tokens of inputs that show the problem.
    """
    trained, carried, longest = model.config.trained_tokens, model.config.carry_state, 0
    if not trained:
        return
    for k, task in tasks_present(problems.task, tasks).items():
        own = problems.task == k
        if carried or not task.clips_positions:
            longest = max(longest, int(widths[own].max()))
        if task.grows and not carried:
            longest = max(longest, task.max_input_tokens(int(problems.length[own].max())))
    if longest > trained:
        warnings.warn(
            f"the longest input has {longest} tokens, the model was trained on up to {trained} "
            "(padding and cuts included): what it writes beyond is a guess; train with a larger "
            "pad_to",
            stacklevel=outside_level(),
        )


def _without_truth(problems: Samples) -> Samples:
    """Returns the problems with empty rounds and no answers."""
    return replace(
        problems,
        rounds=NO_TOKENS,
        round_offsets=np.zeros(len(problems.round_offsets), np.int64),
        answer=np.full(len(problems), PAD, np.int32),
    )


def decode_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Decoded:
    """Continues each problem up to the longest chain that a problem of its length can have.

    Args:
        model: an autoregressive model.
        problems: S samples.
        tasks: the problems' tasks by name.
        **options: those of `relay_fast.decoding.autoregressive.decode`.
    """
    limits = np.zeros(len(problems), np.int64)
    for k, task in tasks_present(problems.task, tasks).items():
        of_task = problems.task == k
        for length in np.unique(problems.length[of_task]).tolist():
            limit = task.max_sequence_tokens(length) - task.max_problem_tokens(length)
            limits[of_task & (problems.length == length)] = limit
    return decode(model, problems.problem, problems.problem_offsets, max_new=limits, **options)


def generate_ar_chains(
    model: AutoregressiveTransformer, problems: Samples, tasks: Mapping[str, Task], **options
) -> Samples:
    """Returns the problems with the rounds and answers that an autoregressive model generates.

    The number of rounds is what the model generates; an answer that cannot be parsed is NO_ANSWER.

    Args:
        model: an autoregressive model.
        problems: S samples.
        tasks: the problems' tasks by name.
        **options: those of `relay_fast.decoding.autoregressive.decode`.
    """
    return parse_chains(decode_chains(model, problems, tasks, **options), problems, tasks)


def parse_chains(decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]) -> Samples:
    """Returns the problems with the rounds and answers parsed from decoded text.

    Args:
        decoded: of `decode_chains` for these problems.
        problems: S samples.
        tasks: the problems' tasks by name.
    """
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
    """Yields the rounds and the answer of every decoded sequence."""
    bounds, of_index = decoded.offsets.tolist(), tasks_present(problems.task, tasks)
    sizes = np.diff(problems.problem_offsets).tolist()
    for i, (k, begin, end) in enumerate(
        zip(problems.task.tolist(), bounds[:-1], bounds[1:], strict=True)
    ):
        rounds, answer = of_index[k].split_for(decoded.tokens[begin:end].tolist(), sizes[i])
        yield rounds, NO_ANSWER if answer is None else answer


def read_answers(decoded: Decoded, problems: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    """Parses the answers (S,) int32 of decoded text, NO_ANSWER where there is none.

    Args:
        decoded, problems, tasks: as in `parse_chains`.
    """
    texts = _read_texts(decoded, problems, tasks)
    return np.fromiter((answer for _, answer in texts), np.int32, len(problems))

"""Parts of a large number of chains: which problems each has, and their chains with a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from relay_fast.decoding.chains import decode_chains, parse_chains
from relay_fast.decoding.confidence import generate_confident
from relay_fast.models.transformers import AutoregressiveTransformer
from relay_fast.relay.label_free import Bounds, label_free
from relay_fast.tasks import Samples, Task
from relay_fast.tasks.verify import check_verify, correct_chains, verify_chains
from relay_fast.training.model_files import Model, model_hash
from relay_fast.utils.files import json_text
from relay_fast.utils.precision import autocast_dtype
from relay_fast.utils.seeds import DATASET_SEED_OFFSET

Counts = Mapping[str, Mapping[int, int]]  # {task: {length: number of chains}}


class WrittenChains(NamedTuple):
    """Chains, and (S,) bool: which passed the check, which ended (None for all), and which the
    label-free filter keeps (None if that was not asked)."""

    chains: Samples
    passed: np.ndarray
    ended: np.ndarray | None
    kept: np.ndarray | None = None


def check_request(
    model: Model,
    tasks: Mapping[str, Task],
    counts: Counts,
    seed: int,
    verify: str | None,
    shard_chains: int,
) -> None:
    """Raises ValueError for chains that the model or a task cannot write.

    Args:
        model: Writes the chains.
        tasks: The tasks by name.
        counts: {task: {length: number of chains}}.
        seed, verify, shard_chains: As in `relay_fast.relay.chain_dataset.write_dataset`.
    """
    check_verify(verify)
    if seed < 0:
        raise ValueError(f"seed = {seed}: give at least 0")
    if shard_chains < 1:
        raise ValueError(f"shard_chains = {shard_chains}: give at least 1")
    if getattr(model, "supervise", "chain") == "answer":
        raise ValueError("this looped model writes answers only: give one that was aligned")
    written = isinstance(model, AutoregressiveTransformer)
    limit = model.config.max_tokens
    for name, own in counts.items():
        task = tasks[name]
        for length, number in own.items():
            task.check_length(length)
            if number < 0:
                raise ValueError(f"{number} chains of {name} length {length}: give 0 or more")
            if verify == "task" and not task.knows_truth(length):
                raise ValueError(
                    f"problems of {name} length {length} have no rounds or no answer, so that "
                    f'chains cannot be checked by the task: verify them by "self"'
                )
            most = task.most_problems(length)
            if most is not None and number > most:
                raise ValueError(
                    f"there are {most} problems of {name} length {length}: ask for no more than "
                    f"these chains"
                )
            need = task.max_problem_tokens(length)
            need = task.max_sequence_tokens(length) - 1 if written else need
            if need > limit:
                raise ValueError(
                    f"{name} length {length} can need {need} tokens, more than the model's limit "
                    f"of {limit}: use a smaller length, or train a model with a larger test length."
                )


def chains_identity(
    model: Model,
    tasks: Mapping[str, Task],
    counts: Counts,
    seed: int,
    verify: str | None,
    shard_chains: int,
    bounds: Bounds | None,
    autocast: str,
) -> dict[str, Any]:
    """Returns everything that written chains depend on, as JSON values.

    Args:
        model, tasks, counts, seed, verify, shard_chains: As in `check_request`.
        bounds, autocast: As in `write_chains`; the latter is left out if it is "fp32", which all
            were that an older version wrote.

    Raises:
        ValueError: The precision is unknown.
    """
    autocast_dtype(autocast)
    present = {name: tasks[name] for name in counts}
    identity = {
        "model": {"kind": type(model).__name__, "hash": model_hash(model)},
        "tasks": {name: task.to_dict() for name, task in present.items()},
        "vocabulary": next(iter(present.values())).vocabulary.to_dict(),
        "counts": {name: dict(own) for name, own in counts.items()},
        "seed": seed,
        "verify": verify,
        "shard_chains": shard_chains,
    } | ({} if bounds is None else {"bounds": dict(bounds)})
    if autocast != "fp32":
        identity["autocast"] = autocast
    return json.loads(json_text(identity))


def part_sizes(counts: Counts, part_chains: int) -> list[int]:
    """Returns the number of chains in each part.

    Args:
        counts: {task: {length: number of chains}}.
        part_chains: The most chains in a part.
    """
    numbers = [sum(own.values()) for own in counts.values()]
    parts = -(-sum(numbers) // part_chains)
    ends = [sum(k * number // parts for number in numbers) for k in range(parts + 1)]
    return [b - a for a, b in pairwise(ends)]


def draw_problems(
    tasks: Mapping[str, Task], counts: Counts, seed: int, index: int, shards: int
) -> Samples:
    """Draws the solved problems of a part: its share of each task, with shuffled lengths.

    Args:
        tasks: The tasks by name.
        counts: {task: {length: number of chains}}.
        seed: Selects the problems.
        index, shards: Which part of how many.
    """
    parts = []
    for name, own in counts.items():
        lengths = np.repeat(list(own), list(own.values()))
        lengths = np.random.default_rng([seed, tasks[name].index]).permutation(lengths)
        a, b = (k * len(lengths) // shards for k in (index, index + 1))
        parts.append(tasks[name].sample(lengths[a:b], seed + DATASET_SEED_OFFSET, a))
    return Samples.concat(parts)


def write_chains(
    model: Model,
    problems: Samples,
    tasks: Mapping[str, Task],
    verify: str | None,
    progress: Callable[[int, int], Any] | None = None,
    bounds: Bounds | None = None,
    autocast: str = "fp32",
) -> WrittenChains:
    """Generates the chains of solved problems and checks them.

    Args:
        model: Writes the chains.
        problems: The problems with their truth.
        tasks: Their tasks by name.
        verify: The check, see `relay_fast.tasks.verify.verify_chains`.
        progress: Called with (chains done, chains in all).
        bounds: Of the label-free filter, see `relay_fast.relay.label_free.confidence_bounds`.
        autocast: Precision of the GEMMs, "fp32" (the parameters' own dtype) or "bf16".
    """
    options = {"progress": progress, "autocast": autocast}
    ended = confidence = None
    if isinstance(model, AutoregressiveTransformer):
        decoded = decode_chains(model, problems, tasks, **options)
        written, ended = parse_chains(decoded, problems, tasks), decoded.ended
    else:
        written, confidence = generate_confident(model, problems, tasks, **options)
    kept = label_free(written, tasks, confidence, bounds)
    if verify == "task":  # the problems are solved already
        passed = correct_chains(written, problems)
    else:
        passed = kept if verify == "self" else verify_chains(written, tasks, verify)
    return WrittenChains(written, passed, ended, kept)


def chain_parts(
    model: Model,
    tasks: Mapping[str, Task],
    counts: Counts,
    *,
    seed: int,
    verify: str | None,
    part_chains: int,
    progress: Callable[[int, int], Any] | None = None,
    bounds: Bounds | None = None,
    autocast: str = "fp32",
) -> Iterator[WrittenChains]:
    """Yields the chains of a dataset part by part, so that only one is in memory.

    Args:
        model: Writes the chains.
        tasks: The tasks by name, at least those in `counts`.
        counts: {task: {length: number of chains}}.
        seed: Selects the problems.
        verify: The check, see `relay_fast.tasks.verify.verify_chains`.
        part_chains: The most chains in a part.
        progress: Called with (chains done, chains in all).
        bounds, autocast: As in `write_chains`.

    Raises:
        ValueError: The model or a task does not support the arguments.
    """
    check_request(model, tasks, counts, seed, verify, part_chains)
    sizes, done = part_sizes(counts, part_chains), 0
    parts, chains = len(sizes), sum(sizes)
    for index in range(parts):
        problems = draw_problems(tasks, counts, seed, index, parts)
        advance = progress and (lambda k, _, done=done: progress(done + k, chains))
        yield write_chains(model, problems, tasks, verify, advance, bounds, autocast)
        done += len(problems)

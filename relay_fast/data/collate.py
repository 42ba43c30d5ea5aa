"""Collation of samples into packed batches for the looped and the autoregressive model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from relay_fast.batch.packed import PackedBatch, _positions
from relay_fast.batch.plan import Plan
from relay_fast.data.feedback import feeder_of, places_of, true_tokens
from relay_fast.tasks import TASK_NAMES, FedPlaces, Samples, Task
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets

WEIGHTINGS = ("sequence", "row")


# Long: each array of the batch is computed from the ones before it.
def collate_looped(
    samples: Samples,
    tasks: Mapping[str, Task],
    *,
    task_weights: Mapping[str, float] | None = None,
    chain_weight: float = 1.0,
    weighting: str = "sequence",
    extra_pad: np.ndarray | None = None,
    feedback: bool = False,
    position_range: int = 0,
    rng: np.random.Generator | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """The looped model's batch: problems, and every iteration's round right-aligned.

    An input shorter than its task's longest round plus the boundary `<pad>` is padded on the
    left, between the task token (always leftmost) and the problem, and so is every input by
    `extra_pad` (S,) more tokens. weighting="sequence" lets
    sequences weigh alike whatever their length; "row" lets all supervised rows weigh alike.
    feedback: for a model that reads its own rounds back (`relay_fast.data.feedback`).
    position_range: positions lie in 0..position_range − 1 (0: as many as tokens), in order: for
    each sequence a random choice of `rng`, without one spread evenly.
    Raises ValueError for unknown weightings and tasks, and for tokens that are negative.
    """
    _check_weighting(weighting, task_weights)
    order = np.argsort(-samples.loops, kind="stable")
    s = samples.take(order)
    sizes = np.diff(s.problem_offsets)
    width = np.maximum(sizes, [tasks[TASK_NAMES[k]].min_input_tokens for k in s.task])
    if extra_pad is not None:
        width = width + extra_pad[order]
    positions = _positions(width, position_range, rng) if position_range else None
    plan = Plan(width, s.loops, device, positions)
    tokens = np.full(plan.rows, PAD, np.int64)
    ends = plan.offsets[1:]
    tokens[concat_ranges(ends - sizes + 1, sizes - 1)] = s.problem[
        concat_ranges(s.problem_offsets[:-1] + 1, sizes - 1)
    ]
    tokens[plan.offsets[:-1]] = s.problem[s.problem_offsets[:-1]]

    # Rounds, iteration-major: the boundary <pad>, then the round's tokens.
    owner = np.repeat(np.arange(len(s)), s.loops)
    iteration = np.arange(len(owner)) - s.first_round[owner]
    major = np.lexsort((owner, iteration))
    owner, iteration = owner[major], iteration[major]
    lengths = np.diff(s.round_offsets)[major]
    if np.any(lengths >= width[owner]):
        raise ValueError("a round does not fit into its input: raise the task's min_input_tokens")
    counts = lengths + 1
    rows = concat_ranges(ends[owner] - counts, counts)
    targets = np.full(len(rows), PAD, np.int64)
    starts = lengths_to_offsets(counts)[:-1]
    targets[concat_ranges(starts + 1, lengths)] = s.rounds[
        concat_ranges(s.round_offsets[:-1][major], lengths)
    ]
    per_iteration = np.bincount(iteration, weights=counts, minlength=plan.max_loops)
    feeder = None
    if feedback:
        feeder = feeder_of(places_of(s, tasks, plan.lengths), plan.lengths, device)
    task_weight = _task_weights(s, task_weights)
    if weighting == "sequence":
        share = chain_weight * task_weight[owner] / (len(s) * s.loops[owner] * counts)
    else:
        share = chain_weight * task_weight[owner] / len(rows)
    return PackedBatch(
        torch.from_numpy(tokens).to(device),
        plan,
        torch.from_numpy(rows).to(device),
        tuple(lengths_to_offsets(per_iteration.astype(np.int64)).tolist()),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device),
        torch.from_numpy(s.answer.astype(np.int64)).to(device),
        torch.from_numpy((task_weight / max(1, len(s))).astype(np.float32)).to(device),
        order,
        max(_largest(tokens, targets), int(s.answer.max(initial=0))),  # no answer: negative
        feeder=feeder,
    )


def collate_side_by_side(
    samples: Samples,
    tasks: Mapping[str, Task],
    *,
    task_weights: Mapping[str, float] | None = None,
    chain_weight: float = 1.0,
    weighting: str = "sequence",
    extra_pad: np.ndarray | None = None,
    position_range: int = 0,
    rng: np.random.Generator | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """The batch that trains a model with feedback: every iteration of a sample as a sequence of
    one iteration, which is fed the true rounds before it.

    Its weights are those of `looped`, and so are options and errors; a sample without rounds
    raises ValueError too.
    """
    if np.any(samples.loops < 1):
        raise ValueError("a sample without rounds has no iteration to train: leave it out")
    split, owner, before = samples.iterations()
    final = before + 1 == samples.loops[owner]
    order = np.argsort(final, kind="stable")
    split, owner, before = split.take(order), owner[order], before[order]
    batch = collate_looped(
        split, tasks, chain_weight=chain_weight, task_weights=task_weights, weighting=weighting,
        extra_pad=None if extra_pad is None else extra_pad[owner],
        position_range=position_range, rng=rng, device=device,
    )  # fmt: skip
    widths = batch.plan.lengths
    fed = true_tokens(samples, owner, before, widths, places_of(split, tasks, widths))
    task_weight = _task_weights(split, task_weights)
    counts = np.diff(split.round_offsets) + 1
    weights = batch.weights
    if weighting == "sequence":
        share = chain_weight * task_weight / (len(samples) * samples.loops[owner] * counts)
        weights = torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device)
    answer_share = task_weight[len(owner) - len(samples) :] / max(1, len(samples))
    return replace(
        batch,
        weights=weights,
        answers=batch.answers[len(owner) - len(samples) :],
        answer_weights=torch.from_numpy(answer_share.astype(np.float32)).to(device),
        order=owner[len(owner) - len(samples) :],
        fed=torch.from_numpy(fed).to(device),
        target_offsets=lengths_to_offsets(counts),
    )


def collate_carried(
    samples: Samples, tasks: Mapping[str, Task], *, truth: float = 1.0, **options
) -> PackedBatch:
    """The batch that trains a model whose iterations get the state before them and a round.

    truth: the share of the iterations that are fed the true round. Other options and errors are
    those of `looped`.
    """
    if not 0 <= truth <= 1:
        raise ValueError(f"truth = {truth}: it must lie in [0, 1]")
    batch = collate_looped(samples, tasks, feedback=True, **options)
    plan, s = batch.plan, samples.take(batch.order)
    active = np.array(plan.active_sequences, np.int64)
    owner = concat_ranges(np.zeros_like(active), active)
    before = np.repeat(np.arange(len(active)), active)
    widths = plan.lengths[owner]
    rows = concat_ranges(plan.offsets[owner], widths)
    places = FedPlaces(*(column[rows] for column in places_of(s, tasks, plan.lengths)))
    fed = torch.from_numpy(true_tokens(s, owner, before, widths, places))
    return replace(batch, true_feed=fed.to(plan.device), truth=truth)


def collate_autoregressive(
    samples: Samples,
    tasks: Mapping[str, Task],
    *,
    task_weights: Mapping[str, float] | None = None,
    weighting: str = "sequence",
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Makes the autoregressive model's batch: whole sequences with targets after the problem.

    Args:
        samples: S samples.
        tasks, task_weights, weighting, device: as in `collate_looped`, which raises the same
            errors.
    """
    _check_weighting(weighting, task_weights)
    sequence, offsets, prompts = samples.sequences(tasks)
    sizes = np.diff(offsets)
    inputs = concat_ranges(offsets[:-1], sizes - 1)
    plan = Plan(sizes - 1, np.ones(len(samples), np.int64), device)
    counts = sizes - prompts
    rows = concat_ranges(plan.offsets[:-1] + prompts - 1, counts)
    targets = sequence[concat_ranges(offsets[:-1] + prompts, counts)]
    task_weight = _task_weights(samples, task_weights)
    if weighting == "sequence":
        share = task_weight / (max(1, len(samples)) * counts)
    else:
        share = task_weight / max(1, len(rows))
    return PackedBatch(
        torch.from_numpy(sequence[inputs].astype(np.int64)).to(device),
        plan,
        torch.from_numpy(rows).to(device),
        (0, len(rows)) if len(samples) else (0,),
        torch.from_numpy(targets.astype(np.int64)).to(device),
        torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device),
        torch.from_numpy(samples.answer.astype(np.int64)).to(device),
        torch.zeros(len(samples), device=device),
        np.arange(len(samples)),
        _largest(sequence),
    )


def _check_weighting(weighting: str, task_weights: Mapping[str, float] | None) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r} is unknown: use one of {WEIGHTINGS}")
    for name in set(task_weights or {}).difference(TASK_NAMES):
        raise ValueError(f"task_weights names {name!r}: the tasks are {', '.join(TASK_NAMES)}")


def _largest(*tokens: np.ndarray) -> int:
    """Returns the largest token id; raises ValueError for a negative one."""
    least = min(int(part.min(initial=0)) for part in tokens)
    if least < 0:
        raise ValueError(f"token {least} is negative: token ids are 0 or more")
    return max(int(part.max(initial=0)) for part in tokens)


def _task_weights(samples: Samples, task_weights: Mapping[str, float] | None) -> np.ndarray:
    """Returns each sample's task weight (S,)."""
    table = np.array([(task_weights or {}).get(name, 1.0) for name in TASK_NAMES])
    return table[samples.task]

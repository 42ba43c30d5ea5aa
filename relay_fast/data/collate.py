"""Collation of samples into packed batches for the looped and the autoregressive model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from relay_fast.batch.feeder import Feeder
from relay_fast.batch.packed import PackedBatch
from relay_fast.batch.plan import Plan
from relay_fast.data.feedback import check_numbers, iterations_of, true_rounds
from relay_fast.tasks import TASK_NAMES, FeedbackDraws, Samples, Task, Written
from relay_fast.tasks.feedback import right_aligned
from relay_fast.tasks.samples import tasks_present
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.arguments import check_kind
from relay_fast.utils.numbers import as_float, as_ints
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
    carry_state: bool = False,
    cut: FeedbackDraws | None = None,
    rng: np.random.Generator | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Makes the looped model's batch: problems, with each iteration's round right-aligned.

    An input shorter than its task's longest round plus the boundary `<pad>` is padded on the left,
    between the task token (always leftmost) and the problem.

    Args:
        samples: S samples.
        tasks: their tasks by name.
        task_weights: weights of the tasks' losses, default 1.
        chain_weight: weight of the rounds' loss relative to the answers'.
        weighting: "sequence" gives all sequences the same weight, whatever their length; "row"
            gives all supervised rows the same weight.
        extra_pad: (S,) further padding tokens of each input.
        carry_state: whether the model gets its own rounds as tokens beside its state.
        cut: moves positions on from a random place of an input on; None for 0..n − 1 in each.
        rng: draws the cuts.
        device: of the batch.

    Raises:
        ValueError: for unknown weightings and tasks, and negative tokens.
    """
    _check_request(samples, weighting, task_weights, tasks)
    order = np.argsort(-samples.loops, kind="stable")
    s = samples.take(order)
    sizes, width = np.diff(s.problem_offsets), input_widths(s, tasks)
    if extra_pad is not None:
        extra = as_ints("extra_pad", extra_pad, len(s))
        if extra.min(initial=0) < 0:
            raise ValueError(f"extra_pad has least value {extra.min()}: give 0 or more")
        width = width + extra[order]
    positions = None
    if cut is not None:
        check_kind("cut", cut, FeedbackDraws, "give FeedbackDraws(cut=..., cut_probability=...)")
        _check_rng("cut", rng)
        positions = concat_ranges(np.zeros_like(width), width) + cut.moves(width, None, rng)
    plan = Plan(width, s.loops, device, positions)
    tokens = np.full(plan.rows, PAD, np.int64)
    ends = plan.offsets[1:]
    tokens[concat_ranges(ends - sizes + 1, sizes - 1)] = s.problem[
        concat_ranges(s.problem_offsets[:-1] + 1, sizes - 1)
    ]
    tokens[plan.offsets[:-1]] = s.problem[s.problem_offsets[:-1]]

    # Rounds, iteration-major: the boundary <pad>, then the round's tokens.
    owner, iteration = s.iterations()
    major = np.lexsort((owner, iteration))
    owner, iteration = owner[major], iteration[major]
    lengths = np.diff(s.round_offsets)[major]
    _check_room(s, tasks, owner, lengths, width[owner])
    counts = lengths + 1
    rows = concat_ranges(ends[owner] - counts, counts)
    targets = np.full(len(rows), PAD, np.int64)
    starts = lengths_to_offsets(counts)[:-1]
    targets[concat_ranges(starts + 1, lengths)] = s.rounds[
        concat_ranges(s.round_offsets[:-1][major], lengths)
    ]
    per_iteration = np.bincount(iteration, weights=counts, minlength=plan.max_loops)
    feeder = None
    if carry_state:
        feeder = Feeder(torch.from_numpy(np.repeat(ends - 1, plan.lengths)).to(device), PAD)
    task_weight = _task_weights(s, task_weights, tasks)
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
        next_tokens=False,
    )


def collate_side_by_side(
    samples: Samples,
    tasks: Mapping[str, Task],
    *,
    task_weights: Mapping[str, float] | None = None,
    chain_weight: float = 1.0,
    weighting: str = "sequence",
    draws: Mapping[str, FeedbackDraws] | None = None,
    rng: np.random.Generator | None = None,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Makes a batch for training with feedback: an iteration is a sequence that sees true rounds.

    Args:
        samples: S samples, each with at least one round; ValueError otherwise.
        tasks, task_weights, chain_weight, weighting, device: as in `collate_looped`.
        draws: random options of the inputs (`Task.inputs`), by task.
        rng: draws them for each iteration.
    """
    _check_request(samples, weighting, task_weights, tasks)
    if np.any(samples.loops < 1):
        raise ValueError("a sample without rounds has no iteration to train: leave it out")
    _check_draws(draws or {}, tasks, rng)
    owner, before = samples.iterations()
    order = np.argsort(before + 1 == samples.loops[owner], kind="stable")
    owner, before = owner[order], before[order]
    inputs, widths, shifts = iterations_of(Written.truth(samples), tasks, owner, before, draws, rng)
    rounds, lengths = true_rounds(samples, tasks, owner, before, shifts)
    for k, task in tasks_present(samples.task, tasks).items():
        own = samples.task[owner] == k
        check_numbers(task, inputs.fed[np.repeat(own, widths)])
        check_numbers(task, rounds[np.repeat(own, lengths)])
    _check_room(samples, tasks, owner, lengths, widths)
    plan = Plan(widths, np.ones(len(owner), np.int64), device, inputs.positions)
    counts = lengths + 1
    rows = concat_ranges(plan.offsets[1:] - counts, counts)
    targets = right_aligned(counts, rounds, np.cumsum(lengths) - lengths, lengths)
    task_weight = _task_weights(samples, task_weights, tasks)
    if weighting == "sequence":
        share = chain_weight * task_weight[owner] / (len(samples) * samples.loops[owner] * counts)
    else:
        share = chain_weight * task_weight[owner] / max(1, len(rows))
    last = owner[len(owner) - len(samples) :]
    tensor = lambda array, dtype: torch.from_numpy(array.astype(dtype)).to(device)
    return PackedBatch(
        tensor(inputs.tokens, np.int64),
        plan,
        tensor(rows, np.int64),
        (0, len(rows)) if len(owner) else (0,),
        tensor(targets, np.int64),
        tensor(np.repeat(share, counts), np.float32),
        tensor(samples.answer[last], np.int64),
        torch.zeros(len(samples), device=device),
        last,
        _largest(inputs.tokens, inputs.fed, targets),
        fed=tensor(inputs.fed, np.int64),
        target_offsets=lengths_to_offsets(counts),
        next_tokens=False,
    )


def collate_carried(
    samples: Samples, tasks: Mapping[str, Task], *, truth: float = 1.0, **options
) -> PackedBatch:
    """Makes the batch that trains a model whose iterations get the state and the last round.

    Args:
        samples: S samples.
        tasks: their tasks by name.
        truth: share of the iterations that get the true round, in [0, 1].
        **options: others of `collate_looped`, which raises the same errors.
    """
    check_truth(truth)
    batch = collate_looped(samples, tasks, carry_state=True, **options)
    plan, s = batch.plan, samples.take(batch.order)
    active = np.array(plan.active_sequences, np.int64)
    owner = concat_ranges(np.zeros_like(active), active)
    before = np.repeat(np.arange(len(active)), active)
    last = Written.truth(s).last_if_any(owner, before)
    fed = torch.from_numpy(right_aligned(plan.lengths[owner], s.rounds, *last))
    return replace(batch, true_feed=fed.to(plan.device), truth=truth)


def check_truth(truth: float) -> None:
    """Raises ValueError for a share of true rounds that is none."""
    if not 0 <= as_float("truth", truth) <= 1:
        raise ValueError(f"truth = {truth}: it must lie in [0, 1]")


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
    _check_request(samples, weighting, task_weights, tasks)
    sequence, offsets, prompts = samples.sequences(tasks)
    sizes = np.diff(offsets)
    inputs = concat_ranges(offsets[:-1], sizes - 1)
    plan = Plan(sizes - 1, np.ones(len(samples), np.int64), device)
    counts = sizes - prompts
    rows = concat_ranges(plan.offsets[:-1] + prompts - 1, counts)
    targets = sequence[concat_ranges(offsets[:-1] + prompts, counts)]
    task_weight = _task_weights(samples, task_weights, tasks)
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
        next_tokens=True,
    )


def _check_request(
    samples: Samples,
    weighting: str,
    task_weights: Mapping[str, float] | None,
    tasks: Mapping[str, Task],
) -> None:
    check_kind("samples", samples, Samples, "give the Samples that a task's sample() returns")
    check_kind("tasks", tasks, Mapping, "give the samples' tasks by name")
    for name, task in tasks.items():
        check_kind(f"tasks[{name!r}]", task, Task, "give a task")
    for name in ("problem", "rounds", "answer"):
        if (kind := getattr(samples, name).dtype).kind not in "iu":
            raise TypeError(f"samples.{name} is {kind}: give token ids, which are integers")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting = {weighting!r} is unknown: use one of {WEIGHTINGS}")
    known = dict.fromkeys((*TASK_NAMES, *tasks))
    for name in set(task_weights or {}).difference(known):
        raise ValueError(f"task_weights names {name!r}: the tasks are {', '.join(known)}")


def _check_draws(
    draws: Mapping[str, FeedbackDraws], tasks: Mapping[str, Task], rng: np.random.Generator | None
) -> None:
    """Raises TypeError and ValueError for draws that could not be made, or for no task."""
    check_kind("draws", draws, Mapping, "give FeedbackDraws by the names of tasks")
    if draws:
        _check_rng("draws", rng)
    known = [task.name for task in tasks.values()]
    for name, own in draws.items():
        check_kind(f"draws[{name!r}]", own, FeedbackDraws, "give FeedbackDraws")
        if name not in known:
            raise ValueError(f"draws names {name!r}: the tasks are {', '.join(known)}")


def _check_rng(what: str, rng: np.random.Generator | None) -> None:
    check_kind(f"rng of {what}", rng, np.random.Generator, "give numpy.random.default_rng(SEED)")


def input_widths(samples: Samples, tasks: Mapping[str, Task]) -> np.ndarray:
    """(S,) tokens of the looped model's input for each sample, padding of short ones included."""
    widths = np.diff(samples.problem_offsets)
    for k, task in tasks_present(samples.task, tasks).items():
        own = samples.task == k
        widths[own] = np.maximum(widths[own], task.min_widths(samples.length[own]))
    return widths


def _largest(*tokens: np.ndarray) -> int:
    """Returns the largest token id; raises ValueError for a negative one."""
    least = min(int(part.min(initial=0)) for part in tokens)
    if least < 0:
        raise ValueError(f"token {least} is negative: token ids are 0 or more")
    return max(int(part.max(initial=0)) for part in tokens)


def _task_weights(
    samples: Samples, task_weights: Mapping[str, float] | None, tasks: Mapping[str, Task]
) -> np.ndarray:
    """Returns each sample's task weight (S,)."""
    weights = np.ones(len(samples))
    for k, task in tasks_present(samples.task, tasks).items():
        weights[samples.task == k] = (task_weights or {}).get(task.name, 1.0)
    return weights


def _check_room(
    samples: Samples,
    tasks: Mapping[str, Task],
    owner: np.ndarray,
    lengths: np.ndarray,
    widths: np.ndarray,
) -> None:
    """Raises ValueError if a round of `lengths` tokens, of the sample `owner`, and its boundary
    `<pad>` do not fit into an input of `widths` tokens."""
    if np.any(lengths >= widths):
        first = int(np.argmax(lengths >= widths))
        task = tasks_present(samples.task, tasks)[int(samples.task[owner[first]])]
        raise ValueError(
            f"task {task.name!r}: a round of {lengths[first]} tokens "
            f"and its boundary <pad> do not fit into its input of {widths[first]}: raise the "
            f"task's min_input_tokens"
        )

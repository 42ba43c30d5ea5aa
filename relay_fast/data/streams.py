"""Streams of training batches: step → batch, the same for every worker and after every resume.

A stream draws only true problems inside the training range, or samples that a model wrote; it
reports the longest *true* problem of each batch, so that a run can prove what it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset, default_convert

from relay_fast.batch.packed import PackedBatch
from relay_fast.data.collate import (
    collate_autoregressive,
    collate_carried,
    collate_looped,
    collate_side_by_side,
)
from relay_fast.data.feedback import mean_iteration_tokens
from relay_fast.data.workers import steps_ahead
from relay_fast.tasks import TASK_NAMES, FeedbackDraws, Samples, Task
from relay_fast.utils.cores import usable_cores

_FRESH = 0x5EED  # salt of the length draws, apart from the problems' own seed
_FEEDBACK = 0xFED  # and of what is drawn for each iteration


class Schedule(Protocol):
    """What a stream reads of its stage's schedule (see `relay_fast.training.schedule.Schedule`)."""

    progress: np.ndarray

    @property
    def steps(self) -> int: ...


class Step(NamedTuple):
    """A training batch and the longest true problem in it, by task."""

    batch: PackedBatch
    longest_true: dict[str, int]


@dataclass(frozen=True)
class BatchFormat:
    """How samples become a batch: `kind` looped or autoregressive, and the batch's options;
    feedback, carry_state: as the looped model has them; draws: with feedback and no carried state,
    what is drawn for each iteration, by task."""

    kind: str
    task_weights: Mapping[str, float] = field(default_factory=dict)
    chain_weight: float = 1.0
    weighting: str = "sequence"
    feedback: bool = False
    carry_state: bool = False
    draws: Mapping[str, FeedbackDraws] = field(default_factory=dict)
    batch_tokens: int | None = None  # upper bound on a batch's tokens: the samples that fit

    def collate(
        self,
        samples: Samples,
        tasks: Mapping[str, Task],
        extra_pad: np.ndarray | None,
        **more,
    ) -> PackedBatch:
        """The batch. more: further options of the looped model's (truth, or rng of its draws)."""
        if self.batch_tokens is not None:
            samples, extra_pad = self._limit_tokens(samples, tasks, extra_pad)
        options = {"task_weights": self.task_weights, "weighting": self.weighting}
        if self.kind == "autoregressive":
            return collate_autoregressive(samples, tasks, **options)
        options |= {"chain_weight": self.chain_weight, **more}
        if self.side_by_side:
            return collate_side_by_side(samples, tasks, draws=self.draws, **options)
        pack = collate_carried if self.feedback else collate_looped
        return pack(samples, tasks, extra_pad=extra_pad, **options)

    @property
    def side_by_side(self) -> bool:
        return self.feedback and not self.carry_state

    def _limit_tokens(
        self, samples: Samples, tasks: Mapping[str, Task], extra_pad: np.ndarray | None
    ):
        """The first samples that fit, tasks in turns so that none of them is cut off."""
        if self.kind == "autoregressive":
            tokens = np.diff(samples.sequences(tasks)[1]) - 1
        else:
            shortest = [tasks[TASK_NAMES[k]].min_input_tokens for k in samples.task]
            tokens = np.maximum(np.diff(samples.problem_offsets), shortest)
            tokens = tokens if extra_pad is None else tokens + extra_pad
        turn = np.empty(len(samples), np.int64)
        for k in np.unique(samples.task):
            own = np.flatnonzero(samples.task == k)
            turn[own] = np.arange(len(own))
        order = np.argsort(turn, kind="stable")
        total = np.cumsum(tokens[order])
        order = order[: max(1, int(np.searchsorted(total, self.batch_tokens, side="right")))]
        return samples.take(order), None if extra_pad is None else extra_pad[order]


class TruthStream(Dataset):
    """True problems inside the training range, tasks in equal shares.

    ranges[task] = (shortest, longest); lengths: "proportional" (probability ∝ length) or "uniform".
    lengths_per_batch: how many different (length, padding) pairs a batch draws per task, None for
    one a sample; few of them make attention cheap. dataset_size: samples per task that exist in
    all, None for ever fresh ones. curriculum: share of the stage over which the longest length
    grows. pad_probability: share of the draws that get random extra padding, so that the input is
    as long as some problem of up to `pad_to` tokens. truth: share of the iterations that are fed
    true rounds in the end, where the state is carried too; all of them at first.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task],
        ranges: Mapping[str, Sequence[int]],
        form: BatchFormat,
        schedule: Schedule,
        *,
        batch_size: int,
        seed: int,
        lengths: str = "proportional",
        lengths_per_batch: int | None = None,
        dataset_size: int | None = None,
        curriculum: float = 0.0,
        pad_probability: float = 0.0,
        pad_to: int = 0,
        truth: float = 1.0,
    ):
        if lengths not in ("proportional", "uniform"):
            raise ValueError(f'lengths = {lengths!r} is unknown: use "proportional" or "uniform"')
        if truth < 1 and not form.carry_state:
            raise ValueError(
                f"truth = {truth}: iterations that train side by side are fed true rounds alone; "
                "use truth = 1, or a model with carry_state = true"
            )
        self.tasks, self.ranges, self.form, self.schedule = tasks, ranges, form, schedule
        self.share = max(1, batch_size // len(tasks))
        self.seed, self.lengths = seed, lengths
        self.lengths_per_batch = lengths_per_batch
        self.dataset_size, self.curriculum = dataset_size, curriculum
        self.pad_probability, self.pad_to = pad_probability, pad_to
        self.truth = truth
        for name, task in tasks.items():
            for length in ranges[name]:
                task.check_length(length)

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Step:
        block = self._block(step)
        parts, pads, longest_true = [], [], {}
        for name, task in self.tasks.items():
            rng = np.random.default_rng([_FRESH, self.seed, task.index, block])
            longest = self._longest(name, step)
            draws = self._draws(rng, self.ranges[name][0], longest)
            repeat = -(-self.share // len(draws))
            lengths = np.repeat(draws, repeat)[: self.share]
            pads.append(np.repeat(self._extra_pad(rng, task, draws), repeat)[: self.share])
            parts.append(task.sample(lengths, self.seed, block * self.share))
            longest_true[name] = int(lengths.max())
        samples = Samples.concat(parts)
        extra = np.concatenate(pads) if self.pad_probability else None
        options = {}
        if self.form.side_by_side:
            options["rng"] = np.random.default_rng([_FEEDBACK, self.seed, step])
        if self.truth < 1:
            options["truth"] = 1 - (1 - self.truth) * float(self.schedule.progress[step])
        return Step(self.form.collate(samples, self.tasks, extra, **options), longest_true)

    def _block(self, step: int) -> int:
        """Which block of `share` samples a step takes: ever new ones, or each once an epoch."""
        if self.dataset_size is None:
            return step
        blocks = max(1, self.dataset_size // self.share)
        epoch, index = divmod(step, blocks)
        return int(np.random.default_rng([self.seed, epoch]).permutation(blocks)[index])

    def _longest(self, name: str, step: int) -> int:
        progress = float(self.schedule.progress[step])
        return curriculum_length(progress, *self.ranges[name], self.curriculum)

    def _draws(self, rng: np.random.Generator, shortest: int, longest: int) -> np.ndarray:
        choices = np.arange(shortest, longest + 1)
        weights = choices if self.lengths == "proportional" else np.ones(len(choices))
        count = self.lengths_per_batch or self.share
        return rng.choice(choices, size=count, p=weights / weights.sum())

    def _extra_pad(self, rng: np.random.Generator, task: Task, draws: np.ndarray) -> np.ndarray:
        longest = np.array([task.max_problem_tokens(n) for n in draws.tolist()])
        room = self.pad_to - np.maximum(longest, task.min_input_tokens)
        extra = rng.integers(0, np.maximum(room, 0) + 1)
        return np.where(rng.random(len(draws)) < self.pad_probability, extra, 0)


class SampleStream(Dataset):
    """A fixed set of samples, shuffled anew each epoch.

    longest_true[task]: the longest of them whose truth a task computed (the rest a model wrote).
    """

    def __init__(
        self,
        samples: Samples,
        tasks: Mapping[str, Task],
        form: BatchFormat,
        schedule: Schedule,
        *,
        batch_size: int,
        seed: int,
        longest_true: Mapping[str, int],
    ):
        if not len(samples):
            raise ValueError("there are no samples to train on: generate or keep more chains")
        self.samples, self.tasks, self.form, self.schedule = samples, tasks, form, schedule
        self.batch_size, self.seed = min(batch_size, len(samples)), seed
        self.longest_true = dict(longest_true)
        self._shuffled: tuple[int, np.ndarray] | None = None  # the last epoch, and its order

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Step:
        epoch, index = divmod(step, len(self.samples) // self.batch_size)
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
            self._shuffled = epoch, order
        order = self._shuffled[1]
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        batch = self.form.collate(self.samples.take(chosen), self.tasks, None)
        return Step(batch, self.longest_true)


def prefetch(
    stream: Dataset, start: int, workers: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Step]:
    """The stream's steps from `start` on, made ahead by `workers` processes (0: in this one), at
    most one a core.

    stopped(): asked while a process is waited for; KeyboardInterrupt is raised when it says so.
    Raises what the stream raises, and WorkerDied for a process that died, hangs or did not start.
    """
    workers = min(workers, usable_cores(), len(stream) - start)
    if workers > 0:
        yield from steps_ahead(stream, start, workers, stopped)
    else:
        for step in range(start, len(stream)):
            yield default_convert(stream[step])


def mean_cost(
    tasks: Mapping[str, Task],
    ranges: Mapping[str, Sequence[int]],
    kind: str,
    batch_size: int,
    lengths: str,
    curriculum: float,
    draws: Mapping[str, FeedbackDraws] | None = None,
):
    """cost(progress): expected token-iterations of a batch, for `Schedule.by_work`.

    draws, for iterations that train side by side: by task, what is drawn for them.
    """

    def cost_of(task: Task, length: int) -> float:
        if draws is not None:
            return mean_iteration_tokens(task, length, draws.get(task.name, FeedbackDraws()))
        if kind == "looped":
            return task.max_problem_tokens(length) * task.loops(length)
        return task.max_sequence_tokens(length)

    choices = {name: np.arange(ranges[name][0], ranges[name][1] + 1) for name in tasks}
    costs = {
        name: np.array([cost_of(task, n) for n in choices[name].tolist()])
        for name, task in tasks.items()
    }

    def cost(progress: float) -> float:
        total = 0.0
        for name in tasks:
            longest = curriculum_length(progress, *ranges[name], curriculum)
            allowed = choices[name][choices[name] <= longest]
            weights = allowed if lengths == "proportional" else np.ones(len(allowed))
            total += float(np.average(costs[name][: len(allowed)], weights=weights))
        return total * batch_size / len(tasks)

    return cost


def curriculum_length(progress: float, shortest: int, longest: int, share: float) -> int:
    """Largest length at `progress`: grows from the shortest + 1 to the longest over the first
    `share` of the stage; always inside the training range."""
    if share <= 0:
        return longest
    start = min(longest, shortest + 1)
    return min(longest, math.ceil(start + (longest - start) * min(1.0, progress / share)))

"""Streams of training batches: step → batch, the same in every worker and after every resume.

A stream draws true problems inside the training range, or samples that a model generated. It
reports the longest *true* problem of each batch, so that a run can prove its training range.
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
    check_truth,
    collate_autoregressive,
    collate_carried,
    collate_looped,
    collate_side_by_side,
    input_widths,
)
from relay_fast.data.feedback import mean_iteration_tokens
from relay_fast.data.workers import steps_ahead
from relay_fast.tasks import FeedbackDraws, Samples, Task
from relay_fast.utils.cores import usable_cores
from relay_fast.utils.numbers import as_float, as_int

_FRESH = 0x5EED  # salt of the length draws, apart from the problems' own seed
_FEEDBACK = 0xFED  # and of what is drawn for each iteration


class Schedule(Protocol):
    """The part of a `relay_fast.training.schedule.Schedule` that a stream reads."""

    progress: np.ndarray

    @property
    def steps(self) -> int: ...


class Step(NamedTuple):
    """A training batch and the longest true problem in it, by task."""

    batch: PackedBatch
    longest_true: dict[str, int]


@dataclass(frozen=True)
class BatchFormat:
    """The kind ("looped" or "autoregressive") and options of batches.

    feedback and carry_state are those of the looped model's ModelConfig. draws, with feedback and
    without a carried state, are the random options of each iteration's inputs, by task.
    """

    kind: str
    task_weights: Mapping[str, float] = field(default_factory=dict)
    chain_weight: float = 1.0
    weighting: str = "sequence"
    feedback: bool = False
    carry_state: bool = False
    draws: Mapping[str, FeedbackDraws] = field(default_factory=dict)
    batch_tokens: int | None = None  # samples beyond so many tokens are left out

    def collate(
        self,
        samples: Samples,
        tasks: Mapping[str, Task],
        extra_pad: np.ndarray | None,
        **more,
    ) -> PackedBatch:
        """Makes a batch.

        Args:
            samples: S samples.
            tasks: their tasks by name.
            extra_pad: (S,) further padding tokens of each input, or None.
            **more: `rng`, `cut` and `truth` of the looped model's batches.
        """
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
        """Keeps the first samples of all tasks in turn, up to `batch_tokens`."""
        if self.kind == "autoregressive":
            tokens = np.diff(samples.sequences(tasks)[1]) - 1
        else:
            tokens = input_widths(samples, tasks)
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

    Args:
        tasks: the tasks by name.
        ranges: (shortest, longest) length of each task.
        form: of the batches.
        schedule: of the training stage.
        batch_size: samples per batch.
        seed: of the problems, lengths and padding.
        lengths: "proportional" (probability ∝ length) or "uniform".
        lengths_per_batch: different (length, padding) pairs per batch and task, None for one per
            sample; with few of them attention is cheaper.
        dataset_size: number of different samples per task, None for new ones in every batch.
        curriculum: share of the stage over which the longest length grows.
        pad_probability: share of the draws that get random extra padding, up to `pad_to` tokens.
        pad_to: tokens of the longest padded input.
        cut: looped models: positions behind a random place are up to so many larger.
        cut_probability: share of the inputs with such a cut.
        truth: with a carried state, share of the iterations that are fed true rounds at the end
            of the stage; the share falls from 1 at its start.

    Raises:
        ValueError: for lengths that a task does not have, and options that do not fit together.
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
        cut: int = 0,
        cut_probability: float = 0.5,
        truth: float = 1.0,
    ):
        if lengths not in ("proportional", "uniform"):
            raise ValueError(f'lengths = {lengths!r} is unknown: use "proportional" or "uniform"')
        check_truth(truth)
        for name, share in (("curriculum", curriculum), ("pad_probability", pad_probability)):
            if not 0 <= as_float(name, share) <= 1:
                raise ValueError(f"{name} = {share}: it must lie in [0, 1]")
        if truth < 1 and not form.carry_state:
            raise ValueError(
                f"truth = {truth}: iterations that train side by side are fed true rounds alone; "
                "use truth = 1, or a model with carry_state = true"
            )
        for name, drawn in (("cut", cut), ("pad_probability", pad_probability)):
            if drawn and form.side_by_side:
                what = "cut" if name == "cut" else "padded"
                raise ValueError(
                    f"{name} = {drawn}: iterations that train side by side are {what} each for "
                    "itself, by the draws of their form"
                )
        self.tasks, self.ranges, self.form, self.schedule = tasks, ranges, form, schedule
        self.share = max(1, batch_size // len(tasks))
        self.seed, self.lengths = seed, lengths
        self.lengths_per_batch = lengths_per_batch
        self.dataset_size, self.curriculum = dataset_size, curriculum
        self.pad_probability, self.pad_to = pad_probability, as_int("pad_to", pad_to, least=0)
        self.cut = FeedbackDraws(cut=cut, cut_probability=cut_probability) if cut else None
        self.truth = truth
        for name, task in tasks.items():
            task.check_range(*ranges[name])

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Step:
        block = self._block(step)
        parts, pads, longest_true = [], [], {}
        for name, task in self.tasks.items():
            rng = np.random.default_rng([_FRESH, self.seed, task.index, block])
            longest = self._longest(name, step)
            draws = self._draws(rng, task.lengths_between(self.ranges[name][0], longest))
            repeat = -(-self.share // len(draws))
            lengths = np.repeat(draws, repeat)[: self.share]
            pads.append(np.repeat(self._extra_pad(rng, task, draws), repeat)[: self.share])
            parts.append(task.sample(lengths, self.seed, block * self.share))
            longest_true[name] = int(lengths.max())
        samples = Samples.concat(parts)
        extra = np.concatenate(pads) if self.pad_probability else None
        options = {}
        if self.form.side_by_side or self.cut:
            options["rng"] = np.random.default_rng([_FEEDBACK, self.seed, step])
        if self.cut:
            options["cut"] = self.cut
        if self.truth < 1:
            options["truth"] = 1 - (1 - self.truth) * float(self.schedule.progress[step])
        return Step(self.form.collate(samples, self.tasks, extra, **options), longest_true)

    def _block(self, step: int) -> int:
        """Returns the index of a step's block of samples: always new, or each once per epoch."""
        if self.dataset_size is None:
            return step
        blocks = max(1, self.dataset_size // self.share)
        epoch, index = divmod(step, blocks)
        return int(np.random.default_rng([self.seed, epoch]).permutation(blocks)[index])

    def _longest(self, name: str, step: int) -> int:
        progress = float(self.schedule.progress[step])
        return curriculum_length(progress, *self.ranges[name], self.curriculum)

    def _draws(self, rng: np.random.Generator, choices: np.ndarray) -> np.ndarray:
        weights = choices if self.lengths == "proportional" else np.ones(len(choices))
        count = self.lengths_per_batch or self.share
        return rng.choice(choices, size=count, p=weights / weights.sum())

    def _extra_pad(self, rng: np.random.Generator, task: Task, draws: np.ndarray) -> np.ndarray:
        longest = np.array([task.max_problem_tokens(n) for n in draws.tolist()])
        room = self.pad_to - np.maximum(longest, task.min_widths(draws))
        extra = rng.integers(0, np.maximum(room, 0) + 1)
        return np.where(rng.random(len(draws)) < self.pad_probability, extra, 0)


class SampleStream(Dataset):
    """A fixed set of samples, shuffled in each epoch.

    Args:
        samples: the samples, not empty.
        tasks: their tasks by name.
        form: of the batches.
        schedule: of the training stage.
        batch_size: samples per batch.
        seed: of the shuffling.
        longest_true: the longest true problem of each task among the samples, as opposed to those
            that a model generated.
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
        self._shuffled: tuple[int, np.ndarray] | None = None  # the last epoch and its order

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Step:
        epoch, index = divmod(step, len(self.samples) // self.batch_size)
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
            self._shuffled = epoch, order
        order = self._shuffled[1]
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        options = {}
        if self.form.side_by_side:
            options["rng"] = np.random.default_rng([_FEEDBACK, self.seed, step])
        batch = self.form.collate(self.samples.take(chosen), self.tasks, None, **options)
        return Step(batch, self.longest_true)


def prefetch(
    stream: Dataset, start: int, workers: int, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Step]:
    """Yields the stream's steps from `start` on, made ahead by worker processes.

    Args:
        stream: step → Step.
        start: the first step.
        workers: processes, at most one per core; 0 makes the steps in this process.
        stopped: polled while waiting for a process; True raises KeyboardInterrupt.

    Raises:
        WorkerDied: if a process died, hangs or did not start.
        Exception: what the stream raises.
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
    """Returns cost(progress), the expected token-iterations of a batch, for `Schedule.by_work`.

    Args:
        tasks: the tasks by name.
        ranges: (shortest, longest) length of each task.
        kind: "looped" or "autoregressive".
        batch_size: samples per batch.
        lengths: "proportional" or "uniform", the distribution of lengths.
        curriculum: share of the stage over which the longest length grows.
        draws: for iterations that train side by side, their random options by task.
    """

    def cost_of(task: Task, length: int) -> float:
        if draws is not None:
            return mean_iteration_tokens(task, length, draws.get(task.name, FeedbackDraws()))
        if kind == "looped":
            return task.max_problem_tokens(length) * task.loops(length)
        return task.max_sequence_tokens(length)

    choices = {name: task.lengths_between(*ranges[name]) for name, task in tasks.items()}
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
    """Returns the largest length at a progress; it is always inside the training range.

    Args:
        progress: share of the stage that is done.
        shortest: shortest length.
        longest: longest length.
        share: of the stage, over which the length grows from shortest + 1 to longest; 0 for the
            longest throughout.
    """
    if share <= 0:
        return longest
    start = min(longest, shortest + 1)
    return min(longest, math.ceil(start + (longest - start) * min(1.0, progress / share)))

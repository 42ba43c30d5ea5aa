"""Batches without padding: sequences laid end to end, sorted by loops, with their plan and
targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from relay_fast.feedback import feeder_of, places_of, true_tokens
from relay_fast.feeder import Feeder
from relay_fast.plan import Plan, check_loops
from relay_fast.ragged import offsets_of, pieces, ragged_index
from relay_fast.tasks import TASK_NAMES, FedPlaces, Samples, Task
from relay_fast.tasks.vocabulary import PAD

__all__ = ["PackedBatch", "Plan", "check_loops"]
WEIGHTINGS = ("sequence", "row")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B sequences of N tokens in all, largest loop count first.

    tokens (N,) int64; plan: order, active prefix, offsets (see `Plan`).
    rows (R,) int64: rows with a target, as index into the active prefix of their iteration,
    iteration-major; row_offsets: T + 1 ints, where the rows of iteration t start (index t − 1);
    targets (R,) int64; weights (R,) fp32: w_task · λ / (B · T_i · |M_t|).
    answers (B,) int64 and answer_weights (B,) fp32: w_task / B.
    order (B,): which sample of the caller each sequence is; max_token: the largest token id.
    fed (N,) int64: the true rounds that a `side_by_side` batch is fed, whose sequences are
    iterations (each sample's last one at the end, in `order`); target_offsets (sequences + 1,):
    where their rows start. feeder: for a model that is fed its own rounds. true_feed (Σ n_i · T_i,)
    int64, iteration-major: what every iteration is fed of true rounds where the state is carried;
    truth: the share of the iterations that are fed them, the others the model's own.
    """

    tokens: Tensor
    plan: Plan
    rows: Tensor
    row_offsets: tuple[int, ...]
    targets: Tensor
    weights: Tensor
    answers: Tensor
    answer_weights: Tensor
    order: np.ndarray
    max_token: int
    fed: Tensor | None = None
    target_offsets: np.ndarray | None = None
    feeder: Feeder | None = None
    true_feed: Tensor | None = None
    truth: float = 1.0

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def answer_rows(self) -> Tensor:
        """(B,) int64: the rows at whose last state the answers are read."""
        return self.plan.last_rows[self.plan.sequences - len(self) :]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on another device; itself if it is there already."""
        device = torch.device(device)
        if device.type == self.plan.device.type and device.index in (None, self.plan.device.index):
            return self
        moved = self._tensors(lambda t: t.to(device, non_blocking=True))
        if self.feeder is not None:
            moved["feeder"] = self.feeder.to(device)
        return replace(self, plan=self.plan.to(device), **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in pinned memory, as a DataLoader with `pin_memory=True` asks for it."""
        return replace(self, **self._tensors(Tensor.pin_memory))

    def _tensors(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: change(t) for name, t in values.items() if isinstance(t, Tensor)}

    def parts(self, tokens: int) -> Iterator[PackedBatch]:
        """A `side_by_side` batch as batches of about so many tokens each, whose losses add up to
        its own; any other batch as it is."""
        plan = self.plan
        if self.fed is None or plan.rows <= tokens:
            yield self
            return
        first_answer = plan.sequences - len(self)
        for chosen in pieces(plan.lengths, tokens):
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            rows = slice(int(plan.offsets[first]), int(plan.offsets[last]))
            offsets = self.target_offsets[first : last + 1]
            targets = slice(int(offsets[0]), int(offsets[-1]))
            answers = slice(max(0, first - first_answer), max(0, last - first_answer))
            yield replace(
                self,
                plan=plan.part(first, last),
                tokens=self.tokens[rows],
                fed=self.fed[rows],
                rows=self.rows[targets] - rows.start,
                row_offsets=(0, targets.stop - targets.start),
                target_offsets=offsets - offsets[0],
                targets=self.targets[targets],
                weights=self.weights[targets],
                answers=self.answers[answers],
                answer_weights=self.answer_weights[answers],
                order=self.order[answers],
            )

    @staticmethod
    def looped(
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
        feedback: for a model that reads its own rounds back (`relay_fast.feedback`).
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
        tokens[ragged_index(ends - sizes + 1, sizes - 1)] = s.problem[
            ragged_index(s.problem_offsets[:-1] + 1, sizes - 1)
        ]
        tokens[plan.offsets[:-1]] = s.problem[s.problem_offsets[:-1]]

        # Rounds, iteration-major: the boundary <pad> and then the round's tokens.
        owner = np.repeat(np.arange(len(s)), s.loops)
        iteration = np.arange(len(owner)) - s.first_round[owner]
        major = np.lexsort((owner, iteration))
        owner, iteration = owner[major], iteration[major]
        lengths = np.diff(s.round_offsets)[major]
        if np.any(lengths >= width[owner]):
            raise ValueError(
                "a round does not fit into its input: raise the task's min_input_tokens"
            )
        counts = lengths + 1
        rows = ragged_index(ends[owner] - counts, counts)
        targets = np.full(len(rows), PAD, np.int64)
        starts = offsets_of(counts)[:-1]
        targets[ragged_index(starts + 1, lengths)] = s.rounds[
            ragged_index(s.round_offsets[:-1][major], lengths)
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
            tuple(offsets_of(per_iteration.astype(np.int64)).tolist()),
            torch.from_numpy(targets).to(device),
            torch.from_numpy(np.repeat(share, counts).astype(np.float32)).to(device),
            torch.from_numpy(s.answer.astype(np.int64)).to(device),
            torch.from_numpy((task_weight / max(1, len(s))).astype(np.float32)).to(device),
            order,
            max(_largest(tokens, targets), int(s.answer.max(initial=0))),  # no answer: negative
            feeder=feeder,
        )

    @staticmethod
    def side_by_side(
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
        batch = PackedBatch.looped(
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
            target_offsets=offsets_of(counts),
        )

    @staticmethod
    def carried(
        samples: Samples, tasks: Mapping[str, Task], *, truth: float = 1.0, **options
    ) -> PackedBatch:
        """The batch that trains a model whose iterations get the state before them and a round.

        truth: the share of the iterations that are fed the true round. Other options and errors are
        those of `looped`.
        """
        if not 0 <= truth <= 1:
            raise ValueError(f"truth = {truth}: it must lie in [0, 1]")
        batch = PackedBatch.looped(samples, tasks, feedback=True, **options)
        plan, s = batch.plan, samples.take(batch.order)
        active = np.array(plan.active_sequences, np.int64)
        owner = ragged_index(np.zeros_like(active), active)
        before = np.repeat(np.arange(len(active)), active)
        widths = plan.lengths[owner]
        rows = ragged_index(plan.offsets[owner], widths)
        places = FedPlaces(*(column[rows] for column in places_of(s, tasks, plan.lengths)))
        fed = torch.from_numpy(true_tokens(s, owner, before, widths, places))
        return replace(batch, true_feed=fed.to(plan.device), truth=truth)

    @staticmethod
    def autoregressive(
        samples: Samples,
        tasks: Mapping[str, Task],
        *,
        task_weights: Mapping[str, float] | None = None,
        weighting: str = "sequence",
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """The autoregressive model's batch: whole sequences, targets after the problem.

        Options and errors are those of `looped`.
        """
        _check_weighting(weighting, task_weights)
        sequence, offsets, prompts = samples.sequences(tasks)
        sizes = np.diff(offsets)
        inputs = ragged_index(offsets[:-1], sizes - 1)
        plan = Plan(sizes - 1, np.ones(len(samples), np.int64), device)
        counts = sizes - prompts
        rows = ragged_index(plan.offsets[:-1] + prompts - 1, counts)
        targets = sequence[ragged_index(offsets[:-1] + prompts, counts)]
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


def _positions(widths: np.ndarray, span: int, rng: np.random.Generator | None) -> np.ndarray:
    """Ascending positions in 0..span − 1 of inputs laid end to end: drawn, or spread evenly."""
    longest = int(widths.max(initial=0))
    if longest > span:
        raise ValueError(
            f"an input of {longest} tokens has no room in position_range = {span}: use a larger "
            "range, or shorter problems"
        )
    if rng is not None:
        ranks = rng.random((len(widths), span)).argsort(1).argsort(1)
        return np.nonzero(ranks < widths[:, None])[1]
    place = ragged_index(np.zeros_like(widths), widths)
    return np.rint(place * (span - 1) / np.repeat(np.maximum(1, widths - 1), widths)).astype(int)


def _largest(*tokens: np.ndarray) -> int:
    """The largest token id."""
    least = min(int(part.min(initial=0)) for part in tokens)
    if least < 0:
        raise ValueError(f"token {least} is negative: token ids are 0 or more")
    return max(int(part.max(initial=0)) for part in tokens)


def _task_weights(samples: Samples, task_weights: Mapping[str, float] | None) -> np.ndarray:
    """w_task of each sample."""
    table = np.array([(task_weights or {}).get(name, 1.0) for name in TASK_NAMES])
    return table[samples.task]

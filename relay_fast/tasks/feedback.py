"""What each iteration of a model that is fed its own rounds sees: rounds so far, inputs, draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from relay_fast.tasks.samples import Samples
from relay_fast.tasks.vocabulary import PAD
from relay_fast.utils.numbers import as_float, as_int
from relay_fast.utils.ragged import concat_ranges


@dataclass(frozen=True, eq=False)
class Written:
    """Problems and the rounds that were written of them so far.

    problems: their own rounds are not read.
    tokens, starts, sizes: round k, from 0, of problem i is the `sizes[r]` tokens from `starts[r]`
        on, with r = problems.first_round[i] + k.
    """

    problems: Samples
    tokens: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @staticmethod
    def truth(samples: Samples) -> Written:
        """The true rounds of samples."""
        offsets = samples.round_offsets
        return Written(samples, samples.rounds, offsets[:-1], np.diff(offsets))

    def problem_sizes(self, owner: np.ndarray) -> np.ndarray:
        """Tokens of the problems `owner`."""
        return np.diff(self.problems.problem_offsets)[owner]

    def last_round(self, owner: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns start and size of the last of `before` ≥ 1 rounds of problems `owner`."""
        r = self.problems.first_round[owner] + before - 1
        return self.starts[r], self.sizes[r]

    def last_if_any(self, owner: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Does what `last_round` does; without a round the size is 0."""
        starts, sizes, later = np.zeros_like(owner), np.zeros_like(owner), before > 0
        starts[later], sizes[later] = self.last_round(owner[later], before[later])
        return starts, sizes

    def last_or_problem(
        self, owner: np.ndarray, before: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns what is left of problems `owner` where each round takes the problem's place.

        Returns:
            Tokens; where in them the last of the `before` rounds starts, or the problem behind its
            task token if there is no round; and its size.
        """
        starts, sizes = self.problems.problem_offsets[owner] + 1, self.problem_sizes(owner) - 1
        later = before > 0
        own, sizes[later] = self.last_round(owner[later], before[later])
        starts[later] = len(self.problems.problem) + own
        return np.concatenate([self.problems.problem, self.tokens]), starts, sizes


class Inputs(NamedTuple):
    """Inputs of iterations, laid end to end, N tokens in all.

    tokens (N,) int64: as the model reads them without feedback.
    fed (N,) int64: a second token at each place, `<pad>` for none.
    positions (N,) int64: of the tokens; None for 0..n − 1 in each input.
    cuts (I,) int64: which token of each input a cut in its positions stands before; None for any.
    """

    tokens: np.ndarray
    fed: np.ndarray
    positions: np.ndarray | None = None
    cuts: np.ndarray | None = None


class Arrangement(NamedTuple):
    """How the inputs of I problems follow from the rounds written so far, if each token of a round
    has its place whatever it is: a device can then lay the inputs, without the host.

    Fields over rows (N,) are of the inputs before the first round, end to end. Those of problems
    that `follow` are not used.

    follows (I,) bool: the last round takes the problem's place behind the task token; nothing is
        fed.
    least (I,) int64: the fewest tokens of such an input.
    turns (N,) int64: a number of rounds.
    fed (3, N) int64: the token fed when fewer rounds than `turns` are written, so many, and more.
    growth (N,) int64: what each round written adds to the last of these.
    from_end (N,) int64: which token of the last round, counted from its end from 1 on, is fed
        instead when more than `turns` rounds are written, if the round has so many; 0: none.
    stays (N,) bool: it is not the last round's but that of the round after `turns`, from then on.
    """

    follows: np.ndarray
    least: np.ndarray
    turns: np.ndarray
    fed: np.ndarray
    growth: np.ndarray
    from_end: np.ndarray
    stays: np.ndarray

    @staticmethod
    def empty(inputs: int, rows: int) -> Arrangement:
        """Inputs that are fed nothing and stay as they are."""
        return Arrangement(
            np.zeros(inputs, bool),
            np.ones(inputs, np.int64),
            np.zeros(rows, np.int64),
            np.full((3, rows), PAD),
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros(rows, bool),
        )


@dataclass(frozen=True)
class FeedbackDraws:
    """Random changes of each iteration that a model with feedback trains on.

    pad_probability: share of the inputs that are padded on the left, to a number of tokens that is
        uniform up to `pad_to`.
    cut_probability: share of the inputs in which all positions from a place on are 1..`cut` larger,
        so that no distance between two tokens is unseen in a longer problem; the place is random
        where the task does not say (`Inputs.cuts`).
    shift_probability: share of the iterations in which a number of 1..`shift` is added to all
        numbers that are fed, so that the target is what the task's rule gives of them.

    Raises ValueError for values out of range.
    """

    pad_probability: float = 0.0
    pad_to: int = 0
    cut: int = 0
    cut_probability: float = 0.5
    shift: int = 0
    shift_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("pad_probability", "cut_probability", "shift_probability"):
            given = getattr(self, name)
            object.__setattr__(self, name, as_float(name, given))
            if not 0 <= given <= 1:
                raise ValueError(f"{name} = {given}: it must lie in [0, 1]")
        for name in ("pad_to", "cut", "shift"):
            object.__setattr__(self, name, as_int(name, getattr(self, name), least=0))

    def widths(self, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Tokens of inputs that need `sizes`."""
        padded = (rng.random(len(sizes)) < self.pad_probability) & (sizes < self.pad_to)
        drawn = rng.integers(np.minimum(sizes, self.pad_to), max(self.pad_to, 0) + 1)
        return np.where(padded, drawn, sizes)

    def moves(
        self, widths: np.ndarray, cuts: np.ndarray | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Draws what is added to the positions of inputs.

        Args:
            widths: (I,) tokens of each input.
            cuts: (I,) the token of each input from which on positions may be moved; None: any.
            rng: The random generator.

        Returns:
            (N,) int64, one for each token.
        """
        place = rng.integers(1, np.maximum(widths, 2)) if cuts is None else cuts
        moved = np.where(rng.random(len(widths)) < self.cut_probability, self.cut, 0)
        moved = rng.integers(np.minimum(moved, 1), moved + 1)
        index = concat_ranges(np.zeros_like(widths), widths)
        return np.where(index >= np.repeat(place, widths), np.repeat(moved, widths), 0)

    def shifts(self, count: int, rng: np.random.Generator) -> np.ndarray:
        if not self.shift:
            return np.zeros(count, np.int64)
        shifted = rng.random(count) < self.shift_probability
        return np.where(shifted, rng.integers(1, self.shift + 1, count), 0)


def right_aligned(
    widths: np.ndarray, source: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Lays tokens at the right end of inputs, with `<pad>` before them.

    Args:
        widths: (I,) tokens of each input.
        source: All tokens.
        starts: (I,) where those of an input start in `source`.
        sizes: (I,) how many they are.

    Returns:
        (N,) int64, the inputs end to end.

    Raises:
        ValueError: There are more tokens than an input has.
    """
    if np.any(sizes > widths):
        i = int(np.argmax(sizes > widths))
        raise ValueError(
            f"{sizes[i]} tokens do not fit into an input of {widths[i]}: let the task's "
            f"input_sizes say more"
        )
    laid = np.full(int(widths.sum()), PAD, np.int64)
    laid[concat_ranges(np.cumsum(widths) - sizes, sizes)] = source[concat_ranges(starts, sizes)]
    return laid


def problems_shown(written: Written, owner: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Lays problems into inputs, right-aligned, with the task token leftmost.

    Args:
        written: The problems.
        owner: (I,) the problem of each input.
        widths: (I,) tokens of each input.

    Returns:
        (N,) int64, the inputs end to end.
    """
    problems = written.problems
    starts, sizes = problems.problem_offsets[owner], written.problem_sizes(owner)
    tokens = right_aligned(widths, problems.problem, starts + 1, sizes - 1)
    tokens[np.cumsum(widths) - widths] = problems.problem[starts]
    return tokens

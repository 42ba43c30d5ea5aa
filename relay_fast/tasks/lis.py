"""Longest strictly increasing subsequence (Feng et al. 2023), its chain folded into rounds.

d_i is the length of the longest strictly increasing subsequence that ends at value i; the answer is
max(d). A round holds `group` of the d_i and `<sep>`; the last group is filled by repeating its last
value. `103 110 145 217 233 18 30 82 141 150 159 161 167 239 <sep>` →
`1 2 3 4 5 1 2 3 4 5 <sep>` `6 7 8 9 9 9 9 9 9 9 <sep>` → `9`.

The length of a problem is its number of values n; it takes ⌈n / group⌉ rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from relay_fast.tasks.base import NO_ANSWER, Rounds, Task, split_after, until_eos
from relay_fast.tasks.feedback import Arrangement, Inputs, Written, problems_shown
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.vocabulary import LETTER0, N_LETTERS, NUMBER0, PAD, SEP, Vocabulary
from relay_fast.tasks.vocabulary import LIS as LIS_TOKEN
from relay_fast.utils.numbers import as_int
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class LIS(Task):
    """Sequences of numbers in low..high, some of which form planted increasing runs.

    Sampling: the runs cover a uniform number t in 3..n of positions, the rest is uniform. With r
    runs left to place on the last m of the t positions, the next takes a uniform 1..⌊m / r⌋ + 1 of
    them and the last all that remain (Feng's splits; the last may be empty). A run's values are
    distinct, uniform and ascending. With n < 3, t is n: a planted run of one or two values.

    Args:
        vocabulary: The tokens.
        group: Values in a round.
        low: Smallest value; None for n + 1, so that no value looks like a length.
        high: Largest value.
        max_runs: 1..max_runs runs are planted.

    Raises:
        ValueError: A parameter is invalid or does not fit the vocabulary.
    """

    name = "lis"
    index = TASK_NAMES.index(name)
    title = "LIS"
    unit = "numbers in the sequence"
    token = LIS_TOKEN
    end = SEP
    answer_suffix = ()
    takes_shift = True
    clips_positions = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        group: int = 10,
        low: int | None = None,
        high: int = 249,
        max_runs: int = 3,
    ) -> None:
        super().__init__(vocabulary)
        group, max_runs, high = (
            as_int("group", group),
            as_int("max_runs", max_runs),
            as_int("high", high),
        )
        low = None if low is None else as_int("low", low)
        for what, value in (("group", group), ("max_runs", max_runs)):
            if value < 1:
                raise ValueError(f"lis {what} is {value}; give at least 1.")
        if high > vocabulary.max_number:
            raise ValueError(
                f"lis high is {high}, the vocabulary ends at {vocabulary.max_number}; "
                f"use a smaller high or a Vocabulary with a larger max_number."
            )
        if high < 0 or (low is not None and not 0 <= low <= high):
            raise ValueError(
                f"lis values {low}..{high} are no range; give 0 <= low <= high, or low=None for "
                f"n + 1."
            )
        self.group = group
        self.min_input_tokens = group + 2
        self.low = low
        self.high = high
        self.max_runs = max_runs

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "group": self.group,
            "low": self.low,
            "high": self.high,
            "max_runs": self.max_runs,
        }

    def loops(self, length: int) -> int:
        return -(-length // self.group)

    def max_problem_tokens(self, length: int) -> int:
        """Returns the exact number."""
        return length + 2

    def max_round_tokens(self, length: int) -> int:
        return self.group + 1

    def max_chain_tokens(self, length: int) -> int:
        return self.loops(length) * (self.group + 1)

    @property
    def max_length(self) -> int:
        """The longest length; a run may cover all n positions and needs n distinct values."""
        if self.low is None:
            return self.high // 2
        return min(self.high - self.low + 1, self.vocabulary.max_number)

    def check_length(self, length: int) -> None:
        super().check_length(length)
        if length > self.max_length:
            low = length + 1 if self.low is None else self.low
            raise ValueError(
                f"lis length {length} needs {length} distinct values, there are "
                f"{max(0, self.high - low + 1)} in {low}..{self.high}; use at most "
                f"{self.max_length}, or a larger high."
            )

    def _fill(self, lengths, seed, start, *arrays: np.ndarray) -> None:
        from relay_fast.tasks import _lis_jit

        low = -1 if self.low is None else self.low
        _lis_jit.sample(lengths, seed, start, self.group, low, self.high, self.max_runs, *arrays)

    def length_of(self, problem: Iterable[int]) -> int:
        return len(self._values(problem))

    def _solve(self, problem: Iterable[int]) -> tuple[np.ndarray, np.ndarray, int]:
        from relay_fast.tasks import _lis_jit

        values = np.array(self._values(problem), np.int64)
        rounds = np.empty(self.max_chain_tokens(len(values)), np.int32)
        offsets = np.zeros(self.loops(len(values)) + 1, np.int64)
        _, best = _lis_jit.solve(values, self.group, rounds, offsets, 0)
        return rounds, offsets, NUMBER0 + int(best)

    def answer_of(self, rounds: Rounds) -> int | None:
        """Returns the maximum over all rounds."""
        best = -1
        for tokens in rounds:
            *lengths, end = [-1, *map(int, tokens)]
            if end != SEP or len(lengths) < 2:
                return None
            if not all(map(self.vocabulary.is_number, lengths[1:])):
                return None
            best = max(best, *lengths)
        return best if best >= 0 else None

    def answers_of(self, samples: Samples) -> np.ndarray:
        answers = np.full(len(samples), NO_ANSWER, np.int32)
        tokens, offsets = samples.rounds, samples.round_offsets
        sizes, numbers = np.diff(offsets), self.are_numbers(tokens)
        right = (sizes >= 2) & (np.diff(lengths_to_offsets(numbers)[offsets]) == sizes - 1)
        right[right] = tokens[offsets[1:][right] - 1] == SEP  # the one non-number
        owner = np.repeat(np.arange(len(samples)), samples.loops)
        np.maximum.at(answers, np.repeat(owner, sizes)[numbers], tokens[numbers])
        answers[owner[~right]] = NO_ANSWER
        return answers

    def inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        """The problem, and fed: each d_i so far under its value, marks under the next group's.
        Positions count from the last group on; all before it stands at 0."""
        if self.group > N_LETTERS:
            raise ValueError(
                f"lis group is {self.group}; with feedback each of its values has a mark of its "
                f"own, of which there are {N_LETTERS}: use a smaller group"
            )
        tokens, fed = problems_shown(written, owner, widths), np.full(int(widths.sum()), PAD)
        sizes, ends = written.problem_sizes(owner), np.cumsum(widths)
        known = np.minimum(before * self.group, sizes - 2)
        row = concat_ranges(ends - sizes + 1, known)
        value = concat_ranges(np.zeros_like(known), known)
        r = np.repeat(written.problems.first_round[owner], known) + value // self.group
        from_end = self.group + 1 - value % self.group
        there = from_end <= written.sizes[r]
        at = (written.starts + written.sizes)[r[there]] - from_end[there]
        fed[row[there]] = written.tokens[at]
        following = np.minimum(known + self.group, sizes - 2) - known
        mark = concat_ranges(np.full_like(following, LETTER0), following)
        fed[concat_ranges(ends - sizes + 1 + known, following)] = mark
        positions = np.arange(len(tokens)) - np.repeat(ends - self.group - 2, widths)
        return Inputs(tokens, fed, np.maximum(0, positions))

    def arrangement(self, problems: Samples, widths: np.ndarray) -> Arrangement:
        own = Arrangement.empty(len(widths), int(widths.sum()))
        sizes = np.diff(problems.problem_offsets)
        count = sizes - 2
        row = concat_ranges(np.cumsum(widths) - sizes + 1, count)
        value = concat_ranges(np.zeros_like(count), count)
        own.turns[row], own.fed[1, row] = value // self.group, LETTER0 + value % self.group
        own.from_end[row] = self.group + 1 - value % self.group
        own.stays[row] = True
        return own

    def largest_fed(self, length: int) -> int:
        return length

    def shifted_rounds(
        self, samples: Samples, owner: np.ndarray, before: np.ndarray, shift: np.ndarray
    ) -> np.ndarray:
        """d_i is one more than the largest d_k of a smaller value before it, shifted or not."""
        from relay_fast.tasks import _lis_jit

        rounds = np.empty(len(owner) * (self.group + 1), np.int64)
        _lis_jit.shifted_rounds(
            samples.problem,
            samples.problem_offsets,
            samples.rounds,
            samples.round_offsets,
            samples.first_round,
            owner,
            before,
            shift,
            self.group,
            rounds,
        )
        return rounds

    def split(self, ids: Iterable[int]) -> tuple[list[list[int]], int | None]:
        rounds, tail = split_after(until_eos(ids), SEP)
        if len(tail) == 1 and self.vocabulary.is_number(tail[0]):
            return rounds, tail[0]
        if tail:
            rounds.append(tail)
        return rounds, None

    def _values(self, problem: Iterable[int]) -> list[int]:
        """Returns the values of a problem; raises ValueError if it is malformed."""
        body = self._body(problem)
        if not body:
            raise ValueError("lis problem has no values; give at least one number before <sep>.")
        last = self.vocabulary.end_of_numbers
        for k, token in enumerate(body):
            if not NUMBER0 <= token < last:
                raise ValueError(
                    f"lis problem holds {self.vocabulary.decode([token])!r} at position {k}; "
                    f"use numbers only."
                )
        return [token - NUMBER0 for token in body]

"""Edit distance (Feng et al. 2023): every round is one row of the table of the dynamic programme.

`o t m l | o t t m l <sep>` → `0 2 4 6 7 ,` `2 0 2 4 6 ,` `4 2 3 2 4 ,` `6 4 5 4 2 ,` → `2`. Rows
are M[i][1..|s2|]; row 0 and column 0 are not written. They grow by `border` a step, not by the cost
of an insertion or a deletion, as in Feng's code and RELAY's appendix.

The length of a problem is |s1|, the length of the shorter string, which comes first; it is also the
number of rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from relay_fast.tasks.base import NO_ANSWER, Rounds, Task, last_rounds, split_after, until_eos
from relay_fast.tasks.feedback import Arrangement, Inputs, Written, problems_shown, right_aligned
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.vocabulary import (
    BAR,
    COMMA,
    EDIT_DISTANCE,
    LETTER0,
    N_LETTERS,
    NUMBER0,
    SEP,
    Vocabulary,
)
from relay_fast.utils.ragged import concat_ranges


class EditDistance(Task):
    """Pairs of strings over a random subset of the letters.

    Sampling: s1 has exactly L letters of the subset. With probability 0.4 s2 is random with a
    length uniform in L-3..L+2, otherwise it is s1 after d random edits (delete, replace and insert
    equally likely; a string of two letters or less grows instead of shrinking). The pair, with its
    subset, is drawn again if the strings are equal or s2 is outside L..L+2: a shorter s2 would
    come first, and the length would not be L. d is uniform in 1..L and drawn once, as in Feng's
    code, so redrawing does not change its distribution.

    Args:
        vocabulary: The tokens.
        insert, delete, replace, border: Costs, at least 1; a match costs nothing.
        alphabet: Least and largest size of the subset.
        letters: The subset is drawn from the first `letters` of a..z.

    Raises:
        ValueError: A parameter is invalid.
    """

    name = "edit_distance"
    index = TASK_NAMES.index(name)
    title = "Edit distance"
    unit = "length of the shorter string"
    token = EDIT_DISTANCE
    end = SEP
    answer_suffix = (SEP,)
    takes_shift = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        insert: int = 2,
        delete: int = 2,
        replace: int = 3,
        border: int = 1,
        alphabet: tuple[int, int] = (3, 10),
        letters: int = N_LETTERS,
    ) -> None:
        super().__init__(vocabulary)
        costs = {"insert": insert, "delete": delete, "replace": replace, "border": border}
        for cost, value in costs.items():
            if value != int(value) or value < 1:
                raise ValueError(
                    f"edit_distance cost {cost} is {value}; give an integer of at least 1."
                )
        if not 2 <= letters <= N_LETTERS:
            raise ValueError(
                f"edit_distance letters is {letters}; give 2..{N_LETTERS}, how many of a..z "
                f"may occur."
            )
        if len(alphabet) != 2 or not 2 <= alphabet[0] <= alphabet[1] <= letters:
            raise ValueError(
                f"edit_distance alphabet {tuple(alphabet)} is no range of sizes; give "
                f"(least, largest) with 2 <= least <= largest <= {letters}."
            )
        self.insert, self.delete, self.replace, self.border = map(int, costs.values())
        self.alphabet = (int(alphabet[0]), int(alphabet[1]))
        self.letters = int(letters)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "insert": self.insert,
            "delete": self.delete,
            "replace": self.replace,
            "border": self.border,
            "alphabet": list(self.alphabet),
            "letters": self.letters,
        }

    def loops(self, length: int) -> int:
        return length

    def max_problem_tokens(self, length: int) -> int:
        """Returns the exact number: the second string has at most two letters more."""
        return 2 * length + 5

    def max_round_tokens(self, length: int) -> int:
        return length + 3

    def max_chain_tokens(self, length: int) -> int:
        return length * self.max_round_tokens(length)

    def largest_cell(self, length: int) -> int:
        """Returns the largest number that a problem of this length can need.

        It occurs where the strings share no letter.
        """
        i = np.arange(1, length + 1)[:, None]
        j = np.arange(1, length + 3)[None, :]
        replace = min(self.replace, self.insert + self.delete)

        def inner(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
            diagonal = np.minimum(rows, columns)
            return (
                diagonal * replace
                + (rows - diagonal) * self.delete
                + (columns - diagonal) * self.insert
            )

        # The best path leaves the border at a corner, or where only replacements remain.
        costs = [inner(i, j)]
        for k in (j, np.maximum(j - i, 0)):
            costs.append(self.border * k + inner(i, j - k))
        for k in (i, np.maximum(i - j, 0)):
            costs.append(self.border * k + inner(i - k, j))
        return int(np.minimum.reduce(costs).max())

    def check_length(self, length: int) -> None:
        super().check_length(length)
        limit = self.vocabulary.max_number
        # Every step costs at least 1, so a row of length + 2 cells ends above that.
        if length + 2 > limit or self.largest_cell(length) > limit:
            raise ValueError(
                f"edit_distance length {length} can need numbers beyond {limit}, where the "
                f"vocabulary ends; use shorter strings or a Vocabulary with a larger max_number."
            )

    def _fill(self, lengths, seed, start, *arrays: np.ndarray) -> None:
        from relay_fast.tasks import _edit_distance_jit

        _edit_distance_jit.sample(
            lengths,
            seed,
            start,
            self.alphabet,
            self.letters,
            self.insert,
            self.delete,
            self.replace,
            self.border,
            *arrays,
        )

    def length_of(self, problem: Iterable[int]) -> int:
        return len(self._strings(problem)[0])

    def _solve(self, problem: Iterable[int]) -> tuple[np.ndarray, np.ndarray, int]:
        from relay_fast.tasks import _edit_distance_jit

        first, second = (np.array(string, np.int32) for string in self._strings(problem))
        rounds = np.empty(len(first) * (len(second) + 1), np.int32)
        offsets = np.zeros(len(first) + 1, np.int64)
        costs = (self.insert, self.delete, self.replace, self.border)
        _edit_distance_jit.solve(first, second, *costs, rounds, offsets, 0)
        largest = int(rounds.max()) - NUMBER0
        if largest > self.vocabulary.max_number:
            raise ValueError(
                f"edit_distance problem of {len(first)} and {len(second)} letters needs the number "
                f"{largest}, the vocabulary ends at {self.vocabulary.max_number}; use shorter "
                f"strings or a Vocabulary with a larger max_number."
            )
        return rounds, offsets, int(rounds[-2])

    def answer_of(self, rounds: Rounds) -> int | None:
        """Returns the last cell of the last row."""
        if not len(rounds) or len(rounds[-1]) < 2 or rounds[-1][-1] != COMMA:
            return None
        cell = int(rounds[-1][-2])
        return cell if self.vocabulary.is_number(cell) else None

    def answers_of(self, samples: Samples) -> np.ndarray:
        answers = np.full(len(samples), NO_ANSWER, np.int32)
        rows, sizes, ends = last_rounds(samples)
        rows, ends = rows[sizes >= 2], ends[sizes >= 2]
        cells = samples.rounds[ends - 2]
        read = (samples.rounds[ends - 1] == COMMA) & self.are_numbers(cells)
        answers[rows[read]] = cells[read]
        return answers

    def inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        """The problem, and fed: the last row of the table (row 0 at first), each cell under its
        letter of the second string and the one of the border under the bar; one mark under the
        letters of the first string that were used, another under the next. A cut stands before
        the bar."""
        tokens = problems_shown(written, owner, widths)
        first = written.problems.length[owner].astype(np.int64)
        second = written.problem_sizes(owner) - first - 3
        largest, last = self.border * int(second.max(initial=0)), self.vocabulary.max_number
        if largest > last:  # beyond, there are other tokens
            raise ValueError(
                f"edit_distance feeds the numbers of row 0 of the table, here up to {largest}, and "
                f"the vocabulary ends at {last}: use shorter strings, a smaller border or a "
                f"Vocabulary with a larger max_number."
            )
        bar = np.cumsum(widths) - second - 2  # the row of each input's bar
        fed = self._last_rows(written, owner, before, widths, second)
        fed[bar] = NUMBER0 + self.border * before
        fed[concat_ranges(bar - first, before)] = COMMA
        fed[(bar - first + before)[before < first]] = BAR
        return Inputs(tokens, fed, cuts=widths - second - 2)

    def _last_rows(
        self,
        written: Written,
        owner: np.ndarray,
        before: np.ndarray,
        widths: np.ndarray,
        second: np.ndarray,
    ) -> np.ndarray:
        """(N,) int64: the cells of the last row under the `second` letters of the second string."""
        begins, given = written.last_if_any(owner, before)
        sizes = np.minimum(given, second + 1)  # cells without a letter have no place
        fed = right_aligned(widths, written.tokens, begins + given - sizes, sizes)
        first = before == 0
        at, cells = (np.cumsum(widths) - second - 1)[first], second[first]
        fed[concat_ranges(at, cells)] = NUMBER0 + self.border * concat_ranges(
            np.ones_like(cells), cells
        )
        return fed

    def arrangement(self, problems: Samples, widths: np.ndarray) -> Arrangement:
        own = Arrangement.empty(len(widths), int(widths.sum()))
        first = problems.length.astype(np.int64)
        second = np.diff(problems.problem_offsets) - first - 3
        bar = np.cumsum(widths) - second - 2
        letters = concat_ranges(bar - first, first)
        own.turns[letters] = concat_ranges(np.zeros_like(first), first)
        own.fed[1, letters], own.fed[2, letters] = BAR, COMMA
        own.fed[1:, bar], own.growth[bar] = NUMBER0, self.border
        cells = concat_ranges(bar + 1, second)  # row 0 of the table
        own.fed[1, cells] = NUMBER0 + self.border * concat_ranges(np.ones_like(second), second)
        under = concat_ranges(bar + 1, second + 1)
        own.from_end[under] = np.repeat(bar + second + 2, second + 1) - under
        return own

    def largest_fed(self, length: int) -> int:
        return max(self.largest_cell(length), self.border * (length + 2))

    def shifted_rounds(
        self, samples: Samples, owner: np.ndarray, before: np.ndarray, shift: np.ndarray
    ) -> np.ndarray:
        """A row follows from the differences of the numbers in the one before."""
        r = samples.first_round[owner] + before
        sizes = np.diff(samples.round_offsets)[r]
        rounds = samples.rounds[concat_ranges(samples.round_offsets[r], sizes)].astype(np.int64)
        return rounds + np.where(rounds >= NUMBER0, np.repeat(shift, sizes), 0)

    def split(self, ids: Iterable[int]) -> tuple[list[list[int]], int | None]:
        chains, tail = split_after(until_eos(ids), SEP)
        # Without a <sep> there is no answer: everything is chain.
        chain = chains[0][:-1] if chains else tail
        rounds, broken = split_after(chain, COMMA)
        if broken:
            rounds.append(broken)
        readable = len(chains) == 1 and len(tail) == 1 and self.vocabulary.is_number(tail[0])
        return rounds, tail[0] if readable else None

    def _spaced(self, text: str) -> str:
        words = text.replace("|", " | ").replace("<sep>", " <sep> ").split()
        return " ".join(" ".join(word) if word.isalpha() else word for word in words)

    def _strings(self, problem: Iterable[int]) -> tuple[list[int], list[int]]:
        """Returns both strings of a problem; raises ValueError if it is malformed."""
        body = self._body(problem)
        if body.count(BAR) != 1:
            self._reject(body, "needs two strings; put one | between them")
        bar = body.index(BAR)
        first, second = body[:bar], body[bar + 1 :]
        for k, token in enumerate(body):
            if k != bar and not LETTER0 <= token < LETTER0 + self.letters:
                last = chr(ord("a") + self.letters - 1)
                held = self.vocabulary.decode([token])
                self._reject(body, f"holds {held!r} at position {k}; use the letters a..{last}")
        if not first or len(second) < len(first):
            self._reject(
                body,
                f"has strings of {len(first)} and {len(second)} letters; put the shorter string "
                f"first and leave none empty",
            )
        return first, second

    def _reject(self, body: list[int], reason: str) -> None:
        raise ValueError(f"edit_distance problem {self.vocabulary.decode(body)!r} {reason}.")

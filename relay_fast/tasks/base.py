"""The base class of tasks: draw samples, solve problems in rounds, read and check chains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from relay_fast.tasks.feedback import Arrangement, Inputs, Written
from relay_fast.tasks.samples import Samples
from relay_fast.tasks.vocabulary import EOS, NUMBER0, PAD, SEP, Vocabulary
from relay_fast.utils.numbers import as_int
from relay_fast.utils.ragged import lengths_to_offsets
from relay_fast.utils.seeds import EVAL_SEED_OFFSET

Rounds = Sequence[Sequence[int]]
NO_ANSWER = -1  # stands for an answer that cannot be read


class Task(ABC):
    """A family of problems whose solution is written in rounds.

    Problems, rounds and answers are token ids of `vocabulary`. The methods raise ValueError for
    invalid input.

    Attributes:
        name: Its name in a run.
        index: What `Samples.task` holds for its samples, different in every task of a run.
        title, unit: Its name in tables and plots, and what its length counts.
        token: Id of the task token, the first of every problem.
        end: Id of the last token of every problem.
        min_length: The smallest length.
        min_input_tokens: What `min_widths` returns for all lengths.
        takes_shift: Whether there is a rule for shifted numbers (`shifted_rounds`).
        grows: Whether inputs may be longer than the problem because of the rounds so far.
        clips_positions: Whether `inputs` of any length hold the same positions.
        one_token_answers: Whether an answer is one token, so that it can be read off one place.
        answer_suffix: Tokens between the last round and the answer in an autoregressive sequence;
            None if the last round is the answer, so that nothing is added.
    """

    name: ClassVar[str]
    index: ClassVar[int]
    title: ClassVar[str]
    unit: ClassVar[str]
    token: ClassVar[int]
    end: ClassVar[int]
    answer_suffix: ClassVar[tuple[int, ...] | None]
    min_length: ClassVar[int] = 1
    min_input_tokens: int = 0
    takes_shift: ClassVar[bool] = False
    clips_positions: ClassVar[bool] = False
    grows: bool = False
    one_token_answers: bool = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @property
    def label(self) -> dict[str, str]:
        """Returns title and unit, as tables and plots read them from results."""
        return {"title": self.title, "unit": self.unit}

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns what `make_task(vocabulary=…, **task.to_dict())` builds it of, JSON-able."""

    @abstractmethod
    def loops(self, length: int) -> int:
        """Returns the number of rounds of a problem of this length."""

    @abstractmethod
    def max_problem_tokens(self, length: int) -> int:
        """Returns the most tokens of a sampled problem, including the task token."""

    def max_input_tokens(self, length: int) -> int:
        """Returns the most tokens of an input of a looped model, the padding of short ones and what
        `inputs` shows included."""
        return max(self.max_problem_tokens(length), int(self.min_widths(np.array([length]))[0]))

    @abstractmethod
    def max_round_tokens(self, length: int) -> int:
        """Returns the most tokens of one round."""

    @abstractmethod
    def max_chain_tokens(self, length: int) -> int:
        """Returns the most tokens of all rounds together."""

    def min_widths(self, lengths: np.ndarray) -> np.ndarray:
        """(S,) the least tokens of the inputs of problems of these lengths; shorter ones are padded
        on the left, so that every round and its boundary `<pad>` fit."""
        return np.full(len(lengths), self.min_input_tokens, np.int64)

    def report(self, shortest: int, longest: int) -> dict[str, int]:
        """Returns counts of the data behind problems of a training range, where there is such."""
        return {}

    def prove(self, lengths: Iterable[int]) -> None:
        """Raises ValueError if a run that uses these lengths cannot be trusted to go well."""
        for length in lengths:
            self.check_length(length)

    def fingerprint(self, lengths: Iterable[int]) -> str | None:
        """Returns a hash of some problems of these lengths, by which a run notices that the task
        draws others than before; None where something else tells that."""
        return None

    @property
    def solves(self) -> bool:
        """Whether `solve` can be called: the task's rules tell the rounds of any problem."""
        return True

    def max_sequence_tokens(self, length: int) -> int:
        """Returns the most tokens of an autoregressive sequence, including `<eos>`."""
        tail = 0 if self.answer_suffix is None else len(self.answer_suffix) + 1
        return self.max_problem_tokens(length) + self.max_chain_tokens(length) + tail + 1

    def check_length(self, length: int) -> None:
        """Raises ValueError if problems of this length cannot be drawn or written."""
        if length < self.min_length:
            raise ValueError(
                f"{self.name} length {length} is too short; use at least {self.min_length}."
            )

    def check_range(self, shortest: int, longest: int) -> None:
        """Raises ValueError if a model cannot be trained on problems of these lengths."""
        for length in (shortest, longest):
            self.check_length(length)

    def lengths_between(self, shortest: int, longest: int) -> np.ndarray:
        """Returns the lengths from `shortest` to `longest` that there are problems of."""
        return np.arange(shortest, longest + 1)

    def tested_lengths(self, shortest: int, longest: int) -> np.ndarray:
        """Returns those of `lengths_between` that there are unseen problems of."""
        return self.lengths_between(shortest, longest)

    def knows_truth(self, length: int) -> bool:
        """Tells whether the problems of a length that are drawn are all solved."""
        return True

    def most_problems(self, length: int) -> int | None:
        """Returns how many different problems of a length can be drawn, None for any number."""
        return None

    def unseen(self, length: int, number: int, seed: int) -> Samples:
        """Returns up to `number` solved problems that no training has seen, but for short ones.

        A larger number extends a smaller one.

        Args:
            length: Of the problems.
            number: How many; there may be fewer where they are not drawn at random.
            seed: Selects them.
        """
        return self.sample(np.full(number, length), as_int("seed", seed) + EVAL_SEED_OFFSET)

    def sample(self, lengths: Sequence[int] | np.ndarray, seed: int, start: int = 0) -> Samples:
        """Draws solved problems.

        Sample i depends on the task's parameters, lengths[i], seed and start + i alone, so samples
        may be drawn in parts.

        Args:
            lengths: (S,) integers, the length of each problem.
            seed: Selects the problems.
            start: Index of the first sample.

        Raises:
            ValueError: A length is not supported, or an argument is invalid.
        """
        array = checked_lengths(lengths, start)
        unique, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
        for length in unique.tolist():
            self.check_length(length)
        loops = np.array([self.loops(n) for n in unique.tolist()], np.int32)[inverse]
        # Memory beyond the written part is never touched, so the bound costs address space only.
        problem = self._buffer(unique, counts, self.max_problem_tokens)
        rounds = self._buffer(unique, counts, self.max_chain_tokens)
        problem_offsets = np.zeros(len(array) + 1, np.int64)
        round_offsets = np.zeros(int(loops.sum()) + 1, np.int64)
        answer = np.empty(len(array), np.int32)
        self._fill(
            array,
            np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF),
            np.uint64(start),
            problem,
            problem_offsets,
            rounds,
            round_offsets,
            answer,
        )
        problem.resize(problem_offsets[-1], refcheck=False)
        rounds.resize(round_offsets[-1], refcheck=False)
        return Samples(
            task=np.full(len(array), self.index, np.int32),
            length=array.astype(np.int32),
            problem=problem,
            problem_offsets=problem_offsets,
            rounds=rounds,
            round_offsets=round_offsets,
            loops=loops,
            answer=answer,
        )

    @staticmethod
    def _buffer(unique: np.ndarray, counts: np.ndarray, bound: Any) -> np.ndarray:
        pairs = zip(unique.tolist(), counts.tolist(), strict=True)
        return np.empty(sum(bound(length) * count for length, count in pairs), np.int32)

    @abstractmethod
    def _fill(
        self,
        lengths: np.ndarray,
        seed: np.uint64,
        start: np.uint64,
        problem: np.ndarray,
        problem_offsets: np.ndarray,
        rounds: np.ndarray,
        round_offsets: np.ndarray,
        answer: np.ndarray,
    ) -> None:
        """Fills the arrays of `Samples`; `problem` and `rounds` may be larger than needed."""

    @abstractmethod
    def length_of(self, problem: Iterable[int]) -> int:
        """Returns the length (complexity) of a problem."""

    def solve(self, problem: Iterable[int]) -> tuple[list[list[int]], int]:
        """Returns the true rounds and the answer's id; raises ValueError for a bad problem."""
        rounds, offsets, answer = self._solve(problem)
        bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        return [rounds[a:b].tolist() for a, b in bounds], answer

    def solve_samples(self, problems: Samples) -> Samples:
        """Returns problems of this task with their true rounds and answers.

        Raises ValueError as `solve` does.
        """
        solved = [self._solve(problems.problem_of(i)) for i in range(len(problems))]
        sizes = [np.diff(offsets) for _, offsets, _ in solved]
        return replace(
            problems,
            rounds=np.concatenate([np.zeros(0, np.int32), *(rounds for rounds, _, _ in solved)]),
            round_offsets=lengths_to_offsets(np.concatenate([np.zeros(0, np.int64), *sizes])),
            loops=np.array([len(own) for own in sizes], np.int32),
            answer=np.array([answer for _, _, answer in solved], np.int32),
        )

    @abstractmethod
    def _solve(self, problem: Iterable[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """Solves a problem; returns tokens (flat, int32), offsets (rounds + 1,) int64, answer."""

    @abstractmethod
    def answer_of(self, rounds: Rounds) -> int | None:
        """Returns the answer that the rounds imply, None if they cannot be read."""

    @abstractmethod
    def answers_of(self, samples: Samples) -> np.ndarray:
        """Returns (S,) int32: `answer_of` for each sample of this task, NO_ANSWER for None."""

    @abstractmethod
    def split(self, ids: Iterable[int]) -> tuple[list[list[int]], int | None]:
        """Splits the text of an autoregressive model, up to `<eos>`, into rounds and answer.

        It never raises: malformed text becomes a round, an answer that cannot be read is None.
        """

    def split_for(
        self, ids: Iterable[int], problem_tokens: int
    ) -> tuple[list[list[int]], int | None]:
        """Does what `split` does, for a problem of so many tokens."""
        return self.split(ids)

    def same_answers(self, written: Samples, truth: Samples) -> np.ndarray:
        """(S,) bool: chains of this task give the answers of the same problems, solved."""
        return written.answer == truth.answer

    def input_sizes(self, written: Written, owner: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Returns the tokens that `inputs` needs for each iteration, (I,).

        Args:
            written: Problems, with the rounds written so far.
            owner: (I,) the problem of each iteration.
            before: (I,) the rounds before it.
        """
        least = self.min_widths(written.problems.length[owner])
        return np.maximum(written.problem_sizes(owner), least)

    def inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        """Makes the inputs of iterations of a looped model with feedback.

        They are a function of the problem and of the rounds before the iteration alone, and hold
        all that the next round needs.

        The round is written right-aligned, the boundary `<pad>` before it.

        Args:
            written: problems of this task, and their rounds so far.
            owner: (I,) which problem each iteration is of.
            before: (I,) how many of its rounds are written before it.
            widths: (I,) tokens of its input, `input_sizes` or more.

        Raises:
            ValueError: The task does not say.
        """
        raise ValueError(
            f"task {self.name!r} does not say what an iteration sees of the rounds so far: define "
            f"{type(self).__name__}.inputs, or train without feedback"
        )

    def arrangement(self, problems: Samples, widths: np.ndarray) -> Arrangement | None:
        """Returns how `inputs` of these widths, of problems of this task, follow from the rounds;
        None where a token's place depends on more than its round and its place in it. Compared with
        `inputs` where it is used."""
        return None

    def largest_fed(self, length: int) -> int:
        """A bound on the numbers that `inputs` shows and rounds hold in problems of a length."""
        return self.vocabulary.max_number or 0

    def shifted_rounds(
        self, samples: Samples, owner: np.ndarray, before: np.ndarray, shift: np.ndarray
    ) -> np.ndarray:
        """Returns the rounds that follow where numbers are shifted.

        Args:
            samples: Solved problems.
            owner: (I,) the sample of each iteration.
            before: (I,) the rounds before it.
            shift: (I,) what is added to every number that the iteration is fed.

        Returns:
            The tokens of the rounds after `before` ones, end to end, int64.
        """
        raise ValueError(
            f"task {self.name!r} has no rule for shifted numbers: use shift = 0 in its feedback"
        )

    def check(self, problem: Iterable[int], rounds: Rounds) -> list[bool]:
        """Compares each round with the one that the problem's rules demand; needs no label.

        The list is as long as the longer of the true and the given chain; missing and surplus
        rounds are False.
        """
        return matches(self.solve(problem)[0], rounds)

    def encode(self, text: str) -> list[int]:
        """Converts a text to the ids of a problem; task token and end token may be left out.

        Raises ValueError for an unknown token or a malformed problem.
        """
        ids = self.vocabulary.encode(self._spaced(text))
        if ids[:1] != [self.token]:
            ids.insert(0, self.token)
        if ids[-1] != self.end:
            ids.append(self.end)
        self.length_of(ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns a readable text of a problem or round, without task token and `<pad>`."""
        return self.vocabulary.decode(t for t in map(int, ids) if t not in (self.token, PAD))

    def plain_text(self, ids: Iterable[int]) -> str:
        """Returns a problem, round or answer for other programs: as `decode` does, but with a space
        between all tokens, and without `<sep>` at the end."""
        tokens = [token for token in map(int, ids) if token not in (self.token, PAD)]
        return self.vocabulary.decode(tokens[:-1] if tokens[-1:] == [SEP] else tokens)

    def answer_text(self, rounds: Rounds, answer: int) -> str:
        """Returns a readable text of the answer that a chain of these rounds gives."""
        return self.decode([answer])

    def are_numbers(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens >= NUMBER0) & (tokens < self.vocabulary.end_of_numbers)

    def _spaced(self, text: str) -> str:
        """Puts spaces between the tokens of `text`."""
        return text

    def _body(self, problem: Iterable[int]) -> list[int]:
        """Returns the problem without task token and end token; raises ValueError without them."""
        ids = problem.tolist() if isinstance(problem, np.ndarray) else list(map(int, problem))
        size = self.vocabulary.size
        whole = len(ids) >= 2 and ids[0] == self.token and ids[-1] == self.end
        if not whole or min(ids) < 0 or max(ids) >= size:
            known = [token for token in ids if 0 <= token < size]
            first, last = self.vocabulary.decode([self.token, self.end]).split()
            shown = self.vocabulary.decode(known)
            raise ValueError(
                f"{self.name} problem {shown!r} is incomplete; "
                f"begin with {first} and end with {last}."
            )
        return ids[1:-1]


def matches(truth: Rounds, rounds: Rounds) -> list[bool]:
    """Compares rounds with the true ones, see `Task.check`."""
    wanted, given = ([[int(token) for token in r] for r in chain] for chain in (truth, rounds))
    right = [a == b for a, b in zip(wanted, given, strict=False)]
    return right + [False] * (max(len(wanted), len(given)) - len(right))


def checked_lengths(lengths: Sequence[int] | np.ndarray, start: int) -> np.ndarray:
    """Returns lengths as (S,) int64; raises ValueError for others, or a negative start."""
    array = np.asarray(lengths)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"lengths have shape {array.shape} and type {array.dtype}; "
            f"give a flat list of integers."
        )
    if start < 0:
        raise ValueError(f"start is {start}; give the index of the first sample, at least 0.")
    return np.ascontiguousarray(array, np.int64)


def last_rounds(samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of samples with rounds, and the sizes and ends of their last rounds."""
    rows = np.flatnonzero(samples.loops > 0)
    last = samples.first_round[1:][rows] - 1
    ends = samples.round_offsets[last + 1]
    return rows, ends - samples.round_offsets[last], ends


def until_eos(ids: Iterable[int]) -> list[int]:
    """Returns `ids` before the first `<eos>`."""
    tokens = [int(token) for token in ids]
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def split_after(ids: list[int], delimiter: int) -> tuple[list[list[int]], list[int]]:
    """Splits `ids` into pieces that end with `delimiter`, and the rest after the last one."""
    pieces, begin = [], 0
    for k, token in enumerate(ids):
        if token == delimiter:
            pieces.append(ids[begin : k + 1])
            begin = k + 1
    return pieces, ids[begin:]

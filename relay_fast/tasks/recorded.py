"""A task of records in token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from relay_fast.tasks.base import NO_ANSWER, Rounds, checked_lengths, split_after
from relay_fast.tasks.record_index import RecordIndex
from relay_fast.tasks.samples import Samples
from relay_fast.tasks.tokenized import TokenizedTask
from relay_fast.tasks.vocabulary import Vocabulary
from relay_fast.utils.ragged import concat_ranges, lengths_to_offsets


class RecordedTask(TokenizedTask):
    """A `relay_fast.tasks.RecordsTask` in the tokens of a vocabulary: what a `TokenizedTask` has,
    with samples that are read.

    A problem without rounds or answer has as many empty rounds as a model has to write, and the
    answer NO_ANSWER.

    Args:
        text: The task of texts.
        vocabulary: The tokens, among them all of the records.
        index: Its number in the run.
    """

    def __init__(self, text: Any, vocabulary: Vocabulary, index: int) -> None:
        super().__init__(text, vocabulary, index)
        self._encode = text.tokeniser.encoder(self._id_of)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._encode = self.text.tokeniser.encoder(self._id_of)

    def lengths_between(self, shortest: int, longest: int) -> np.ndarray:
        return self.text.lengths_between(shortest, longest)

    def tested_lengths(self, shortest: int, longest: int) -> np.ndarray:
        lengths, pools = self.lengths_between(shortest, longest), self.text.pools
        return lengths[[len(pools.unseen(length)) > 0 for length in lengths.tolist()]]

    def check_range(self, shortest: int, longest: int) -> None:
        self.text.check_range(shortest, longest)

    def prove(self, lengths: Iterable[int]) -> None:
        """Raises ValueError for records with tokens that the vocabulary lacks; what else may be
        wrong with them was found when the file was opened."""
        self.text.check_vocabulary(self.vocabulary)

    def fingerprint(self, lengths: Iterable[int]) -> None:
        return None  # the files' content is in the config

    def report(self, shortest: int, longest: int) -> dict[str, int]:
        return self.text.report(shortest, longest)

    def knows_truth(self, length: int) -> bool:
        pools = self.text.pools
        return bool(pools.index.rows["solved"][pools.drawn(length)].all())

    def most_problems(self, length: int) -> int | None:
        return len(self.text.pools.drawn(length))

    def sample(self, lengths: Sequence[int] | np.ndarray, seed: int, start: int = 0) -> Samples:
        array = checked_lengths(lengths, start)
        for length in np.unique(array).tolist():
            self.text.check_drawn(length)
        pools = self.text.pools
        return self._read(pools.index, pools.draw(array, int(seed), start))

    def unseen(self, length: int, number: int, seed: int) -> Samples:
        """Returns solved records that are kept for evaluation.

        Args:
            length: Their length.
            number: The most records.
            seed: Selects them.
        """
        pools = self.text.pools
        return self._read(pools.test, pools.chosen(length, number, seed))

    def min_widths(self, lengths: np.ndarray) -> np.ndarray:
        if self._splits:
            return np.zeros(len(lengths), np.int64)
        return super().min_widths(lengths)

    # Rounds that were split

    def split_for(
        self, ids: Iterable[int], problem_tokens: int
    ) -> tuple[list[list[int]], int | None]:
        rounds, answer = self.split(ids)
        if not self._splits:
            return rounds, answer
        room = problem_tokens - 1
        return [r[k : k + room] for r in rounds for k in range(0, len(r), room)], answer

    def answer_of(self, rounds: Rounds) -> int | None:
        whole = [token for tokens in rounds for token in tokens]
        return super().answer_of([whole] if self._splits and whole else rounds)

    def answers_of(self, samples: Samples) -> np.ndarray:
        if self._splits:  # what follows the last piece but one may be <sep> alone
            offsets = samples.round_offsets[samples.first_round]
            loops = np.ones(len(samples), np.int32)
            samples = replace(samples, round_offsets=offsets, loops=loops)
        return super().answers_of(samples)

    def _texts(self, rounds: Rounds) -> list[str] | None:
        if self._splits:
            rounds, rest = split_after([int(t) for r in rounds for t in r], self.end)
            rounds = [*rounds, rest] if rest else rounds
        return super()._texts(rounds)

    @property
    def _splits(self) -> bool:
        return self.text.rules.long_rounds == "split"

    def _read(self, index: RecordIndex, positions: np.ndarray) -> Samples:
        """Reads records and puts them into token ids."""
        rows, texts, counts = index.rows[positions], [], []
        known = rows["solved"]
        for record, solved in zip(index.read(positions), known.tolist(), strict=True):
            texts.append(record.problem)
            texts += record.rounds if solved else ()
            counts.append(len(record.rounds) if solved else 0)
        counts = np.array(counts, np.int64)
        ids, sizes = self._encode(texts)
        starts = np.cumsum(sizes) - sizes
        is_problem = np.zeros(len(texts), bool)
        is_problem[np.cumsum(counts + 1) - counts - 1] = True
        problem, problem_offsets = self._laid(ids, starts[is_problem], sizes[is_problem], True)
        rounds, round_offsets = self._laid(ids, starts[~is_problem], sizes[~is_problem], False)
        loops, sizes = rows["loops"], np.diff(round_offsets)
        if self._splits:
            sizes = _split(counts, sizes, np.diff(problem_offsets) - 1)
        every = np.zeros(int(loops.sum()), np.int64)  # rounds that are not known are empty
        every[np.repeat(known, loops)] = sizes
        round_offsets = lengths_to_offsets(every)
        answer = np.full(len(rows), NO_ANSWER, np.int32)
        ends = round_offsets[np.cumsum(loops)]
        answer[known] = rounds[ends[known] - 2]  # the token before <sep>
        return Samples(
            task=np.full(len(rows), self.index, np.int32),
            length=rows["length"].astype(np.int32),
            problem=problem,
            problem_offsets=problem_offsets,
            rounds=rounds,
            round_offsets=round_offsets,
            loops=loops.astype(np.int32),
            answer=answer,
        )

    def _laid(
        self, ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, begin: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns texts end to end, each with `<sep>` behind it and, with `begin`, the task token
        before it; and their offsets."""
        offsets = lengths_to_offsets(sizes + 1 + begin)
        laid = np.full(offsets[-1], self.end, np.int32)
        laid[concat_ranges(offsets[:-1] + begin, sizes)] = ids[concat_ranges(starts, sizes)]
        if begin:
            laid[offsets[:-1]] = self.token
        return laid, offsets


def _split(counts: np.ndarray, sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Splits rounds into pieces of at most `room` tokens; returns the tokens of each piece.

    Args:
        counts: (S,) rounds of each sample.
        sizes: (R,) tokens of each round.
        room: (S,) most tokens of a piece.
    """
    room = np.repeat(room, counts)
    pieces = -(-sizes // room)
    full = np.repeat(room, pieces)
    full[np.cumsum(pieces) - 1] = sizes - (pieces - 1) * room
    return full

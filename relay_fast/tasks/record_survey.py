"""One pass over a file of records, which checks each of them and writes a row about it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from relay_fast.tasks.record_files import Record, Source, parse
from relay_fast.tasks.record_rules import Facts, Rules, Sizes, texts_of
from relay_fast.tasks.tokenisers import Tokeniser
from relay_fast.utils.ragged import lengths_to_offsets

ROW = np.dtype(
    [("offset", "<i8"), ("digest", "<u8"), ("size", "<i4"), ("length", "<i4"), ("loops", "<i4"),
     ("solved", "?")]
)  # fmt: skip
BLOCK = 1024  # records that are checked together


class _Block(NamedTuple):
    """Up to BLOCK records: lines from `first` on, and their tokens laid end to end."""

    first: int
    records: list[Record]
    tokens: list[str]
    bounds: list[int]  # of the texts: of each record the problem, its rounds, its answer
    texts: np.ndarray  # (records + 1,) where each record's texts begin


class Survey:
    """The pass over a file.

    Args:
        source: The file.
        tokeniser: Makes tokens of its texts.
        rules: What its records have to be like.
    """

    def __init__(self, source: Source, tokeniser: Tokeniser, rules: Rules) -> None:
        self.source, self.tokeniser, self.rules = source, tokeniser, rules
        self.facts = Facts()
        self._seen: set[str] = set()
        self._content = hashlib.blake2b(digest_size=16)
        self._without_loops = -1  # the first record whose loops are taken from its length

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the rows of all records; raises ValueError for the first that breaks a rule."""
        first = offset = 0
        with open(self.source.path, "rb") as file:
            while lines := list(islice(file, BLOCK)):
                read = [self._parsed(first + i, line) for i, line in enumerate(lines)]
                records = [*map(self.rules.applied, read)]
                block = self._tokenised(first, records)
                rows = np.zeros(len(lines), ROW)
                rows["size"] = sizes = np.fromiter(map(len, lines), np.int64, len(lines))
                rows["offset"] = offset + np.cumsum(sizes) - sizes
                self._check_tokens(block)
                for i, record in enumerate(records):
                    self._fill(rows[i], block, i, record)
                    if record.rounds is None and read[i].loops is None and self._without_loops < 0:
                        self._without_loops = first + i
                self._content.update(b"".join(lines))
                first, offset = first + len(lines), offset + int(sizes.sum())
                yield rows

    def finish(self) -> Facts:
        """Returns the facts; raises ValueError for an empty file and for loops not known."""
        if not self.facts.lengths:
            raise ValueError(f"{self.source.shown} holds no records")
        if min(self._without_loops, self.facts.other_loops) >= 0:
            raise ValueError(
                f'{self.source.place(self._without_loops)} has neither "rounds" nor "loops", and '
                f"its length does not say how many rounds it needs: in "
                f"{self.source.unit} {self.facts.other_loops + 1} the length is not the number of "
                f'rounds; add "loops"'
            )
        self.facts.content = self._content.hexdigest()
        self.facts.tokens = sorted(self._seen)
        self.facts.lengths = dict(sorted(self.facts.lengths.items()))
        return self.facts

    def _parsed(self, index: int, line: bytes) -> Record:
        try:
            return parse(line)
        except ValueError as error:
            raise self._wrong(index, str(error)) from None

    def _wrong(self, index: int, why: str) -> ValueError:
        return ValueError(f"{self.source.place(index)} {why}")

    def _tokenised(self, first: int, records: list[Record]) -> _Block:
        texts, counts = [], []
        for record in records:
            before = len(texts)
            texts += texts_of(record)
            counts.append(len(texts) - before)
        try:
            tokens, sizes = self._cut(texts)
        except ValueError:
            raise self._uncut(first, records) from None
        bounds = lengths_to_offsets(sizes).tolist()
        return _Block(first, records, tokens, bounds, lengths_to_offsets(np.array(counts)))

    def _cut(self, texts: list[str]) -> tuple[list[str], np.ndarray]:
        tokens, sizes = self.tokeniser.tokens(texts)
        self.tokeniser.check(texts, tokens)
        return tokens, sizes

    def _uncut(self, first: int, records: list[Record]) -> ValueError:
        """Returns the error of the first text that the tokeniser cannot cut."""
        for i, record in enumerate(records):
            for text in texts_of(record):
                try:
                    self._cut([text])
                except ValueError as error:
                    why = f"has the text {text!r:.60}, {error}"
                    return self._wrong(
                        first + i, f"{why}: write it otherwise, or mend the tokeniser"
                    )
        raise AssertionError("texts are cut one by one as they are together")

    def _check_tokens(self, block: _Block) -> None:
        """Raises ValueError for texts without tokens and for tokens that may not occur."""
        new = set(block.tokens) - self._seen
        for token in new:
            if token in self.rules.reserved:
                text = np.searchsorted(block.bounds, block.tokens.index(token), "right") - 1
                owner = int(np.searchsorted(block.texts, text, "right")) - 1
                why = f"has the token {token!r}, which is kept for the model: write it otherwise"
                raise self._wrong(block.first + owner, why)
        self._seen |= new
        empty = np.flatnonzero(np.diff(block.bounds) == 0)
        if len(empty):
            owner = int(np.searchsorted(block.texts, empty[0], "right")) - 1
            record, k = block.records[owner], int(empty[0] - block.texts[owner])
            rounds = len(record.rounds or ())
            what = "problem" if k == 0 else f"round {k}" if k <= rounds else "answer"
            raise self._wrong(
                block.first + owner, f"has an empty {what}: write it, or leave it out"
            )

    def _fill(self, row: np.ndarray, block: _Block, i: int, record: Record) -> None:
        """Checks one record and fills its row."""
        rules, facts, index = self.rules, self.facts, block.first + i
        begin, end = int(block.texts[i]), int(block.texts[i + 1])
        bounds = block.bounds[begin : end + 1]
        problem = bounds[1] - bounds[0] + rules.problem_extra
        rounds = record.rounds or ()
        loops, longest, chain = len(rounds) or record.loops or record.length, 0, 0
        length = record.length or loops
        added = rules.answer_is == "added"
        if rounds:
            ends = bounds[1 : len(rounds) + 2]
            sizes = [b - a for a, b in zip(ends, ends[1:], strict=False)]
            loops, longest = self._rounds(index, problem, sizes)
            chain = ends[-1] - ends[0] + len(rounds) * rules.round_extra
            if record.answer is not None:
                self._check_answer(index, block.tokens, ends, bounds[-2:])
            if loops != length + added and facts.other_loops < 0:
                facts.other_loops = index
        solved = bool(rounds) and record.answer is not None
        key = self.tokeniser.key(block.tokens[bounds[0] : bounds[1]])
        facts.respelt += key != record.problem.encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        row["digest"] = int.from_bytes(digest, "little")
        row["length"], row["loops"], row["solved"] = length, loops, solved
        own = facts.lengths.setdefault(length, Sizes())
        own.records, own.solved = own.records + 1, own.solved + solved
        own.loops, own.problem = max(own.loops, loops), max(own.problem, problem)
        own.round, own.chain = max(own.round, longest), max(own.chain, chain)

    def _rounds(self, index: int, problem: int, sizes: list[int]) -> tuple[int, int]:
        """Returns the rounds as a model writes them: how many, and tokens of the longest."""
        rules, longest = self.rules, max(sizes)
        if rules.max_round_tokens is not None and longest > rules.max_round_tokens:
            raise self._wrong(
                index,
                f"has a round of {longest} tokens, more than max_round_tokens = "
                f"{rules.max_round_tokens}: shorten it, or allow longer ones",
            )
        room = problem - 1  # the boundary <pad> stands before the round
        longest += rules.round_extra
        if longest <= room:
            return len(sizes), longest
        sizes = [size + rules.round_extra for size in sizes]
        self.facts.long_rounds += sum(size > room for size in sizes)
        if rules.long_rounds == "split":
            return sum(-(-size // room) for size in sizes), room
        return len(sizes), longest

    def _check_answer(
        self, index: int, tokens: list[str], ends: list[int], answer: list[int]
    ) -> None:
        given, last = tokens[answer[0] : answer[1]], tokens[ends[-2] : ends[-1]]
        if self.rules.answer_is == "token":
            last = last[-1:]
        if given != last:
            what = "is" if self.rules.answer_is == "round" else "ends with"
            raise self._wrong(
                index,
                f"has the answer {self.tokeniser.join(given)!r}, but its last round {what} "
                f'{self.tokeniser.join(last)!r}: correct one, or set answer_is = "round" if the '
                f'answer is the whole last round, "added" to make a last round of it',
            )


def place_of_token(
    source: Source, tokeniser: Tokeniser, tokens: Collection[str]
) -> tuple[str, str]:
    """Finds where the first of some tokens occurs, for messages; reads the file again.

    Args:
        source: The file.
        tokeniser: Makes tokens of its texts.
        tokens: The tokens.

    Returns:
        The place, and which token it is.
    """
    with open(source.path, "rb") as file:
        for index, line in enumerate(file):
            for token in tokeniser.tokens(texts_of(parse(line)))[0]:
                if token in tokens:
                    return source.place(index), token
    return source.shown, min(tokens)

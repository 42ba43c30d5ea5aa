"""The index of a file of records: where each stands, and whether all of them can be used.

One pass reads every record, checks it against the rules of its task and writes a row about it; the
index is kept in the cache folder for the next time. Rows are mapped into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relay_fast.tasks.record_files import (
    Record,
    RecordReader,
    Source,
    Stamp,
    cache_folder,
    changed,
    parse,
)
from relay_fast.tasks.tokenisers import Tokeniser
from relay_fast.utils.ragged import lengths_to_offsets

ROW = np.dtype(
    [("offset", "<i8"), ("digest", "<u8"), ("size", "<i4"), ("length", "<i4"), ("loops", "<i4"),
     ("solved", "?")]
)  # fmt: skip
BLOCK = 1024  # records that are checked together
VERSION = 1  # of the files; others are ignored
LONG_ROUNDS = ("pad", "split")
ANSWERS = ("token", "round", "added")


@dataclass(frozen=True)
class Rules:
    """What records of a task must be like.

    Args:
        reserved: texts of special tokens, which may not occur.
        max_round_tokens: of one round, None for any number.
        long_rounds: what happens to a round that does not fit into its problem's input: "pad" makes
            inputs longer, "split" makes several rounds of it.
        answer_is: where the answer stands in the rounds: "token" for the last token of the last
            round, "round" for the whole last round, "added" to make a last round of it.
        problem_extra, round_extra: tokens that the task adds to a problem and to a round.
    """

    reserved: tuple[str, ...] = ()
    max_round_tokens: int | None = None
    long_rounds: str = "pad"
    answer_is: str = "token"
    problem_extra: int = 2
    round_extra: int = 1

    def __post_init__(self) -> None:
        for name, known in (("long_rounds", LONG_ROUNDS), ("answer_is", ANSWERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is unknown: use one of {', '.join(known)}"
                )

    def applied(self, record: Record) -> Record:
        """Returns the record with its answer as a last round, where that is asked for."""
        if self.answer_is != "added":
            return record
        length = record.length or len(record.rounds or ()) or record.loops
        if record.rounds is None or record.answer is None:
            return record._replace(rounds=None, length=length, loops=(record.loops or length) + 1)
        return record._replace(rounds=[*record.rounds, record.answer], length=length)


@dataclass
class Sizes:
    """The most that records of one length need, and how many there are.

    Attributes:
        records, solved: how many; those with rounds and answer.
        loops: rounds; problem, round, chain: tokens, those of the task included.
    """

    records: int = 0
    solved: int = 0
    loops: int = 0
    problem: int = 0
    round: int = 0
    chain: int = 0

    def joined(self, other: Sizes) -> Sizes:
        """Returns the sizes of these and other records together."""
        most = {n: max(getattr(self, n), getattr(other, n)) for n in vars(self)}
        counts = {n: getattr(self, n) + getattr(other, n) for n in ("records", "solved")}
        return Sizes(**most | counts)


@dataclass
class Facts:
    """What the pass found in all records together.

    Attributes:
        content: hash of the file.
        tokens: the tokens that occur, sorted.
        lengths: sizes by length, ascending.
        long_rounds: rounds that do not fit into their problem's input.
        widest: tokens of the input that the longest of them needs, 0 without any.
        other_loops: the first record whose length is not the number of its rounds, -1 for none.
    """

    content: str = ""
    tokens: list[str] = field(default_factory=list)
    lengths: dict[int, Sizes] = field(default_factory=dict)
    long_rounds: int = 0
    widest: int = 0
    other_loops: int = -1

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"lengths": {n: vars(sizes) for n, sizes in self.lengths.items()}}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Facts:
        lengths = {int(n): Sizes(**sizes) for n, sizes in values["lengths"].items()}
        return Facts(**{**values, "lengths": lengths})


class RecordIndex:
    """The records of a file, by position and by length.

    Args:
        source: The file.
        stamp: What it is recognised by.
        folder: Files of the index.
        rules: What its records are like.
    """

    def __init__(self, source: Source, stamp: Stamp, folder: Path, rules: Rules) -> None:
        self.source, self._folder, self._rules = source, folder, rules
        self.reader = RecordReader(source, stamp)
        self.facts = Facts.from_json(json.loads((folder / "facts.json").read_text()))

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """(N,) ROW, one for each record."""
        return np.memmap(self._folder / "rows.bin", ROW, "r")

    @cached_property
    def _by_length(self) -> np.ndarray:
        """(N,) positions of all records, by length."""
        return np.load(self._folder / "order.npy", mmap_mode="r")

    @cached_property
    def _starts(self) -> dict[int, tuple[int, int]]:
        """Where the records of each length stand in `_by_length`."""
        bounds = lengths_to_offsets(np.array([s.records for s in self.facts.lengths.values()]))
        pairs = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return dict(zip(self.facts.lengths, pairs, strict=True))

    def of_length(self, length: int) -> np.ndarray:
        """Returns the positions of the records of a length, in the order of the file."""
        first, last = self._starts.get(length, (0, 0))
        return self._by_length[first:last]

    def read(self, positions: np.ndarray) -> list[Record]:
        """Reads records, as the rules have them; raises RecordsChanged for a changed file."""
        rows = self.rows[positions]
        records = self.reader.read(rows["offset"].tolist(), rows["size"].tolist())
        return [*map(self._rules.applied, records)]

    def place(self, position: int) -> str:
        """Says where a record stands, for messages."""
        return self.source.place(int(position))

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("rows", "_by_length", "_starts")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}


def open_index(source: Source, tokeniser: Tokeniser, rules: Rules) -> RecordIndex:
    """Returns the index of a file, made if it is not in the cache folder yet.

    Raises:
        ValueError: A record breaks a rule; names its file and line.
    """
    stamp = Stamp.of(source.path)
    key = repr((VERSION, source.path, stamp, tokeniser.identity, rules))
    folder = cache_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if not (folder / "facts.json").exists():
        _make(source, stamp, tokeniser, rules, folder)
    return RecordIndex(source, stamp, folder, rules)


def _make(source: Source, stamp: Stamp, tokeniser: Tokeniser, rules: Rules, folder: Path) -> None:
    """Writes the files of an index; the folder appears when all are there."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        survey = _Survey(source, tokeniser, rules)
        with open(partial / "rows.bin", "wb") as file:
            for rows in survey.blocks():
                rows.tofile(file)
        if not stamp.fits(source.path):
            raise changed(source.shown)
        (partial / "facts.json").write_text(json.dumps(survey.finish().to_json()))
        lengths = np.memmap(partial / "rows.bin", ROW, "r")["length"]
        np.save(partial / "order.npy", np.argsort(lengths, kind="stable"))
        try:
            os.replace(partial, folder)
        except OSError:  # another process was faster
            if not (folder / "facts.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Block(NamedTuple):
    """Up to BLOCK records: lines from `first` on, and their tokens laid end to end."""

    first: int
    records: list[Record]
    tokens: list[str]
    bounds: list[int]  # of the texts: of each record the problem, its rounds, its answer
    texts: np.ndarray  # (records + 1,) where each record's texts begin


class _Survey:
    """The pass over a file."""

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
        tokens, sizes = self.tokeniser.tokens(texts)
        bounds = lengths_to_offsets(sizes).tolist()
        return _Block(first, records, tokens, bounds, lengths_to_offsets(np.array(counts)))

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
        digest = hashlib.blake2b(record.problem.encode(), digest_size=8).digest()
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
                f"{rules.max_round_tokens}",
            )
        room = problem - 1  # the boundary <pad> stands before the round
        longest += rules.round_extra
        if longest <= room:
            return len(sizes), longest
        sizes = [size + rules.round_extra for size in sizes]
        self.facts.long_rounds += sum(size > room for size in sizes)
        if rules.long_rounds == "split":
            return sum(-(-size // room) for size in sizes), room
        self.facts.widest = max(self.facts.widest, longest + 1)
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
    """Returns where the first of some tokens occurs, for messages, and which it is; the file is
    read again."""
    with open(source.path, "rb") as file:
        for index, line in enumerate(file):
            for token in tokeniser.tokens(texts_of(parse(line)))[0]:
                if token in tokens:
                    return source.place(index), token
    return source.shown, min(tokens)


def texts_of(record: Record) -> list[str]:
    """Returns the texts of a record: its problem, its rounds, its answer."""
    texts = [record.problem, *(record.rounds or ())]
    if record.answer is not None:
        texts.append(record.answer)
    return texts

"""A task whose problems, rounds and answers are read from a file: no generator, no solver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from relay_fast.tasks.base import Task
from relay_fast.tasks.record_files import Record, open_source
from relay_fast.tasks.record_index import RecordIndex, open_index
from relay_fast.tasks.record_pools import RecordPools
from relay_fast.tasks.record_rules import Rules
from relay_fast.tasks.record_rules import Sizes as RecordSizes
from relay_fast.tasks.record_survey import place_of_token
from relay_fast.tasks.recorded import RecordedTask
from relay_fast.tasks.text import Sample, Sizes, TextTask
from relay_fast.tasks.tokenisers import make_tokeniser
from relay_fast.tasks.vocabulary import RESERVED, Vocabulary
from relay_fast.utils.lengths import ranges_text
from relay_fast.utils.numbers import as_float, as_int

SHOWS = ("both", "round")
_BY_TOKENS = "-tokens"  # of files whose problems' tokens are not their texts, where some are kept


class RecordsTask(TextTask):
    """A task of records `{"problem": …, "rounds": […], "answer": …}`, one JSON object a line.

    The length of a record is its `length`, or else the number of its rounds. Records of the
    training range need rounds and answer; those beyond may be problems alone, with `length` (and
    `loops`, where the length is not the number of rounds).

    Args:
        name: Its name in a run.
        data: Path of a JSONL or Parquet file.
        tokeniser: "whitespace", "characters", "bytes", or a JSON file of the `tokenizers` library.
        title, unit: Its name in tables and plots, and what its length counts.
        test_data: A file of records for evaluation alone. Without it `held_out` of the solved
            records of each length are kept for evaluation; equal problems stay together.
        held_out: That share.
        long_rounds: What happens to rounds that do not fit into their problem's input: "pad" makes
            inputs longer, "split" makes several rounds of one.
        max_round_tokens: The most tokens of a round, None for any number.
        answer_is: "token" if the answer is the last token of the last round, "round" if it is the
            whole last round, "added" to make a last round of it.
        shows: What an iteration of a model with feedback sees: "both" or "round", as in `TextTask`.
        content: Hashes of its files, as a run keeps them: other files are refused.

    Raises:
        ValueError: An argument, a file or a record cannot be used; names file and line.
    """

    def __init__(
        self,
        name: str,
        data: str,
        tokeniser: str = "whitespace",
        title: str = "",
        unit: str = "rounds",
        test_data: str | None = None,
        held_out: float = 0.1,
        long_rounds: str = "pad",
        max_round_tokens: int | None = None,
        answer_is: str = "token",
        shows: str = "both",
        content: str | None = None,
    ) -> None:
        self.name, self.title, self.unit = name, title, unit
        _check_texts(data=data, test_data=test_data, tokeniser=tokeniser, title=title, unit=unit)
        if not 0 <= as_float("held_out", held_out) < 1:
            raise ValueError(f"held_out = {held_out}: give a share of at least 0, less than 1")
        if max_round_tokens is not None:
            as_int("max_round_tokens", max_round_tokens, 1)
        self.arguments |= _absolute({"data": data, "test_data": test_data, "tokeniser": tokeniser})
        reserved = (*RESERVED, *self.special_tokens())
        self.rules = Rules(reserved, max_round_tokens, long_rounds, answer_is)
        self.answer_is = "token" if answer_is == "token" else "round"
        if shows not in SHOWS:
            raise ValueError(f"shows = {shows!r} is unknown: use one of {', '.join(SHOWS)}")
        self.shows = shows
        self.tokeniser = make_tokeniser(tokeniser)
        self._data, self._test_data, self._held_out = data, test_data, held_out
        self._expected = content

    @cached_property
    def pools(self) -> RecordPools:
        """The records, opened when they are needed first; raises ValueError as the class does."""
        test = None if self._test_data is None else self._opened(self._test_data, "test_data")
        pools = RecordPools(self._opened(self._data, "data"), test, self._held_out)
        content = self._content(pools)
        if self._expected not in (None, content):
            if content == f"{self._expected}{_BY_TOKENS}":
                raise ValueError(
                    f"the run was begun by an earlier version, which kept other records of "
                    f"{pools.index.source.shown} for evaluation: begin a new run in another folder"
                )
            raise ValueError(
                f"{pools.index.source.shown} has changed since the run began: restore the file, or "
                f"begin a new run in another folder"
            )
        return pools

    @classmethod
    def of(cls, name: str, records: Iterable[Mapping[str, Any]], **options: Any) -> RecordsTask:
        """Makes a task of records in memory, such as a dataset of the `datasets` library.

        They are copied into the cache folder, from which other processes and later runs read them.

        Args:
            name: Its name in a run.
            records: Mappings with the fields of a record.
            options: Further arguments of the class.
        """
        return cls(name, open_source(records).path, **options)

    # What a task of texts says

    def sample(self, length: int, rng: np.random.Generator) -> Sample:
        self.check_drawn(length)
        pool = self.pools.drawn(length)
        record = self.pools.index.read(pool[rng.integers(len(pool), size=1)])[0]
        if record.rounds is None or record.answer is None:
            raise ValueError(
                f"{self.pools.index.source.shown} holds problems of length {length} that have no "
                f"rounds or no answer: train on others"
            )
        return record.problem, record.rounds, record.answer

    def tokenize(self, text: str) -> list[str]:
        return self.tokeniser.tokens([text])[0]

    def detokenize(self, tokens: list[str]) -> str:
        return self.tokeniser.join(tokens)

    def check_length(self, length: int) -> None:
        if length not in self._sizes:
            raise ValueError(
                f"{self.pools.index.source.shown} has no records of length {length}: it has "
                f"{ranges_text(self._sizes)}"
            )

    def sizes(self, length: int) -> Sizes:
        """Bounds on records of up to a length; where rounds are not known, as long beside their
        problems as those of the longest that are."""
        below = [sizes for n, sizes in self._sizes.items() if n <= length]
        below = below or [*self._sizes.values()][:1]
        rules, solved = self.rules, [sizes for sizes in below if sizes.round]
        problem = max(sizes.problem for sizes in below)
        rounds = max(sizes.loops for sizes in below)
        own = self._sizes.get(length)
        if own is not None and own.round:
            longest = own.round
        else:
            longest = max(problem + (solved[-1].round - solved[-1].problem if solved else 0), 2)
        chain = max([sizes.chain for sizes in solved], default=0)
        if own is None or not own.solved or own.solved < own.records:
            chain = max(chain, rounds * longest)
        chain -= rounds * rules.round_extra
        return Sizes(problem - rules.problem_extra, longest - rules.round_extra, chain, rounds)

    def vocabulary_tokens(self, lengths: Iterable[int]) -> list[str]:
        found = set(self.pools.index.facts.tokens).union(self.pools.test.facts.tokens)
        return sorted(found)

    def bound(self, vocabulary: Vocabulary, index: int) -> Task:
        return RecordedTask(self, vocabulary, index)

    # What a run asks of it

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises ValueError for a token of the records that a vocabulary lacks."""
        for records in (self.pools.index, self.pools.test):
            missing = {token for token in records.facts.tokens if token not in vocabulary}
            if missing:
                place, token = place_of_token(records.source, self.tokeniser, missing)
                raise ValueError(
                    f"{place} has the token {token!r}, which the vocabulary lacks: add it to "
                    f"vocabulary.tokens, or leave these out to collect them from the records"
                )

    def drawable(self, length: int) -> bool:
        return len(self.pools.drawn(length)) > 0

    def pinned(self) -> dict[str, Any]:
        """Returns the hashes by which a run recognises its files."""
        return {"content": self._content(self.pools)}

    def lengths_between(self, shortest: int, longest: int) -> np.ndarray:
        """Returns the lengths that there are records of, ascending."""
        return np.array([n for n in self._sizes if shortest <= n <= longest], np.int64)

    def check_drawn(self, length: int) -> None:
        """Raises ValueError if there are no records of a length to draw from."""
        self.check_length(length)
        if not len(self.pools.drawn(length)):
            raise ValueError(
                f"all records of length {length} in {self.pools.index.source.shown} are kept for "
                f"evaluation: add some, or lower held_out"
            )

    def check_range(self, shortest: int, longest: int) -> None:
        """Raises ValueError for a training range without records or with unsolved ones."""
        for length in (shortest, longest):
            self.check_drawn(length)
        for length in self.lengths_between(shortest, longest).tolist():
            index = self.pools.index
            rows = index.of_length(length)
            unsolved = rows[~index.rows["solved"][rows]]
            if len(unsolved):
                record = index.read(unsolved[:1])[0]
                raise ValueError(
                    f"{index.place(unsolved[0])} has no {_missing(record)}, but its length "
                    f"{length} is in the training range {shortest}..{longest}: add what is "
                    f"missing, or train on other lengths"
                )

    def report(self, shortest: int, longest: int) -> dict[str, int]:
        """Counts the records: of the training range, for evaluation, and what was changed."""
        index, test, facts = self.pools.index, self.pools.test, self.pools.index.facts
        lengths = self.lengths_between(shortest, longest).tolist()
        every = [*test.facts.lengths]
        return {
            "records": len(index),
            "train": sum(len(self.pools.drawn(length)) for length in lengths),
            "test": sum(len(self.pools.unseen(length)) for length in every),
            "unsolved": sum(s.records - s.solved for s in facts.lengths.values()),
            "duplicates": self.pools.duplicates,
            f"rounds_{'split' if self.rules.long_rounds == 'split' else 'padded'}": (
                facts.long_rounds + (test.facts.long_rounds if test is not index else 0)
            ),
        }

    def _content(self, pools: RecordPools) -> str:
        hashes = {index.facts.content: None for index in (pools.index, pools.test)}
        content = "-".join([*hashes, *self.tokeniser.files])
        split = pools.test is pools.index and self._held_out > 0
        return content + _BY_TOKENS * (split and pools.index.facts.respelt > 0)

    def _opened(self, data: str, what: str) -> RecordIndex:
        return open_index(open_source(data, what), self.tokeniser, self.rules)

    @cached_property
    def _sizes(self) -> dict[int, RecordSizes]:
        """Sizes of the records of both files, by length, ascending."""
        sizes = dict(self.pools.index.facts.lengths)
        if self.pools.test is not self.pools.index:
            for length, other in self.pools.test.facts.lengths.items():
                sizes[length] = sizes[length].joined(other) if length in sizes else other
        return dict(sorted(sizes.items()))


def _check_texts(**arguments: Any) -> None:
    """Raises ValueError for an argument that is no text."""
    for name, value in arguments.items():
        if not isinstance(value, str) and (name, value) != ("test_data", None):
            raise ValueError(f"{name} = {value!r}: give a text")


def _absolute(paths: Mapping[str, str | None]) -> dict[str, str]:
    """Makes those that are paths of files absolute; leaves out what is none."""
    files = {name: Path(path) for name, path in paths.items() if path is not None}
    return {name: str(path.resolve()) for name, path in files.items() if path.is_file()}


def _missing(record: Record) -> str:
    return "rounds" if record.rounds is None else "answer"

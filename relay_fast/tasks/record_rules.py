"""What records of a task must be like, and what is known of all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from relay_fast.tasks.record_files import Record

LONG_ROUNDS = ("pad", "split")
ANSWERS = ("token", "round", "added")


@dataclass(frozen=True)
class Rules:
    """The rules that records of a task must keep.

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
    """Facts that the pass found about all records together.

    Attributes:
        content: hash of the file.
        tokens: the tokens that occur, sorted.
        lengths: sizes by length, ascending.
        long_rounds: rounds that do not fit into their problem's input.
        other_loops: the first record whose length is not the number of its rounds, -1 for none.
        respelt: problems whose text is not that of their tokens, which decide what is kept.
    """

    content: str = ""
    tokens: list[str] = field(default_factory=list)
    lengths: dict[int, Sizes] = field(default_factory=dict)
    long_rounds: int = 0
    other_loops: int = -1
    respelt: int = 0

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"lengths": {n: vars(sizes) for n, sizes in self.lengths.items()}}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Facts:
        lengths = {int(n): Sizes(**sizes) for n, sizes in values["lengths"].items()}
        return Facts(**{**values, "lengths": lengths})


def texts_of(record: Record) -> list[str]:
    """Returns the texts of a record: its problem, its rounds, its answer."""
    texts = [record.problem, *(record.rounds or ())]
    if record.answer is not None:
        texts.append(record.answer)
    return texts

"""A task in one class of plain Python, whose problems, rounds and answers are texts."""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from relay_fast.tasks.base import Task
from relay_fast.tasks.own_code import own_code
from relay_fast.tasks.references import load_class, reference_of
from relay_fast.tasks.tokenized import TokenizedTask
from relay_fast.tasks.vocabulary import RESERVED, Vocabulary
from relay_fast.utils.numbers import as_int

MEASURED = 48  # samples of a length that its sizes are measured on
_MEASURING = 0x512E  # salt of their seed

Sample = tuple[str, Sequence[str], str]


class Sizes(NamedTuple):
    """Bounds on the samples of one length, in tokens of the task's texts.

    problem, round, chain: of the problem, of one round, and of all rounds together.
    rounds: how many rounds.
    """

    problem: int
    round: int
    chain: int
    rounds: int


class TextTask(ABC):
    """A family of problems whose solution is written in rounds, as texts.

    A subclass gives `name` and `sample`; all else has a default that can be overridden. It is built
    of its class and the arguments of its constructor in every process, so that these must be
    JSON-able and the class importable; attributes that are set later are lost.

    Attributes:
        name: Its name in a run: letters, digits, `_` and `-`.
        title, unit: Its name in tables and plots, and what its length counts.
        min_length: The smallest length.
        tokens: All tokens of its texts; None to collect them from samples.
        answer_is: "token" if the answer is the last token of the last round, "round" if it is the
            whole last round; `answer_of` may say otherwise.
        shows: What an iteration of a model with `feedback = "tokens"` sees: "both", the problem and
            under it the last round, or "round", the last round in the problem's place, where it
            holds all that the next one needs; `shown` may say otherwise.
        arguments: Those of the constructor, by name.
    """

    name: str
    title: str = ""
    unit: str = "length"
    min_length: int = 1
    tokens: Sequence[str] | None = None
    answer_is: ClassVar[str] = "token"
    shows: ClassVar[str] = "both"
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> TextTask:
        task = super().__new__(cls)
        task.arguments = _arguments(cls, args, kwargs)
        return task

    def __reduce__(self) -> tuple:
        return _built, (reference_of(type(self)), self.arguments)

    # What a task says

    @abstractmethod
    def sample(self, length: int, rng: np.random.Generator) -> Sample:
        """Draws a problem: its text, the texts of its rounds, the text of its answer.

        All that is random comes from `rng`, which has a seed of its own in each sample.
        """

    def solve(self, problem: str) -> tuple[Sequence[str], str]:
        """Returns the rounds and the answer of a problem; raises ValueError for a bad one."""
        raise NotImplementedError

    def length_of(self, problem: str) -> int:
        """Returns the length of a problem; where it is given, samples are checked against it."""
        raise NotImplementedError

    def answer_of(self, rounds: Sequence[str]) -> str | None:
        """Returns the answer that the rounds imply, None if they imply none.

        The rounds may be a model's: ValueError and LookupError mean None too.
        """
        if self.answer_is == "round":
            return rounds[-1]
        last = self.tokenize(rounds[-1])
        return self.detokenize(last[-1:]) if last else None

    def shown(self, problem: str, rounds: Sequence[str]) -> tuple[str, str]:
        """Makes the input of an iteration of a model with `feedback = "tokens"` after these rounds:
        two texts, right-aligned under each other."""
        last = rounds[-1] if rounds else ""
        return (problem, last) if self.shows == "both" else (last or problem, "")

    def tokenize(self, text: str) -> list[str]:
        """Splits a text into tokens, by default at whitespace."""
        return text.split()

    def detokenize(self, tokens: Sequence[str]) -> str:
        """Joins tokens to a text that `tokenize` splits into the same ones."""
        return " ".join(tokens)

    def check_length(self, length: int) -> None:
        """Raises ValueError if there are no problems of this length."""
        if length < self.min_length:
            raise ValueError(
                f"{self.name} length {length} is too short; use at least {self.min_length}."
            )

    def sizes(self, length: int) -> Sizes:
        """Bounds on samples of a length, by default measured on some, with room where they vary."""
        least, most = self._measured[length]
        return Sizes(*(b + (b - a) for a, b in zip(least, most, strict=True)))

    # What the package does with it

    def bounds(self, length: int) -> Sizes:
        """Returns `sizes`; raises ValueError if they are none."""
        if not self.own_sizes:
            return self.sizes(length)
        with own_code(self):
            sizes = self.sizes(length)
        try:
            pairs = zip(Sizes._fields, sizes, strict=True)
            return Sizes(*(as_int(name, value, 0) for name, value in pairs))
        except (TypeError, ValueError):
            raise ValueError(
                f"task {self.name!r}: sizes({length}) returned {sizes!r:.80}; return "
                f"Sizes(problem, round, chain, rounds), whole numbers"
            ) from None

    @property
    def solves(self) -> bool:
        """Whether `solve` is given."""
        return type(self).solve is not TextTask.solve

    @property
    def tells_lengths(self) -> bool:
        """Whether `length_of` is given."""
        return type(self).length_of is not TextTask.length_of

    @property
    def own_sizes(self) -> bool:
        """Whether `sizes` is given."""
        return type(self).sizes is not TextTask.sizes

    @property
    def own_answers(self) -> bool:
        """Whether `answer_of` is given."""
        return type(self).answer_of is not TextTask.answer_of

    @property
    def own_inputs(self) -> bool:
        """Whether `shown` is given."""
        return type(self).shown is not TextTask.shown

    def reference(self) -> dict[str, Any]:
        """Returns the part of a run's config that builds this task again."""
        return {"class": reference_of(type(self)), "parameters": self.arguments}

    def drawable(self, length: int) -> bool:
        """Tells whether problems of a length can be drawn, as far as that is known beforehand."""
        return True

    def pinned(self) -> dict[str, Any]:
        """Returns parameters that a run adds to its config to recognise what they stand for."""
        return {}

    def special_tokens(self) -> list[str]:
        """Returns the tokens that a vocabulary needs beside those of its texts."""
        return [f"[{self.name}]", "<sep>"]

    def vocabulary_tokens(self, lengths: Iterable[int]) -> list[str]:
        """Returns the tokens of its texts, sorted: `tokens`, or those of samples of `lengths`."""
        if self.tokens is not None:
            return list(self.tokens)
        found: set[str] = set()
        for length in lengths:
            for problem, rounds, answer in self._examples(length):
                for text in (problem, *rounds, answer):
                    found.update(self.tokenize(text))
        return sorted(found.difference(RESERVED))

    def bound(self, vocabulary: Vocabulary, index: int) -> Task:
        """Returns the task in token ids of a vocabulary; override it to return another `Task`."""
        return TokenizedTask(self, vocabulary, index)

    def draw(self, length: int, seed: int, index: int) -> Sample:
        """Draws a sample, checked to be texts with at least one round.

        Args:
            length: Its length.
            seed: The seed.
            index: The sample's number.

        Raises:
            OwnCodeError: The sampler returns something else, or raises.
        """
        rng = np.random.default_rng([self._key, seed & 0xFFFFFFFFFFFFFFFF, index])
        with own_code(self):
            return _checked(self.name, length, self.sample(length, rng))

    @cached_property
    def _key(self) -> int:
        return int.from_bytes(self.name.encode(), "little")

    @cached_property
    def _measured(self) -> _Measured:
        return _Measured(self)

    def _examples(self, length: int) -> list[Sample]:
        self.check_length(length)
        return [self.draw(length, _MEASURING, i) for i in range(MEASURED)]


class _Measured(dict):
    """The least and the most sizes among a task's examples, by length, measured when asked for."""

    def __init__(self, task: TextTask) -> None:
        self.task = task

    def __missing__(self, length: int) -> tuple[Sizes, Sizes]:
        count, found = lambda text: len(self.task.tokenize(text)), []
        for problem, rounds, _ in self.task._examples(length):
            sizes = [count(text) for text in rounds]
            found.append(Sizes(count(problem), max(sizes), sum(sizes), len(sizes)))
        columns = list(zip(*found, strict=True))
        self[length] = Sizes(*map(min, columns)), Sizes(*map(max, columns))
        return self[length]


def _arguments(cls: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a constructor by name, as JSON gives them back.

    Raises ValueError for one that JSON cannot hold.
    """
    if cls.__init__ is object.__init__ and (args or kwargs):
        raise TypeError(f"{cls.__name__} has no parameter {next(iter((*kwargs, *args)))!r}")
    signature = inspect.signature(cls.__init__)
    given = dict(signature.bind(None, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    given.pop(next(iter(signature.parameters)))  # self
    try:
        return json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"an argument of {cls.__name__} cannot be saved with a run ({error}); use numbers, "
            f"texts, lists and dictionaries."
        ) from None


def _built(reference: str, arguments: dict[str, Any]) -> TextTask:
    return load_class(reference)(**arguments)


def _checked(name: str, length: int, sample: Any) -> Sample:
    """Returns a sample as texts; raises ValueError for anything else."""
    try:
        problem, given, answer = sample
        rounds = [*given]
        texts = [problem, answer, *rounds]
    except (TypeError, ValueError):
        given, texts = None, [None]
    if not all(isinstance(text, str) for text in texts) or isinstance(given, str):
        raise ValueError(
            f"task {name!r}: sample({length}, rng) returned {sample!r:.80}; return three things, "
            f"the problem's text, a list of the rounds' texts and the answer's text."
        )
    if not rounds:
        raise ValueError(
            f"task {name!r}: the problem {problem!r:.60} of length {length} has no round; give at "
            f"least one."
        )
    return problem, rounds, answer

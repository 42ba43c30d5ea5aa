"""A task of texts in token ids: what the package trains on, decodes and checks.

A problem is `[NAME] … <sep>`, a round `… <sep>`. An autoregressive sequence is the problem, the
rounds and `<eos>`; the answer is read off the rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from relay_fast.tasks.base import (
    NO_ANSWER,
    Rounds,
    Task,
    checked_lengths,
    last_rounds,
    split_after,
    until_eos,
)
from relay_fast.tasks.feedback import Arrangement, Inputs, Written, problems_shown, right_aligned
from relay_fast.tasks.own_code import OwnCodeError, own_code
from relay_fast.tasks.proving import digest_of, prove_samples
from relay_fast.tasks.samples import Samples
from relay_fast.tasks.vocabulary import EOS, PAD, RESERVED, Vocabulary
from relay_fast.utils.ragged import lengths_to_offsets

MEASURED = 16  # samples of a length that what is shown is measured on
_UNREADABLE = (ValueError, LookupError, TypeError, ArithmeticError)  # of a model's texts


class TokenizedTask(Task):
    """A `relay_fast.tasks.TextTask` in the tokens of a vocabulary.

    The last token of an answer stands for it in `Samples.answer`; where answers have several
    tokens, `same_answers` compares all of them.

    Args:
        text: The task of texts.
        vocabulary: The tokens, among them `[NAME]` and `<sep>`.
        index: Its number in the run.
    """

    answer_suffix = None

    def __init__(self, text: Any, vocabulary: Vocabulary, index: int) -> None:
        super().__init__(vocabulary)
        for name, known in (("answer_is", ("token", "round")), ("shows", ("both", "round"))):
            if (value := getattr(text, name)) not in known:
                raise ValueError(
                    f"task {text.name!r}: {name} = {value!r} is unknown; use one of "
                    f"{', '.join(known)}"
                )
        for name in ("title", "unit"):  # of tables and plots, at the end of a run
            if not isinstance(value := getattr(text, name), str):
                raise ValueError(f"task {text.name!r}: {name} = {value!r:.60} is no text")
        self.text, self.index, self.grows = text, index, text.own_inputs
        self.name, self.title, self.unit = text.name, text.title or text.name, text.unit
        self.min_length = text.min_length
        self.one_token_answers = not text.own_answers and text.answer_is == "token"
        self.token, self.end = (vocabulary.id_of(token) for token in text.special_tokens())
        self._shown_sizes: dict[int, int] = {}
        self._reserved = {*RESERVED, *text.special_tokens()}
        texts = vocabulary.texts(range(vocabulary.n_tokens))
        self._id_of = {t: k for k, t in enumerate(texts) if t not in self._reserved}
        self._ordinary = np.zeros(vocabulary.size, bool)
        self._ordinary[list(self._id_of.values())] = True

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "index": self.index, **self.text.reference()}

    def loops(self, length: int) -> int:
        """Returns the most rounds of a problem of this length."""
        return self.text.bounds(length).rounds

    def max_problem_tokens(self, length: int) -> int:
        return self.text.bounds(length).problem + 2

    def max_round_tokens(self, length: int) -> int:
        return self.text.bounds(length).round + 1

    def max_chain_tokens(self, length: int) -> int:
        sizes = self.text.bounds(length)
        return sizes.chain + sizes.rounds

    def max_input_tokens(self, length: int) -> int:
        """Where `shown` is given, as measured on some samples, with room where they vary."""
        most = super().max_input_tokens(length)
        if not self.text.own_inputs or not self.knows_truth(length):
            return most
        if length not in self._shown_sizes:
            samples = self.sample(np.full(MEASURED, length), 0)
            sizes = self.input_sizes(Written.truth(samples), *samples.iterations())
            own = np.maximum.reduceat(sizes, samples.first_round[:-1])
            self._shown_sizes[length] = int(2 * own.max() - own.min())
        return max(most, self._shown_sizes[length])

    def min_widths(self, lengths: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(lengths, return_inverse=True)
        widths = [self.max_round_tokens(length) + 1 for length in unique.tolist()]
        return np.array(widths, np.int64)[inverse]

    def check_length(self, length: int) -> None:
        self.text.check_length(length)

    def sample(self, lengths: Sequence[int] | np.ndarray, seed: int, start: int = 0) -> Samples:
        array = checked_lengths(lengths, start)
        for length in np.unique(array).tolist():
            self.check_length(length)
        drawn = [
            self.encoded(*self.text.draw(length, int(seed), start + i))
            for i, length in enumerate(array.tolist())
        ]
        samples = self._samples(array, drawn)
        self._check_sizes(samples)
        return samples

    def prove(self, lengths: Iterable[int]) -> None:
        """Raises ValueError for samples that cannot be encoded, that differ when they are drawn
        again, that have another length than asked, that `solve` contradicts, or that are larger
        than `sizes` says."""
        seen = prove_samples(self, lengths)
        if seen and self.text.own_sizes:
            lengths = np.array([length for length, _ in seen])
            self._check_sizes(self._samples(lengths, [self.encoded(*s) for s in seen.values()]))

    def fingerprint(self, lengths: Iterable[int]) -> str | None:
        drawn = [self.text.draw(length, 0, i) for length in lengths for i in range(2)]
        return digest_of(drawn)

    def encoded(
        self, problem: str, rounds: Sequence[str], answer: str
    ) -> tuple[list[int], list[list[int]], int]:
        """Encodes a sample in token ids.

        Args:
            problem: The problem's text.
            rounds: The rounds' texts.
            answer: The answer's text.

        Returns:
            The ids of the problem and of each round, and the number of the answer.

        Raises:
            ValueError: The texts do not fit together.
        """
        ids = [self.token, *self._ids(problem), self.end]
        if len(ids) == 2:
            raise ValueError(
                f"task {self.name!r}: the problem {problem!r:.60} of the rounds {[*rounds]!r:.60} "
                f"is empty; give every problem at least one token."
            )
        chain = [[*self._ids(text), self.end] for text in rounds]
        for text, tokens in zip(rounds, chain, strict=True):
            if len(tokens) == 1:
                raise ValueError(
                    f"task {self.name!r}: the problem {problem!r:.60} has an empty round "
                    f"{text!r}; give every round at least one token."
                )
        implied = self._implied(rounds)
        if not self.text.tokenize(answer) or implied != self.text.tokenize(answer):
            shown = None if implied is None else self.text.detokenize(implied)
            raise ValueError(
                f"task {self.name!r}: the problem {problem!r:.60} has the answer {answer!r:.40}, "
                f"but its rounds imply {shown!r:.40} (the last is {rounds[-1]!r:.60}); make the "
                f'rounds end with the answer, set answer_is = "round" if it is the whole last '
                f"round, or define answer_of."
            )
        return ids, chain, self._ids(answer)[-1]

    def _check_sizes(self, samples: Samples) -> None:
        """Raises ValueError for samples beyond the sizes that the task gives for their lengths."""
        first = samples.first_round
        rounds = np.diff(samples.round_offsets)
        found = {
            "max_problem_tokens": np.diff(samples.problem_offsets),
            "max_round_tokens": np.maximum.reduceat(rounds, first[:-1]) if len(rounds) else rounds,
            "max_chain_tokens": np.diff(samples.round_offsets[first]),
            "loops": samples.loops,
        }
        for length in np.unique(samples.length).tolist():
            own = samples.length == length
            for name, sizes in found.items():
                most, bound = int(sizes[own].max()), getattr(self, name)(length)
                if most > bound:
                    raise ValueError(
                        f"task {self.name!r}: a sample of length {length} has {name} = {most}, "
                        f"more than the {bound} expected; define {type(self.text).__name__}.sizes"
                    )

    def _ids(self, text: str) -> list[int]:
        try:
            return [self._id_of[token] for token in self.text.tokenize(text)]
        except KeyError as error:
            token = error.args[0]
            why = "which is reserved" if token in self._reserved else "which the vocabulary lacks"
            raise ValueError(
                f"task {self.name!r}: the text {text!r:.60} holds the token {token!r}, {why}; name "
                f"all of its tokens in {type(self.text).__name__}.tokens or in the config's "
                f"vocabulary.tokens, and use none of {' '.join(RESERVED)}."
            ) from None

    def _implied(self, rounds: Sequence[str]) -> list[str] | None:
        """Returns the tokens of the answer that rounds imply, None if there is none."""
        try:
            answer = self.text.answer_of(list(rounds)) if rounds else None
            return None if answer is None else self.text.tokenize(answer) or None
        except _UNREADABLE:
            return None

    def _samples(self, lengths: np.ndarray, drawn: list) -> Samples:
        flat = lambda parts: np.array([token for part in parts for token in part], np.int32)
        sizes = lambda parts: lengths_to_offsets(np.array([len(part) for part in parts], np.int64))
        problems, chains = [ids for ids, _, _ in drawn], [chain for _, chain, _ in drawn]
        rounds = [tokens for chain in chains for tokens in chain]
        return Samples(
            task=np.full(len(drawn), self.index, np.int32),
            length=lengths.astype(np.int32),
            problem=flat(problems),
            problem_offsets=sizes(problems),
            rounds=flat(rounds),
            round_offsets=sizes(rounds),
            loops=np.array([len(chain) for chain in chains], np.int32),
            answer=np.array([answer for _, _, answer in drawn], np.int32),
        )

    def _fill(self, *arrays: np.ndarray) -> None:
        raise NotImplementedError("sample makes the arrays itself")

    # Reading problems and chains

    def answer_text(self, rounds: Rounds, answer: int) -> str:
        if self.one_token_answers:
            return self.decode([answer])
        implied = self._implied(self._texts(rounds) or [])
        if implied is None or self._id_of.get(implied[-1]) != answer:
            return self.decode([answer])
        return self.text.detokenize(implied)

    @property
    def solves(self) -> bool:
        return self.text.solves

    def length_of(self, problem: Iterable[int]) -> int:
        try:
            return self.text.length_of(self._text(self._body(problem)))
        except NotImplementedError:
            raise ValueError(
                f"task {self.name!r} does not say how long a problem is: define "
                f"{type(self.text).__name__}.length_of"
            ) from None

    def _solve(self, problem: Iterable[int]) -> tuple[np.ndarray, np.ndarray, int]:
        text = self._text(self._body(problem))
        if not self.solves:
            raise ValueError(
                f"task {self.name!r} has no solver, so that chains cannot be checked by its rules: "
                f"define {type(self.text).__name__}.solve"
            )
        rounds, answer = self.text.solve(text)
        _, chain, answer = self.encoded(text, list(rounds), answer)
        tokens = np.array([token for tokens in chain for token in tokens], np.int32)
        return tokens, lengths_to_offsets(np.array([*map(len, chain)], np.int64)), answer

    def encode(self, text: str) -> list[int]:
        """Converts the text of a problem to its ids; raises ValueError for an unknown token."""
        return [self.token, *self._ids(text), self.end]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of a problem or round, without `[NAME]`, `<sep>` and `<pad>`."""
        return self._text(ids)

    def plain_text(self, ids: Iterable[int]) -> str:
        return self._text(ids)

    def _text(self, ids: Iterable[int]) -> str:
        left_out = (self.token, self.end, PAD, EOS)
        shown = [int(token) for token in ids if token not in left_out]
        return self.text.detokenize(self.vocabulary.texts(shown))

    def _texts(self, rounds: Rounds) -> list[str] | None:
        """Returns the texts of rounds, None if one of them is malformed."""
        for tokens in rounds:
            if len(tokens) < 2 or tokens[-1] != self.end:
                return None
        return [self._text(tokens) for tokens in rounds]

    def answer_of(self, rounds: Rounds) -> int | None:
        if self.text.own_answers:
            implied = self._implied(self._texts(rounds) or [])
            return None if implied is None else self._id_of.get(implied[-1])
        last = [int(token) for token in rounds[-1]] if len(rounds) else []
        if len(last) < 2 or last[-1] != self.end or not self._ordinary[last[-2]]:
            return None
        return last[-2]

    def answers_of(self, samples: Samples) -> np.ndarray:
        answers = np.full(len(samples), NO_ANSWER, np.int32)
        if self.text.own_answers:
            for i in range(len(samples)):
                answer = self.answer_of(samples.rounds_of(i))
                answers[i] = NO_ANSWER if answer is None else answer
            return answers
        rows, sizes, ends = last_rounds(samples)
        whole = sizes >= 2
        rows, ends = rows[whole], ends[whole]
        tokens = samples.rounds[ends - 2]
        read = self._ordinary[tokens] & (samples.rounds[ends - 1] == self.end)
        answers[rows[read]] = tokens[read]
        return answers

    def same_answers(self, written: Samples, truth: Samples) -> np.ndarray:
        same = written.answer == truth.answer
        if not self.one_token_answers:
            for i in np.flatnonzero(same).tolist():
                given, wanted = (
                    self._implied(self._texts(samples.rounds_of(i)) or [])
                    for samples in (written, truth)
                )
                same[i] = given == wanted
        return same

    def split(self, ids: Iterable[int]) -> tuple[list[list[int]], int | None]:
        rounds, tail = split_after(until_eos(ids), self.end)
        if tail:
            rounds.append(tail)
        return rounds, self.answer_of(rounds)

    # What an iteration with feedback sees

    def input_sizes(self, written: Written, owner: np.ndarray, before: np.ndarray) -> np.ndarray:
        if self.text.own_inputs:
            pairs = self._shown(written, owner, before)
            sizes = np.array([max(map(len, pair)) for pair in pairs], np.int64) + 2
        elif self.text.shows == "both":
            sizes = written.problem_sizes(owner)
        else:
            sizes = written.last_or_problem(owner, before)[2] + 1
        return np.maximum(sizes, self.min_widths(written.problems.length[owner]))

    def inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        """The problem, and fed: the last round, right-aligned under it; the last round in the
        problem's place; or what `shown` says."""
        if self.text.own_inputs:
            return self._own_inputs(written, owner, before, widths)
        if self.text.shows == "round":
            tokens = right_aligned(widths, *written.last_or_problem(owner, before))
            tokens[np.cumsum(widths) - widths] = self.token
            return Inputs(tokens, np.full_like(tokens, PAD))
        fed = right_aligned(widths, written.tokens, *written.last_if_any(owner, before))
        return Inputs(problems_shown(written, owner, widths), fed)

    def arrangement(self, problems: Samples, widths: np.ndarray) -> Arrangement | None:
        if self.text.own_inputs:
            return None
        own = Arrangement.empty(len(widths), int(widths.sum()))
        if self.text.shows == "round":
            least = self.min_widths(problems.length)
            return own._replace(follows=np.ones(len(widths), bool), least=least)
        own.from_end[:] = np.repeat(np.cumsum(widths), widths) - np.arange(len(own.turns))
        return own

    def _own_inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        tokens, fed = np.full((2, int(widths.sum())), PAD)
        ends = np.cumsum(widths)
        tokens[ends - widths], tokens[ends - 1] = self.token, self.end
        for end, (upper, lower) in zip(
            ends.tolist(), self._shown(written, owner, before), strict=True
        ):
            tokens[end - 1 - len(upper) : end - 1] = upper
            fed[end - 1 - len(lower) : end - 1] = lower
        return Inputs(tokens, fed)

    def _shown(
        self, written: Written, owner: np.ndarray, before: np.ndarray
    ) -> list[tuple[list[int], list[int]]]:
        """The ids of the two texts that each iteration sees."""
        pairs, name = [], type(self.text).__name__
        problems, first = written.problems, written.problems.first_round
        for i, count in zip(owner.tolist(), before.tolist(), strict=True):
            r = np.arange(first[i], first[i] + count)
            rounds = [
                self._text(written.tokens[a : a + n].tolist())
                for a, n in zip(written.starts[r].tolist(), written.sizes[r].tolist(), strict=True)
            ]
            with own_code(self.text):
                pair = self.text.shown(self._text(problems.problem_of(i).tolist()), rounds)
            texts = isinstance(pair, tuple | list) and all(isinstance(t, str) for t in pair)
            if not texts or len(pair) != 2:
                raise OwnCodeError(
                    f"task {self.name!r}: shown returned {pair!r:.80}; return two texts, one for "
                    f"each of the two rows of the input (in {name})"
                )
            pairs.append(tuple(map(self._shown_ids, pair)))
        return pairs

    def _shown_ids(self, text: str) -> list[int]:
        # A model's round may hold anything; what is no token of the vocabulary is left out.
        return [self._id_of[t] for t in self.text.tokenize(text) if t in self._id_of]

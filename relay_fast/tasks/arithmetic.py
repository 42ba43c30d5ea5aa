"""Arithmetic in a prime field (Feng et al. 2023): every round collapses one operator.

`3 * 2 + 6 / 3 =` → `6 + 6 / 3 =` → `6 + 2 =` → `8`. The length of a problem is its number of
operators, which is also its number of rounds; the last round is the answer, without `=`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from relay_fast.tasks.base import NO_ANSWER, Rounds, Task, last_rounds, split_after, until_eos
from relay_fast.tasks.feedback import Arrangement, Inputs, Written, right_aligned
from relay_fast.tasks.samples import TASK_NAMES, Samples
from relay_fast.tasks.vocabulary import (
    ARITHMETIC,
    DIVIDE,
    EQUALS,
    LEFT,
    MINUS,
    NUMBER0,
    PAD,
    PLUS,
    RIGHT,
    TIMES,
    Vocabulary,
)
from relay_fast.utils.numbers import as_int

_OPERATORS = {"+": PLUS, "-": MINUS, "*": TIMES, "/": DIVIDE}
_TOKEN = re.compile(r"\[ARI\]|<\w+>|\w+|\S")
_SYMBOLS = str.maketrans("*/-", "×÷−")


class Arithmetic(Task):
    """Expressions modulo a prime, with brackets only where needed; no divisor is zero.

    Args:
        vocabulary: The tokens.
        prime: Numbers are 0..prime-1.
        operators: The operators to draw from, any of `+-*/`.

    Raises:
        ValueError: A parameter is invalid or does not fit the vocabulary.
    """

    name = "arithmetic"
    index = TASK_NAMES.index(name)
    title = "Arithmetic"
    unit = "number of operators"
    token = ARITHMETIC
    end = EQUALS
    answer_suffix = None

    def __init__(self, vocabulary: Vocabulary, prime: int = 11, operators: str = "+-*/") -> None:
        super().__init__(vocabulary)
        prime = as_int("prime", prime)
        if prime < 2 or any(prime % k == 0 for k in range(2, int(prime**0.5) + 1)):
            raise ValueError(
                f"arithmetic prime {prime} is not a prime, so not every number can be divided by; "
                f"use for example 11."
            )
        if prime - 1 > vocabulary.max_number:
            raise ValueError(
                f"arithmetic prime {prime} needs the numbers up to {prime - 1}, the vocabulary "
                f"ends at {vocabulary.max_number}; use a smaller prime or a Vocabulary with a "
                f"larger max_number."
            )
        unknown = [op for op in operators if op not in _OPERATORS]
        if unknown or not operators or len(set(operators)) < len(operators):
            raise ValueError(
                f"arithmetic operators {operators!r} are not understood; "
                f"give one or more of + - * / without repetition, for example '+-*/'."
            )
        self.prime = prime
        self.operators = operators
        self._inverse = np.array([0, *(pow(a, -1, prime) for a in range(1, prime))], np.int64)
        self._operator_ids = np.array([_OPERATORS[op] for op in operators], np.int64)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "prime": self.prime, "operators": self.operators}

    def loops(self, length: int) -> int:
        return length

    def max_problem_tokens(self, length: int) -> int:
        """Returns a bound: every operator but the outermost in brackets."""
        return self._expression_tokens(length) + 2

    def max_round_tokens(self, length: int) -> int:
        return self._expression_tokens(length - 1) + (length > 1)

    def max_chain_tokens(self, length: int) -> int:
        return sum(self._expression_tokens(n) + (n > 0) for n in range(length))

    def _expression_tokens(self, n: int) -> int:
        # Each pair of brackets has its own outermost operator; that of the expression has none.
        pairs = 0 if self.operators in ("+", "*") else max(n - 1, 0)
        return 2 * n + 1 + 2 * pairs

    def _fill(self, lengths, seed, start, *arrays: np.ndarray) -> None:
        from relay_fast.tasks import _arithmetic_jit

        _arithmetic_jit.sample(
            lengths, seed, start, self.prime, self._operator_ids, self._inverse, *arrays
        )

    def length_of(self, problem: Iterable[int]) -> int:
        return sum(PLUS <= token <= DIVIDE for token in self._expression(problem))

    def _solve(self, problem: Iterable[int]) -> tuple[np.ndarray, np.ndarray, int]:
        from relay_fast.tasks import _arithmetic_jit

        expression = np.array(self._expression(problem), np.int32)
        size = len(expression)
        length = np.count_nonzero((expression >= PLUS) & (expression <= DIVIDE))
        rounds = np.empty(length * size, np.int32)
        offsets = np.zeros(length + 1, np.int64)
        count = _arithmetic_jit.solve(
            expression.copy(), size, self.prime, self._inverse, rounds, offsets, 0
        )
        if count < 0:
            raise ValueError(
                f"arithmetic problem {self.decode(expression)!r} divides by zero modulo "
                f"{self.prime}; change the divisor."
            )
        rounds = rounds[: offsets[-1]]
        return rounds, offsets, int(rounds[-1])

    def answer_of(self, rounds: Rounds) -> int | None:
        if len(rounds) and len(rounds[-1]) == 1 and self.vocabulary.is_number(rounds[-1][0]):
            return int(rounds[-1][0])
        return None

    def answers_of(self, samples: Samples) -> np.ndarray:
        answers = np.full(len(samples), NO_ANSWER, np.int32)
        rows, sizes, ends = last_rounds(samples)
        rows, tokens = rows[sizes == 1], samples.rounds[ends[sizes == 1] - 1]
        read = self.are_numbers(tokens)
        answers[rows[read]] = tokens[read]
        return answers

    def input_sizes(self, written: Written, owner: np.ndarray, before: np.ndarray) -> np.ndarray:
        return written.last_or_problem(owner, before)[2] + 1

    def inputs(
        self, written: Written, owner: np.ndarray, before: np.ndarray, widths: np.ndarray
    ) -> Inputs:
        """The expression that is left, alone: the last round in the problem's place."""
        tokens = right_aligned(widths, *written.last_or_problem(owner, before))
        tokens[np.cumsum(widths) - widths] = self.token
        return Inputs(tokens, np.full_like(tokens, PAD))

    def arrangement(self, problems: Samples, widths: np.ndarray) -> Arrangement:
        return Arrangement.empty(len(widths), int(widths.sum()))._replace(
            follows=np.ones(len(widths), bool)
        )

    def split(self, ids: Iterable[int]) -> tuple[list[list[int]], int | None]:
        rounds, tail = split_after(until_eos(ids), EQUALS)
        if tail:
            rounds.append(tail)
        return rounds, self.answer_of(rounds)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns a text without spaces, `(6+9)÷(7+2×5)=`, except between two numbers."""
        text = super().decode(ids)
        return re.sub(r"(?<!\w) | (?!\w)", "", text).translate(_SYMBOLS)

    def _spaced(self, text: str) -> str:
        return " ".join(_TOKEN.findall(text))

    def _expression(self, problem: Iterable[int]) -> list[int]:
        """Returns the expression of a problem; raises ValueError if it is malformed."""
        body = self._body(problem)
        known = self._operator_ids.tolist()
        depth, operand_next = 0, True
        for k, token in enumerate(body):
            if NUMBER0 <= token < NUMBER0 + self.prime:
                fits, operand_next = operand_next, False
                if body[k - 1 : k] == [LEFT] and body[k + 1 : k + 2] == [RIGHT]:
                    self._reject(body, f"brackets hold nothing but a number at position {k}")
            elif token == LEFT:
                fits = operand_next
                depth += 1
            elif token == RIGHT:
                fits = not operand_next and depth > 0
                depth -= 1
            else:
                fits = not operand_next and token in known
                operand_next = True
            if not fits:
                shown = self.vocabulary.decode([token])
                self._reject(body, f"token {shown!r} does not fit at position {k}")
        if operand_next or depth:
            self._reject(body, "it stops before the expression is complete")
        if len(body) == 1:
            self._reject(body, "it has no operator")
        return body

    def _reject(self, body: list[int], reason: str) -> None:
        raise ValueError(
            f"arithmetic problem {self.decode(body)!r}: {reason}; write numbers "
            f"0..{self.prime - 1} joined by {' '.join(self.operators)}, with brackets around "
            f"expressions, and = at the end."
        )

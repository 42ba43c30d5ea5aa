"""Addition of two numbers, a digit a round, as a `TextTask`.

`3 7 5 + 1 2 8 =` → `3 7 +1 1 2 = 3` → `3 +1 1 = 0 3` → `5 0 3`. A round holds the digits of both
numbers that are left, joined by `+`, or by `+1` with a carry, and the digits of the sum so far; the
last round is the sum. The length of a problem is its number of digits and of rounds.
"""

from __future__ import annotations

import numpy as np

from relay_fast.tasks.text import TextTask

_PLUS = ("+", "+1")  # without and with a carry


class Addition(TextTask):
    """Numbers with the same number of digits, each digit uniform; both may begin with zeros."""

    name = "addition"
    title = "Addition"
    unit = "number of digits"
    tokens = (*_PLUS, "=", *"0123456789")
    answer_is = "round"
    shows = "round"

    def sample(self, length: int, rng: np.random.Generator) -> tuple[str, list[str], str]:
        digits = "".join(map(str, rng.integers(0, 10, 2 * length).tolist()))
        first, second = digits[:length], digits[length:]
        return f"{' '.join(first)} + {' '.join(second)} =", *_solved(first, second)

    def solve(self, problem: str) -> tuple[list[str], str]:
        return _solved(*self._numbers(problem))

    def length_of(self, problem: str) -> int:
        return len(self._numbers(problem)[0])

    @staticmethod
    def _numbers(problem: str) -> tuple[str, str]:
        first, _, second = "".join(problem.split()).removesuffix("=").partition("+")
        if len(first) != len(second) or not (first + second).isdecimal():
            raise ValueError(
                f"addition problem {problem!r} is malformed; write two numbers of as many digits, "
                f"for example 3 7 + 0 5 =."
            )
        return first, second


def _solved(first: str, second: str) -> tuple[list[str], str]:
    """Returns the rounds and the sum of two numbers."""
    upper, lower = " ".join(first), " ".join(second)
    rounds, carry, total = [], 0, ""
    for left in reversed(range(len(first))):
        carry, digit = divmod(int(first[left]) + int(second[left]) + carry, 10)
        total = f"{digit} {total}".rstrip()
        if left:
            end = 2 * left - 1
            rounds.append(f"{upper[:end]} {_PLUS[carry]} {lower[:end]} = {total}")
    rounds.append(f"1 {total}" if carry else total)
    return rounds, rounds[-1]
